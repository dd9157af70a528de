import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.bounds import Interval, Options, crown, ibp, record

RNG = np.random.default_rng(0)
SIZES = (4, 7, 6, 3)
WEIGHTS = [RNG.normal(size=pair) / np.sqrt(pair[0]) for pair in itertools.pairwise(SIZES)]
BIASES = [RNG.normal(size=size) * 0.1 for size in SIZES[1:]]
X = RNG.normal(size=4)
BOX = Interval(X - 0.4, X + 0.4)


def network(x):
  for weight, bias in zip(WEIGHTS[:-1], BIASES[:-1], strict=True):
    x = jax.nn.relu(x @ weight + bias)
  return x @ WEIGHTS[-1] + BIASES[-1]


def concretize(matrix, offset, low, high):
  """Least value of matrix x + offset over the box; rows of matrix are forms."""
  return np.maximum(matrix, 0) @ low + np.minimum(matrix, 0) @ high + offset


def backward(layers, bounds, low, high, choice):
  """Zhang et al. (2018): lower bounds of the last layer, line by line backwards; float64."""
  matrix, offset = layers[-1][0].T, layers[-1][1]
  for (weight, bias), (lower, upper) in zip(layers[-2::-1], bounds[::-1], strict=True):
    on, off = lower >= 0, upper <= 0
    chord = np.where(on, 1, np.where(off, 0, upper / np.where(upper > lower, upper - lower, 1)))
    slopes = {
      "adaptive": (upper > -lower) * 1.0,
      "same-slope": chord,
      "zero": 0 * lower,
      "one": 0 * lower + 1,
    }
    slope = np.where(on, 1, np.where(off, 0, slopes[choice]))
    top = np.where(on | off, 0, -lower * chord)
    positive, negative = np.maximum(matrix, 0), np.minimum(matrix, 0)
    offset = offset + negative @ top
    matrix = positive * slope + negative * chord
    offset, matrix = offset + matrix @ bias, matrix @ weight.T
  return concretize(matrix, offset, low, high)


def reference(intermediate, choice):
  """Lower and upper bounds of the three layers' outputs, inner ones by IBP or by CROWN."""
  low, high = BOX.lower, BOX.upper
  layers = list(zip(WEIGHTS, BIASES, strict=True))
  ends, bounds = (low, high), []
  for depth, (weight, bias) in enumerate(layers):
    center, radius = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
    middle, reach = center @ weight + bias, radius @ np.abs(weight)
    lower, upper = middle - reach, middle + reach
    if intermediate == "crown" or depth == len(layers) - 1:
      part = layers[: depth + 1]
      negated = [*part[:-1], (-weight, -bias)]
      lower = np.maximum(lower, backward(part, bounds, low, high, choice))
      upper = np.minimum(upper, -backward(negated, bounds, low, high, choice))
    bounds.append((lower, upper))
    ends = np.maximum(lower, 0), np.maximum(upper, 0)
  return bounds[-1]


@pytest.mark.parametrize("intermediate", ["ibp", "crown"])
@pytest.mark.parametrize("choice", ["adaptive", "same-slope", "zero", "one"])
def test_equals_reference(intermediate, choice):
  with jax.enable_x64(True):
    found = crown(network, intermediate=intermediate, relu_lower=choice)(BOX)
  lower, upper = reference(intermediate, choice)
  np.testing.assert_allclose(found.lower, lower, rtol=1e-12)
  np.testing.assert_allclose(found.upper, upper, rtol=1e-12)


def test_by_hand():
  """relu(x) - relu(-x) is x. With x in [-1, 3]: chords (3x + 3) / 4 and (3 - x) / 4."""
  fn = lambda x: jax.nn.relu(x) - jax.nn.relu(-x)  # noqa: E731
  box = Interval(jnp.array(-1.0), jnp.array(3.0))
  found = crown(fn)(box)
  # Adaptive: relu(x) >= x as 3 > 1, relu(-x) >= 0. Lower: IBP's -1, as x - (3 - x)/4 is -2.
  np.testing.assert_allclose((found.lower, found.upper), (-1.0, 3.0), rtol=1e-6)
  found = crown(lambda x: fn(x) - x)(box)
  # Lower: x - (3 - x)/4 - x = (x - 3)/4 at -1; upper: (3x + 3)/4 - 0 - x = (3 - x)/4 at -1.
  np.testing.assert_allclose((found.lower, found.upper), (-1.0, 1.0), rtol=1e-6)


