"""Statistics of attention logits, the early sign of attention collapse.

With z_ij = scale * <q_i, k_j>, training diverges after max z has grown: the softmax turns one-hot
and its entropy falls to zero. Source: Wortsman et al., "Small-scale proxies for large-scale
Transformer training instabilities", 2023 (arXiv 2309.14322), section 3.1.1. The entropy is that of
Zhai et al., 2023 (arXiv 2303.06296), which the paper cites.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.stability import updates


class AttentionStats(NamedTuple):
  """Per example and head, float32 (B, H); see `reduce_attention_stats` for a batch.

  Attributes:
    max_logit: largest logit z over visible pairs, before any soft cap.
    mean_abs_logit: mean of |z| over visible pairs, before any soft cap.
    entropy: mean over queries of the entropy of the attention weights, in nats, within
      [0, log T]; near 0 where attention has collapsed.
  """

  max_logit: jax.Array
  mean_abs_logit: jax.Array
  entropy: jax.Array


def attention_stats(
  query, key, *, scale=None, causal=True, where=None, soft_cap=None, chunk=128
) -> AttentionStats:
  """Largest logit, mean |logit| and entropy of the attention of queries to keys.

  Nothing of size T x T is formed: queries are taken `chunk` at a time. No gradient flows.

  Args:
    query: floating (B, T, H, D), normalised and rotated as the model does before the product.
    key: floating (B, S, H, D); S = T if `causal` or `where` is given.
    scale: factor on the inner products; None is D ** -0.5. May be traced.
    causal: a query sees keys at or before its own position only.
    where: bool (B, T), positions that count, as query and as key; None is all.
    soft_cap: c > 0 for a softmax of c tanh(z / c); None is no cap. May be traced.
    chunk: queries at a time, >= 1; memory is that of (B, H, chunk, S) floats.

  Returns:
    AttentionStats, each float32 (B, H). Queries that see no key do not count; an example without
    any visible pair has 0 everywhere.

  Raises:
    ValueError: a shape, dtype or number outside of the above.

  >>> query = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
  >>> stats = attention_stats(query, jnp.ones((1, 2, 1, 1)))  # z: 1; 3, 3
  >>> [round(float(value[0, 0]), 4) for value in stats]  # entropies: 0; log 2
  [3.0, 2.3333, 0.3466]
  """
  query, key = _check_arrays(query, key, causal, where)
  if scale is not None:
    _checks.check_number("scale", scale)
  if soft_cap is not None:
    _checks.check_number("soft_cap", soft_cap, low=0.0, open_low=True)
  _checks.check_number("chunk", chunk, low=1, integer=True)

  batch, length, heads, size = query.shape
  wide = jnp.promote_types(jnp.promote_types(query.dtype, key.dtype), jnp.float32)
  query, key = (jax.lax.stop_gradient(x).astype(wide).transpose(0, 2, 1, 3) for x in (query, key))
  query = query * (size**-0.5 if scale is None else jnp.asarray(scale, wide))
  chunk = min(chunk, length)
  padding = -length % chunk
  rows = jnp.ones((batch, length), bool) if where is None else jnp.asarray(where)
  seen = None if where is None else rows[:, None, None, :]
  rows = jnp.pad(rows, ((0, 0), (0, padding)))
  query = jnp.pad(query, ((0, 0), (0, 0), (0, padding), (0, 0)))

  def sums(chunk_of):
    query, rows, first = chunk_of
    visible = rows[:, None, :, None]
    if seen is not None:
      visible &= seen
    if causal:
      position = first + jnp.arange(chunk)
      visible &= (position[:, None] >= jnp.arange(key.shape[2])[None, :])[None, None]
    return _chunk_sums(query, key, visible, soft_cap)

  count = (length + padding) // chunk
  chunks = (
    jnp.moveaxis(query.reshape(batch, heads, count, chunk, size), 2, 0),
    jnp.moveaxis(rows.reshape(batch, count, chunk), 1, 0),
    chunk * jnp.arange(count),
  )
  largest, total_abs, total_entropy, pairs, queries = jax.lax.map(sums, chunks)
  # At least one: the sums of an example without a visible pair are 0, and so is its mean.
  pairs, queries = (jnp.maximum(x.sum(0), 1) for x in (pairs, queries))
  largest = largest.max(0)
  stats = AttentionStats(
    max_logit=jnp.where(jnp.isneginf(largest), 0.0, largest),
    mean_abs_logit=total_abs.sum(0) / pairs,
    entropy=total_entropy.sum(0) / queries,
  )
  return jax.tree.map(lambda x: x.astype(jnp.float32), stats)


def reduce_attention_stats(stats: AttentionStats, where=None) -> AttentionStats:
  """Over the batch: the largest logit is a maximum, the other two are means.

  Args:
    stats: AttentionStats of arrays (B, H).
    where: bool (B,), examples that count; None is all.

  Returns:
    AttentionStats of arrays (H,); 0 where no example counts.

  >>> stats = AttentionStats(*jnp.array([[[1.0], [5.0]], [[1.0], [3.0]], [[0.0], [1.0]]]))
  >>> [float(value[0]) for value in reduce_attention_stats(stats)]
  [5.0, 2.0, 0.5]
  """
  shape = jnp.shape(stats.max_logit)
  _checks.check_shape("stats.max_logit", stats.max_logit, (None, None))
  for name in ("mean_abs_logit", "entropy"):
    _checks.check_shape(f"stats.{name}", getattr(stats, name), shape)
  if where is None:
    where = jnp.ones(shape[:1], bool)
  _checks.check_shape("where", where, shape[:1])
  _check_bool("where", where)
  used = jnp.asarray(where)[:, None]
  count = jnp.maximum(used.sum(), 1)
  largest = jnp.where(used, stats.max_logit, -jnp.inf).max(0)
  return AttentionStats(
    jnp.where(used.any(), largest, 0.0),
    jnp.where(used, stats.mean_abs_logit, 0.0).sum(0) / count,
    jnp.where(used, stats.entropy, 0.0).sum(0) / count,
  )


def _chunk_sums(query, key, visible, soft_cap):
  """(max z, sum |z|, sum of entropies, visible pairs, queries that see a key) of some queries.

  query (B, H, Q, D) with the scale in it, key (B, H, S, D), visible broadcasting to (B, 1, Q, S);
  the first three results are (B, H), the other two (B, 1).
  """
  logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, precision=jax.lax.Precision.HIGHEST)
  visible = jnp.broadcast_to(visible, (*visible.shape[:2], *logits.shape[2:]))
  total_abs = jnp.where(visible, jnp.abs(logits), 0.0).sum((-2, -1))
  largest = jnp.where(visible, logits, -jnp.inf).max((-2, -1))
  scores = logits if soft_cap is None else updates.soft_cap(logits, soft_cap)
  peak = jnp.where(visible, scores, -jnp.inf).max(-1, keepdims=True)
  shifted = jnp.where(visible, scores - peak, 0.0)
  weights = jnp.where(visible, jnp.exp(shifted), 0.0)
  # The visible key of the largest score adds exp(0): below one only where there is none.
  total = jnp.maximum(weights.sum(-1), 1.0)
  entropy = jnp.log(total) - (weights * shifted).sum(-1) / total
  pairs = visible.sum((-2, -1), dtype=logits.dtype)
  return largest, total_abs, entropy.sum(-1), pairs, visible.any(-1).sum(-1, dtype=logits.dtype)


def _check_arrays(query, key, causal, where):
  query, key = jnp.asarray(query), jnp.asarray(key)
  for name, array in (("query", query), ("key", key)):
    _checks.check_shape(name, array, (None, None, None, None))
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} has dtype {array.dtype}; expected floating")
    if 0 in array.shape:
      raise ValueError(f"{name} has shape {array.shape}; expected no empty axis")
  batch, length, heads, size = query.shape
  # A mask and a causal order relate queries and keys position by position.
  keys = length if causal or where is not None else None
  _checks.check_shape("key", key, (batch, keys, heads, size))
  if where is not None:
    _checks.check_shape("where", where, (batch, length))
    _check_bool("where", where)
  return query, key


def _check_bool(name, array):
  dtype = jnp.result_type(array)
  if dtype != jnp.bool_:
    raise ValueError(f"{name} has dtype {dtype}; expected bool")
