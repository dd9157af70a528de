"""Lines lie on their side of the function over the whole interval, and touch it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.bounds import relaxations

RNG = np.random.default_rng(0)
LOWER = np.concatenate([RNG.normal(0, 2, 500), [-1.0, 0.0, 0.5, -2.0, -1e-7, 3.0]])
UPPER = LOWER + np.concatenate([RNG.exponential(1.5, 500), [1.0, 1.0, 0.0, 2.0, 2e-7, 1e-9]])
SHARES = np.linspace(0, 1, 201)[:, None]


def check(function, lines, lower, upper, tolerance=1e-12):
  lines = relaxations.Lines(*map(np.asarray, lines))
  x = lower + (upper - lower) * SHARES
  y = np.asarray(function(x))
  below = lines.lower_slope * x + lines.lower_offset
  above = lines.upper_slope * x + lines.upper_offset
  slack = tolerance * (1 + np.abs(y).max(0))
  assert np.all(below <= y + slack)
  assert np.all(above >= y - slack)
  return (y - below).min(0), (above - y).min(0)


@pytest.mark.parametrize("choice", ["adaptive", "same-slope", "zero", "one"])
def test_relu(choice):
  with jax.enable_x64(True):
    lines = relaxations.relu_lines(jnp.asarray(LOWER), jnp.asarray(UPPER), choice)
    check(jax.nn.relu, lines, LOWER, UPPER)
  stable = (LOWER >= 0) | (UPPER <= 0)
  np.testing.assert_array_equal(lines.lower_slope[stable], (LOWER[stable] >= 0))
  np.testing.assert_array_equal(lines.upper_offset[stable], 0)


def test_relu_by_hand():
  lines = relaxations.relu_lines(jnp.array([-1.0, -3.0]), jnp.array([3.0, 1.0]), "adaptive")
  np.testing.assert_allclose(lines.lower_slope, [1, 0])
  np.testing.assert_allclose(lines.upper_slope, [0.75, 0.25])
  np.testing.assert_allclose(lines.upper_offset, [0.75, 0.75])


def test_curves():
  """Convex, concave and S-shaped functions; the lines touch at a point of the grid or its end."""
  cases = [
    (relaxations.convex_lines, jnp.exp, LOWER, UPPER),
    (relaxations.convex_lines, jnp.square, LOWER, UPPER),
    (relaxations.convex_lines, jax.nn.softplus, LOWER, UPPER),
    (
      relaxations.concave_lines,
      jnp.log,
      np.abs(LOWER) + 0.01,
      np.abs(LOWER) + 0.01 + UPPER - LOWER,
    ),
    (relaxations.s_shaped_lines, jnp.tanh, LOWER, UPPER),
    (relaxations.s_shaped_lines, jax.nn.sigmoid, 3 * LOWER, 3 * UPPER),
    (relaxations.s_shaped_lines, jax.lax.erf, LOWER, UPPER),
    (relaxations.s_shaped_lines, jnp.arctan, LOWER, UPPER),
    (relaxations.s_shaped_lines, jnp.arcsinh, LOWER, UPPER),
  ]
  with jax.enable_x64(True):
    for make, function, lower, upper in cases:
      lines = make(function, jnp.asarray(lower), jnp.asarray(upper))
      gaps = check(function, lines, lower, upper, 1e-11)
      for gap in gaps:
        np.testing.assert_allclose(
          gap, 0, atol=1e-6 * (1 + np.abs(np.asarray(function(upper)))).max()
        )
