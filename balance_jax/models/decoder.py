"""The decoder-only Transformer of "Small-scale proxies" (Wortsman et al., 2023, arXiv 2309.14322).

Pre-LN blocks, a final layer norm before the head, GELU MLP, rotary positions, separate input and
output embeddings, no biases and no dropout. Options are the paper's interventions, layer norm on
queries and keys first (section 3.1.1), the remedy against the growth of attention logits, and what
is common elsewhere.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.models.attention import (
  ATTENTIONS,
  causal_attention,
  causal_attention_with_stats,
  rotary,
  rotary_tables,
)
from balance_jax.stability.updates import soft_cap

_EPS = 1e-6
ATTENTION_SCALES = ("mup", "sqrt")
POSITIONS = ("learned", "rotary")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and variants of a `Decoder`; frozen and hashable, so usable as a static argument.

  Attributes:
    vocab_size: number of tokens V, >= 1.
    width: model dimension d, >= 1.
    depth: number of blocks, >= 0; with none the next token is told from the last one alone.
    heads: attention heads a block, >= 1.
    head_dim: size of one head D, even with rotary positions; None means width // heads.
    mlp_ratio: hidden units of the MLP as a multiple of width, >= 1.
    qk_norm: what is done to queries and keys before they are rotated. "none"; "per_head": layer
      norm of each head's vector, one learnable scale (D,) shared by the heads; "model": layer norm
      over all heads at once, scale (heads * D,); "rms": division of each head's vector by its root
      mean square, scale (D,). Later work: "l2" (Henry et al., 2020, arXiv 2010.04245), vectors of
      length one, z = temperature * cosine with one learnable temperature a block. It starts at D
      times the attention scale, where "rms" starts as well: sqrt(D), or sqrt(base_head_dim).
    dtype: compute dtype, floating. Parameters are float32, and so are softmax, layer-norm
      statistics and logits (float64 only if dtype is float64).
    attention_scale: "sqrt", D ** -0.5; "mup", sqrt(base_head_dim) / D.
    base_head_dim: head size at which "mup" equals "sqrt", >= 1. 1 is the paper's 1 / D; Tensor
      Programs V takes the head size of the base model.
    attention: "softmax" or "squared_relu", relu(z)^2 / sqrt(T), T the length of the sequence.
    logit_soft_cap: c > 0 for attention logits c tanh(z / c); None is no cap. May be traced. Later
      work (Gemma 2, 2024, arXiv 2408.00118), where c is 50.
    output_soft_cap: the same for the model's logits; 30 in Gemma 2.
    tied_embeddings: the embedding is the head as well; there is no "head" parameter.
    position: "rotary", or "learned": one vector a position, added to the embedding.
    max_length: longest sequence of learned positions, required for them and used by them only.
    zero_query_init: query kernels start at zero, as in the paper's muParam (full).
    kappa: None, or the paper's transplant test: queries and keys become
      sqrt(kappa) x / rms(x) per head, so that z = kappa * sqrt(D) * cosine. > 0, may be traced
      (the config is then not hashable); with qk_norm "none" only.

  Raises:
    ValueError: a number outside of its range, an odd head size with rotary positions, heads not
      dividing width, an unknown variant, learned positions without max_length, kappa with a norm.
  """

  vocab_size: int
  width: int
  depth: int
  heads: int
  head_dim: int | None = None
  mlp_ratio: int = 4
  qk_norm: str = "none"
  dtype: Any = jnp.float32
  attention_scale: str = "sqrt"
  base_head_dim: int = 1
  attention: str = "softmax"
  logit_soft_cap: Any = None
  output_soft_cap: Any = None
  tied_embeddings: bool = False
  position: str = "rotary"
  max_length: int | None = None
  zero_query_init: bool = False
  kappa: Any = None

  def __post_init__(self):
    for name in ("vocab_size", "width", "heads", "mlp_ratio", "base_head_dim"):
      _checks.check_number(name, getattr(self, name), low=1, integer=True)
    _checks.check_number("depth", self.depth, low=0, integer=True)
    if self.head_dim is None:
      if self.width % self.heads:
        raise ValueError(
          f"width is {self.width}; expected a multiple of heads ({self.heads}), or give head_dim"
        )
      object.__setattr__(self, "head_dim", self.width // self.heads)
    _checks.check_number("head_dim", self.head_dim, low=1, integer=True)
    object.__setattr__(self, "dtype", _floating_dtype(self.dtype))
    self._check_variants()

  def _check_variants(self):
    _checks.check_choice("qk_norm", self.qk_norm, QK_NORMS)
    _checks.check_choice("attention_scale", self.attention_scale, ATTENTION_SCALES)
    _checks.check_choice("attention", self.attention, ATTENTIONS)
    _checks.check_choice("position", self.position, POSITIONS)
    for name in ("tied_embeddings", "zero_query_init"):
      if not isinstance(getattr(self, name), bool):
        raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False")
    for name in ("logit_soft_cap", "output_soft_cap", "kappa"):
      if getattr(self, name) is not None:
        _checks.check_number(name, getattr(self, name), low=0.0, open_low=True)
    if self.max_length is not None:
      _checks.check_number("max_length", self.max_length, low=1, integer=True)
    elif self.position == "learned":
      raise ValueError("max_length is None; expected a number with learned positions")
    if self.position == "rotary" and self.head_dim % 2:
      raise ValueError(f"head_dim is {self.head_dim}; expected an even number (rotary turns pairs)")
    if self.kappa is not None and self.qk_norm != "none":
      raise ValueError(
        f"kappa with qk_norm {self.qk_norm!r}; expected 'none' (kappa is a norm too)"
      )

  @property
  def logit_scale(self) -> float:
    """Factor on <q, k> in the attention logits; with "l2", what the temperature starts from."""
    if self.attention_scale == "mup":
      return self.base_head_dim**0.5 / self.head_dim
    return self.head_dim**-0.5


class Decoder(nn.Module):
  """Next-token logits of a causal Transformer.

  Called with tokens, int (B, T), each in [0, V), any integer dtype; returns logits, float32
  (B, T, V). `logits[:, t]` depends on `tokens[:, :t + 1]` only (with "squared_relu", whose weights
  are divided by sqrt(T), on T too).

  With "intermediates" mutable, every attention module sows "attention_stats", an `AttentionStats`
  of float32 (B, heads), and every block "output_rms", the root mean square of its output over
  positions and width, float32 (B,). Otherwise neither is computed.

  >>> model = Decoder(DecoderConfig(vocab_size=256, width=32, depth=1, heads=4))
  >>> tokens = jnp.zeros((2, 16), jnp.uint8)
  >>> params = jax.jit(model.init)(jax.random.key(0), tokens)
  >>> model.apply(params, tokens).shape
  (2, 16, 256)
  >>> _, state = model.apply(params, tokens, mutable=["intermediates"])
  >>> state["intermediates"]["block_0"]["attention"]["attention_stats"][0].max_logit.shape
  (2, 4)

  Raises:
    ValueError: tokens are not integers of rank 2 with T >= 1, or longer than learned positions.
  """

  config: DecoderConfig

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    config = self.config
    if tokens.ndim != 2 or tokens.shape[1] < 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(
        f"tokens is {tokens.dtype} with shape {tokens.shape}; expected integers (B, T), T >= 1"
      )
    embedding = self._table("embedding", config.vocab_size)
    x = jnp.take(embedding, tokens.astype(jnp.int32), axis=0).astype(config.dtype)
    wide = _at_least_float32(config.dtype)
    length, tables = tokens.shape[1], None
    if config.position == "rotary":
      tables = rotary_tables(length, config.head_dim, wide)
    elif length > config.max_length:
      raise ValueError(f"tokens has T = {length}; learned positions end at {config.max_length}")
    else:
      positions = self._table("position_embedding", config.max_length)
      x = x + positions[None, :length].astype(config.dtype)
    for i in range(config.depth):
      x = Block(config, name=f"block_{i}")(x, tables)
    x = LayerNorm(name="final_norm")(x)
    if config.tied_embeddings:
      kernel = embedding.T
    else:
      kernel = self.param("head", _kernel_init, (config.width, config.vocab_size), jnp.float32)
    logits = _project(x, kernel, wide)
    cap = config.output_soft_cap
    return logits if cap is None else soft_cap(logits, cap)

  def _table(self, name: str, rows: int) -> jax.Array:
    width = self.config.width
    return self.param(name, nn.initializers.normal(width**-0.5), (rows, width), jnp.float32)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); (B, T, d) to (B, T, d)."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, tables: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    x = x + Attention(self.config, name="attention")(LayerNorm(name="attention_norm")(x), tables)
    x = x + Mlp(self.config, name="mlp")(LayerNorm(name="mlp_norm")(x))
    if self.is_mutable_collection("intermediates"):
      wide = jax.lax.stop_gradient(x).astype(jnp.float32)
      self.sow("intermediates", "output_rms", jnp.sqrt(jnp.square(wide).mean((1, 2))))
    return x


