import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.stability.sensitivity import (
  diverged_count,
  lr_grid,
  lr_sensitivity,
  lr_sensitivity_best_window,
)

GRID = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
# Final losses over GRID of a 3-block decoder without and with layer norm on queries and keys.
QK_NORM_OFF = [2.365, 1.987, 1.706, 1.567, 1.824, 2.418, 2.635]
QK_NORM_ON = [2.360, 2.030, 1.754, 1.534, 1.582, 1.759, 1.847]


def reference(losses, init_loss, where=None):
  """S of one curve in float64, point by point."""
  where = np.ones(len(losses), bool) if where is None else where
  kept = [
    min(float(loss), float(init_loss)) if np.isfinite(loss) else float(init_loss)
    for loss, keep in zip(losses, where, strict=True)
    if keep
  ]
  return sum(loss - min(kept) for loss in kept) / len(kept) if kept else 0.0


def random_curves(rows=40, points=7, seed=0):
  """Curves around an initial loss of 4, with diverged runs among them."""
  rng = np.random.default_rng(seed)
  losses = rng.uniform(1.0, 6.0, (rows, points)).astype(np.float32)
  losses[rng.random(losses.shape) < 0.1] = np.nan
  losses[rng.random(losses.shape) < 0.1] = np.inf
  losses[rng.random(losses.shape) < 0.05] = -np.inf
  return losses, rng.uniform(3.0, 5.0, rows).astype(np.float32), rng.random(losses.shape) < 0.8


def test_grid_is_exact():
  grid = lr_grid()
  assert grid.dtype == jnp.float32
  np.testing.assert_array_equal(grid, np.array(GRID, np.float32))
  np.testing.assert_array_equal(lr_grid(1e-2, 1e-2 * 3), np.array([1e-2, 3e-2], np.float32))
  np.testing.assert_array_equal(
    lr_grid(2e-4, 2e-1, per_decade=1), np.array([2e-4, 2e-3, 2e-2, 2e-1], np.float32)
  )
  np.testing.assert_array_equal(
    lr_grid(1e-3, 1e-1, per_decade=3),
    np.array([1e-3, 2.2e-3, 4.6e-3, 1e-2, 2.2e-2, 4.6e-2, 1e-1], np.float32),
  )


@pytest.mark.parametrize("per_decade", [1, 2, 3, 4, 5, 10, 20])
def test_every_grid_counts_as_log_uniform(per_decade):
  grid = lr_grid(3e-4, 3e-1, per_decade)
  assert grid.shape == (3 * per_decade + 1,)
  lr_sensitivity(jnp.ones(grid.shape), 2.0, learning_rates=grid, window=(3e-4, 3e-1))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((0.0, 1.0), "low is 0"),
    ((-1e-3, 1.0), "low is -0.001"),
    ((np.nan, 1.0), "low is nan"),
    ((1e-2, 1e-3), "high is 0.001"),
    ((1e-2, np.inf), "high is inf"),
    ((1e-2, 1e-2), "same as low; expected a grid of at least 2"),
    ((1e-3, 1.0, 0), "per_decade is 0"),
    ((1e-3, 1.0, 2.0), "per_decade is 2.0"),
    ((2e-4, 1.0), "low is 0.0002, not on the grid"),
    ((1e-4, 5e-1), "high is 0.5, not on the grid"),
    ((1e-4, 5e-1, 1), "high is 0.5, not on the grid with per_decade=1.*is 1"),
    ((1.23e-4, 1.23e-1, 3), "low is 0.000123, not on the grid"),
    ((1e-3, 1.0, 200), "per_decade is 200"),
  ],
)
def test_grid_refuses(arguments, message):
  with pytest.raises(ValueError, match=message):
    lr_grid(*arguments)


def test_sensitivity_by_hand():
  # The divergent run and the one above the initial loss count as 4: heights 1, 0, 0.5, 3, 3.
  losses = jnp.array([2.0, 1.0, 1.5, jnp.nan, 9.0])
  assert float(lr_sensitivity(losses, 4.0)) == pytest.approx(7.5 / 5)
  assert float(lr_sensitivity(losses.at[3].set(jnp.inf), 4.0)) == pytest.approx(7.5 / 5)
  assert float(lr_sensitivity(losses.at[3].set(-jnp.inf), 4.0)) == pytest.approx(7.5 / 5)
  where = jnp.array([True, False, True, True, False])
  assert float(lr_sensitivity(losses, 4.0, where)) == pytest.approx((0.5 + 0 + 2.5) / 3)
  assert int(diverged_count(losses)) == 1
  assert int(diverged_count(losses, ~where)) == 0


