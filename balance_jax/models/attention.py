"""Causal attention and rotary positions, as functions of arrays.

Attention is the softmax or a squared ReLU, with which Wortsman et al., 2023 (arXiv 2309.14322) show
that the growth of logits does not come from the softmax; statistics of the logits on request.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax.stability import updates
from balance_jax.stability.attention import AttentionStats

_ROTARY_BASE = 10_000.0
# Sequences from this length on are attended in two halves of queries, see `causal_attention`.
_SPLIT_LENGTH = 64
# From this length on, a T x T array is never formed: blocks of _CHUNK queries, one after another.
_LONG_LENGTH = 1024
_CHUNK = 128


def rotary_tables(length: int, head_dim: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of the angles t * 10000^(-2i/D) (Su et al., 2021, arXiv 2104.09864).

  Args:
    length: T, >= 1.
    head_dim: D, even.
    dtype: of the tables, float32 or float64.

  Returns:
    Two constants (T, D / 2).
  """
  # In NumPy: formed in the program they were formed in every step, at 8 % of its time on a CPU.
  half = head_dim // 2
  angle = np.arange(length)[:, None] * _ROTARY_BASE ** (-np.arange(half) / half)
  return jnp.asarray(np.cos(angle), dtype), jnp.asarray(np.sin(angle), dtype)


