"""Decoder: architecture against a NumPy float64 reference, causality, initialisation, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.models import Decoder, DecoderConfig, count_params
from tests.models.decoders import SMALL, apply, init, make, numpy_decoder

# Kernels large enough to measure a standard deviation; "out" and "down" have fan-ins of their own.
WIDE = DecoderConfig(vocab_size=500, width=64, depth=1, heads=2, head_dim=48, mlp_ratio=3)


@pytest.mark.parametrize(
  "changes",
  [{}, {"qk_norm": "none"}, {"head_dim": 6, "mlp_ratio": 2}, {"depth": 1, "heads": 1}],
  ids=str,
)
def test_forward_equals_the_formulas(changes):
  config = dataclasses.replace(SMALL, **({"head_dim": None} | changes))
  params, tokens = make(config)
  logits = apply(config, params, tokens)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, numpy_decoder(params, tokens, config)[0], atol=2e-5)


def test_parameter_count_by_hand():
  v, d, depth, h, size, ratio = 19, 12, 2, 3, 4, 4
  params = jax.eval_shape(Decoder(SMALL).init, jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
  block = 4 * d * h * size + 2 * ratio * d * d + 2 * d + 2 * size
  assert count_params(params) == 2 * v * d + depth * block + d
  assert count_params(params, exclude_embeddings=True) == depth * block + d
  assert count_params(params["params"]) == count_params(params)


def test_count_params_does_not_overflow():
  shapes = {"embedding": jax.ShapeDtypeStruct((2**20, 2**13), jnp.float32)}
  assert count_params(shapes) == 2**33


@pytest.mark.parametrize("position", range(6))
def test_future_tokens_do_not_change_past_logits(position):
  params, tokens = make(SMALL)
  changed = tokens.copy()
  changed[:, position + 1 :] = (changed[:, position + 1 :] + 1) % SMALL.vocab_size
  before, after = apply(SMALL, params, tokens), apply(SMALL, params, changed)
  np.testing.assert_array_equal(before[:, : position + 1], after[:, : position + 1])
  assert np.abs(before - after)[:, position + 1 :].max(-1).min() > 1e-4


def test_every_past_token_is_seen():
  params, tokens = make(SMALL)
  changed = tokens.copy()
  changed[:, 0] = (changed[:, 0] + 1) % SMALL.vocab_size
  difference = np.abs(apply(SMALL, params, tokens) - apply(SMALL, params, changed)).max(-1)
  assert (difference > 1e-4).all()


def test_qk_norm_removes_the_scale_of_the_query():
  params, tokens = make(SMALL)
  scaled = jax.tree_util.tree_map_with_path(
    lambda path, leaf: 50.0 * leaf if path[-1].key == "query" else leaf, params
  )
  np.testing.assert_allclose(
    apply(SMALL, params, tokens), apply(SMALL, scaled, tokens), rtol=1e-3, atol=1e-3
  )
  without = dataclasses.replace(SMALL, qk_norm="none")
  assert np.abs(apply(without, params, tokens) - apply(without, scaled, tokens)).max() > 0.1


def test_initial_standard_deviations():
  params = init(WIDE, jax.random.key(1))["params"]
  attention, mlp = params["block_0"]["attention"], params["block_0"]["mlp"]
  fan_in = {"query": 64, "key": 64, "value": 64, "out": 96, "up": 64, "down": 192, "head": 64}
  leaves = {**{k: attention[k] for k in ("query", "key", "value", "out")}, **mlp}
  for name, leaf in {**leaves, "head": params["head"]}.items():
    std = fan_in[name] ** -0.5
    np.testing.assert_allclose(leaf.std(), std, rtol=0.05, err_msg=name)
    # Truncated at two sigma of the normal before truncation (0.8796 is what remains of its std).
    assert jnp.abs(leaf).max() <= 2 * std / 0.8796 + 1e-6, name
  np.testing.assert_allclose(params["embedding"].std(), 1 / 8, rtol=0.03)
  assert jnp.abs(params["embedding"]).max() > 3 / 8  # a normal, not truncated
  np.testing.assert_array_equal(params["block_0"]["mlp_norm"]["scale"], np.ones(64))


def test_bfloat16_is_close_and_keeps_float32_parameters():
  params, tokens = make(SMALL)
  low = dataclasses.replace(SMALL, dtype="bfloat16")
  initial = jax.eval_shape(Decoder(low).init, jax.random.key(0), tokens)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(initial))
  exact, rounded = apply(SMALL, params, tokens), apply(low, params, tokens)
  assert rounded.dtype == jnp.float32
  error = np.sqrt(np.square(exact - rounded).mean() / np.square(exact).mean())
  assert 1e-4 < error < 0.03  # eight bits are really used, and are enough


def test_vmap_over_initial_keys():
  keys = jax.random.split(jax.random.key(3), 2)
  stacked = jax.jit(jax.vmap(functools.partial(init, WIDE)))(keys)
  tokens = np.zeros((1, 3), np.int32)
  logits = jax.jit(jax.vmap(Decoder(WIDE).apply, in_axes=(0, None)))(stacked, tokens)
  assert np.abs(logits[0] - logits[1]).max() > 0.1
  for i, key in enumerate(keys):
    single = init(WIDE, key)
    jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), stacked, single)
    np.testing.assert_allclose(logits[i], apply(WIDE, single, tokens), atol=2e-5)


def test_jit_equals_eager():
  config = dataclasses.replace(SMALL, depth=1)
  params, tokens = make(config)
  eager = Decoder(config).apply(params, tokens)
  np.testing.assert_allclose(apply(config, params, tokens), eager, atol=1e-5)


def test_uint8_tokens_with_a_larger_vocabulary():
  config = dataclasses.replace(SMALL, vocab_size=300, depth=1)
  params, _ = make(config)
  tokens = np.array([[255, 0, 200]], np.uint8)
  expected, _ = numpy_decoder(params, tokens, config)
  np.testing.assert_allclose(apply(config, params, tokens), expected, atol=2e-5)
  np.testing.assert_array_equal(
    apply(config, params, tokens), apply(config, params, tokens.astype(np.int32))
  )


@pytest.mark.parametrize(
  "changes",
  [
    {"qk_norm": "per_head"},
    {"qk_norm": "l2", "logit_soft_cap": 0.5, "output_soft_cap": 0.8, "tied_embeddings": True},
    {"attention": "squared_relu", "kappa": 2.0, "position": "learned", "max_length": 5},
  ],
  ids=str,
)
def test_gradient_equals_finite_differences(changes):
  with jax.enable_x64(True):
    config = DecoderConfig(5, width=8, depth=1, heads=2, dtype="float64", **changes)
    params, tokens = make(config, length=5)
    params = jax.tree.map(lambda a: a.astype(np.float64), params)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
      log_probs = jax.nn.log_softmax(Decoder(config).apply(params, tokens[:, :-1]))
      return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()

    grads = loss(params)[1]
    leaves, tree = jax.tree.flatten(params)
    for i, grad in enumerate(jax.tree.leaves(grads)):
      direction = np.random.default_rng(i).normal(size=grad.shape)
      up, down = (
        loss(tree.unflatten([*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]]))[0]
        for step in (1e-6, -1e-6)
      )
      slope = np.sum(np.asarray(grad) * direction)
      np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"width": 0}, r"width is 0; allowed: \[1"),
    ({"depth": 2.0}, "depth is 2.0; expected an integer"),
    ({"mlp_ratio": True}, "mlp_ratio"),
    ({"head_dim": None, "heads": 5}, r"width is 12; expected a multiple of heads \(5\)"),
    ({"head_dim": 3}, "head_dim is 3; expected an even"),
    ({"head_dim": 0}, "head_dim is 0"),
    (
      {"qk_norm": "per-head"},
      "qk_norm is 'per-head'.*did you mean 'per_head'.*allowed: l2, model, none, per_head, rms",
    ),
    ({"attention_scale": "muP"}, "attention_scale is 'muP'.*allowed: mup, sqrt"),
    ({"attention": "relu"}, "attention is 'relu'.*allowed: softmax, squared_relu"),
    ({"position": "rotery"}, "position is 'rotery' .did you mean 'rotary'"),
    ({"position": "learned"}, "max_length is None; expected a number with learned positions"),
    ({"max_length": 0}, r"max_length is 0; allowed: \[1"),
    ({"base_head_dim": 0}, "base_head_dim is 0"),
    ({"logit_soft_cap": 0.0}, r"logit_soft_cap is 0.0; allowed: \(0"),
    ({"output_soft_cap": -1.0}, "output_soft_cap is -1.0"),
    ({"kappa": 0.0, "qk_norm": "none"}, "kappa is 0.0"),
    ({"kappa": 2.0}, "kappa with qk_norm 'per_head'; expected 'none'"),
    ({"tied_embeddings": 1}, "tied_embeddings is 1; expected True or False"),
    ({"zero_query_init": None}, "zero_query_init is None; expected True or False"),
    ({"dtype": "int32"}, "dtype is int32; expected a floating dtype"),
    ({"dtype": "floaty"}, "dtype is 'floaty'; expected the name"),
  ],
)
def test_bad_config(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
  "tokens",
  [np.zeros(3, np.int32), np.zeros((2, 3), np.float32), np.zeros((2, 0), np.int32)],
  ids=str,
)
def test_bad_tokens(tokens):
  with pytest.raises(ValueError, match=r"tokens is .* expected integers \(B, T\)"):
    jax.eval_shape(Decoder(SMALL).init, jax.random.key(0), tokens)


def test_config_is_hashable_with_canonical_dtype():
  by_name = dataclasses.replace(SMALL, dtype="bfloat16")
  by_type = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
  assert hash(by_name) == hash(by_type)
  assert by_name == by_type


def test_without_blocks_a_token_depends_on_the_last_one_alone():
  """Norm of the embedding times the head, in float64."""
  config = dataclasses.replace(SMALL, depth=0)
  model = Decoder(config)
  tokens = np.array([[1, 2, 3, 2]])
  params = jax.jit(model.init)(jax.random.key(0), tokens)
  tree = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
  x = tree["embedding"][tokens]
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  logits = model.apply(params, tokens)
  np.testing.assert_allclose(logits, x @ tree["head"], rtol=2e-5, atol=2e-6)
  np.testing.assert_array_equal(logits[0, 1], logits[0, 3])