def test_measured_curves():
  # A trapezoid or a mean over the learning rate itself gives other numbers.
  found = lr_sensitivity(jnp.array([QK_NORM_OFF, QK_NORM_ON]), 4.85)
  np.testing.assert_allclose(found, [0.505, 0.304], atol=5e-4)


def test_equals_reference_also_under_jit_and_vmap():
  losses, init_loss, where = random_curves()
  for mask in (None, where):
    masks = [None] * len(losses) if mask is None else mask
    expected = [reference(*row) for row in zip(losses, init_loss, masks, strict=True)]
    found = lr_sensitivity(losses, init_loss, mask)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lr_sensitivity)(losses, init_loss, mask), found, rtol=1e-6)
    in_axes = (0, 0, None if mask is None else 0)
    by_row = jax.vmap(lr_sensitivity, in_axes)(losses, init_loss, mask)
    np.testing.assert_allclose(by_row, found, rtol=1e-6)
  cube = lr_sensitivity(losses.reshape(4, 10, 7), init_loss.reshape(4, 10))
  np.testing.assert_allclose(cube.reshape(-1), lr_sensitivity(losses, init_loss), rtol=1e-6)
  counts = jax.jit(diverged_count)(losses, where)
  assert counts.dtype == jnp.int32
  np.testing.assert_array_equal(counts, (~np.isfinite(losses) & where).sum(-1))


def test_one_initial_loss_for_all():
  losses, _, _ = random_curves()
  np.testing.assert_array_equal(
    lr_sensitivity(losses, 4.0), lr_sensitivity(losses, np.full(len(losses), 4.0, np.float32))
  )


def test_limits():
  nothing = jnp.full(7, jnp.nan)
  assert float(lr_sensitivity(nothing, 4.0)) == 0
  assert int(diverged_count(nothing)) == 7
  # Every run is worse than no training: there is nothing to lose.
  assert float(lr_sensitivity(jnp.array([5.0, 6.0, jnp.nan]), 4.0)) == 0
  assert float(lr_sensitivity(jnp.full(7, 3.0), 4.0)) == 0
  assert float(lr_sensitivity(jnp.array([1.0, 2.0]), 4.0, jnp.zeros(2, bool))) == 0
  # The same curve 10 nats higher, its ceiling too.
  low, high = (lr_sensitivity(jnp.array([1.0, 2.0, jnp.nan]) + c, 4.0 + c) for c in (0.0, 10.0))
  assert float(low) == pytest.approx(float(high), rel=1e-6)


@pytest.mark.parametrize("init_loss", [np.nan, np.inf, -np.inf])
def test_no_ceiling_where_the_initial_loss_is_not_finite(init_loss):
  assert float(lr_sensitivity(jnp.array([1.0, 3.0]), init_loss)) == 1
  assert float(lr_sensitivity(jnp.array([1.0, jnp.nan]), init_loss)) == jnp.inf
  assert float(lr_sensitivity(jnp.array([jnp.nan, jnp.nan]), init_loss)) == 0
  masked = lr_sensitivity(jnp.array([1.0, 3.0, jnp.nan]), init_loss, jnp.array([True, True, False]))
  assert float(masked) == 1
  window = lr_sensitivity_best_window(jnp.array([1.0, 3.0, jnp.nan]), init_loss, 2)
  assert float(window) == 1


def test_masked_equals_the_subset():
  losses, init_loss, where = random_curves(rows=20)
  for row in range(20):
    if where[row].sum() < 2:
      continue
    subset = lr_sensitivity(losses[row][where[row]], init_loss[row])
    full = lr_sensitivity(losses[row], init_loss[row], where[row])
    assert float(full) == pytest.approx(float(subset), rel=1e-6)


