"""Lines below and above elementwise functions on an interval.

ReLU: Zhang et al., 2018 (arXiv 1811.00866). Convex functions lie above every tangent and below the
chord; for S-shaped functions, whose slope is least at one of the ends, f(x) - k x increases where k
is that slope. Every offset is taken at the ends for the slope as computed, so that a slope that is
off by rounding loosens the bound and does not break it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Lines(NamedTuple):
  """lower_slope x + lower_offset <= f(x) <= upper_slope x + upper_offset; arrays of x's shape."""

  lower_slope: jax.Array
  lower_offset: jax.Array
  upper_slope: jax.Array
  upper_offset: jax.Array


def relu_lines(lower, upper, choice: str) -> Lines:
  """Lines of max(x, 0).

  Args:
    lower: float (...).
    upper: float (...).
    choice: slope of the lower line of a unit that may be on or off: "adaptive" (1 where
      upper > -lower, else 0), "same-slope" (that of the upper line), "zero" or "one".
  """
  zero, one = jnp.zeros_like(lower), jnp.ones_like(lower)
  unstable = (lower < 0) & (upper > 0)
  stable = jnp.where(lower >= 0, one, zero)
  # The denominator is made safe first, so that the branch not taken has no NaN in its gradient.
  chord = jnp.where(unstable, upper / jnp.where(unstable, upper - lower, one), stable)
  slopes = {
    "adaptive": jnp.where(upper > -lower, one, zero),
    "same-slope": chord,
    "zero": zero,
    "one": one,
  }
  lower_slope = jnp.where(unstable, slopes[choice], stable)
  return Lines(lower_slope, zero, chord, jnp.where(unstable, -lower * chord, zero))


def constant_lines(lower, upper) -> Lines:
  """Lines without slope, from the interval of the result."""
  zero = jnp.zeros_like(lower)
  return Lines(zero, lower, zero, upper)


def derivative(function: Callable) -> Callable:
  """The derivative of an elementwise function."""
  return lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1]


def convex_lines(function: Callable, lower, upper, tangent_at=None) -> Lines:
  """Tangent below (at the middle by default) and chord above a convex function."""
  point = 0.5 * lower + 0.5 * upper if tangent_at is None else tangent_at
  slope = derivative(function)(point)
  below, above = function(lower), function(upper)
  width = upper - lower
  narrow = width <= 0
  chord = jnp.where(narrow, slope, (above - below) / jnp.where(narrow, 1, width))
  top = jnp.maximum(below - chord * lower, above - chord * upper)
  return Lines(slope, function(point) - slope * point, chord, top)


def concave_lines(function: Callable, lower, upper) -> Lines:
  """Chord below and tangent above a concave function."""
  mirrored = convex_lines(lambda x: -function(x), lower, upper)
  return Lines(
    -mirrored.upper_slope, -mirrored.upper_offset, -mirrored.lower_slope, -mirrored.lower_offset
  )


def s_shaped_lines(function: Callable, lower, upper) -> Lines:
  """Lines of an increasing function that is convex below 0 and concave above."""
  slope_at = derivative(function)
  slope = jnp.minimum(slope_at(lower), slope_at(upper))
  crossing = Lines(slope, function(lower) - slope * lower, slope, function(upper) - slope * upper)
  on_one_side = choose_lines(
    lower >= 0, concave_lines(function, lower, upper), convex_lines(function, lower, upper)
  )
  return choose_lines((lower < 0) & (upper > 0), crossing, on_one_side)


def choose_lines(condition, first: Lines, second: Lines) -> Lines:
  """`first` where the condition holds, else `second`."""
  return Lines(*(jnp.where(condition, a, b) for a, b in zip(first, second, strict=True)))
