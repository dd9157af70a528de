"""Delayed draws: r is known in advance, p is not delayed, and a delay of one step is none."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import mixing

SIZES = [600, 300, 100]


def loss_driven(needs=("group_loss",)):
  """p and r follow the running sum of the group losses."""

  def target(state, step):
    del step
    return jax.nn.softmax(state)

  return mixing.make_mixer(
    target,
    SIZES,
    init=lambda key: jax.random.normal(key, (3,)),
    update=lambda state, seen: state + seen["group_loss"],
    needs=needs,
  )


def trace(mixer, observations):
  """p and r of every step, and the states before them."""
  state, weights, states = mixer.init(jax.random.key(0)), [], []
  for step, observed in enumerate(observations):
    weights.append(mixer.weights(state, step))
    states.append(state)
    state = mixer.update(state, {"group_loss": observed})
  p, r = (np.stack(x) for x in zip(*weights, strict=True))
  return p, r, states


OBSERVED = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)


@pytest.mark.parametrize("delay", [1, 2, 7])
def test_r_comes_late_and_p_does_not(delay):
  p, r, _ = trace(loss_driven(), OBSERVED)
  delayed_p, delayed_r, _ = trace(mixing.delayed(loss_driven(), delay), OBSERVED)
  np.testing.assert_array_equal(delayed_p, p)
  # Before the first observation can have reached it, r is that of the initial state.
  late = delay - 1
  np.testing.assert_allclose(delayed_r[late:], r[: len(r) - late], rtol=1e-6)
  np.testing.assert_allclose(delayed_r[: late + 1], np.broadcast_to(r[0], (delay, 3)), rtol=1e-6)
  assert np.abs(np.diff(delayed_r[late:], axis=0)).min(axis=0).max() > 0  # and then it moves


def test_a_state_foresees_the_draws():
  mixer = mixing.delayed(loss_driven(), 5)
  assert mixer.foreseen == 5
  _, r, states = trace(mixer, OBSERVED)
  for step, state in enumerate(states[:-5]):
    seen = [mixer.weights(state, step + ahead)[1] for ahead in range(5)]
    np.testing.assert_array_equal(seen, r[step : step + 5])
    assert np.any(mixer.weights(state, step + 5)[1] != r[step + 5])


def test_schedules_are_not_delayed():
  def target(state, step):
    return jnp.where(step < 6, jnp.array([0.8, 0.1, 0.1]), jnp.array([0.1, 0.1, 0.8]))

  mixer = mixing.make_mixer(target, SIZES, draw="optimal")
  state = mixing.delayed(mixer, 4).init(jax.random.key(0))
  for step in range(12):
    expected = mixer.weights(mixer.init(jax.random.key(0)), step)[1]
    np.testing.assert_allclose(mixing.delayed(mixer, 4).weights(state, step)[1], expected)
    state = mixing.delayed(mixer, 4).update(state, {})


def test_what_is_foreseen():
  static, positions = mixing.temperature(SIZES, 5.0), mixing.unimax(SIZES, mode="online")
  learning = mixing.delayed(loss_driven(), 9)
  both = loss_driven(needs=("group_loss", "epochs_seen"))
  assert mixing.delayed(static, 9) is static
  assert static.foreseen == positions.foreseen == math.inf
  assert (both.foreseen, loss_driven().foreseen) == (1, 1)
  assert mixing.select([static, static]).foreseen == math.inf
  assert mixing.select([static, learning]).foreseen == 9
  # Beside a rule that learns, positions are not followed, so they count as learnt.
  assert mixing.select([positions, learning]).foreseen == 1


def test_under_jit_and_vmap():
  mixer = mixing.delayed(loss_driven(), 3)

  def run(key, observed):
    def body(carry, seen):
      state, step = carry
      r = mixer.weights(state, step)[1]
      return (mixer.update(state, {"group_loss": seen}), step + 1), r

    return jax.lax.scan(body, (mixer.init(key), 0), observed)[1]

  keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
  several = jax.jit(jax.vmap(run, in_axes=(0, None)))(keys, OBSERVED)
  np.testing.assert_allclose(several[0], trace(mixer, OBSERVED)[1], rtol=1e-6)
  assert np.any(several[0] != several[1])


@pytest.mark.parametrize("delay", [0, -1, 2.0, True])
def test_bad_delay(delay):
  with pytest.raises(ValueError, match="delay"):
    mixing.delayed(loss_driven(), delay)
