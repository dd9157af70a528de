"""Variants of the decoder and its statistics: a NumPy float64 reference, limits, traced numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.models import Decoder, count_params
from tests.models.decoders import (
  SMALL,
  TOKENS,
  apply,
  apply_with_statistics,
  equations,
  init,
  make,
  numpy_decoder,
)

PLAIN = {"qk_norm": "none", "depth": 1}


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"qk_norm": "model", "depth": 1},
    {"qk_norm": "rms", "attention_scale": "mup", "base_head_dim": 9, "depth": 1},
    {"qk_norm": "l2", "depth": 1},
    {**PLAIN, "attention_scale": "mup", "logit_soft_cap": 0.2, "output_soft_cap": 0.7},
    {**PLAIN, "attention": "squared_relu", "tied_embeddings": True},
    {**PLAIN, "attention": "squared_relu", "logit_soft_cap": 0.4},
    {**PLAIN, "position": "learned", "max_length": 9, "head_dim": 5, "kappa": 3.0},
  ],
  ids=str,
)
def test_forward_and_statistics_equal_the_formulas(changes):
  config = dataclasses.replace(SMALL, **({"head_dim": None} | changes))
  params, tokens = make(config)
  if config.qk_norm == "l2":
    params["params"]["block_0"]["attention"]["temperature"] = np.float32(3.0)
  expected, statistics = numpy_decoder(params, tokens, config)
  logits, state = apply_with_statistics(config, params, tokens)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, expected, atol=2e-5)
  for i in range(config.depth):
    block = state["intermediates"][f"block_{i}"]
    (found,), (rms,) = block["attention"]["attention_stats"], block["output_rms"]
    for name, value, wanted in zip(found._fields, found, statistics, strict=False):
      assert value.dtype == jnp.float32
      np.testing.assert_allclose(value, wanted[:, i], rtol=1e-4, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(rms, statistics[3][:, i], rtol=1e-5)


def test_statistics_are_left_out_unless_asked_for():
  params, tokens = make(SMALL)
  assert "intermediates" not in jax.eval_shape(Decoder(SMALL).init, jax.random.key(0), tokens)

  def primitives(apply):
    return [str(eqn.primitive) for eqn in equations(jax.make_jaxpr(apply)(params, tokens).jaxpr)]

  without = primitives(Decoder(SMALL).apply)
  sowing = primitives(functools.partial(Decoder(SMALL).apply, mutable=["intermediates"]))
  assert "log" not in without
  assert sowing.count("log") == SMALL.depth
  assert len(without) < len(sowing)


def test_statistics_do_not_change_the_gradient():
  config = dataclasses.replace(SMALL, depth=1)
  params, tokens = make(config)

  def loss(params, mutable):
    out = Decoder(config).apply(params, tokens, mutable=mutable)
    if not mutable:
      return jnp.square(out).mean()
    logits, state = out
    extra = sum(leaf.sum() for leaf in jax.tree.leaves(state))
    return jnp.square(logits).mean() + extra

  plain, extra = (
    jax.jit(jax.grad(functools.partial(loss, mutable=mutable)))(params)
    for mutable in (False, ["intermediates"])
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, extra)


def test_parameters_of_the_variants():
  def shapes(**changes):
    config = dataclasses.replace(SMALL, depth=1, **changes)
    tree = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
    return tree["params"], {k: v for k, v in tree["params"]["block_0"]["attention"].items()}

  tied, _ = shapes(tied_embeddings=True)
  assert "head" not in tied
  assert count_params(tied, exclude_embeddings=True) == count_params(tied) - 19 * 12
  learned, _ = shapes(position="learned", max_length=6)
  assert learned["position_embedding"].shape == (6, 12)
  assert count_params(learned, True) == count_params(tied, True)
  for qk_norm, size in (("per_head", 4), ("model", 12), ("rms", 4)):
    attention = shapes(qk_norm=qk_norm)[1]
    assert {k for k in attention if "norm" in k} == {"query_norm", "key_norm"}
    assert attention["key_norm"]["scale"].shape == (size,)
  assert set(shapes(qk_norm="l2")[1]) == {"query", "key", "value", "out", "temperature"}


def test_l2_starts_where_rms_does():
  config = dataclasses.replace(SMALL, qk_norm="l2", depth=1, attention_scale="mup", base_head_dim=9)
  params, _ = make(config)
  start = params["params"]["block_0"]["attention"]
  start["temperature"] = np.float32(3.0)
  rms = {name: start[name] for name in ("query", "key", "value", "out")}
  rms |= {name: {"scale": np.ones(4, np.float32)} for name in ("query_norm", "key_norm")}
  other = {**params["params"], "block_0": {**params["params"]["block_0"], "attention": rms}}
  np.testing.assert_allclose(
    apply(config, params, TOKENS),
    apply(dataclasses.replace(config, qk_norm="rms"), {"params": other}, TOKENS),
    atol=2e-5,
  )


def test_scale_of_the_logits():
  assert SMALL.head_dim == 4
  assert SMALL.logit_scale == 0.5
  mup = dataclasses.replace(SMALL, attention_scale="mup")
  assert mup.logit_scale == 0.25
  assert dataclasses.replace(mup, base_head_dim=4).logit_scale == SMALL.logit_scale


def test_initial_values_of_the_variants():
  config = dataclasses.replace(
    SMALL, depth=1, qk_norm="l2", attention_scale="mup", base_head_dim=9, zero_query_init=True
  )
  attention = init(config, jax.random.key(0))["params"]["block_0"]["attention"]
  assert attention.pop("temperature") == 3  # 4 sqrt(9) / 4
  np.testing.assert_array_equal(attention.pop("query"), 0)
  for name, kernel in attention.items():
    np.testing.assert_allclose(kernel.std(), 12**-0.5, rtol=0.3, err_msg=name)


def test_traced_caps_and_kappa():
  config = dataclasses.replace(SMALL, **PLAIN)
  params, tokens = make(config)

  def logits(kappa, cap, output_cap):
    changes = {"kappa": kappa, "logit_soft_cap": cap, "output_soft_cap": output_cap}
    return Decoder(dataclasses.replace(config, **changes)).apply(params, tokens)

  values = np.array([[0.5, 8.0], [1.0, 4.0], [0.5, 3.0]], np.float32)
  together = jax.jit(jax.vmap(logits))(*values)
  for i in range(2):
    kappa, cap, output_cap = map(float, values[:, i])
    single = dataclasses.replace(
      config, kappa=kappa, logit_soft_cap=cap, output_soft_cap=output_cap
    )
    np.testing.assert_allclose(together[i], numpy_decoder(params, tokens, single)[0], atol=2e-5)


@pytest.mark.parametrize("changes", [{"attention": "squared_relu"}, {"kappa": 4.0}], ids=str)
def test_variants_are_causal(changes):
  config = dataclasses.replace(SMALL, **PLAIN, **changes)
  params, tokens = make(config)
  changed = tokens.copy()
  changed[:, 4:] = (changed[:, 4:] + 1) % config.vocab_size
  before, after = apply(config, params, tokens), apply(config, params, changed)
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert np.abs(before - after)[:, 4:].max(-1).min() > 1e-4


def test_kappa_fixes_the_size_of_the_logits():
  config = dataclasses.replace(SMALL, **PLAIN, kappa=100.0)
  params, tokens = make(config)
  stats = apply_with_statistics(config, params, tokens)[1]["intermediates"]["block_0"]
  largest = np.asarray(stats["attention"]["attention_stats"][0].max_logit)
  # Of z = kappa sqrt(D) cosine, D = 4.
  assert largest.max() <= 200.001
  assert largest.min() > 50


def test_sequence_longer_than_learned_positions():
  config = dataclasses.replace(SMALL, position="learned", max_length=6, depth=1)
  with pytest.raises(ValueError, match="tokens has T = 7; learned positions end at 6"):
    jax.eval_shape(Decoder(config).init, jax.random.key(0), TOKENS)
