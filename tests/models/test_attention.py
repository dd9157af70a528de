"""Causal attention and rotary positions against float64 references; long sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.models import attention as attention_module
from balance_jax.models.attention import (
  causal_attention,
  causal_attention_with_stats,
  rotary,
  rotary_tables,
)
from balance_jax.stability.attention import attention_stats
from tests.models.decoders import equations


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


def draw(length, batch=2, size=4):
  return np.random.default_rng(1).normal(size=(3, batch, length, 2, size)).astype("f4")


@pytest.fixture
def short_blocks(monkeypatch):
  """Sequences from 16 on count as long, in blocks of 4: 4 + 4 blocks and a rest of 3 of T = 35."""
  monkeypatch.setattr(attention_module, "_LONG_LENGTH", 16)
  monkeypatch.setattr(attention_module, "_CHUNK", 4)


@pytest.mark.parametrize(
  ("length", "options"),
  [(16, {}), (35, {}), (22, {"attention": "squared_relu", "soft_cap": 2.0})],
  ids=str,
)
def test_long_path_equals_the_short_one(length, options, monkeypatch):
  arrays = draw(length)

  def value(*arrays):
    mixed, stats = causal_attention_with_stats(*arrays, **options)
    return jnp.sin(mixed).sum(), (mixed, stats)

  def run():
    return jax.jit(jax.value_and_grad(lambda *a: value(*a), (0, 1, 2), has_aux=True))(*arrays)

  short = run()
  monkeypatch.setattr(attention_module, "_LONG_LENGTH", 16)
  monkeypatch.setattr(attention_module, "_CHUNK", 4)
  loops = str(jax.make_jaxpr(value)(*arrays)).count("scan[")
  assert loops == 2
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), short, run())


@pytest.mark.usefixtures("short_blocks")
def test_long_path_under_vmap():
  arrays = draw(18)
  together = jax.jit(jax.vmap(causal_attention, in_axes=(0, None, None)))(
    np.stack([arrays[0], -arrays[0]]), *arrays[1:]
  )
  for query, mixed in zip((arrays[0], -arrays[0]), together, strict=True):
    np.testing.assert_allclose(mixed, causal_attention(query, *arrays[1:]), atol=2e-6)


def test_long_sequences_never_form_the_square():
  length, heads = 2048, 2
  shapes = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)] * 3
  square = heads * length**2 * 4

  def used(attend):
    grad = jax.grad(lambda *arrays: jnp.square(attend(*arrays)).sum(), (0, 1, 2))
    return jax.jit(grad).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  assert used(causal_attention) < square / 3

  def with_stats(*arrays):
    mixed, stats = causal_attention_with_stats(*arrays)
    return mixed + stats.entropy.sum()

  assert used(with_stats) < square / 2


def test_short_sequences_form_the_square():
  # What the test above measures does see a square where there is one.
  shapes = [jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32)] * 3
  compiled = jax.jit(jax.grad(lambda *a: causal_attention(*a).sum())).lower(*shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes > 2 * 512**2 * 4


@pytest.mark.parametrize("length", [5, 70])
@pytest.mark.parametrize("soft_cap", [None, 0.7])
def test_statistics_equal_those_computed_apart(length, soft_cap):
  query, key, value = draw(length)
  run = jax.jit(causal_attention_with_stats, static_argnames="attention")
  mixed, stats = run(query, key, value, scale=1.3, soft_cap=soft_cap)
  expected = attention_stats(query, key, scale=1.3, soft_cap=soft_cap, chunk=16)
  for got, want in zip(stats, expected, strict=True):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-5)
  plain = causal_attention(query, key, value, scale=1.3, soft_cap=soft_cap)
  np.testing.assert_allclose(mixed, plain, atol=1e-6)


def test_squared_relu_by_hand():
  query, key = jnp.ones((1, 3, 1, 1)), jnp.array([2.0, -1.0, 4.0]).reshape(1, 3, 1, 1)
  value = jnp.array([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1)
  mixed, stats = causal_attention_with_stats(query, key, value, attention="squared_relu")
  # Weights 4; 4, 0; 4, 0, 16 over sqrt(3).
  expected = np.array([4.0, 4.0, 4.0 + 1600.0]) / np.sqrt(3)
  np.testing.assert_allclose(mixed.ravel(), expected, rtol=1e-6)
  assert stats.max_logit[0, 0] == 4
  np.testing.assert_allclose(stats.mean_abs_logit[0, 0], (2 + 2 + 1 + 2 + 1 + 4) / 6, rtol=1e-6)
  p = np.array([0.2, 0.8])
  np.testing.assert_allclose(stats.entropy[0, 0], -(p * np.log(p)).sum() / 3, rtol=1e-6)


def test_squared_relu_without_a_positive_logit():
  query = jnp.ones((1, 3, 1, 2))

  @functools.partial(jax.value_and_grad, has_aux=True)
  def total(query):
    mixed, stats = causal_attention_with_stats(query, -query, query, attention="squared_relu")
    return mixed.sum(), stats

  (value, stats), grad = total(query)
  assert value == 0
  assert stats.entropy == 0
  assert np.isfinite(grad).all()


def test_scale_in_bfloat16_keeps_the_dtype():
  query, key, value = jnp.asarray(draw(6), jnp.bfloat16)
  attend = functools.partial(causal_attention, scale=jnp.float32(0.3))
  mixed = attend(query, key, value)
  assert mixed.dtype == jnp.bfloat16
  products = [
    equation
    for equation in equations(jax.make_jaxpr(attend)(query, key, value).jaxpr)
    if str(equation.primitive) == "dot_general"
  ]
  assert len(products) == 2
  for equation in products:
    assert all(operand.aval.dtype == jnp.bfloat16 for operand in equation.invars)
  exact = causal_attention(*draw(6), scale=0.3)
  np.testing.assert_allclose(mixed.astype(jnp.float32), exact, atol=0.03)


def test_unknown_attention():
  with pytest.raises(ValueError, match=r"attention is 'softmx' .did you mean 'softmax'"):
    causal_attention(*draw(3), attention="softmx")