def test_gradient_equals_finite_differences():
  losses = np.array([2.0, 1.0, 1.5, np.nan, 9.0])

  def objective(losses, init_loss):
    return lr_sensitivity(losses, init_loss)

  grads = jax.jit(jax.grad(objective, argnums=(0, 1)))(jnp.array(losses, jnp.float32), 4.0)
  slopes = []
  for i in range(len(losses)):
    step = np.zeros(len(losses))
    step[i] = 1e-4
    slopes.append((reference(losses + step, 4.0) - reference(losses - step, 4.0)) / 2e-4)
  np.testing.assert_allclose(grads[0], slopes, atol=1e-6)
  slope = (reference(losses, 4.0 + 1e-4) - reference(losses, 4.0 - 1e-4)) / 2e-4
  np.testing.assert_allclose(grads[1], slope, atol=1e-6)


def test_low_precision_is_lifted():
  losses = jnp.array([2.0, 1.0, 1.5, 9.0], jnp.bfloat16)
  found = lr_sensitivity(losses, jnp.bfloat16(4.0))
  assert found.dtype == jnp.float32
  assert float(found) == pytest.approx(reference([2.0, 1.0, 1.5, 9.0], 4.0), rel=1e-6)
  with jax.enable_x64(True):
    assert lr_sensitivity(np.array([2.0, 1.0]), np.float64(4.0)).dtype == jnp.float64


def test_window_leaves_out_what_lies_outside():
  grid = lr_grid(1e-4, 1.0)
  losses = jnp.array([3.0, *QK_NORM_OFF, 0.5])
  for window in ((3e-4, 3e-1), np.array([3e-4, 3e-1], np.float32)):
    found = lr_sensitivity(losses, 4.85, learning_rates=grid, window=window)
    assert float(found) == pytest.approx(reference(QK_NORM_OFF, 4.85), rel=1e-5)
  whole = jax.jit(lambda x: lr_sensitivity(x, 4.85, learning_rates=grid))(losses)
  assert float(whole) == pytest.approx(reference([3.0, *QK_NORM_OFF, 0.5], 4.85), rel=1e-5)
  rows = lr_sensitivity(jnp.stack([losses] * 2), 4.85, learning_rates=grid, window=(3e-4, 3e-1))
  np.testing.assert_allclose(rows, reference(QK_NORM_OFF, 4.85), rtol=1e-5)


@pytest.mark.parametrize(
  ("rates", "window", "message"),
  [
    (GRID[:6], None, r"learning_rates has shape \(6,\); expected \(7\)"),
    (GRID[::-1], None, "learning_rates must be > 0 and increasing"),
    ([GRID[0], *GRID[:6]], None, "learning_rates must be > 0 and increasing"),
    ([0.0, *GRID[1:]], None, "learning_rates must be > 0 and increasing"),
    ([-1.0, *GRID[1:]], None, "learning_rates must be >= 0, got -1 at 0"),
    (list(np.linspace(3e-4, 3e-1, 7)), None, "uniform in the logarithm within 6 %"),
    ([*GRID[:3], 1.2e-2, *GRID[4:]], None, "0.012 at 3 should be near 0.00949"),
    (GRID, (3e-4, 1.0), r"not spanning the window \(0.0003, 1\): 1 is no point of it"),
    (GRID, (1e-4, 3e-1), "not spanning the window .*: 0.0001 is no point of it"),
    (GRID, (2e-3, 3e-1), "not spanning the window .*: 0.002 is no point of it"),
    (GRID, (3e-1, 3e-4), "window is .*expected 0 < low < high"),
    (GRID, 3e-1, "window is 0.3; expected a pair"),
    (None, (3e-4, 3e-1), "window needs learning_rates"),
  ],
)
def test_uneven_or_short_grids_are_refused(rates, window, message):
  with pytest.raises(ValueError, match=message):
    lr_sensitivity(jnp.ones(7), 2.0, learning_rates=rates, window=window)


