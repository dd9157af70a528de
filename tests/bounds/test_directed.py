"""Outward rounding: bounds of the float32 program that no tolerance is needed for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.bounds import Interval, crown, ibp, rounding
from tests.bounds import sampling

RNG = np.random.default_rng(0)
# Functions and where they are compared, within the normal range of float32.
FUNCTIONS = {
  "exp": (jnp.exp, -87, 88),
  "exp2": (jnp.exp2, -126, 127),
  "expm1": (jnp.expm1, -80, 88),
  "log": (jnp.log, 1e-30, 1e30),
  "log1p": (jnp.log1p, -1 + 1e-6, 1e6),
  "tanh": (jnp.tanh, -10, 10),
  "logistic": (jax.nn.sigmoid, -80, 80),
  "softplus": (jax.nn.softplus, -80, 80),
  "erf": (jax.lax.erf, -5, 5),
  "erfc": (jax.lax.erfc, -5, 8),
  "rsqrt": (jax.lax.rsqrt, 1e-20, 1e20),
  "sqrt": (jnp.sqrt, 1e-20, 1e20),
  "atan": (jnp.arctan, -1e3, 1e3),
  "asinh": (jnp.arcsinh, -1e3, 1e3),
}


# Their rules are made of those of others, as their error is not so many units of the result.
COMPOSED = ("exp2", "erfc")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_are_as_exact_as_assumed(name):
  """Half of `FUNCTION_ULPS` is for the network, half for the bound."""
  function, low, high = FUNCTIONS[name]
  x = RNG.uniform(low, high, 50000)
  if low > 0:
    x[::2] = np.exp(RNG.uniform(np.log(low), np.log(high), 25000))
  else:
    x[::2] = np.clip(RNG.normal(0, 1, 25000) * np.exp(RNG.normal(0, 3, 25000)), low, high)
  x = x.astype(np.float32)
  found = np.asarray(jax.jit(function)(x), np.float64)
  with jax.enable_x64(True):
    exact = np.asarray(jax.jit(function)(x.astype(np.float64)))
  error = np.abs(found - exact) / (np.abs(exact) * 2 * rounding.unit(np.float32) + 1e-38)
  if name not in COMPOSED:
    assert error.max() <= rounding.FUNCTION_ULPS / 2, (error.max(), x[error.argmax()])
  out = ibp(function, directed=True)(Interval(x, x))
  lower, upper = np.asarray(out.lower, np.float64), np.asarray(out.upper, np.float64)
  assert np.all(lower <= np.minimum(found, exact))
  assert np.all(upper >= np.maximum(found, exact))


def test_gamma_by_hand():
  unit = 2.0**-24
  assert rounding.unit(np.float32) == unit
  np.testing.assert_allclose(rounding.gamma(100, np.float32), 100 * unit / (1 - 100 * unit))
  assert rounding.gamma(2**24, np.float32) == np.inf


def test_sums_with_cancellation():
  """Large terms whose sum is 0: what is computed is off by what their size makes of a rounding."""
  big = (1e6 * RNG.normal(size=300)).astype(np.float32)
  x = RNG.normal(size=300).astype(np.float32)

  def fn(x):
    return jnp.sum(big * (x + 1)) - jnp.dot(big, x) - jnp.sum(big)

  computed = float(fn(x)), float(jax.jit(fn)(x))
  assert max(map(abs, computed)) > 0.1
  for bounds in (ibp, crown):
    out = bounds(fn, directed=True)(Interval(x, x))
    for value in (0.0, *computed):
      assert out.lower <= value <= out.upper


def test_deep_network_in_float32_and_float64():
  """Points of a thin box, where rounding is most of the width; both the ideal and computed net."""
  weights = (RNG.normal(size=(12, 20, 20)) / np.sqrt(10)).astype(np.float32)
  bias = RNG.normal(size=(12, 20)).astype(np.float32)

  def fn(x, weights):
    for i in range(12):
      x = (
        jnp.tanh(x @ weights[i])
        if i % 4 == 3
        else jax.nn.relu(jnp.add(*jnp.broadcast_arrays(x @ weights[i], bias[i])))
      )
    return x @ weights[0] * 100

  center = RNG.normal(size=20).astype(np.float32)
  box = Interval(center, np.nextafter(center, np.float32(9)))
  xs = sampling.points(box, 20000)
  low, high = jax.jit(lambda xs: sampling.extremes(lambda x: fn(x, weights), box, xs))(xs)
  with jax.enable_x64(True):
    ideal = jax.vmap(lambda x: fn(x, weights.astype(np.float64)))(xs[:500].astype(np.float64))
    ideal = np.asarray(ideal)
  for bounds in (ibp, crown):
    out = jax.jit(bounds(lambda x: fn(x, weights), directed=True))(box)
    sampling.assert_contains(out, low, high, 0.0)
    assert np.all(np.asarray(out.lower, float) <= ideal.min(0))
    assert np.all(np.asarray(out.upper, float) >= ideal.max(0))


def test_too_long_sums_have_no_bound():
  """A sum of n terms with n u >= 1 has no error bound; bfloat16 is there with 512 of them."""
  box = Interval(jnp.zeros(600, jnp.bfloat16), jnp.ones(600, jnp.bfloat16))
  out = ibp(lambda x: x @ jnp.ones(600, jnp.bfloat16), directed=True)(box)
  assert not np.isfinite(float(out.upper))
  assert np.isfinite(float(ibp(lambda x: x @ jnp.ones(600, jnp.bfloat16))(box).upper))
