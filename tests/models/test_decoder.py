"""Decoder: architecture against a NumPy float64 reference, causality, initialisation, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.models import Decoder, DecoderConfig, count_params
from balance_jax.models.decoder import causal_attention, rotary, rotary_tables

SMALL = DecoderConfig(vocab_size=19, width=12, depth=2, heads=3, qk_norm="per_head")

# Kernels large enough to measure a standard deviation; "out" and "down" have fan-ins of their own.
WIDE = DecoderConfig(vocab_size=500, width=64, depth=1, heads=2, head_dim=48, mlp_ratio=3)


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, tokens):
  return Decoder(config).apply(params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def init(config, key):
  return Decoder(config).init(key, np.zeros((1, 2), np.int32))


def make(config, *, batch=2, length=7, seed=0):
  """Random parameters of the initial size, with layer-norm scales off one, and tokens."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, config.vocab_size, (batch, length), dtype=np.int32)
  shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)

  def draw(leaf):
    # All-one scales would hide a scale that is ignored or applied in the wrong place.
    mean, std = (0.0, leaf.shape[0] ** -0.5) if len(leaf.shape) > 1 else (1.0, 0.3)
    return rng.normal(mean, std, leaf.shape).astype(leaf.dtype)

  return jax.tree.map(draw, shapes), tokens


def numpy_decoder(params, tokens, config):
  """The formulas in float64, one position and one head at a time."""

  def norm(x, scale):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * scale

  def turn(x, position):
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
      angle = position * 10_000.0 ** (-i / half)
      out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
      out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out

  def attention(x, p):
    heads, size, length = config.heads, config.head_dim, len(x)
    q, k, v = ((x @ p[name]).reshape(length, heads, size) for name in ("query", "key", "value"))
    if config.qk_norm == "per_head":
      q, k = norm(q, p["query_norm"]["scale"]), norm(k, p["key_norm"]["scale"])
    out = np.zeros((length, heads, size))
    for h in range(heads):
      for t in range(length):
        scores = np.array([turn(q[t, h], t) @ turn(k[s, h], s) for s in range(t + 1)])
        weights = np.exp(scores / np.sqrt(size))
        out[t, h] = weights / weights.sum() @ v[: t + 1, h]
    return out.reshape(length, -1) @ p["out"]

  def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
  rows = []
  for row in np.asarray(tokens):
    x = p["embedding"][row]
    for i in range(config.depth):
      block = p[f"block_{i}"]
      x = x + attention(norm(x, block["attention_norm"]["scale"]), block["attention"])
      hidden = gelu(norm(x, block["mlp_norm"]["scale"]) @ block["mlp"]["up"])
      x = x + hidden @ block["mlp"]["down"]
    rows.append(norm(x, p["final_norm"]["scale"]) @ p["head"])
  return np.stack(rows)


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
  np.testing.assert_allclose(logits, numpy_decoder(params, tokens, config), atol=2e-5)


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


@pytest.mark.parametrize("length", [1, 3, 64, 129])
def test_causal_attention_at_every_length(length):
  # With one block of queries and with two, equal and unequal; the reference masks the full square.
  query, key, value = np.random.default_rng(0).normal(size=(3, 2, length, 2, 4)).astype("f4")
  scores = np.einsum("bqhd,bkhd->bhqk", query, key, dtype=np.float64) / 2
  weights = np.exp(scores) * np.tril(np.ones((length, length)))
  weights /= weights.sum(-1, keepdims=True)
  expected = np.einsum("bhqk,bkhd->bqhd", weights, value)
  result = jax.jit(causal_attention)(query, key, value)
  np.testing.assert_allclose(result, expected, atol=1e-5)


def test_attention_takes_huge_logits():
  value = np.random.default_rng(0).normal(size=(1, 5, 1, 2)).astype("f4")

  @jax.jit
  @jax.value_and_grad
  def total(scale):
    query = jnp.full(value.shape, scale)
    return causal_attention(query, query, jnp.asarray(value)).sum()

  assert np.isfinite(total(1e9)).all()


def test_rotary_depends_on_the_distance_only():
  x, y = jax.random.normal(jax.random.key(0), (2, 8))
  # The same vector at every position: entry (s, t) must depend on s - t alone.
  at_every_position = jnp.broadcast_to(jnp.stack([x, y])[:, None, None, :], (2, 10, 1, 8))
  turned = rotary(at_every_position, rotary_tables(10, 8, jnp.float32))
  products = np.asarray(jnp.einsum("sd,td->st", turned[0, :, 0], turned[1, :, 0]))
  np.testing.assert_allclose(products[1:, 1:], products[:-1, :-1], atol=1e-5)
  np.testing.assert_allclose(products[0, 0], x @ y, rtol=1e-6)
  assert np.abs(products[0, 0] - products[0, 1:]).min() > 1e-3
  np.testing.assert_allclose(
    jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(at_every_position, axis=-1), rtol=1e-6
  )


def test_rotary_by_hand():
  # D = 4: pairs (0, 2) and (1, 3); frequencies 1 and 1/100.
  x = jnp.broadcast_to(jnp.array([1.0, 1.0, 0.0, 0.0]), (1, 3, 1, 4))
  expected = [np.cos(2.0), np.cos(0.02), np.sin(2.0), np.sin(0.02)]
  np.testing.assert_allclose(
    rotary(x, rotary_tables(3, 4, jnp.float32))[0, 2, 0], expected, rtol=1e-6
  )


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
  expected = numpy_decoder(params, tokens, config)
  np.testing.assert_allclose(apply(config, params, tokens), expected, atol=2e-5)
  np.testing.assert_array_equal(
    apply(config, params, tokens), apply(config, params, tokens.astype(np.int32))
  )


def test_gradient_equals_finite_differences():
  with jax.enable_x64(True):
    config = DecoderConfig(5, width=8, depth=1, heads=2, qk_norm="per_head", dtype="float64")
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
        for step in (1e-5, -1e-5)
      )
      slope = np.sum(np.asarray(grad) * direction)
      np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-6, atol=1e-9)


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
      "qk_norm is 'per-head'.*did you mean 'per_head'.*allowed: none, per_head",
    ),
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