class Attention(nn.Module):
  """Causal multi-head attention, with rotary positions if given; (B, T, d) to (B, T, d)."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, tables: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    config = self.config
    batch, length, width = x.shape
    inner = config.heads * config.head_dim
    inits = {"query": nn.initializers.zeros} if config.zero_query_init else {}
    query, key, value = (
      _project(x, self.param(name, inits.get(name, _kernel_init), (width, inner), jnp.float32))
      for name in ("query", "key", "value")
    )
    split = (batch, length, config.heads, config.head_dim)
    query, key, value = (a.reshape(split) for a in (query, key, value))
    # Before rotary: a per-channel scale after it would break the relative-position property.
    query, key = QK_NORMS[config.qk_norm](query, key)
    if config.kappa is not None:
      query, key = (_over_rms(a, jnp.sqrt(config.kappa)) for a in (query, key))
    scale = config.logit_scale
    if config.qk_norm == "l2":
      start = nn.initializers.constant(config.head_dim * scale)
      scale = self.param("temperature", start, (), jnp.float32)
    if tables is not None:
      query, key = rotary(query, tables), rotary(key, tables)
    options = {"scale": scale, "attention": config.attention, "soft_cap": config.logit_soft_cap}
    if self.is_mutable_collection("intermediates"):
      mixed, stats = causal_attention_with_stats(query, key, value, **options)
      self.sow("intermediates", "attention_stats", stats)
    else:
      mixed = causal_attention(query, key, value, **options)
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


class RmsNorm(nn.Module):
  """Division of the last axis by its root mean square, scaled; eps 1e-6, statistics in float32."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    return _over_rms(x, scale.reshape((1,) * (x.ndim - 1) + (-1,)))