def test_exact_on_affine_networks():
  kernels = RNG.normal(size=(3, 3, 3, 2, 2))

  def fn(x):
    h = x[None]
    for i, kernel in enumerate(kernels):
      numbers = ("NHWC", "HWIO", "NHWC")
      y = jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=numbers)
      h = h + (y - 0.3) * np.array([0.7, -1.2])[None, None, None] / np.sqrt(1.5 + i)
    pooled = jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    return jnp.cumsum(jnp.concatenate([pooled.reshape(-1), h[0, 0, 0], x[1, 1] - x[0, 0]]))

  x = RNG.normal(size=(3, 3, 2))
  with jax.enable_x64(True):
    found = jax.jit(crown(fn))(Interval(x - 0.3, x + 0.3))
    value, jacobian = np.asarray(fn(x)), np.asarray(jax.jit(jax.jacobian(fn))(x))
    wide = np.asarray(ibp(fn)(Interval(x - 0.3, x + 0.3)).radius)
  reach = 0.3 * np.abs(jacobian).sum((1, 2, 3))
  # The pixels at the end are read by too few sums for IBP to lose on them.
  assert np.all(wide >= reach - 1e-11)
  assert np.mean(wide) > 1.5 * np.mean(reach)
  np.testing.assert_allclose(found.lower, value - reach, rtol=1e-11, atol=1e-11)
  np.testing.assert_allclose(found.upper, value + reach, rtol=1e-11, atol=1e-11)


def test_zero_slope_is_never_looser_than_ibp_before_the_cut():
  """Lines of slope 0 below and chords above stay inside of IBP's intervals, layer by layer."""
  with jax.enable_x64(True):
    tape, out = record(network, (BOX,), Options(relu_lower="zero"))
    eye = jnp.eye(3)
    lower, upper = tape.lower(eye, out), -tape.lower(-eye, out)
    assert np.all(lower >= out.interval.lower - 1e-12)
    assert np.all(upper <= out.interval.upper + 1e-12)
    assert np.any(lower > out.interval.lower + 1e-3)
    # With the slope 1 it can be looser, so that the cut matters.
    tape, out = record(network, (BOX,), Options(relu_lower="one"))
    assert np.any(tape.lower(eye, out) < out.interval.lower - 1e-3)
    found = crown(network, relu_lower="one")(BOX)
  assert np.all(found.lower >= out.interval.lower)
  assert np.all(found.upper <= out.interval.upper)


def test_the_affine_tail_is_elided():
  """Forms of the logits, pulled back to the last relu only, are IBP with the margins as a layer."""
  forms = np.array([[1.0, -1, 0], [0, 1, -1]])
  with jax.enable_x64(True):
    tape, out = record(network, (BOX,), Options())
    tail = tape.lower(jnp.asarray(forms), out, tail_only=True)
    fused = np.asarray(ibp(lambda x: (network(x) - BIASES[-1]) @ forms.T)(BOX).lower)
    last = tape.relus[-1].interval
  ends = np.maximum(last.lower, 0), np.maximum(last.upper, 0)
  expected = concretize(forms @ WEIGHTS[-1].T, forms @ BIASES[-1], *ends)
  np.testing.assert_allclose(tail, expected, rtol=1e-12)
  assert np.all(np.asarray(tail) >= fused + forms @ BIASES[-1] + 1e-3)


