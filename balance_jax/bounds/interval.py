"""A box: elementwise lower and upper ends of an array whose value is only known to lie between."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Interval:
  """All arrays x of one shape with `lower <= x <= upper`, elementwise.

  A pytree, so it passes through jit, vmap and grad. The constructor checks nothing, as JAX rebuilds
  pytrees around placeholders; `from_linf` and `check_interval` do.

  Attributes:
    lower: float (...).
    upper: float (...), of the same shape and dtype.

  >>> box = Interval.from_linf(jnp.array([0.0, 0.5]), 0.1)
  >>> box.lower.tolist(), round(float(box.radius[0]), 3)
  ([0.0, 0.4000000059604645], 0.05)
  """

  lower: jax.Array
  upper: jax.Array

  @classmethod
  def from_linf(cls, x, eps, lo=0.0, hi=1.0) -> "Interval":
    """The l_inf ball of radius `eps` around `x`, cut to the valid range [lo, hi].

    Args:
      x: float (...), each in [lo, hi].
      eps: radius, >= 0, a number or an array that broadcasts against x; may be traced.
      lo: lowest valid value, number or array that broadcasts against x; -inf for none.
      hi: highest valid value; inf for none.

    Returns:
      Interval of the shape of x.

    Raises:
      ValueError: eps < 0 or not finite, lo > hi, an entry of x outside [lo, hi] or not finite;
        values that are traced are not looked at.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"x has dtype {x.dtype}; expected floating point")
    _check_box(x, eps, lo, hi)
    eps, lo, hi = (jnp.asarray(value, x.dtype) for value in (eps, lo, hi))
    # Cut to the range on both sides: where x itself is outside, the box must not turn over.
    return cls(jnp.clip(x - eps, lo, hi), jnp.clip(x + eps, lo, hi))

  @property
  def center(self) -> jax.Array:
    """(lower + upper) / 2, float (...)."""
    return 0.5 * self.lower + 0.5 * self.upper

  @property
  def radius(self) -> jax.Array:
    """(upper - lower) / 2, float (...), >= 0."""
    return 0.5 * self.upper - 0.5 * self.lower

  @property
  def shape(self) -> tuple[int, ...]:
    return jnp.shape(self.lower)

  @property
  def dtype(self):
    return jnp.result_type(self.lower)


def check_interval(argument: str, interval: Interval) -> None:
  """Raises ValueError unless shapes and floating dtypes agree and known values are in order."""
  if jnp.shape(interval.lower) != jnp.shape(interval.upper):
    raise ValueError(
      f"{argument} has a lower end of shape {jnp.shape(interval.lower)} and an upper one of "
      f"{jnp.shape(interval.upper)}; expected one shape"
    )
  low, high = (jnp.result_type(end) for end in (interval.lower, interval.upper))
  if low != high or not jnp.issubdtype(low, jnp.floating):
    raise ValueError(
      f"{argument} has a lower end of dtype {low} and an upper one of {high}; expected one "
      "floating-point dtype"
    )
  if not _checks.is_concrete((interval.lower, interval.upper)):
    return
  lower, upper = np.asarray(interval.lower), np.asarray(interval.upper)
  if not (np.all(np.isfinite(lower)) and np.all(np.isfinite(upper))):
    raise ValueError(f"{argument} holds values that are not finite")
  if np.any(lower > upper):
    worst = np.unravel_index(np.argmax(lower - upper), lower.shape)
    raise ValueError(
      f"{argument} has lower {lower[worst]} > upper {upper[worst]} at {tuple(map(int, worst))}"
    )


def _check_box(x, eps, lo, hi) -> None:
  if _checks.is_concrete(eps):
    radius = np.asarray(eps)
    if not np.all(np.isfinite(radius)) or np.any(radius < 0):
      raise ValueError(f"eps is {eps}; allowed: finite and >= 0")
  if not _checks.is_concrete((x, lo, hi)):
    return
  values, low, high = np.asarray(x), np.asarray(lo), np.asarray(hi)
  if np.any(low > high):
    raise ValueError(f"lo is {lo} and hi is {hi}; expected lo <= hi")
  if not np.all(np.isfinite(values)):
    raise ValueError("x holds values that are not finite")
  if np.any(values < low) or np.any(values > high):
    raise ValueError(
      f"x has values in [{values.min():g}, {values.max():g}], outside the valid range "
      f"[{low.min():g}, {high.max():g}]; give lo and hi"
    )
