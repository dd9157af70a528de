"""The decoder-only Transformer of "Small-scale proxies" (Wortsman et al., 2023, arXiv 2309.14322).

Pre-LN blocks, a final layer norm before the head, GELU MLP, rotary positions, separate input and
output embeddings, no biases and no dropout. Optionally layer norm on queries and keys (section
3.1.1 of the paper), the remedy against the growth of attention logits.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks

_EPS = 1e-6
_ROTARY_BASE = 10_000.0
# Sequences from this length on are attended in two halves of queries, see `causal_attention`.
_SPLIT_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and variants of a `Decoder`; frozen and hashable, so usable as a static argument.

  Attributes:
    vocab_size: number of tokens V, >= 1.
    width: model dimension d, >= 1.
    depth: number of blocks, >= 1.
    heads: attention heads a block, >= 1.
    head_dim: size of one head, even (rotary turns pairs); None means width // heads.
    mlp_ratio: hidden units of the MLP as a multiple of width, >= 1.
    qk_norm: "none", or "per_head": layer norm of each head's query and key, with one learnable
      scale (head_dim,) shared by the heads.
    dtype: compute dtype, floating. Parameters are float32, and so are softmax, layer-norm
      statistics and logits (float64 only if dtype is float64).

  Raises:
    ValueError: a size below 1, an odd head size, heads not dividing width, an unknown variant.
  """

  vocab_size: int
  width: int
  depth: int
  heads: int
  head_dim: int | None = None
  mlp_ratio: int = 4
  qk_norm: str = "none"
  dtype: Any = jnp.float32

  def __post_init__(self):
    for name in ("vocab_size", "width", "depth", "heads", "mlp_ratio"):
      _checks.check_number(name, getattr(self, name), low=1, integer=True)
    if self.head_dim is None:
      if self.width % self.heads:
        raise ValueError(
          f"width is {self.width}; expected a multiple of heads ({self.heads}), or give head_dim"
        )
      object.__setattr__(self, "head_dim", self.width // self.heads)
    _checks.check_number("head_dim", self.head_dim, low=1, integer=True)
    if self.head_dim % 2:
      raise ValueError(f"head_dim is {self.head_dim}; expected an even number (rotary turns pairs)")
    _checks.check_choice("qk_norm", self.qk_norm, QK_NORMS)
    object.__setattr__(self, "dtype", _floating_dtype(self.dtype))


class Decoder(nn.Module):
  """Next-token logits of a causal Transformer.

  Called with tokens, int (B, T), each in [0, V), any integer dtype; returns logits, float32
  (B, T, V). `logits[:, t]` depends on `tokens[:, :t + 1]` only.

  >>> model = Decoder(DecoderConfig(vocab_size=256, width=32, depth=1, heads=4))
  >>> tokens = jnp.zeros((2, 16), jnp.uint8)
  >>> params = jax.jit(model.init)(jax.random.key(0), tokens)
  >>> model.apply(params, tokens).shape
  (2, 16, 256)

  Raises:
    ValueError: tokens are not integers of rank 2 with T >= 1.
  """

  config: DecoderConfig

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    config = self.config
    if tokens.ndim != 2 or tokens.shape[1] < 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(
        f"tokens is {tokens.dtype} with shape {tokens.shape}; expected integers (B, T), T >= 1"
      )
    embedding = self.param(
      "embedding",
      nn.initializers.normal(config.width**-0.5),
      (config.vocab_size, config.width),
      jnp.float32,
    )
    x = jnp.take(embedding, tokens.astype(jnp.int32), axis=0).astype(config.dtype)
    tables = rotary_tables(tokens.shape[1], config.head_dim, _at_least_float32(config.dtype))
    for i in range(config.depth):
      x = Block(config, name=f"block_{i}")(x, tables)
    x = LayerNorm(name="final_norm")(x)
    kernel = self.param("head", _kernel_init, (config.width, config.vocab_size), jnp.float32)
    return _project(x, kernel, _at_least_float32(config.dtype))


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); (B, T, d) to (B, T, d)."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    x = x + Attention(self.config, name="attention")(LayerNorm(name="attention_norm")(x), tables)
    return x + Mlp(self.config, name="mlp")(LayerNorm(name="mlp_norm")(x))


