"""A mixer whose draw is settled some steps before it is made, so that rows can be read in advance.

What a rule learns from the training moves p at once and r only `delay` steps later. The loss
weight of an example is p / r with the r it was really drawn by, so the objective stays the
rule's p of the moment; the delay costs variance alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.mixing.mixer import Mixer


class DelayedState(NamedTuple):
  """State of `delayed`."""

  rule: Any
  draws: jax.Array  # float (delay, K); row t % delay is the r of step t, for the next `delay` steps
  step: jax.Array  # int32 scalar, steps taken


def delayed(mixer: Mixer, delay: int) -> Mixer:
  """The mixer with an r that its observations reach after `delay` steps; p is not delayed.

  Schedules are not delayed either: the r of step t is what the rule's state of step t - delay says
  of step t. A rule that draws nothing of a group (r = 0) cannot count it (p > 0) until `delay`
  steps later, as with any draw.

  Args:
    mixer: any mixer. One that learns nothing is returned as it is.
    delay: steps, >= 1; 1 is the mixer itself. A run with a `data.GroupReader` reads ahead if it is
      at least two of its chunks.

  Returns:
    The `Mixer`.

  Raises:
    ValueError: if delay is out of range.

  >>> from balance_jax import mixing
  >>> mixer = mixing.delayed(mixing.temperature([80, 20], 5.0, draw="optimal"), 200)
  >>> mixer.delay, sorted(mixer.needs)
  (200, ['group_second_moment'])
  """
  _checks.check_number("delay", delay, low=1, integer=True)
  if not mixer.needs:
    return mixer

  def init(key):
    rule = mixer.init(key)
    draws = jax.vmap(lambda step: mixer.weights(rule, step)[1])(jnp.arange(delay))
    return DelayedState(rule, draws, jnp.zeros((), jnp.int32))

  def weights(state, step):
    return mixer.weights(state.rule, step)[0], state.draws[step % delay]

  def update(state, observation):
    rule = mixer.update(state.rule, observation)
    _, r = mixer.weights(rule, state.step + delay)
    # The place of the step just taken is that of the step `delay` later.
    return DelayedState(rule, state.draws.at[state.step % delay].set(r), state.step + 1)

  return Mixer(init, weights, update, mixer.needs, int(delay))