def test_traced_learning_rates_are_refused():
  with pytest.raises(ValueError, match="learning_rates must be known"):
    jax.jit(lambda r: lr_sensitivity(jnp.ones(7), 2.0, learning_rates=r))(jnp.array(GRID))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((1.0, 4.0), r"final_losses has shape \(\); expected"),
    ((np.ones((3, 0)), np.ones(3)), r"final_losses has shape \(3, 0\); expected .* K >= 2"),
    ((np.ones((3, 1)), np.ones(3)), r"final_losses has shape \(3, 1\); expected .* K >= 2"),
    ((np.ones((3, 7)), np.ones(2)), r"init_loss has shape \(2,\); expected \(3\)"),
    ((np.ones((3, 7)), np.ones((3, 7))), r"init_loss has shape \(3, 7\); expected \(3\)"),
    ((np.ones((3, 7)), np.ones(3), np.ones(7, bool)), r"where has shape \(7,\); expected \(3, 7\)"),
    ((np.ones((3, 7)), np.ones(3), np.ones((3, 7))), "where has dtype float.*; expected bool"),
  ],
)
def test_bad_shapes_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    lr_sensitivity(*arguments)


def test_diverged_count_refuses():
  with pytest.raises(ValueError, match=r"final_losses has shape \(\)"):
    diverged_count(1.0)
  with pytest.raises(ValueError, match=r"where has shape \(2,\); expected \(3\)"):
    diverged_count(jnp.ones(3), jnp.ones(2, bool))


def test_best_window_by_hand():
  # Windows of 3: heights (2 1 0), (1 0 1), (0 1 3); the middle one is best.
  losses = jnp.array([3.0, 2.0, 1.0, 2.0, jnp.nan])
  assert float(lr_sensitivity_best_window(losses, 4.0, 3)) == pytest.approx(2 / 3)
  assert float(lr_sensitivity_best_window(losses, 4.0, 5)) == pytest.approx((2 + 1 + 1 + 3) / 5)


def test_best_window_equals_reference():
  losses, init_loss, _ = random_curves(points=10)

  def smallest(losses, init_loss):
    windows = [losses[i : i + 4] for i in range(7)]
    learned = [w for w in windows if np.any(np.isfinite(w) & (w < init_loss))]
    return min((reference(w, init_loss) for w in learned), default=0.0)

  expected = [smallest(*row) for row in zip(losses, init_loss, strict=True)]
  found = lr_sensitivity_best_window(losses, init_loss, 4)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  in_jit = jax.jit(jax.vmap(lambda x, y: lr_sensitivity_best_window(x, y, 4)))(losses, init_loss)
  np.testing.assert_allclose(in_jit, found, rtol=1e-6)


def test_a_dead_window_is_not_the_best_one():
  losses = jnp.array([3.0, 1.0, 2.0, jnp.nan, jnp.nan, 7.0])
  assert float(lr_sensitivity_best_window(losses, 4.0, 3)) == pytest.approx(3 / 3)
  assert float(lr_sensitivity_best_window(jnp.full(6, jnp.nan), 4.0, 3)) == 0
  # Nor where it is the only complete one: (3 1) and (1 nan) compete.
  holes = jnp.array([3.0, 0.0, 1.0, 0.0, jnp.nan, jnp.nan, jnp.nan])
  assert float(lr_sensitivity_best_window(holes, 4.0, 3, holes != 0)) == pytest.approx(1.0)


def test_best_window_needs_its_points():
  losses = jnp.array([3.0, 2.0, 1.0, 2.5, 3.5])
  where = jnp.array([False, True, True, True, True])
  # Complete windows only: (2 1 2.5) and (1 2.5 3.5), not what is left of the first one.
  found = lr_sensitivity_best_window(losses, 4.0, 3, where)
  assert float(found) == pytest.approx((1 + 1.5) / 3)
  holes = jnp.array([True, True, False, True, False])
  # No complete window: those with two of their points, (3 2) and (2 2.5), not those with one.
  assert float(lr_sensitivity_best_window(losses, 4.0, 3, holes)) == pytest.approx(0.25)
  assert float(lr_sensitivity_best_window(losses, 4.0, 3, jnp.zeros(5, bool))) == 0


@pytest.mark.parametrize("window", [1, 8, 3.0, True])
def test_best_window_refuses(window):
  with pytest.raises(ValueError, match=f"window is {window}"):
    lr_sensitivity_best_window(jnp.ones(7), 2.0, window)