class Attention(nn.Module):
  """Causal multi-head attention with rotary positions; (B, T, d) to (B, T, d)."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    config = self.config
    batch, length, width = x.shape
    inner = config.heads * config.head_dim
    query, key, value = (
      _project(x, self.param(name, _kernel_init, (width, inner), jnp.float32))
      for name in ("query", "key", "value")
    )
    split = (batch, length, config.heads, config.head_dim)
    query, key, value = (a.reshape(split) for a in (query, key, value))
    query, key = QK_NORMS[config.qk_norm](query, key)
    mixed = causal_attention(rotary(query, tables), rotary(key, tables), value)
    out = self.param("out", _kernel_init, (inner, width), jnp.float32)
    return _project(mixed.reshape(batch, length, inner), out)


class Mlp(nn.Module):
  """Two matrices with a GELU (tanh form) between them; (B, T, d) to (B, T, d)."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width, hidden = self.config.width, self.config.mlp_ratio * self.config.width
    up = self.param("up", _kernel_init, (width, hidden), jnp.float32)
    down = self.param("down", _kernel_init, (hidden, width), jnp.float32)
    return _project(jax.nn.gelu(_project(x, up), approximate=True), down)


class LayerNorm(nn.Module):
  """Layer norm over the last axis: centred, scaled, no bias, eps 1e-6, statistics in float32."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    wide = x.astype(_at_least_float32(x.dtype))
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _EPS)
    return (normed * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


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


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(D)) v over keys at or before the query; softmax in float32.

  Args:
    query: floating (B, T, H, D).
    key: like query.
    value: like query.

  Returns:
    (B, T, H, D), dtype of value.
  """
  length = query.shape[1]
  query = query * query.shape[-1] ** -0.5
  query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
  # The first half of the queries sees the first half of the keys only, which leaves out a quarter
  # of the scores. Smaller blocks save less than they cost in small operations.
  block = length if length < _SPLIT_LENGTH else -(-length // 2)
  mixed = [
    _attend(query[:, :, start : start + block], *(x[:, :, : start + block] for x in (key, value)))
    for start in range(0, length, block)
  ]
  return jnp.concatenate(mixed, axis=2).transpose(0, 2, 1, 3)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Attention of the last Q of K positions; query (B, H, Q, D), key and value (B, H, K, D)."""
  scores = jnp.einsum(
    "bhqd,bhkd->bhqk", query, key, preferred_element_type=_at_least_float32(query.dtype)
  )
  queries, keys = scores.shape[-2:]
  visible = jnp.arange(queries)[:, None] + (keys - queries) >= jnp.arange(keys)[None, :]
  scores = jnp.where(visible[None, None], scores, -jnp.inf)
  # The softmax, divided after the product with the values, where there is less to divide; autodiff
  # then also forms its row sums from (B, H, Q, D). The maximum cancels, hence no gradient.
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
  total = weights.sum(-1, keepdims=True)
  mixed = jnp.einsum(
    "bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=scores.dtype
  )
  return (mixed / total).astype(value.dtype)


def count_params(params: Any, exclude_embeddings: bool = False) -> int:
  """Number of parameters, as a Python int (no overflow).

  Args:
    params: what `Decoder.init` returns, or its "params" entry; arrays or ShapeDtypeStructs.
    exclude_embeddings: leave out "embedding" and "head"; the paper's N.

  >>> model = Decoder(DecoderConfig(vocab_size=10, width=4, depth=1, heads=2))
  >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  >>> count_params(params, exclude_embeddings=True)  # 12 d^2 + 3 d
  204
  """
  params = dict(params.get("params", params))
  if exclude_embeddings:
    params = {name: leaf for name, leaf in params.items() if name not in ("embedding", "head")}
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _per_head_norm(query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  # Before rotary: a per-channel scale after it would break the relative-position property.
  return LayerNorm(name="query_norm")(query), LayerNorm(name="key_norm")(key)


# Each entry maps (query, key), both (B, T, H, D), inside the Attention module.
QK_NORMS = {"none": lambda query, key: (query, key), "per_head": _per_head_norm}

# Flax corrects the standard deviation for the truncation at two sigma.
_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def _at_least_float32(dtype: Any) -> jnp.dtype:
  return jnp.promote_types(dtype, jnp.float32)


def _project(x: jax.Array, kernel: jax.Array, dtype: Any = None) -> jax.Array:
  """x (..., d) times kernel (d, f), in the dtype of x; the result in `dtype` if given."""
  # One matrix product of rank two: with more axes XLA transposes the operands of the kernel's
  # gradient in memory, which cost a third of a train step on a CPU.
  rows = x.reshape(-1, x.shape[-1])
  result = jnp.dot(rows, kernel.astype(x.dtype), preferred_element_type=dtype)
  return result.reshape(*x.shape[:-1], kernel.shape[-1])


def _floating_dtype(dtype: Any) -> jnp.dtype:
  try:
    dtype = jnp.dtype(dtype)
  except TypeError:
    raise ValueError(f"dtype is {dtype!r}; expected the name of a floating dtype") from None
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype is {dtype}; expected a floating dtype")
  return dtype
