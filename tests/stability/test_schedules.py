"""warmup_cosine: hand values, a NumPy version, the absolute minimum, traced arguments, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.stability.schedules import warmup_cosine


def numpy_schedule(step, peak, warmup, total, end):
  if step < warmup:
    return peak * step / warmup
  done = min((step - warmup) / (total - warmup), 1.0)
  return end + (peak - end) * (1 + np.cos(np.pi * done)) / 2


def test_hand_values():
  schedule = warmup_cosine(0.4, warmup_steps=10, total_steps=50, end=0.2)
  # Half-way down the cosine is the middle of peak and end; a quarter is at cos(pi / 4).
  quarter = 0.2 + 0.1 * (1 + np.sqrt(0.5))
  steps = jnp.array([0, 1, 5, 10, 20, 30, 50, 51, 10_000])
  want = [0.0, 0.04, 0.2, 0.4, quarter, 0.3, 0.2, 0.2, 0.2]
  np.testing.assert_allclose(schedule(steps), want, rtol=1e-6)
  assert schedule(0) == 0.0
  assert schedule(3).dtype == jnp.float32
  assert schedule(3).shape == ()


@pytest.mark.parametrize(
  ("peak", "warmup", "total", "end"),
  [(0.3, 0, 7, 1e-5), (2e-3, 3, 19, 2e-3), (1.0, 2.5, 11, 0.0), (5.0, 18, 19, 1.0)],
)
def test_against_numpy(peak, warmup, total, end):
  schedule = warmup_cosine(peak, warmup, total, end=end)
  want = [numpy_schedule(step, peak, warmup, total, end) for step in range(25)]
  np.testing.assert_allclose(schedule(jnp.arange(25)), want, rtol=1e-5, atol=1e-7 * peak)


def test_minimum_is_absolute_and_1e_5_by_default():
  for peak in (3e-4, 0.3, 3.0):
    np.testing.assert_allclose(warmup_cosine(peak, 5, 50)(50), 1e-5, rtol=1e-6)
  # Relative to the peak, as the optimizers take it, the same rule is end / peak.
  steps = jnp.arange(60)
  relative = warmup_cosine(1.0, 5, 50, end=1e-5 / 3e-4)(steps)
  np.testing.assert_allclose(3e-4 * relative, warmup_cosine(3e-4, 5, 50)(steps), rtol=1e-5)


def test_no_warmup_starts_at_the_peak_and_end_at_the_peak_stays_there():
  np.testing.assert_array_equal(warmup_cosine(0.5, 0, 10, end=0.5)(jnp.arange(20)), 0.5)


def test_every_argument_may_be_traced():
  rows = np.array([(0.3, 4.0, 20.0, 1e-5), (2.0, 0.0, 9.0, 0.1)], np.float32)
  steps = jnp.arange(25)
  traced = jax.jit(jax.vmap(lambda row: warmup_cosine(*row)(steps)))(rows)
  for got, row in zip(traced, rows, strict=True):
    np.testing.assert_allclose(got, warmup_cosine(*map(float, row))(steps), rtol=2e-6, atol=1e-7)
  whole = jax.jit(lambda n: warmup_cosine(0.3, n, n)(steps))(5)
  assert np.all(np.isfinite(whole))
  # Concrete and traced arguments together: a limit that is unknown is not checked.
  mixed = jax.jit(lambda total: warmup_cosine(0.3, 5, total)(steps))(20)
  np.testing.assert_allclose(mixed, warmup_cosine(0.3, 5, 20)(steps), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((0.0, 1, 10), r"peak is 0.0; allowed: \(0, inf\]"),
    ((0.1, 10, 10), r"warmup_steps is 10; allowed: \[0, 9\]"),
    ((0.1, -1, 10), "warmup_steps is -1"),
    ((0.1, 0, 0), "total_steps is 0"),
    ((0.1, 1, 10, 0.2), r"end is 0.2; allowed: \[0, 0.1\]"),
    ((1e-6, 1, 10), r"end is 1e-05; allowed: \[0, 1e-06\]"),
    ((jnp.array(0.1), 1, 10, -1.0), "end is -1.0"),
    (("fast", 1, 10), "peak is 'fast'; expected a number"),
  ],
)
def test_bad_input(arguments, message):
  with pytest.raises(ValueError, match=message):
    warmup_cosine(*arguments)
