import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import mixing

SIZES = [900, 90, 10]


def temperature(tau):
  power = np.array(SIZES) ** (1.0 / tau)
  return power / power.sum()


def read(mixer, steps):
  """p (T, K) at the steps, in one compiled program."""
  return np.asarray(jax.jit(jax.vmap(lambda step: mixer.weights((), step)[0]))(jnp.array(steps)))


def test_cooldown_switches_exactly_at_the_step():
  p = read(mixing.cooldown(SIZES, switch_step=100), [0, 99, 100, 10**6])
  np.testing.assert_allclose(p, [temperature(tau) for tau in (5, 5, 1, 1)], rtol=1e-5)
  at_once = read(mixing.cooldown(SIZES, switch_step=0, tau_hi=np.inf, tau_lo=2.0), [0])
  np.testing.assert_allclose(at_once, [temperature(2.0)], rtol=1e-5)


def test_cooldown_parameters_may_be_traced():
  def p_of(switch, tau):
    return mixing.cooldown(SIZES, switch_step=switch, tau_hi=tau).weights((), 7)[0]

  p = jax.jit(jax.vmap(p_of))(jnp.array([7, 8]), jnp.array([3.0, 3.0]))
  np.testing.assert_allclose(p, [temperature(1), temperature(3)], rtol=1e-5)


def test_piecewise_tau():
  schedule = mixing.piecewise_tau([3, 5], [5.0, jnp.inf, 1])
  assert [float(schedule(step)) for step in (0, 2, 3, 4, 5, 99)] == [5, 5, np.inf, np.inf, 1, 1]
  assert float(mixing.piecewise_tau([], [2])(0)) == 2
  assert schedule(0).dtype == jnp.float32


@pytest.mark.parametrize(
  ("shape", "middle"),
  [("linear", 3.0), ("cosine", 3.0), ("exponential", np.sqrt(5.0))],
)
def test_decay_tau_ends_and_middle(shape, middle):
  down = mixing.decay_tau(shape, start=5.0, end=1.0, num_steps=8)
  up = mixing.decay_tau(shape, start=1, end=5, num_steps=8)
  steps = jnp.array([0, 4, 8, 100])
  np.testing.assert_allclose(jax.vmap(down)(steps), [5, middle, 1, 1], rtol=1e-6)
  np.testing.assert_allclose(jax.vmap(up)(steps), [1, middle, 5, 5], rtol=1e-6)
  assert np.all(np.diff(jax.vmap(down)(jnp.arange(9))) < 0)


def test_decay_tau_quarter():
  at = {
    shape: float(mixing.decay_tau(shape, start=16.0, end=1.0, num_steps=4)(1))
    for shape in ("linear", "cosine", "exponential")
  }
  cosine = 1 + 15 * (1 + np.cos(np.pi / 4)) / 2
  for shape, expected in {"linear": 12.25, "cosine": cosine, "exponential": 8.0}.items():
    np.testing.assert_allclose(at[shape], expected, rtol=1e-6)


def test_decay_tau_traced():
  def tau_of(start, num_steps):
    return mixing.decay_tau("cosine", start=start, end=1.0, num_steps=num_steps)(3)

  traced = jax.jit(jax.vmap(tau_of))(jnp.array([5.0, 2.0]), jnp.array([6, 3]))
  np.testing.assert_allclose(traced, [3.0, 1.0], rtol=1e-6)


def test_temperature_warmup_is_the_opposite_of_cooldown():
  p = read(mixing.temperature_warmup(SIZES, warmup_steps=10), [0, 5, 10, 50])
  np.testing.assert_allclose(p, [temperature(tau) for tau in (1, 3, 5, 5)], rtol=1e-5)


def test_tau_schedule_reads_any_schedule():
  mixer = mixing.tau_schedule(SIZES, lambda step: 1.0 + step, draw="natural")
  p, r = mixer.weights((), 1)
  np.testing.assert_allclose(p, temperature(2.0), rtol=1e-5)
  np.testing.assert_allclose(r, [0.9, 0.09, 0.01], rtol=1e-6)


def test_order_matters():
  sizes = [10, 500, 0, 490, 500]
  all_groups = np.array(sizes) / 1500
  # The mean is 300: three groups are above it.
  p = read(mixing.order_matters(sizes, switch_step=4), [0, 3, 4, 9])
  first = np.array([0, 500, 0, 490, 500]) / 1490
  np.testing.assert_allclose(p, [first, first, all_groups, all_groups], rtol=1e-5)
  # Ties go to the group that comes first; more than 16 groups, as NumPy sorts few stably anyway.
  ties = mixing.order_matters([7, 9, 8] * 14, switch_step=4, num_high=16).weights((), 0)[0]
  assert np.flatnonzero(ties).tolist() == sorted([*range(1, 42, 3), 2, 5])
  p = read(mixing.order_matters(sizes, switch_step=4, num_high=1), [3])
  np.testing.assert_allclose(p, [[0, 1, 0, 0, 0]], atol=1e-7)
  p = read(mixing.order_matters(sizes, switch_step=4, num_high=5, tau=np.inf), [3, 4])
  np.testing.assert_allclose(p, np.tile([0.25, 0.25, 0, 0.25, 0.25], (2, 1)), rtol=1e-6)
  # Equal sizes: none is above the mean, and one has to start.
  p = read(mixing.order_matters([7, 7], switch_step=4), [3, 4])
  np.testing.assert_allclose(p, [[1, 0], [0.5, 0.5]], rtol=1e-6)


