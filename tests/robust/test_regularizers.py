"""Regularisers on ReLU bounds: hand values, float64 loops, finite differences, skipped layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.bounds.interval import Interval
from balance_jax.robust.regularizers import (
  relu_balance_regularizer,
  relu_stability_regularizer,
  relu_state_counts,
  relu_volume_regularizer,
  tightness_regularizer,
)


# In float64, one layer after the other, in the form of the official code: quotients, then the fold.
def tightness(box, layers, tau=0.5):
  radius = (box[1] - box[0]).mean()
  ratios = [radius / max((upper - lower).mean(), 1e-12) for lower, upper in layers]
  return np.mean([max(tau - ratio, 0) for ratio in ratios]) / tau


def balance(layers, tau=0.5):
  total = 0.0
  for lower, upper in layers:
    center, active, inactive = (lower + upper) / 2, lower > 0, upper < 0
    if not active.any() or not inactive.any():
      continue
    delta = (center - center.mean()) ** 2
    alpha = (center * active).mean() / -(center * inactive).mean()
    beta = (delta * active).sum() / (delta * inactive).sum()
    total += sum(max(tau - min(t, 1 / t), 0) for t in (alpha, beta)) / tau
  return total / len(layers)


def stability(layers):
  neurons = [-np.tanh(1 + lower * upper).reshape(len(lower), -1) for lower, upper in layers]
  return sum(layer.sum(axis=1).mean() for layer in neurons)


def volume(layers):
  return sum((np.maximum(-lower, 0) * np.maximum(upper, 0)).mean() for lower, upper in layers)


def random_layers(seed=0, batch=3, dtype=np.float32):
  """A box and three layers in float32, of which none has a balance term at its clip."""
  rng = np.random.default_rng(seed)
  shapes, offsets, radii = [(3,), (2, 2, 3), (5,), (6,)], (0, 1.0, -0.7, 0.5), (0.1, 0.3, 0.5, 0.2)
  pairs = []
  for shape, offset, radius in zip(shapes, offsets, radii, strict=True):
    center = rng.normal(offset, 1, (batch, *shape))
    half = radius * rng.uniform(0.5, 1.5, center.shape)
    pairs.append(((center - half).astype(dtype), (center + half).astype(dtype)))
  return pairs[0], pairs[1:]


def as_intervals(layers):
  return [Interval(jnp.asarray(lower), jnp.asarray(upper)) for lower, upper in layers]


def everything(box, layers, where=None):
  """The four regularisers, from pairs of ends, as one vector."""
  intervals = as_intervals(layers)
  return jnp.stack(
    [
      tightness_regularizer(Interval(*box), intervals, where=where),
      relu_balance_regularizer(intervals, where=where),
      relu_stability_regularizer(intervals, where=where),
      relu_volume_regularizer(intervals, where=where),
    ]
  )


def everything_float64(box, layers):
  box, layers = jax.tree.map(lambda x: np.asarray(x, np.float64), (box, layers))
  return np.array([tightness(box, layers), balance(layers), stability(layers), volume(layers)])


compiled = jax.jit(everything)
compiled_jacobian = jax.jit(jax.jacrev(everything, argnums=(0, 1)))


@pytest.mark.parametrize("seed", range(3))
def test_values_equal_float64_loops(seed):
  box, layers = random_layers(seed)
  found = compiled(box, layers)
  want = everything_float64(box, layers)
  assert found.dtype == jnp.float32
  assert np.all(want[:2] > 0.05)  # or the comparison of the clipped terms says nothing
  np.testing.assert_allclose(found, want, rtol=1e-5)


def test_gradients_equal_finite_differences():
  box, layers = random_layers()
  jacobian = compiled_jacobian(box, layers)
  flat, structure = jax.tree.flatten((box, layers))
  for number, (array, slopes) in enumerate(zip(flat, jax.tree.leaves(jacobian), strict=True)):
    for index in list(np.ndindex(array.shape))[::5]:
      ends = []
      for sign in (1, -1):
        moved = [x.astype(np.float64) for x in flat]
        moved[number][index] += sign * 1e-6
        ends.append(everything_float64(*structure.unflatten(moved)))
      want = (ends[0] - ends[1]) / 2e-6
      np.testing.assert_allclose(slopes[(slice(None), *index)], want, rtol=1e-3, atol=2e-5)


def test_by_hand():
  ones = jnp.ones((2, 3))
  box = Interval(-0.1 * ones, 0.1 * ones)
  # Radii 0.1, 0.2, 0.8 and a point: ratios 1, 1/2, 1/8 and nothing to tighten.
  layers = [Interval(-r * ones, r * ones) for r in (0.1, 0.2, 0.8, 0.0)]
  np.testing.assert_allclose(tightness_regularizer(box, layers), 0.75 / 4, rtol=1e-6)
  np.testing.assert_allclose(tightness_regularizer(box, layers, tau=1.0), (0.5 + 0.875) / 4)
  # Centres 6, -1, -1, 0: mean 1; alpha = 6 / 2, beta = 25 / 8; the unstable one counts in the mean.
  centers = jnp.array([[6.0, -1.0], [-1.0, 0.0]])
  layer = Interval(centers - 0.5, centers + 0.5)
  want = (0.5 - 1 / 3 + 0.5 - 8 / 25) / 0.5
  np.testing.assert_allclose(relu_balance_regularizer([layer]), want, rtol=1e-6)
  mirrored = Interval(-layer.upper, -layer.lower)
  np.testing.assert_allclose(relu_balance_regularizer([mirrored]), want, rtol=1e-6)
  # Scales cancel, and a balanced layer costs nothing.
  tiny = Interval(1e-6 * layer.lower, 1e-6 * layer.upper)
  np.testing.assert_allclose(relu_balance_regularizer([tiny, layer]), want, rtol=1e-5)
  even = Interval(jnp.array([[0.5, -1.5]]), jnp.array([[1.5, -0.5]]))
  assert relu_balance_regularizer([even]) == 0


def test_layers_of_one_kind_add_zero_with_zero_gradient():
  ends = {
    "active": ([1.0, 2.0], [3.0, 2.5]),
    "inactive": ([-2.0, -3.0], [-1.0, -0.5]),
    "unstable": ([-2.0, -1.0], [1.0, 0.5]),
    "points": ([0.0, 0.0], [0.0, 0.0]),
    "at zero": ([0.0, -1.0], [1.0, 0.0]),
  }
  lower, upper = np.array(list(ends.values()), np.float32).swapaxes(0, 1)[:, :, None, :]
  # Next to a layer with a term, they change the number of layers only.
  mixed = Interval(jnp.array([[3.0, -1.0]]) - 0.1, jnp.array([[3.0, -1.0]]) + 0.1)
  by_kind = jax.vmap(jax.value_and_grad(lambda layer: relu_balance_regularizer([layer, mixed])))
  values, grads = jax.jit(by_kind)(Interval(lower, upper))
  np.testing.assert_allclose(values, relu_balance_regularizer([mixed]) / 2, rtol=1e-6)
  assert not np.any(grads.lower)
  assert not np.any(grads.upper)


def test_degenerate_intervals_are_finite():
  # The mean is the centre of the only active neuron: the variance of that kind is 0, fold(0) = 0.
  at_mean = np.array([1.0, -1.0, 3.0]), np.array([0.1, 0.1, 3.5])
  signs, zeros = np.array([1.0, -1.0, 1.0]), np.zeros(3)
  centers_and_radii = [
    at_mean,
    (zeros, zeros),
    (signs, zeros),
    (1e15 * signs, 1.0 + zeros),
    (1e-30 * signs, zeros),  # whose squares are 0 in float32
  ]
  pairs = [(center - radius, center + radius) for center, radius in centers_and_radii]
  lower, upper = np.array(pairs, np.float32).swapaxes(0, 1)[:, :, None, :]
  box = jnp.zeros((1, 2)), jnp.zeros((1, 2))

  def with_points(lower, upper):
    layers = [(lower, upper), (jnp.zeros((1, 3)), jnp.zeros((1, 3)))]
    return everything(box, layers), jax.jacrev(everything, argnums=(0, 1))(box, layers)

  values, grads = jax.jit(jax.vmap(with_points))(lower, upper)
  assert np.all(np.isfinite(values))
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
  np.testing.assert_allclose(values[0, 1], 0.5, rtol=1e-5)


def test_padded_rows_do_not_count():
  box, layers = random_layers(batch=4)
  keep = np.array([True, False, True, True])
  subset = jax.tree.map(lambda x: x[keep], (box, layers))
  want, slopes = compiled(*subset), compiled_jacobian(*subset)
  for junk in (np.nan, np.inf, 1e6):
    padded = jax.tree.map(np.copy, (box, layers))
    for array in jax.tree.leaves(padded):
      array[~keep] = junk
    np.testing.assert_allclose(compiled(*padded, keep), want, rtol=1e-5)
    got = jax.tree.leaves(compiled_jacobian(*padded, keep))
    for leaf, alone in zip(got, jax.tree.leaves(slopes), strict=True):
      assert np.all(leaf[:, ~keep] == 0)
      np.testing.assert_allclose(leaf[:, keep], alone, rtol=1e-4, atol=1e-7)
  states = relu_state_counts(as_intervals(padded[1]), where=keep)
  for got, alone in zip(states, relu_state_counts(as_intervals(subset[1])), strict=True):
    np.testing.assert_allclose(got, alone, rtol=1e-6)
  np.testing.assert_array_equal(compiled(*padded, np.zeros(4, bool)), 0)
  none_left = relu_state_counts(as_intervals(layers), where=np.zeros(4, bool))
  np.testing.assert_array_equal(none_left, np.zeros((3, 3)))


def test_states():
  lower = jnp.array([[1.0, 0.0, 0.0, -1.0, -1.0, -1.0, np.nan, -0.0]])
  upper = jnp.array([[2.0, 1.0, 0.0, 0.0, -0.5, 2.0, np.nan, 3.0]])
  states = jax.jit(relu_state_counts)([Interval(lower, upper), Interval(-lower, -lower)])
  np.testing.assert_allclose(states.active, [3 / 8, 3 / 8])
  np.testing.assert_allclose(states.inactive, [3 / 8, 4 / 8])
  np.testing.assert_allclose(states.unstable, [1 / 8, 0])
  assert states.active.dtype == jnp.float32


def test_vmap_over_runs_and_traced_tau():
  runs = [random_layers(seed) for seed in range(2)]
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *runs)
  found = jax.jit(jax.vmap(everything))(*stacked)
  for got, run in zip(found, runs, strict=True):
    np.testing.assert_allclose(got, compiled(*run), rtol=1e-5)
  layers = as_intervals(runs[0][1])
  taus = jnp.array([0.3, 0.8])
  over_tau = jax.vmap(functools.partial(relu_balance_regularizer, layers))(taus)
  want = [balance(jax.tree.map(np.float64, runs[0][1]), tau) for tau in (0.3, 0.8)]
  np.testing.assert_allclose(over_tau, want, rtol=1e-5)


def test_bfloat16_is_reduced_in_float32():
  box, layers = random_layers()
  low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (box, layers))
  found = everything(*low)
  assert found.dtype == jnp.float32
  # To float32 precision: the rounding to bfloat16 happened before.
  want = everything_float64(*jax.tree.map(lambda x: np.asarray(x, np.float32), low))
  np.testing.assert_allclose(found, want, rtol=1e-5)


BOX, LAYERS = random_layers()
INTERVALS = as_intervals(LAYERS)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: relu_balance_regularizer([]), r"preacts is \[\]"),
    (lambda: relu_balance_regularizer(INTERVALS[0]), "preacts is Interval"),
    (lambda: relu_balance_regularizer(INTERVALS, tau=0.0), r"tau is 0\.0"),
    (lambda: tightness_regularizer(Interval(*BOX), INTERVALS, tau=-1.0), r"tau is -1\.0"),
    (
      lambda: tightness_regularizer(Interval(jnp.ones((2, 2)), jnp.ones((2, 2))), INTERVALS),
      r"input_interval has shape \(2, 2\); expected \(3, \.\.\.\)",
    ),
    (
      lambda: relu_volume_regularizer([Interval(jnp.ones((4, 2)), jnp.ones((4, 1)))]),
      r"preacts\[0\] has ends of shapes \(4, 2\) and \(4, 1\)",
    ),
    (lambda: relu_state_counts(INTERVALS, where=np.ones(4, bool)), r"expected \(4, \.\.\.\)"),
    (lambda: relu_state_counts(INTERVALS, where=True), "where has no batch axis"),
    (lambda: relu_stability_regularizer([Interval(1.0, 2.0)]), r"preacts\[0\] has no batch axis"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