def test_gradients_equal_finite_differences():
  def total(weight, eps, bounds):
    fn = lambda x: jnp.tanh(jax.nn.relu(x @ weight) @ WEIGHTS[1][:7])  # noqa: E731
    out = bounds(fn)(Interval(X - eps, X + eps))
    return jnp.sum(out.upper) - jnp.sum(jnp.sin(out.lower))

  with jax.enable_x64(True):
    for bounds in (ibp, crown):
      fn = jax.jit(lambda w, e, bounds=bounds: total(w, e, bounds))
      to_weight, to_eps = jax.jit(jax.grad(fn, (0, 1)))(WEIGHTS[0], 0.3)
      direction = RNG.normal(size=WEIGHTS[0].shape)
      step = 1e-6
      sides = [fn(WEIGHTS[0] + s * direction, 0.3) for s in (step, -step)]
      np.testing.assert_allclose(
        np.sum(to_weight * direction), (sides[0] - sides[1]) / (2 * step), rtol=1e-6
      )
      sides = [fn(WEIGHTS[0], 0.3 + s) for s in (step, -step)]
      np.testing.assert_allclose(to_eps, (sides[0] - sides[1]) / (2 * step), rtol=1e-6)


def test_gradients_at_point_boxes_are_finite():
  total = lambda e, b: sum(map(jnp.sum, jax.tree.leaves(b(network)(Interval(X - e, X + e)))))  # noqa: E731
  with jax.enable_x64(True):
    for bounds in (ibp, crown):
      assert np.isfinite(jax.grad(total)(0.0, bounds))


def test_chunks_give_the_same_numbers_in_less_memory():
  weights = jnp.asarray(RNG.normal(size=(64, 256)), jnp.float32)
  last = jnp.asarray(RNG.normal(size=(256, 48)), jnp.float32)
  fn = lambda x: jax.nn.relu(jax.nn.relu(x @ weights) @ last) @ last.T[:, :64]  # noqa: E731
  box = Interval(jnp.zeros(64), jnp.full(64, 0.1))
  found, memory = [], []
  for chunk in (None, 16, 5):
    compiled = jax.jit(crown(fn, chunk=chunk)).lower(box).compile()
    found.append(compiled(box))
    memory.append(compiled.memory_analysis().temp_size_in_bytes)
  for other in found[1:]:
    np.testing.assert_allclose(other.lower, found[0].lower, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(other.upper, found[0].upper, rtol=1e-5, atol=1e-4)
  assert memory[2] < memory[1] < memory[0], memory
  assert memory[2] < memory[0] / 2, memory


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_give_no_finite_bound(bad):
  weights = jnp.array([[1.0, bad], [2.0, 1.0]])
  box = Interval(-jnp.ones(2), jnp.ones(2))
  for tail in (jax.nn.relu, jnp.abs, jax.nn.softmax, jnp.max):
    fn = lambda x, tail=tail: tail(x @ weights).sum()  # noqa: E731
    out = crown(fn)(box)
    assert not np.isfinite(out.lower) or not np.isfinite(out.upper)
    for tail_only in (False, True):
      tape, node = record(fn, (box,), Options())
      lower = tape.lower(jnp.array([1.0, -1.0]), node, tail_only=tail_only)
      assert not np.all(np.isfinite(lower))


def test_an_entry_that_is_none_is_not_forgotten_on_the_way_back():
  """What is taken from outside of an array is NaN, and has no row to be pulled back by."""
  box = Interval(-jnp.ones(2), jnp.ones(2))
  take = lambda x: jnp.take(x, jnp.array([0, 5]), mode="fill").sum()  # noqa: E731
  tape, node = record(take, (box,), Options())
  assert np.all(np.isnan(tape.lower(jnp.array([1.0, -1.0]), node)))
  assert np.isnan(crown(take)(box).upper)


def test_overflow_on_the_way_back_leaves_the_interval():
  box = Interval(jnp.array([-1e3, 1.0]), jnp.array([1e3, 2.0]))
  out = crown(lambda x: jnp.tanh(jnp.exp(x)) + x)(box)
  assert np.all(np.isfinite(out.lower))
  assert np.all(np.isfinite(out.upper))
