"""Learning-rate sensitivity: how much a model loses when its learning rate is off.

Training runs that differ only in the peak learning rate give a curve of final losses. The
sensitivity is its mean height above its minimum over three decades, with the loss at initialisation
as the ceiling. It does not see the level of the curve: a model that is random at every learning
rate has sensitivity 0. Always look at the curve beside it.

Source: Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities",
2023 (arXiv 2309.14322), section 2.2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks

# Rounding a point of a log-uniform grid to two digits moves it by up to 5 %, and 3 in place of
# 10^0.5 by 5.4 %.
_GRID_TOLERANCE = 1.06
# Learning rates are compared after a trip through float32.
_SAME = 1e-5


def lr_grid(low: float = 3e-4, high: float = 3e-1, per_decade: int = 2) -> jax.Array:
  """Learning rates that are uniform in the logarithm up to rounding, both ends included.

  Two a decade have the mantissas 1 and 3 (the grid of the paper), one a decade the mantissa of
  `low`; other numbers are rounded to two significant digits.

  Args:
    low: smallest learning rate, > 0, on the grid.
    high: largest, > low, on the grid that starts at `low`.
    per_decade: points a decade, >= 1. None of the three may be traced.

  Returns:
    float32 (K,), strictly increasing, K >= 2.

  Raises:
    ValueError: bad ends, an end beside the grid, or points so dense that rounding merges them.

  >>> [f"{rate:g}" for rate in lr_grid()]
  ['0.0003', '0.001', '0.003', '0.01', '0.03', '0.1', '0.3']
  """
  for name, value in (("low", low), ("high", high), ("per_decade", per_decade)):
    _checks.check_known(name, value)
  _checks.check_number("low", low, low=0.0, high=np.finfo(np.float32).max, open_low=True)
  _checks.check_number("high", high, low=float(low), high=np.finfo(np.float32).max)
  _checks.check_number("per_decade", per_decade, low=1, integer=True)
  low, high = float(low), float(high)
  if _same(low, high):
    raise ValueError(f"high is {high:g}, the same as low; expected a grid of at least 2 points")
  points = _half_decades(low, high) if per_decade == 2 else _rounded_grid(low, high, per_decade)
  for name, wanted, found in (("low", low, points[0]), ("high", high, points[-1])):
    if not _same(wanted, found):
      raise ValueError(
        f"{name} is {wanted:g}, not on the grid with per_decade={per_decade}; "
        f"the nearest point there is {found:g}"
      )
  if len(set(points)) < len(points):
    raise ValueError(f"per_decade is {per_decade}; so dense that points agree to two digits")
  return jnp.asarray(np.array(points, np.float32))


def lr_sensitivity(
  final_losses, init_loss, where=None, *, learning_rates=None, window=None
) -> jax.Array:
  """Learning-rate sensitivity S = mean over the grid of min(loss, init_loss) - best loss.

  Every grid point has the same weight, so the grid has to be uniform in log learning rate; give
  `learning_rates` to have that checked. A loss that is NaN or infinite, of a run that diverged,
  counts as `init_loss`. The best loss is the minimum over finite losses, and at most `init_loss`,
  so that S >= 0 where no run learned anything.

  Args:
    final_losses: float (..., K), final validation loss for each of K >= 2 learning rates.
    init_loss: float (...) or (), loss at initialisation. Where it is not finite there is no
      ceiling: S is infinite if a run diverged.
    where: bool (..., K), optional; False leaves a point out of both the mean and the minimum.
    learning_rates: float (K,), optional, known on the host: increasing and log-uniform within 6 %.
    window: optional (low, high) in the unit of `learning_rates`; both must be points of the grid,
      and points outside are left out. The paper uses (3e-4, 3e-1).

  Returns:
    float32 (or float64) (...), in the unit of the loss, never NaN; 0 where all runs diverged or
    all points are masked.

  Raises:
    ValueError: K < 2, shapes that do not match, a grid that is uneven or not spanning the window.

  >>> round(float(lr_sensitivity(jnp.array([2.0, 1.0, 1.5, jnp.nan]), 4.0)), 4)
  1.125
  """
  losses, init_loss, where = _check_curve(final_losses, init_loss, where)
  if learning_rates is not None:
    where = where & jnp.broadcast_to(
      _in_window(learning_rates, window, where.shape[-1]), where.shape
    )
  elif window is not None:
    raise ValueError("window needs learning_rates, the grid it is to be found in")
  return _mean_excess(losses, init_loss, where)


def diverged_count(final_losses, where=None) -> jax.Array:
  """Number of runs of each curve whose final loss is NaN or infinite.

  Args:
    final_losses: float (..., K).
    where: bool (..., K), optional; False leaves a run out.

  Returns:
    int32 (...).

  >>> int(diverged_count(jnp.array([2.0, jnp.inf, jnp.nan])))
  2
  """
  losses = jnp.asarray(final_losses)
  if losses.ndim == 0:
    raise ValueError("final_losses has shape (); expected (..., K)")
  diverged = ~jnp.isfinite(losses) & _check_where(where, losses.shape)
  return diverged.sum(axis=-1, dtype=jnp.int32)


def lr_sensitivity_best_window(final_losses, init_loss, window: int = 7, where=None) -> jax.Array:
  """Smallest sensitivity over all runs of `window` consecutive learning rates.

  For comparing methods whose best learning rates lie apart: each is judged on the three decades
  that suit it. A window in which no run ended below `init_loss` would have sensitivity 0, so it
  takes no part; and with masked points only the windows with the most points present do.

  Args:
    final_losses: float (..., M), one loss per point of a log-uniform grid.
    init_loss: float (...) or ().
    window: points a window, in [2, M]; 7 half-decades are the paper's. Static.
    where: bool (..., M), optional; False marks a missing point.

  Returns:
    float32 (or float64) (...); 0 where no window takes part.

  >>> losses = jnp.array([3.0, 2.0, 1.0, 2.0, jnp.nan])
  >>> round(float(lr_sensitivity_best_window(losses, 4.0, window=3)), 4)
  0.6667
  """
  losses, init_loss, where = _check_curve(final_losses, init_loss, where)
  points = losses.shape[-1]
  _checks.check_known("window", window)
  _checks.check_number("window", window, low=2, high=points, integer=True)
  index = np.arange(points - window + 1)[:, None] + np.arange(window)
  return _smallest_window(losses, init_loss, where, index)


@jax.jit
def _mean_excess(losses, init_loss, where):
  """Sensitivity of checked curves; losses and where (..., K), init_loss (...)."""
  # A NaN or an infinity at initialisation is no ceiling.
  ceiling = jnp.where(jnp.isfinite(init_loss), init_loss, jnp.inf)[..., None]
  capped = jnp.where(jnp.isfinite(losses), jnp.minimum(losses, ceiling), ceiling)
  # Masked points must not be the minimum; without a ceiling it may be infinite.
  best = jnp.min(jnp.where(where, capped, jnp.inf), axis=-1, keepdims=True)
  excess = jnp.where(where & jnp.isfinite(best), capped - best, 0.0)
  return excess.sum(axis=-1) / jnp.maximum(where.sum(axis=-1), 1)


@jax.jit
def _smallest_window(losses, init_loss, where, index):
  """Smallest sensitivity over windows, the rows of index (W, K); losses and where (..., M)."""
  losses, where = losses[..., index], where[..., index]
  init_loss = jnp.broadcast_to(init_loss[..., None], losses.shape[:-1])
  values = _mean_excess(losses, init_loss, where)
  ceiling = jnp.where(jnp.isfinite(init_loss), init_loss, jnp.inf)[..., None]
  learned = jnp.any(where & jnp.isfinite(losses) & (losses < ceiling), axis=-1)
  present = jnp.where(learned, where.sum(axis=-1), 0)
  # Where nothing was learned in any window, all take part, and all are 0.
  takes_part = present == present.max(axis=-1, keepdims=True)
  return jnp.min(jnp.where(takes_part, values, jnp.inf), axis=-1)


def _check_curve(final_losses, init_loss, where):
  losses, init_loss = jnp.asarray(final_losses), jnp.asarray(init_loss)
  if losses.ndim == 0 or losses.shape[-1] < 2:
    raise ValueError(
      f"final_losses has shape {losses.shape}; expected (..., K) with K >= 2 learning rates"
    )
  dtype = jnp.promote_types(jnp.promote_types(losses.dtype, init_loss.dtype), jnp.float32)
  if init_loss.ndim:
    _checks.check_shape("init_loss", init_loss, losses.shape[:-1])
  init_loss = jnp.broadcast_to(init_loss.astype(dtype), losses.shape[:-1])
  return losses.astype(dtype), init_loss, _check_where(where, losses.shape)


def _check_where(where, shape):
  if where is None:
    return jnp.ones(shape, bool)
  where = jnp.asarray(where)
  _checks.check_shape("where", where, shape)
  if where.dtype != bool:
    raise ValueError(f"where has dtype {where.dtype}; expected bool")
  return where


def _in_window(learning_rates, window, points: int):
  """bool (K,) constant: which points of the checked grid lie in the window."""
  _checks.check_known("learning_rates", learning_rates)
  rates = _checks.check_sizes(learning_rates, "learning_rates")
  _checks.check_shape("learning_rates", rates, (points,))
  _check_log_uniform(rates)
  if window is None:
    return jnp.ones(points, bool)
  _checks.check_known("window", window)
  if np.shape(window) != (2,):
    raise ValueError(f"window is {window!r}; expected a pair (low, high)")
  low, high = (float(end) for end in window)
  if not 0 < low < high:
    raise ValueError(f"window is ({low:g}, {high:g}); expected 0 < low < high")
  for end in (low, high):
    if not np.any(np.isclose(rates, end, rtol=_SAME, atol=0.0)):
      raise ValueError(
        f"learning_rates from {rates[0]:g} to {rates[-1]:g} is a grid not spanning the window "
        f"({low:g}, {high:g}): {end:g} is no point of it"
      )
  return jnp.asarray((rates >= low * (1 - _SAME)) & (rates <= high * (1 + _SAME)))


def _check_log_uniform(rates: np.ndarray) -> None:
  if rates[0] <= 0 or np.any(np.diff(rates) <= 0):
    raise ValueError(f"learning_rates must be > 0 and increasing, got {rates.tolist()}")
  even = np.geomspace(rates[0], rates[-1], rates.size)
  off = np.exp(np.abs(np.log(rates / even)))
  worst = int(np.argmax(off))
  if off[worst] > _GRID_TOLERANCE:
    raise ValueError(
      f"learning_rates must be uniform in the logarithm within 6 %; {rates[worst]:g} at {worst} "
      f"should be near {even[worst]:.3g}"
    )


def _same(a: float, b: float) -> bool:
  return math.isclose(a, b, rel_tol=_SAME)


def _half_decades(low: float, high: float) -> list[float]:
  """Numbers 1eX and 3eX from the nearest one at `low` to the nearest one at `high`."""
  first, last = (math.floor(math.log10(end)) for end in (low, high))
  # Written as decimal text, so that 3e-4 is the float 3e-4.
  points = [float(f"{m}e{e}") for e in range(first - 1, last + 2) for m in (1, 3)]
  start, stop = (
    min(range(len(points)), key=lambda i: abs(math.log(points[i] / end))) for end in (low, high)
  )
  return points[start : stop + 1]


def _rounded_grid(low: float, high: float, per_decade: int) -> list[float]:
  count = max(1, round(per_decade * math.log10(high / low)))
  exact = [low * 10 ** (k / per_decade) for k in range(count + 1)]
  if per_decade == 1:  # powers of ten times any mantissa: nothing to round but the float itself
    return [float(f"{point:.12g}") for point in exact]
  return [float(f"{point:.1e}") for point in exact]