def test_order_matters_drawn_naturally_silences_the_small_groups():
  p, r = mixing.order_matters(SIZES, switch_step=4, draw="natural").weights((), 0)
  np.testing.assert_allclose(mixing.importance_weights(p, r), [1 / 0.9, 0, 0], rtol=1e-5)


def test_staged_normalises_and_switches():
  mixer = mixing.staged([[2, 2, 0], [1, 0, 3], [0, 0, 5]], [3, 6], SIZES)
  expected = [[0.5, 0.5, 0], [0.25, 0, 0.75], [0, 0, 1]]
  np.testing.assert_allclose(read(mixer, [2, 3, 5, 6]), np.array(expected)[[0, 1, 1, 2]], rtol=1e-6)
  np.testing.assert_allclose(read(mixing.staged([[1, 1, 2]], [], SIZES), [9]), [[0.25, 0.25, 0.5]])


def test_staged_is_the_same_inside_jit():
  def p_of(share, boundary, step):
    mixtures = [[2.0, 2.0, 0.0], [share, 0.0, 3.0], jnp.array([1.0, 1.0, share])]
    return mixing.staged(mixtures, [boundary, boundary + 1], SIZES).weights((), step)[0]

  traced = jax.jit(jax.vmap(p_of, in_axes=(None, None, 0)))(1.0, 3, jnp.arange(2, 5))
  expected = [[0.5, 0.5, 0], [0.25, 0, 0.75], [1 / 3, 1 / 3, 1 / 3]]
  np.testing.assert_allclose(traced, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: mixing.cooldown(SIZES, switch_step=-1), "switch_step is -1"),
    (lambda: mixing.cooldown(SIZES, switch_step=1, tau_hi=0), "tau_hi is 0"),
    (lambda: mixing.cooldown(SIZES, switch_step=1, tau_lo=np.nan), "tau_lo is nan"),
    (lambda: mixing.piecewise_tau([1], [1.0]), "values has 1 entries and boundaries 1"),
    (lambda: mixing.piecewise_tau([1], [1.0, -2.0]), r"values is -2\.0"),
    (lambda: mixing.piecewise_tau([2, 2], [1, 2, 3]), r"boundaries must increase, got \[2, 2\]"),
    (lambda: mixing.piecewise_tau([2, np.nan], [1, 2, 3]), "boundaries must increase"),
    (lambda: mixing.decay_tau("square", start=1, end=2, num_steps=3), "shape is 'square'"),
    (lambda: mixing.decay_tau("linear", start=np.inf, end=2, num_steps=3), "start is inf"),
    (lambda: mixing.decay_tau("linear", start=1, end=0, num_steps=3), "end is 0"),
    (lambda: mixing.decay_tau("linear", start=1, end=2, num_steps=0), "num_steps is 0"),
    (lambda: mixing.temperature_warmup(SIZES, warmup_steps=0), "warmup_steps is 0"),
    (lambda: mixing.temperature_warmup(SIZES, warmup_steps=1, tau_start=0), "tau_start is 0"),
    (lambda: mixing.temperature_warmup(SIZES, warmup_steps=1, tau_end=np.inf), "tau_end is inf"),
    (lambda: mixing.tau_schedule([-1, 2], lambda step: 1.0), "sizes must be >= 0"),
    (lambda: mixing.order_matters(SIZES, switch_step=-1), "switch_step is -1"),
    (lambda: mixing.order_matters(SIZES, switch_step=1, num_high=4), r"num_high is 4; .*\[1, 3\]"),
    (lambda: mixing.order_matters(SIZES, switch_step=1, num_high=1.5), r"num_high is 1\.5"),
    (lambda: mixing.order_matters(SIZES, switch_step=1, tau=0), "tau is 0"),
    (lambda: mixing.staged([[1, 1, 1]], [3], SIZES), "mixtures has 1 entries and boundaries 1"),
    (lambda: mixing.staged([[1, 1]], [], SIZES), r"mixtures has shape \(2,\); expected \(3\)"),
    (lambda: mixing.staged([[1, 1, -1]], [], SIZES), "mixtures must be >= 0"),
    (lambda: mixing.staged([[1, 0, 0]] * 3, [5, 3], SIZES), r"boundaries must increase, got \[5, "),
    (lambda: mixing.staged([[1, 1]], [], [1, 0]), "mixtures is 1 at 1, a group of size 0"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
