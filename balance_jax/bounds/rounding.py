"""Outward rounding: bounds that hold for what the computer computes, not only for real numbers.

A sum of n products in a floating-point format with unit roundoff u is off by at most
gamma_n = n u / (1 - n u) times the sum of the absolute products, in any order of summation (Higham,
Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). Bounds are moved outwards by
twice that: once for their own rounding and once for that of the network they speak about. The
network has to be evaluated at highest matrix precision too, by products that are summed: fast
convolution algorithms, such as Winograd's, do not keep to gamma_n.
"""

import jax.numpy as jnp

from balance_jax.bounds.interval import Interval

# Units in the last place that exp, tanh and their like may be off on any backend.
FUNCTION_ULPS = 16


def unit(dtype) -> float:
  """Unit roundoff u."""
  return float(jnp.finfo(dtype).eps) / 2


def gamma(terms: int, dtype) -> float:
  """gamma_n for n `terms`; infinite where n u >= 1."""
  product = terms * unit(dtype)
  return product / (1 - product) if product < 1 else float("inf")


def magnitude(interval: Interval):
  """The largest absolute value in the box, entry by entry."""
  return jnp.maximum(jnp.abs(interval.lower), jnp.abs(interval.upper))


def inflate(error, operations: int):
  """An error bound made a little larger, for its own rounding."""
  tiny = jnp.finfo(error.dtype).tiny
  return error * (1 + 2 * gamma(operations + 64, error.dtype)) + tiny


def down(value):
  """Below `value`, by the rounding of one subtraction and of taking this off."""
  return value - inflate(4 * unit(value.dtype) * jnp.abs(value), 1)


def widen(interval: Interval, below, above) -> Interval:
  """The interval with its ends moved outwards by these errors and by the rounding of doing so."""
  lower, upper = interval.lower, interval.upper
  below, above = (
    inflate(error, 1) + 2 * unit(interval.dtype) * jnp.abs(end)
    for error, end in ((below, lower), (above, upper))
  )
  return Interval(lower - below, upper + above)


def widen_function(interval: Interval) -> Interval:
  """As `widen`, for the values of an elementary function.

  With an error e |y| of a value y, y - e |y| increases in y: the ends' own sizes are what counts.
  """
  relative = FUNCTION_ULPS * 2 * unit(interval.dtype)
  return widen(interval, relative * jnp.abs(interval.lower), relative * jnp.abs(interval.upper))


def widen_lines(lines, interval: Interval, result: Interval):
  """Lines moved apart by the rounding of their own coefficients."""
  dtype = interval.dtype
  reach, value = magnitude(interval), magnitude(result)

  def error(slope, offset):
    size = jnp.abs(slope) * reach + jnp.abs(offset) + value
    return inflate(2 * FUNCTION_ULPS * unit(dtype) * size, 8)

  return lines._replace(
    lower_offset=lines.lower_offset - error(lines.lower_slope, lines.lower_offset),
    upper_offset=lines.upper_offset + error(lines.upper_slope, lines.upper_offset),
  )
