"""The smoothed radius and values linear in it: a reference in epochs and batches, ends, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.robust.schedules import linear_in_eps, smoothed_eps_schedule, warmup_lambda


def reference(step, init, final, eps, mid=0.25, exponent=4):
  """The published form, with its coefficient a, in Python floats."""
  middle = init + int(mid * (final - init))
  if step <= init:
    return 0.0
  if step >= final:
    return eps
  t = (middle - init) ** (exponent - 1)
  a = eps / ((final - middle) * exponent * t + (middle - init) * t)
  at_middle = a * (middle - init) ** exponent
  if step < middle:
    return a * (step - init) ** exponent
  return at_middle + (eps - at_middle) * (step - middle) / (final - middle)


@pytest.mark.parametrize(
  ("start", "end", "eps", "mid", "exponent"),
  [
    (5, 105, 8 / 255, 0.25, 4),
    (0, 83, 0.4, 0.25, 4),
    (7, 90, 1.0, 0.5, 2.5),
    (3, 24, 0.1, 0.9, 1),
  ],
)
def test_against_the_published_form(start, end, eps, mid, exponent):
  schedule = smoothed_eps_schedule(start, end, eps, mid, exponent)
  steps = np.arange(end + 20)
  want = [reference(int(step), start, end, eps, mid, exponent) for step in steps]
  got = jax.jit(schedule)(steps)
  assert got.dtype == jnp.float32
  assert got.shape == steps.shape
  np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-12)
  assert np.all(np.diff(got) >= 0)


def test_epochs_and_first_batch_of_the_paper():
  # CIFAR-10, 160 epochs: radius 0 in epoch 1, ramp over epochs 2 to 81, 391 batches each.
  start, end = 1 * 391, 81 * 391
  schedule = smoothed_eps_schedule(start, end, 8 / 255)
  middle = start + (end - start) // 4
  got = schedule(jnp.array([0, start, start + 1, middle, end - 1, end, 160 * 391]))
  assert got[0] == got[1] == 0
  assert 0 < got[2] < 1e-8
  np.testing.assert_allclose(got[3], 8 / 255 / 13, rtol=1e-6)
  assert got[4] < got[5] == got[6] == np.float32(8 / 255)
  # No kink: the slope after the middle is the derivative of the power there, 4 / (13 * length).
  slope = schedule(middle + 100) - schedule(middle)
  np.testing.assert_allclose(slope, 100 * 8 / 255 * 4 / 13 / (middle - start), rtol=1e-4)


def test_edges():
  steps = jnp.arange(12)
  linear = smoothed_eps_schedule(2, 6, 0.8, mid=0)(steps)
  np.testing.assert_allclose(linear, np.clip((np.arange(12) - 2) / 4, 0, 1) * 0.8, rtol=1e-6)
  # Too short for a power: the same line. One step, or none: a jump after the start.
  short = smoothed_eps_schedule(2, 5, 0.8)(steps)
  np.testing.assert_allclose(short, np.clip((np.arange(12) - 2) / 3, 0, 1) * 0.8, rtol=1e-6)
  for end in (4, 5):
    jump = smoothed_eps_schedule(4, end, 0.8)(steps)
    np.testing.assert_array_equal(jump, np.float32(0.8) * (np.arange(12) > 4))
  power = smoothed_eps_schedule(0, 8, 1.0, mid=1.0)(steps)
  np.testing.assert_allclose(power, np.minimum(np.arange(12) / 8, 1) ** 4, rtol=1e-6)
  np.testing.assert_array_equal(smoothed_eps_schedule(2, 6, 0.0)(steps), 0.0)


def test_a_sweep_traces_every_argument():
  rows = np.array([(5, 105, 0.1, 0.25, 4), (0, 40, 0.3, 0.5, 2), (9, 9, 0.2, 0.25, 4)], np.float32)
  steps = jnp.arange(0, 120, 7)
  traced = jax.jit(jax.vmap(lambda row: smoothed_eps_schedule(*row)(steps)))(rows)
  for got, row in zip(traced, rows.tolist(), strict=True):
    want = [reference(int(step), int(row[0]), int(row[1]), *row[2:]) for step in steps]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-12)
  # Radii as an array against one step, as one program of several runs has them.
  both = smoothed_eps_schedule(5, 105, jnp.array([0.1, 0.2]))(55)
  np.testing.assert_allclose(both[1], 2 * both[0], rtol=1e-6)
  slope = jax.grad(lambda eps: smoothed_eps_schedule(5, 105, eps)(55))(0.1)
  np.testing.assert_allclose(slope, reference(55, 5, 105, 1.0), rtol=1e-5)


def test_linear_in_eps():
  eps = jnp.array([0.0, 0.05, 0.1, 0.2, 0.25])
  np.testing.assert_allclose(linear_in_eps(eps, 0.2, 1.0, 0.5), [1, 0.875, 0.75, 0.5, 0.5])
  np.testing.assert_allclose(warmup_lambda(eps, 0.2, 0.5), [0.5, 0.375, 0.25, 0, 0], rtol=1e-6)
  # Exactly 0 at the target, also where the schedule computed it: then the second bound is skipped.
  targets = np.random.default_rng(0).uniform(0.001, 0.5, 200)
  at_end = jax.jit(
    jax.vmap(lambda t: linear_in_eps(smoothed_eps_schedule(3, 17, t)(17), t, 1.0, 0.0))
  )
  np.testing.assert_array_equal(at_end(targets), 0.0)
  assert linear_in_eps(8 / 255, 8 / 255, 0.7, 0.3) == np.float32(0.3)
  assert jax.jit(warmup_lambda)(0.0, 0.2, 0.5) == 0.5


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: smoothed_eps_schedule(-1, 10, 0.1), "start_step is -1"),
    (lambda: smoothed_eps_schedule(5, 4, 0.1), r"end_step is 4; allowed: \[5, inf\]"),
    (lambda: smoothed_eps_schedule(5, 10, -0.1), r"eps is -0\.1; allowed: finite and >= 0"),
    (lambda: smoothed_eps_schedule(5, 10, np.array([0.1, np.nan])), "eps is .*nan"),
    (lambda: smoothed_eps_schedule(5, 10, 0.1, mid=1.5), r"mid is 1\.5"),
    (lambda: smoothed_eps_schedule(5, 10, 0.1, exponent=0.5), r"exponent is 0\.5"),
    (lambda: linear_in_eps(0.1, 0.0, 1.0, 0.0), r"eps_target is 0\.0; allowed: finite and > 0"),
    (lambda: linear_in_eps(-0.1, 0.2, 1.0, 0.0), r"eps is -0\.1"),
    (lambda: warmup_lambda(0.1, 0.2, -1.0), r"lam0 is -1\.0"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
