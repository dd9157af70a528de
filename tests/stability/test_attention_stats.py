"""Attention statistics against a float64 reference, masks, memory, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.stability.attention import (
  AttentionStats,
  attention_stats,
  reduce_attention_stats,
)


def draw(length=7, keys=None, *, batch=2, heads=3, size=4, seed=0):
  rng = np.random.default_rng(seed)
  query = 3 * rng.normal(size=(batch, length, heads, size))
  key = rng.normal(size=(batch, keys or length, heads, size))
  return query.astype("f4"), key.astype("f4")


def reference(query, key, *, scale=None, causal=True, where=None, soft_cap=None):
  """The definitions in float64, one pair at a time."""
  query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
  batch, length, heads, size = query.shape
  scale = size**-0.5 if scale is None else scale
  largest, mean, entropy = np.zeros((3, batch, heads))
  for b in range(batch):
    for h in range(heads):
      logits, entropies = [], []
      for t in range(length):
        seen = [
          s
          for s in range(key.shape[1])
          if (s <= t or not causal) and (where is None or (where[b, t] and where[b, s]))
        ]
        if not seen:
          continue
        z = np.array([scale * query[b, t, h] @ key[b, s, h] for s in seen])
        logits.extend(z)
        capped = z if soft_cap is None else soft_cap * np.tanh(z / soft_cap)
        p = np.exp(capped - capped.max())
        p /= p.sum()
        entropies.append(-np.sum(p[p > 0] * np.log(p[p > 0])))
      if logits:
        largest[b, h], mean[b, h] = np.max(logits), np.mean(np.abs(logits))
        entropy[b, h] = np.mean(entropies)
  return AttentionStats(largest, mean, entropy)


def assert_close(result, expected, rtol=2e-6):
  for name, got, want in zip(AttentionStats._fields, result, expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol, err_msg=name)


HOLES = np.array([[0, 1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0, 1]], bool)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"causal": False},
    {"scale": -0.3},
    {"soft_cap": 1.5},
    {"where": HOLES},
    {"where": HOLES, "causal": False, "soft_cap": 2.0},
  ],
  ids=lambda options: ",".join(options) or "default",
)
def test_equals_the_definitions(options):
  query, key = draw()
  expected = reference(query, key, **options)
  for chunk in (1, 3, 128):  # 7 queries: one at a time, a last chunk of one, all at once
    stats = attention_stats(query, key, chunk=chunk, **options)
    assert all(x.shape == (2, 3) and x.dtype == jnp.float32 for x in stats)
    assert_close(stats, expected)


def test_more_keys_than_queries():
  query, key = draw(3, 5)
  expected = reference(query, key, causal=False)
  assert_close(attention_stats(query, key, causal=False, chunk=2), expected)


def test_equal_logits_have_the_largest_entropy():
  query, key = draw(6)
  stats = attention_stats(np.zeros_like(query), key)
  np.testing.assert_array_equal(stats.max_logit, 0)
  np.testing.assert_array_equal(stats.mean_abs_logit, 0)
  np.testing.assert_allclose(stats.entropy, np.log(np.arange(1, 7)).mean(), rtol=1e-6)
  whole = attention_stats(np.zeros_like(query), key, causal=False)
  np.testing.assert_allclose(whole.entropy, np.log(6), rtol=1e-6)


def test_entropy_of_collapsed_attention_is_zero():
  query, key = draw()
  stats = attention_stats(query, key, scale=1e6)
  np.testing.assert_allclose(stats.entropy, 0, atol=1e-6)
  assert (np.asarray(stats.max_logit) > 1e5).all()


def test_cap_changes_the_entropy_only():
  query, key = draw()
  plain, capped = attention_stats(query, key), attention_stats(query, key, soft_cap=0.1)
  np.testing.assert_array_equal(plain.max_logit, capped.max_logit)
  np.testing.assert_array_equal(plain.mean_abs_logit, capped.mean_abs_logit)
  assert (np.asarray(capped.entropy) > np.asarray(plain.entropy) + 0.1).all()


@pytest.mark.parametrize("causal", [True, False])
def test_masked_positions_are_as_if_absent(causal):
  query, key = draw(6)
  where = np.array([1, 0, 1, 1, 0, 0], bool)
  kept = attention_stats(query[:, where], key[:, where], causal=causal)
  # Not even NaN at masked positions shows.
  query[:, ~where], key[:, ~where] = np.nan, np.inf
  masked = attention_stats(query, key, causal=causal, where=np.broadcast_to(where, (2, 6)), chunk=4)
  assert_close(masked, kept, rtol=1e-6)


def test_example_without_any_position_has_zeros():
  query, key = draw(4)
  stats = attention_stats(-query, key, where=np.array([[False] * 4, [True] * 4]))
  for value, other in zip(stats, reference(-query, key), strict=True):
    np.testing.assert_array_equal(value[0], 0)
    np.testing.assert_allclose(value[1], other[1], rtol=2e-6)


def test_jit_and_vmap_with_traced_numbers():
  query, key = draw()

  def stats(query, scale, cap):
    return attention_stats(query, key, scale=scale, soft_cap=cap, chunk=3)

  queries = np.stack([query, 2 * query])
  scales, caps = np.array([0.2, 0.7], "f4"), np.array([1.0, 5.0], "f4")
  together = jax.jit(jax.vmap(stats))(queries, scales, caps)
  for i in range(2):
    single = reference(queries[i], key, scale=scales[i], soft_cap=caps[i])
    assert_close(jax.tree.map(lambda x, i=i: x[i], together), single)


def test_bfloat16_is_multiplied_in_float32():
  query, key = (jnp.asarray(x, jnp.bfloat16) for x in draw())
  assert_close(attention_stats(query, key), reference(query, key))


def test_no_gradient():
  query, key = draw(3)
  grads = jax.grad(lambda q, k: sum(x.sum() for x in attention_stats(q, k)), (0, 1))(query, key)
  jax.tree.map(lambda grad: np.testing.assert_array_equal(grad, 0), grads)


def test_square_of_the_length_is_never_formed():
  batch, length, heads, size = 1, 2048, 2, 8
  shape = jax.ShapeDtypeStruct((batch, length, heads, size), jnp.float32)
  square = batch * heads * length**2 * 4

  def used(**options):
    compiled = jax.jit(functools.partial(attention_stats, **options)).lower(shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert used() < square / 4
  assert used(chunk=32) < square / 12
  assert used(chunk=length) > square  # that is, the measurement sees a square


@pytest.mark.parametrize(
  ("query", "key", "options", "message"),
  [
    ((2, 3, 4), (2, 3, 4), {}, r"query has shape \(2, 3, 4\); expected \(any, any, any, any\)"),
    ((2, 3, 1, 4), (2, 3, 2, 4), {}, r"key has shape \(2, 3, 2, 4\); expected \(2, 3, 1, 4\)"),
    ((2, 3, 1, 4), (2, 5, 1, 4), {}, "key has shape"),
    ((2, 0, 1, 4), (2, 0, 1, 4), {}, "query has shape .* no empty axis"),
    ((2, 3, 1, 4), (2, 3, 1, 4), {"where": np.ones((2, 4), bool)}, r"where .* expected \(2, 3\)"),
    ((2, 3, 1, 4), (2, 3, 1, 4), {"where": np.ones((2, 3))}, "where has dtype float.* bool"),
    ((2, 3, 1, 4), (2, 3, 1, 4), {"soft_cap": 0.0}, r"soft_cap is 0.0; allowed: \(0"),
    ((2, 3, 1, 4), (2, 3, 1, 4), {"scale": np.ones(2)}, "scale has shape"),
    ((2, 3, 1, 4), (2, 3, 1, 4), {"chunk": 0}, "chunk is 0"),
    ((2, 3, 1, 4), (2, 3, 1, 4), {"chunk": 2.0}, "chunk is 2.0; expected an integer"),
  ],
)
def test_bad_input(query, key, options, message):
  with pytest.raises(ValueError, match=message):
    attention_stats(np.ones(query, "f4"), np.ones(key, "f4"), **options)


def test_integers_are_refused():
  ones = np.ones((1, 2, 1, 2), np.int32)
  with pytest.raises(ValueError, match="query has dtype int32; expected floating"):
    attention_stats(ones, ones)


def test_reduce_over_the_batch():
  stats = AttentionStats(*np.random.default_rng(0).normal(size=(3, 4, 2)).astype("f4"))
  where = np.array([True, False, True, False])
  for mask, rows in ((None, slice(None)), (where, where)):
    reduced = reduce_attention_stats(stats, mask)
    np.testing.assert_allclose(reduced.max_logit, stats.max_logit[rows].max(0), rtol=1e-6)
    np.testing.assert_allclose(reduced.mean_abs_logit, stats.mean_abs_logit[rows].mean(0), 1e-6)
    np.testing.assert_allclose(reduced.entropy, stats.entropy[rows].mean(0), rtol=1e-6)
  for value in reduce_attention_stats(stats, np.zeros(4, bool)):
    np.testing.assert_array_equal(value, np.zeros(2))


def test_reduce_refuses_other_shapes():
  stats = AttentionStats(np.ones((4, 2)), np.ones((4, 2)), np.ones((4, 3)))
  with pytest.raises(ValueError, match=r"stats.entropy has shape \(4, 3\); expected \(4, 2\)"):
    reduce_attention_stats(stats)
  stats = stats._replace(entropy=np.ones((4, 2)))
  with pytest.raises(ValueError, match=r"where has shape \(3,\); expected \(4\)"):
    reduce_attention_stats(stats, np.ones(3, bool))
