import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.bounds import Interval, ibp

RNG = np.random.default_rng(0)


# The references: float64 NumPy, from the formulas.
def affine(low, high, matrix, bias):
  center, radius = (low + high) / 2, (high - low) / 2
  middle, reach = center @ matrix + bias, radius @ np.abs(matrix)
  return middle - reach, middle + reach


def convolution_matrix(kernel, height, width):
  """(height * width * in, height * width * out) of a 3 x 3 kernel with zeros around the image."""
  rows, columns, inputs, outputs = kernel.shape
  matrix = np.zeros((height, width, inputs, height, width, outputs))
  for y, x, i, j in np.ndindex(height, width, rows, columns):
    source = y + i - rows // 2, x + j - columns // 2
    if 0 <= source[0] < height and 0 <= source[1] < width:
      matrix[source[0], source[1], :, y, x, :] = kernel[i, j]
  return matrix.reshape(height * width * inputs, height * width * outputs)


def relu(ends):
  return tuple(np.maximum(end, 0) for end in ends)


def absolute(low, high):
  ends = np.abs(low), np.abs(high)
  least = np.where((low <= 0) & (high >= 0), 0, np.minimum(*ends))
  return least, np.maximum(*ends)


def product(x, y):
  corners = [a * b for a in x for b in y]
  return np.minimum.reduce(corners), np.maximum.reduce(corners)


def agree(found, expected, rtol=1e-12):
  np.testing.assert_allclose(found.lower, expected[0], rtol=rtol, atol=1e-13)
  np.testing.assert_allclose(found.upper, expected[1], rtol=rtol, atol=1e-13)


def test_by_hand():
  box = Interval(jnp.array([-1.0, 0.0]), jnp.array([1.0, 2.0]))
  # x0 - x1 in [-3, 1], its relu in [0, 1]; x0 + 2 x1 - 1 in [-2, 4], its relu in [0, 4].
  matrix, bias = jnp.array([[1.0, 1.0], [-1.0, 2.0]]), jnp.array([0.0, -1.0])
  out, relus = ibp(lambda x: jax.nn.relu(x @ matrix + bias), record_relus=True)(box)
  assert (out.lower.tolist(), out.upper.tolist()) == ([0, 0], [1, 4])
  (before,) = relus
  assert (before.lower.tolist(), before.upper.tolist()) == ([-3, -2], [1, 4])