def count_params(params: Any, exclude_embeddings: bool = False) -> int:
  """Number of parameters, as a Python int (no overflow).

  Args:
    params: what `Decoder.init` returns, or its "params" entry; arrays or ShapeDtypeStructs.
    exclude_embeddings: leave out "embedding", "position_embedding" and "head"; the paper's N.

  >>> model = Decoder(DecoderConfig(vocab_size=10, width=4, depth=1, heads=2))
  >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  >>> count_params(params, exclude_embeddings=True)  # 12 d^2 + 3 d
  204
  """
  params = dict(params.get("params", params))
  if exclude_embeddings:
    outer = ("embedding", "position_embedding", "head")
    params = {name: leaf for name, leaf in params.items() if name not in outer}
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _per_head_norm(query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  return LayerNorm(name="query_norm")(query), LayerNorm(name="key_norm")(key)


def _model_norm(query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  flat = _per_head_norm(*(x.reshape(*x.shape[:2], -1) for x in (query, key)))
  return tuple(x.reshape(query.shape) for x in flat)


def _rms_norm(query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  return RmsNorm(name="query_norm")(query), RmsNorm(name="key_norm")(key)


def _l2_norm(query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  return tuple(_over_rms(x, x.shape[-1] ** -0.5) for x in (query, key))


# Each entry maps (query, key), both (B, T, H, D), inside the Attention module.
QK_NORMS = {
  "none": lambda query, key: (query, key),
  "per_head": _per_head_norm,
  "model": _model_norm,
  "rms": _rms_norm,
  "l2": _l2_norm,
}


def _over_rms(x: jax.Array, factor: Any) -> jax.Array:
  wide = x.astype(_at_least_float32(x.dtype))
  normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + _EPS)
  return (normed * factor).astype(x.dtype)


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
