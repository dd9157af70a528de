"""The one reducer: a mean is a pair (numerator, denominator) that is divided once, at the end.

Pairs add: over micro-batches, over evaluation batches, over devices (`jax.lax.psum` works on the
pair, it is a pytree). Averaging averages instead is wrong whenever the parts weigh differently.
"""

import dataclasses

import jax
import jax.numpy as jnp

from balance_jax import _checks

NORMALIZE = ("count", "weights")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedMean:
  """A mean in the making: `num` and `den`, arrays of one shape; `+` merges two of them."""

  num: jax.Array
  den: jax.Array

  def mean(self) -> jax.Array:
    """num / den; 0 where den is 0 (nothing selected), with gradient 0."""
    empty = self.den == 0
    return jnp.where(empty, 0.0, self.num / jnp.where(empty, 1.0, self.den))

  def __add__(self, other: "WeightedMean") -> "WeightedMean":
    return WeightedMean(self.num + other.num, self.den + other.den)


def _prepare(values, weights, where, normalize):
  """Terms of the numerator and of the denominator, at least float32, of one shape."""
  _checks.check_choice("normalize", normalize, NORMALIZE)
  values = jnp.asarray(values)
  dtype = jnp.promote_types(values.dtype, jnp.float32)
  values = values.astype(dtype)
  for name, array in (("weights", weights), ("where", where)):
    if array is not None and jnp.shape(array) != values.shape:
      raise ValueError(f"{name} has shape {jnp.shape(array)}; expected {values.shape} as values")
  weights = jnp.ones_like(values) if weights is None else jnp.asarray(weights, dtype)
  if where is not None:
    where = jnp.asarray(where).astype(bool)
    # On the input side: a masked value may be NaN or infinite and must leave no trace.
    values = jnp.where(where, values, 0.0)
    weights = jnp.where(where, weights, 0.0)
  counted = jnp.ones_like(values) if where is None else where.astype(dtype)
  return weights * values, counted if normalize == "count" else weights


def weighted_mean(values, weights=None, where=None, normalize: str = "count") -> WeightedMean:
  """Sums `weights * values` and the denominator that fits the meaning of the weights.

  Args:
    values: float (...), one loss per example or token.
    weights: float (...) of the same shape, or None for ones.
    where: bool (...) of the same shape; False entries do not exist, whatever they hold.
    normalize: "count" divides by the number of valid entries: right for importance weights p / r,
      whose expectation is 1 (dividing by the sum of the batch's weights would bias the estimate).
      "weights" divides by the sum of the weights: for class weights and evaluation.

  Returns:
    `WeightedMean` of two scalars, float32 or wider.

  >>> losses, weights = jnp.array([1.0, 3.0]), jnp.array([0.5, 2.0])
  >>> float(weighted_mean(losses, weights).mean())
  3.25
  >>> round(float(weighted_mean(losses, weights, normalize="weights").mean()), 6)
  2.6
  """
  num, den = _prepare(values, weights, where, normalize)
  return WeightedMean(num.sum(), den.sum())


def group_weighted_mean(
  values, groups, num_groups: int, weights=None, where=None, normalize: str = "count"
) -> WeightedMean:
  """`weighted_mean` of every group at once.

  Args:
    values: float (B,).
    groups: int (B,), each in [0, num_groups).
    num_groups: K, static, >= 1.
    weights: float (B,) or None.
    where: bool (B,) or None.
    normalize: see `weighted_mean`.

  Returns:
    `WeightedMean` of two float (K,); a group without an entry has den 0 and mean 0.
  """
  num, den = _prepare(values, weights, where, normalize)
  _checks.check_shape("values", values, (None,))
  _checks.check_shape("groups", groups, jnp.shape(values))
  _checks.check_number("num_groups", num_groups, low=1, integer=True)
  # Masked sums instead of a scatter: deterministic, and fast for small K. A product with the
  # one-hot matrix would spread an infinite loss to all groups, and TPUs would round its factors.
  member = jnp.asarray(groups)[None, :] == jnp.arange(num_groups)[:, None]
  num, den = (jnp.where(member, x[None, :], 0.0).sum(axis=1) for x in (num, den))
  return WeightedMean(num, den)