def test_residual_network_equals_reference():
  """Convolution, BN of fixed statistics, relu, residual sum, pooling, dense."""
  kernels = RNG.normal(size=(2, 3, 3, 2, 2)) / 3
  mean, variance, scale, shift = RNG.normal(size=2), np.array([0.5, 2.0]), RNG.normal(size=2), 0.1
  dense, bias = RNG.normal(size=(8, 3)), RNG.normal(size=3)

  def convolve(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

  def network(x):
    h = convolve(x[None], kernels[0])
    h = jax.nn.relu(
      (h - mean[None, None, None]) * (scale / np.sqrt(variance))[None, None, None] + shift
    )
    h = jax.nn.relu(convolve(h, kernels[1]) + h)
    h = jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    return h.reshape(-1) @ dense + bias

  x = RNG.normal(size=(4, 4, 2))
  with jax.enable_x64(True):
    found = jax.jit(ibp(network))(Interval(x - 0.1, x + 0.1))
  low, high = (x - 0.1).reshape(-1), (x + 0.1).reshape(-1)
  first, second = (convolution_matrix(kernel, 4, 4) for kernel in kernels)
  factor = np.tile(scale / np.sqrt(variance), 16)
  ends = affine(low, high, first, 0)
  ends = relu(affine(*ends, np.diag(factor), shift - np.tile(mean, 16) * factor))
  mixed = affine(*ends, second, 0)
  ends = relu((mixed[0] + ends[0], mixed[1] + ends[1]))
  pooled = [end.reshape(2, 2, 2, 2, 2).mean((1, 3)).reshape(-1) for end in ends]
  agree(found, affine(*pooled, dense, bias))


def test_nonlinear_operations_equal_references():
  low = RNG.normal(size=(2, 6))
  box = Interval(low, low + RNG.uniform(0.01, 2, size=low.shape))

  def network(x):
    return jnp.abs(x), jnp.square(x[0]), x[0] * x[1], jnp.max(x.reshape(2, 2, 3), -1), x[0] - x[1]

  with jax.enable_x64(True):
    absolutes, squares, products, maxima, gaps = jax.jit(ibp(network))(box)
  low, high = box.lower, box.upper
  agree(absolutes, absolute(low, high))
  agree(squares, tuple(end**2 for end in absolute(low[0], high[0])))
  agree(products, product((low[0], high[0]), (low[1], high[1])))
  agree(maxima, tuple(end.reshape(2, 2, 3).max(-1) for end in (low, high)))
  agree(gaps, (low[0] - high[1], high[0] - low[1]))


def test_matrix_product_of_boxes_is_within_the_published_factor():
  low = RNG.normal(size=(2, 3, 3))
  box = Interval(low, low + RNG.uniform(0, 1, size=low.shape))
  with jax.enable_x64(True):
    found = ibp(lambda x: x[0] @ x[1])(box)
    radius, found = np.asarray(found.radius), jax.tree.map(np.asarray, found)
  x, y = ([end[i] for end in (box.lower, box.upper)] for i in range(2))
  ends = product([a[:, :, None] for a in x], [b[None] for b in y])
  exact = [end.sum(1) for end in ends]
  assert np.all(found.lower <= exact[0] + 1e-12)
  assert np.all(found.upper >= exact[1] - 1e-12)
  assert np.all(radius <= 1.5 * (exact[1] - exact[0]) / 2 + 1e-12)


def test_softmax_is_exact_entry_by_entry():
  low = RNG.normal(size=4)
  box = Interval(low, low + RNG.uniform(0, 2, size=4))
  with jax.enable_x64(True):
    found = ibp(jax.nn.softmax)(box)
  for i in range(4):
    for end, own, other in (
      (found.lower, box.lower, box.upper),
      (found.upper, box.upper, box.lower),
    ):
      logits = np.where(np.arange(4) == i, own, other)
      np.testing.assert_allclose(end[i], np.exp(logits[i]) / np.exp(logits).sum(), rtol=1e-12)


def test_point_box_is_the_function():
  x = jnp.asarray(RNG.normal(size=5), jnp.float32)
  out = ibp(lambda x: jnp.tanh(x) * x + 1)(Interval(x, x))
  np.testing.assert_allclose(out.lower, jnp.tanh(x) * x + 1, rtol=1e-6)
  np.testing.assert_array_equal(out.lower, out.upper)


def test_arguments_may_be_trees_and_exact():
  def fn(params, batch):
    return {"a": params["w"] * batch[0], "b": batch[1], "c": params["w"] + 1}

  box = Interval(jnp.array([1.0]), jnp.array([2.0]))
  out = ibp(fn)({"w": 2.0}, (box, np.float64(3)))
  assert (out["a"].lower, out["a"].upper) == (2, 4)
  assert (out["b"].lower, out["b"].upper) == (3, 3)
  assert (out["c"].lower, out["c"].upper) == (3, 3)
  # Bounded weights, exact input.
  out = ibp(fn)({"w": box}, (jnp.array([-1.0]), 0.0))
  assert (out["a"].lower, out["a"].upper) == (-2, -1)


def test_relus_are_recorded_in_order_also_under_jit():
  def fn(x):
    x = jax.nn.relu(x - 1)
    x = jax.jit(lambda x: jnp.maximum(x - 2, 0))(x)
    return jnp.maximum(x, 1) + jnp.maximum(
      jax.nn.relu(x - 3), x
    )  # max(x, 1) and max(x, y) are none

  box = Interval(jnp.zeros(2), jnp.full(2, 5.0))
  for transform in (lambda f: f, jax.jit):
    _, relus = transform(ibp(fn, record_relus=True))(box)
    assert [r.lower[0].item() for r in relus] == [-1, -2, -3]
    assert [r.upper[0].item() for r in relus] == [4, 2, -1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_give_no_finite_bound(bad):
  weights = jnp.array([[1.0, bad], [2.0, 1.0]])
  # A comparison with NaN is false and relu's slope there 0; neither must hide it.
  for tail in (jax.nn.relu, jnp.tanh, jnp.abs, jax.nn.softmax, jnp.exp, jnp.max):
    out = ibp(lambda x, tail=tail: tail(x @ weights).sum())(Interval(-jnp.ones(2), jnp.ones(2)))
    assert not np.isfinite(out.lower) or not np.isfinite(out.upper)


@pytest.mark.parametrize("fn", [jnp.log, jnp.sqrt, jax.lax.rsqrt, lambda x: 1 / x, jnp.log1p])
def test_outside_of_the_domain_nothing_is_certain(fn):
  box = Interval(jnp.array(-2.0), jnp.array(1.0))
  for tail in (lambda y: y, jnp.exp, jnp.tanh, lambda y: jnp.exp(-y)):
    out = ibp(lambda x, tail=tail: tail(fn(x)))(box)
    assert np.isnan(out.lower)
    assert np.isnan(out.upper)
  # What is unknown may compare either way.
  out = ibp(lambda x: jnp.where(fn(x) > 0, 2.0, 3.0))(box)
  assert (out.lower, out.upper) == (2, 3)


def test_bfloat16():
  rng = np.random.default_rng(0)
  weights = jnp.asarray(rng.normal(size=(6, 5)), jnp.bfloat16)
  box = Interval(jnp.zeros(6, jnp.bfloat16), jnp.ones(6, jnp.bfloat16))

  def fn(x):
    return (jax.nn.relu(x.astype(jnp.bfloat16) @ weights)).astype(jnp.float32) * 1.5

  out = ibp(fn, directed=True)(box)
  assert out.dtype == jnp.float32
  values = jax.vmap(fn)(jnp.asarray(rng.uniform(size=(1000, 6)), jnp.bfloat16))
  assert np.all(out.lower <= values.min(0))
  assert np.all(out.upper >= values.max(0))