def rotary(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns the pair (x[i], x[i + D/2]) at position t by the angle of the tables.

  Inner products of turned queries and keys depend on positions only through their difference.

  Args:
    x: floating (B, T, H, D); position is the index on axis 1.
    tables: `rotary_tables(T, D, dtype)`.

  Returns:
    Same shape and dtype; norms of pairs are kept.
  """
  cos, sin = (table[None, :, None, None, :] for table in tables)
  sign = jnp.array([-1.0, 1.0], sin.dtype).reshape(2, 1)
  # The two halves of a head on an axis of their own: swapping them is then a reversal.
  halves = x.astype(cos.dtype).reshape(*x.shape[:-1], 2, -1)
  turned = halves * cos + jnp.flip(halves, -2) * (sin * sign[None, None, None])
  return turned.reshape(x.shape).astype(x.dtype)


def causal_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  scale: Any = None,
  attention: str = "softmax",
  soft_cap: Any = None,
) -> jax.Array:
  """Attention to the keys at or before the query; logits and weights in float32.

  With z = scale * q k^T over visible pairs: "softmax" is softmax(z) v; "squared_relu" is
  relu(z)^2 v / sqrt(T), T the length of the sequence and not the number of visible keys. Sequences
  of 1024 and more are attended 128 queries at a time, and again in the backward pass, so that
  memory grows with T and not with T^2.

  Args:
    query: floating (B, T, H, D).
    key: like query.
    value: like query.
    scale: None is D ** -0.5. May be traced.
    attention: "softmax" or "squared_relu".
    soft_cap: c > 0 replaces z by c tanh(z / c); None is no cap. May be traced. Later work (Gemma 2,
      2024, arXiv 2408.00118).

  Returns:
    (B, T, H, D), dtype of value.

  >>> value = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
  >>> causal_attention(jnp.zeros((1, 2, 1, 1)), value, value).ravel().tolist()
  [1.0, 2.0]
  """
  return _causal(query, key, value, scale, attention, soft_cap, with_stats=False)[0]


def causal_attention_with_stats(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  scale: Any = None,
  attention: str = "softmax",
  soft_cap: Any = None,
) -> tuple[jax.Array, AttentionStats]:
  """`causal_attention` and the statistics of its logits, from the logits it forms anyway.

  Args are those of `causal_attention`.

  Returns:
    (mixed (B, T, H, D), AttentionStats of float32 (B, H)). The entropy is that of the weights
    divided by their sum, 0 for a query whose weights are all 0. No gradient through statistics.
  """
  return _causal(query, key, value, scale, attention, soft_cap, with_stats=True)


def _causal(query, key, value, scale, attention, soft_cap, with_stats):
  _checks.check_choice("attention", attention, ATTENTIONS)
  length = query.shape[1]
  query = _scaled(query, query.shape[-1] ** -0.5 if scale is None else scale)
  query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
  attend = functools.partial(
    _attend,
    weigh=functools.partial(ATTENTIONS[attention], length=length),
    soft_cap=soft_cap,
    with_stats=with_stats,
  )
  if length >= _LONG_LENGTH:
    parts = _attend_long(attend, query, key, value)
  else:
    # The first half of the queries sees the first half of the keys only, which leaves out a quarter
    # of the scores. Smaller blocks save less than they cost in small operations.
    block = length if length < _SPLIT_LENGTH else -(-length // 2)
    parts = [
      attend(
        query[:, :, start : start + block], *(x[:, :, : start + block] for x in (key, value)), start
      )
      for start in range(0, length, block)
    ]
  mixed, sums = zip(*parts, strict=True)
  mixed = jnp.concatenate(mixed, axis=2).transpose(0, 2, 1, 3)
  return mixed, _merge(sums, length) if with_stats else None


def _attend_long(attend: Callable, query, key, value):
  """Blocks of _CHUNK queries in turn, each formed again for its gradient; see `_attend`."""
  length = query.shape[2]
  whole = length - length % _CHUNK
  middle = whole // 2 // _CHUNK * _CHUNK
  parts = []
  # Halves for the reason given in `_causal`.
  for start, stop in ((0, middle), (middle, whole)):
    chunks = query[:, :, start:stop].reshape(*query.shape[:2], -1, _CHUNK, query.shape[3])
    keys, values = (x[:, :, :stop] for x in (key, value))
    # The loop itself keeps XLA from merging the two computations of a block.
    block = jax.checkpoint(attend, prevent_cse=False)
    mixed, sums = jax.lax.map(
      lambda args, keys=keys, values=values, block=block: block(args[0], keys, values, args[1]),
      (jnp.moveaxis(chunks, 2, 0), start + _CHUNK * jnp.arange(chunks.shape[2])),
    )
    mixed = jnp.moveaxis(mixed, 0, 2).reshape(*query.shape[:2], stop - start, -1)
    parts.append(
      (mixed, None if sums is None else (sums[0].max(0), sums[1].sum(0), sums[2].sum(0)))
    )
  if whole < length:
    parts.append(jax.checkpoint(attend)(query[:, :, whole:], key, value, whole))
  return parts


def _attend(query, key, value, first, *, weigh, soft_cap, with_stats):
  """Attention of the queries (B, H, Q, D) at `first` and on; key and value (B, H, K, D).

  Returns:
    (mixed (B, H, Q, D), sums for `_merge` or None).
  """
  logits = jnp.einsum(
    "bhqd,bhkd->bhqk", query, key, preferred_element_type=_at_least_float32(query.dtype)
  )
  queries, keys = logits.shape[-2:]
  visible = jnp.arange(queries)[:, None] + first >= jnp.arange(keys)[None, :]
  visible = visible[None, None]
  scores = logits if soft_cap is None else updates.soft_cap(logits, soft_cap)
  weights, log_weights, divisor = weigh(scores, visible)
  mixed = jnp.einsum(
    "bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=logits.dtype
  )
  mixed = (mixed / divisor).astype(value.dtype)
  return mixed, _sums(logits, visible, weights, log_weights) if with_stats else None


def _softmax(scores, visible, *, length):
  """(weights, their logarithm, what to divide the mixed values by)."""
  del length
  scores = jnp.where(visible, scores, -jnp.inf)
  # The softmax, divided after the product with the values, where there is less to divide; autodiff
  # then also forms its row sums from (B, H, Q, D). The maximum cancels, hence no gradient.
  log_weights = scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(log_weights)
  return weights, log_weights, weights.sum(-1, keepdims=True)


def _squared_relu(scores, visible, *, length):
  positive = jnp.where(visible, jnp.maximum(scores, 0.0), 0.0)
  return jnp.square(positive), 2 * jnp.log(jax.lax.stop_gradient(positive)), length**0.5


ATTENTIONS = {"softmax": _softmax, "squared_relu": _squared_relu}


def _sums(logits, visible, weights, log_weights):
  """(max z, sum |z|, sum over queries of the entropy), each (B, H), without gradient."""
  logits, weights, log_weights = map(jax.lax.stop_gradient, (logits, weights, log_weights))
  # By rows first: XLA then shares it with the maximum of the softmax.
  largest = jnp.where(visible, logits, -jnp.inf).max(-1).max(-1)
  total_abs = jnp.where(visible, jnp.abs(logits), 0.0).sum((-2, -1))
  total = weights.sum(-1)
  moment = jnp.where(weights > 0, weights * log_weights, 0.0).sum(-1)
  safe = jnp.where(total > 0, total, 1.0)
  return largest, total_abs, (jnp.log(safe) - moment / safe).sum(-1)


def _merge(sums, length) -> AttentionStats:
  largest, total_abs, total_entropy = zip(*sums, strict=True)
  stats = AttentionStats(
    max_logit=functools.reduce(jnp.maximum, largest),
    mean_abs_logit=sum(total_abs) / (length * (length + 1) / 2),
    entropy=sum(total_entropy) / length,
  )
  return jax.tree.map(lambda x: x.astype(jnp.float32), stats)


def _scaled(x, factor):
  if isinstance(factor, float | int):
    return x * factor
  # A float32 factor must neither widen a bfloat16 x nor be rounded to it.
  return (x.astype(_at_least_float32(x.dtype)) * factor).astype(x.dtype)


def _at_least_float32(dtype: Any) -> jnp.dtype:
  return jnp.promote_types(dtype, jnp.float32)
