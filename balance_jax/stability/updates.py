"""Changes to an update, a step or a pair of kernels that keep training stable.

`param_rms` and `scale_by_param_rms` are Adafactor's relative step size, one of the interventions of
section 3.2 of Wortsman et al., "Small-scale proxies for large-scale Transformer training
instabilities", 2023 (arXiv 2309.14322). `skip_unstable_steps`, `qk_clip` and `soft_cap` are later
work.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balance_jax import _checks
from balance_jax.stability.health import tree_rms

# A history without spread would call the last digit of the next value a spike.
_LEAST_RELATIVE_STD = 1e-4


def param_rms(params, min_rms=1e-3) -> Any:
  """max(RMS(p), min_rms) of each tensor (Shazeer and Stern, 2018, arXiv 1804.04235).

  As `multipliers=param_rms` of an optimizer it scales the direction and leaves the decay alone.

  Args:
    params: pytree of floating arrays; an empty tensor has RMS 0.
    min_rms: > 0, so that tensors at zero can leave it; may be traced.

  Returns:
    Pytree of float32 (or float64) scalars.
  """
  _checks.check_number("min_rms", min_rms, low=0.0, open_low=True)
  return jax.tree.map(lambda rms: jnp.maximum(rms, min_rms), tree_rms(params))


def scale_by_param_rms(min_rms=1e-3) -> optax.GradientTransformation:
  """Multiplies the update of each tensor by max(RMS(p), min_rms).

  Behind an optimizer it scales the decay as well; see `param_rms` for the direction alone.

  Args:
    min_rms: > 0; may be traced.

  Returns:
    An optax transformation without state; its update needs params.
  """
  _checks.check_number("min_rms", min_rms, low=0.0, open_low=True)

  def update(updates, state, params=None):
    if params is None:
      raise ValueError("params is None; scale_by_param_rms needs them in update")
    scaled = jax.tree.map(
      lambda u, scale: (u * scale).astype(u.dtype), updates, param_rms(params, min_rms)
    )
    return scaled, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class SkipState(NamedTuple):
  """State of `skip_unstable_steps`.

  Attributes:
    inner: state of the wrapped optimizer.
    norms: float32 (window,), ring of global gradient norms.
    losses: float32 (window,), ring of losses; NaN where none was passed.
    recorded: int32, values recorded so far.
    skipped: int32, steps skipped so far.
  """

  inner: Any
  norms: jax.Array
  losses: jax.Array
  recorded: jax.Array
  skipped: jax.Array


def skip_unstable_steps(
  inner: optax.GradientTransformation, window: int = 128, n_std=6.0, min_history: int = 64
) -> optax.GradientTransformationExtraArgs:
  """Later work: leaves out a step whose gradient norm or loss is far above its recent history.

  A step is skipped, with a zero update and `inner` left as it was, if its global gradient norm or
  its loss is not finite, or exceeds mean + n_std * std of the recorded values, once at least
  `min_history` of them are there. The standard deviation (population form) is taken as at least
  1e-4 of the mean. Finite values are recorded even when their step is skipped: with accepted values
  alone, a lasting rise would be skipped for ever. So one spike raises the threshold for a window.

  Put it outside of gradient clipping, where it sees the raw norms.

  Source: the skip-step optimizers of OLMo-core and Levanter, which record every value, hold the
  last 128 and ask for 64; skipping values that are not finite, from the first step, is ours.

  Args:
    inner: the optimizer to wrap.
    window: length of the history, >= 2.
    n_std: standard deviations above the mean that make a spike, > 0; may be traced.
    min_history: recorded values before a step can count as a spike, in [2, window].

  Returns:
    An optax transformation with a `SkipState`. Its update takes the loss of the step as the extra
    argument `loss=` or `value=`, a scalar; without, gradient norms alone decide. `value` and other
    extra arguments are passed on to `inner`.

  >>> optimizer = skip_unstable_steps(optax.sgd(1.0), window=8, min_history=2)
  >>> state = optimizer.init(jnp.zeros(1))
  >>> for gradient in (1.0, 1.1, 1.0, 50.0):
  ...   update, state = optimizer.update(jnp.array([gradient]), state)
  >>> float(update[0]), int(state.skipped)
  (0.0, 1)
  """
  _checks.check_number("window", window, low=2, integer=True)
  _checks.check_number("min_history", min_history, low=2, high=window, integer=True)
  _checks.check_number("n_std", n_std, low=0.0, open_low=True)
  inner = optax.with_extra_args_support(inner)

  def init(params):
    empty = jnp.full((window,), jnp.nan, jnp.float32)
    zero = jnp.zeros([], jnp.int32)
    return SkipState(inner.init(params), empty, empty, zero, zero)

  def update(updates, state, params=None, *, loss=None, value=None, **extra):
    if value is not None:
      extra["value"] = value
    loss = value if loss is None else loss
    norm = _global_norm(updates)
    unstable = ~jnp.isfinite(norm) | _is_spike(norm, state.norms, n_std, min_history)
    usable = jnp.isfinite(norm)
    if loss is None:
      loss = jnp.nan
    else:
      _checks.check_shape("loss", loss, ())
      loss = jnp.asarray(loss, jnp.float32)
      unstable |= ~jnp.isfinite(loss) | _is_spike(loss, state.losses, n_std, min_history)
      usable &= jnp.isfinite(loss)

    new, new_inner = inner.update(updates, state.inner, params, **extra)
    here = state.recorded % window

    def record(ring, x):
      return jnp.where(usable, ring.at[here].set(x), ring)

    new_state = SkipState(
      jax.tree.map(lambda old, new: jnp.where(unstable, old, new), state.inner, new_inner),
      record(state.norms, norm),
      record(state.losses, loss),
      jnp.where(usable, state.recorded + 1, state.recorded),
      state.skipped + unstable.astype(jnp.int32),
    )
    return jax.tree.map(lambda u: jnp.where(unstable, jnp.zeros_like(u), u), new), new_state

  return optax.GradientTransformationExtraArgs(init, update)


def _global_norm(updates):
  squares = [jnp.sum(jnp.square(u.astype(jnp.float32))) for u in jax.tree.leaves(updates)]
  return jnp.sqrt(sum(squares, jnp.zeros([], jnp.float32)))


def _is_spike(x, history, n_std, min_history):
  known = jnp.isfinite(history)
  count = known.sum()
  values = jnp.where(known, history, 0.0)
  mean = values.sum() / jnp.maximum(count, 1)
  variance = jnp.where(known, jnp.square(values - mean), 0.0).sum() / jnp.maximum(count, 1)
  std = jnp.maximum(jnp.sqrt(variance), _LEAST_RELATIVE_STD * jnp.abs(mean))
  return (count >= min_history) & (x > mean + n_std * std)


def qk_clip(
  params, max_logits, tau=100.0, *, query: str = "query", key: str = "key", heads: int | None = None
) -> Any:
  """Later work: QK-Clip; shrinks query and key kernels of heads whose logits exceed tau.

  For each head g = min(1, tau / max_logit), W_q <- g^(1/2) W_q and W_k <- g^(1/2) W_k, on the
  columns of the head, after an optimizer step. Logits are bilinear in the two, so the same batch
  then has a maximum of at most tau, rotary positions included. With layer norm on queries and keys
  the kernels have no influence on the logits and the clip has none on the model.

  Source: MuonClip of Kimi K2, "Kimi K2: Open Agentic Intelligence", 2025 (arXiv 2507.20534).

  Args:
    params: pytree of nested mappings. An attention module is one that holds both names, each a
      kernel (d, H * head_dim) (`balance_jax.models.Decoder`), or a mapping of a "kernel" (d, H *
      head_dim) or (d, H, head_dim) and possibly a "bias" (H * head_dim,) or (H, head_dim) (flax).
    max_logits: largest attention logits of the step, taken from the parameters given. Either float
      (blocks, H), the modules in the order of their names with numbers counted as numbers; or
      a mapping from module names, such as "block_0/attention", with or without "params/" in front,
      to float (H,); modules that are not named stay as they are. May be traced.
    tau: > 0; may be traced.
    query: name of the query projection.
    key: name of the key projection.
    heads: H, if it should be checked.

  Returns:
    Like params. A maximum <= tau (negative ones included), NaN or infinity leaves the head alone.

  Raises:
    ValueError: no module found, an unknown module name, a shape that does not fit.

  >>> params = {"attention": {"query": jnp.ones((2, 4)), "key": jnp.ones((2, 4))}}
  >>> clipped = qk_clip(params, jnp.array([[400.0, 7.0]]))
  >>> [float(x) for x in clipped["attention"]["query"][0]]
  [0.5, 0.5, 1.0, 1.0]
  """
  _checks.check_number("tau", tau, low=0.0, open_low=True)
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  owners = [_projection_of(name, (query, key)) for name in names]
  modules = sorted(
    {m for m, q in filter(None, owners) if q == query}
    & {m for m, k in filter(None, owners) if k == key},
    key=_natural_order,
  )
  if not modules:
    raise ValueError(f"params holds no module with {query!r} and {key!r}; names: {names}")
  logits = _by_module(max_logits, modules, heads)

  clipped = []
  for name, owner, (_, leaf) in zip(names, owners, leaves, strict=True):
    if owner is not None and owner[0] in logits:
      leaf = _scale_heads(name, leaf, jnp.sqrt(_clip_factor(logits[owner[0]], tau)))
    clipped.append(leaf)
  return jax.tree.unflatten(structure, clipped)


def soft_cap(logits, cap) -> jax.Array:
  """Later work: cap * tanh(logits / cap), which keeps logits inside (-cap, cap).

  Masks come after it: it would turn -inf into -cap. Gemma 2 (arXiv 2408.00118) caps attention
  logits at 50 and output logits at 30.

  Args:
    logits: float (...).
    cap: > 0; may be traced. Large values leave the logits as they are.

  Returns:
    Like logits; computed in float32 or wider.

  >>> [round(float(x), 3) for x in soft_cap(jnp.array([0.0, 50.0, -1000.0]), 50.0)]
  [0.0, 38.08, -50.0]
  """
  _checks.check_number("cap", cap, low=0.0, open_low=True)
  logits = jnp.asarray(logits)
  wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  return (cap * jnp.tanh(wide / cap)).astype(logits.dtype)


def _projection_of(name: str, projections: tuple[str, str]) -> tuple[str, str] | None:
  """("block_0/attention", "query") of ".../query", ".../query/kernel" or ".../query/bias"."""
  parts = name.split("/")
  if parts[-1] in ("kernel", "bias"):
    parts = parts[:-1]
  return ("/".join(parts[:-1]), parts[-1]) if parts and parts[-1] in projections else None


def _natural_order(name: str) -> list:
  """Sort key by which block_10 comes after block_2."""
  # Digits stand at the odd places of the split, so numbers are compared with numbers only.
  parts = re.split(r"(\d+)", name)
  return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _by_module(max_logits, modules: list[str], heads: int | None) -> dict[str, jax.Array]:
  """float (H,) for each module that is to be clipped."""
  if not isinstance(max_logits, Mapping):
    max_logits = jnp.asarray(max_logits)
    _checks.check_shape("max_logits", max_logits, (len(modules), heads))
    return dict(zip(modules, max_logits, strict=True))
  short = {name.removeprefix("params/"): name for name in modules}
  named = {}
  for name, logits in max_logits.items():
    module = short.get(name.removeprefix("params/"))
    if module is None:
      raise ValueError(f"max_logits names {name!r}; modules of params: {', '.join(modules)}")
    _checks.check_shape(f"max_logits[{name!r}]", logits, (heads,))
    named[module] = jnp.asarray(logits)
  return named


def _clip_factor(max_logits, tau):
  clip = (max_logits > tau) & jnp.isfinite(max_logits)
  return jnp.where(clip, tau / jnp.where(clip, max_logits, 1.0), 1.0)


def _scale_heads(name: str, leaf, factors):
  leaf, heads = jnp.asarray(leaf), factors.shape[0]
  trailing = np.ndim(leaf) - (0 if name.endswith("/bias") else 1)
  if trailing == 2 and leaf.shape[-2] == heads:
    scale = factors[:, None]
  elif trailing == 1 and leaf.shape[-1] % heads == 0:
    scale = jnp.repeat(factors, leaf.shape[-1] // heads)
  else:
    raise ValueError(
      f"params[{name!r}] has shape {np.shape(leaf)}; expected {heads} heads (max_logits) in the "
      "last axis, or on the axis before it"
    )
  scale = scale.reshape((1,) * (np.ndim(leaf) - scale.ndim) + scale.shape)
  return (leaf * scale).astype(leaf.dtype)
