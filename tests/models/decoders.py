"""A small decoder with random parameters, and its formulas in NumPy."""

import functools

import jax
import numpy as np

from balance_jax.models import Decoder, DecoderConfig

SMALL = DecoderConfig(vocab_size=19, width=12, depth=2, heads=3, qk_norm="per_head")

TOKENS = np.arange(14).reshape(2, 7) % 19


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, tokens):
  return Decoder(config).apply(params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def apply_with_statistics(config, params, tokens):
  return Decoder(config).apply(params, tokens, mutable=["intermediates"])


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
  """The formulas in float64, one position and one head at a time.

  Returns logits, and statistics of the logits of attention and block outputs in the order
  (max, mean absolute, entropy, RMS), each (B, blocks, heads), RMS (B, blocks).
  """
  seen = []

  def norm(x, scale):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * scale

  def turn(x, position):
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for i in range(half):
      angle = position * 10_000.0 ** (-i / half)
      out[:, i] = x[:, i] * np.cos(angle) - x[:, i + half] * np.sin(angle)
      out[:, i + half] = x[:, i + half] * np.cos(angle) + x[:, i] * np.sin(angle)
    return out

  def over_rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

  def qk_norm(x, p, name):
    heads, size = config.heads, config.head_dim
    if config.qk_norm == "model":
      return norm(x, p[name]["scale"]).reshape(-1, heads, size)
    x = x.reshape(-1, heads, size)
    if config.qk_norm == "per_head":
      x = norm(x, p[name]["scale"])
    elif config.qk_norm == "rms":
      x = over_rms(x) * p[name]["scale"]
    elif config.qk_norm == "l2":
      x = x / np.sqrt((x**2).sum(-1, keepdims=True) + size * 1e-6)
    return x if config.kappa is None else np.sqrt(config.kappa) * over_rms(x)

  def attention(x, p):
    heads, size, length = config.heads, config.head_dim, len(x)
    q, k = (qk_norm(x @ p[name], p, f"{name}_norm") for name in ("query", "key"))
    v = (x @ p["value"]).reshape(length, heads, size)
    if config.position == "rotary":
      q, k = (np.array([turn(x[t], t) for t in range(length)]) for x in (q, k))
    scale = np.sqrt(config.base_head_dim) / size if config.attention_scale == "mup" else size**-0.5
    scale = p["temperature"] if config.qk_norm == "l2" else scale
    out = np.zeros((length, heads, size))
    for h in range(heads):
      for t in range(length):
        logits = scale * k[: t + 1, h] @ q[t, h]
        weights = weigh(logits, length)
        out[t, h] = weights @ v[: t + 1, h]
        seen.append((t, h, logits, weights))
    return out.reshape(length, -1) @ p["out"]

  def weigh(logits, length):
    if config.logit_soft_cap is not None:
      logits = config.logit_soft_cap * np.tanh(logits / config.logit_soft_cap)
    if config.attention == "squared_relu":
      return np.maximum(logits, 0) ** 2 / np.sqrt(length)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()

  def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
  rows, statistics = [], []
  for row in np.asarray(tokens):
    x = p["embedding"][row]
    if config.position == "learned":
      x = x + p["position_embedding"][: len(row)]
    statistics.append([])
    for i in range(config.depth):
      block = p[f"block_{i}"]
      seen.clear()
      x = x + attention(norm(x, block["attention_norm"]["scale"]), block["attention"])
      hidden = gelu(norm(x, block["mlp_norm"]["scale"]) @ block["mlp"]["up"])
      x = x + hidden @ block["mlp"]["down"]
      statistics[-1].append([*attention_statistics(seen, config), np.sqrt((x**2).mean())])
    head = p["embedding"].T if config.tied_embeddings else p["head"]
    logits = norm(x, p["final_norm"]["scale"]) @ head
    cap = config.output_soft_cap
    rows.append(logits if cap is None else cap * np.tanh(logits / cap))
  return np.stack(rows), [
    np.array([[block[i] for block in row] for row in statistics]) for i in range(4)
  ]


def attention_statistics(seen, config):
  def entropy(weights):
    p = weights[weights > 0] / max(weights.sum(), 1e-300)
    return -np.sum(p * np.log(p))

  of_head = [[entry[2:] for entry in seen if entry[1] == h] for h in range(config.heads)]
  logits = [np.concatenate([z for z, _ in entries]) for entries in of_head]
  return (
    [z.max() for z in logits],
    [np.abs(z).mean() for z in logits],
    [np.mean([entropy(weights) for _, weights in entries]) for entries in of_head],
  )


def equations(jaxpr):
  """The equations of a jaxpr and of what is nested in them."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from equations(inner)
