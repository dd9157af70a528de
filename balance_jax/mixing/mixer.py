"""The Mixer: a rule with state that says what is optimised (p) and what is drawn (r).

A mixer is a NamedTuple of functions, in the manner of an optax transformation:

  init(key) -> state                 arrays only
  weights(state, step) -> (p, r)     pure; both float (K,) on the simplex; step may be traced
  update(state, observation) -> state
  needs                              frozenset of the observations that `update` reads
  delay                              steps from an observation to the first r that it moves

The observations a training step can supply are named in `OBSERVATIONS`; only those in `needs` are
computed. `make_mixer` turns a rule for p alone into a mixer and adds the draw r, so every rule runs
as upsampling, as upweighting and as everything between.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.mixing.probabilities import natural_probs, optimal_sampling

OBSERVATIONS = {
  "group_loss": "float (K,): mean unweighted loss by group in the batch, 0 where it has no example",
  "group_count": "float (K,): number of examples by group in the batch",
  "epochs_seen": "float (K,): passes over each group since the start",
  "group_second_moment": "float (K,): measured E||grad l||^2 by group, now and then",
  "group_gram": "float (K, K): measured inner products of mean group gradients, now and then",
}
# These need gradients of their own, so a step measures them only every `measure_every` steps; the
# observation of the other steps lacks them. `make_mixer` calls a rule only with all it needs.
MEASURED = frozenset({"group_second_moment", "group_gram"})

DRAWS = ("target", "natural", "optimal")

# Share of p mixed into the variance-optimal draw. It bounds the loss weights p / r by 1 / FLOOR
# where a measured second moment is far too small.
FLOOR = 0.1
# Weight of the past in the running estimate of the second moments.
MOMENT_DECAY = 0.5


class Mixer(NamedTuple):
  """A mixing rule; see the module docstring for the contract of the fields."""

  init: Callable[[Any], Any]
  weights: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
  update: Callable[[Any, dict], Any]
  needs: frozenset[str] = frozenset()
  delay: int = 1

  @property
  def foreseen(self) -> float:
    """How many steps' r follow from a state before they are taken: `delay`, or infinity for a rule
    that learns nothing from the training. Positions in the data do not count as such."""
    return self.delay if self.needs - {"epochs_seen"} else math.inf


class MeasuredState(NamedTuple):
  """State of a mixer drawn with `draw="optimal"`."""

  rule: Any
  second_moment: jax.Array  # float (K,), running estimate; ones until the first measurement
  measurements: jax.Array  # int32 scalar


def _check_draw(draw) -> None:
  if isinstance(draw, str):
    _checks.check_choice("draw", draw, DRAWS)
  else:
    _checks.check_number("draw", draw, low=0.0, high=1.0)


def draw_between(p, natural, a) -> jax.Array:
  """The continuum r ~ p^a q^(1-a): a = 1 is upsampling, a = 0 upweighting; float (K,)."""
  mass = jnp.power(p, a) * jnp.power(natural, 1.0 - a)
  return mass / mass.sum()


def make_mixer(
  target: Callable[[Any, Any], jax.Array],
  sizes,
  *,
  draw: str | float = "target",
  init: Callable[[Any], Any] = lambda key: (),
  update: Callable[[Any, dict], Any] = lambda state, observation: state,
  needs: Iterable[str] = (),
) -> Mixer:
  """Builds a mixer from a rule for p and a choice of the draw.

  Args:
    target: target(state, step) -> p, float (K,) on the simplex; pure, traceable.
    sizes: numbers (K,), the group sizes; they define the natural draw.
    draw: "target" draws r = p with loss weight 1 (upsampling); "natural" draws r = q and weights
      by p / q (upweighting); "optimal" draws r ~ p * sqrt(G) with G measured during training; a
      number a in [0, 1], possibly traced, draws r ~ p^a q^(1-a).
    init: init(key) -> state of the rule. Without one the rule has no state.
    update: update(state, observation) -> state of the rule.
    needs: names out of `OBSERVATIONS` that `update` reads.

  Returns:
    The `Mixer`.

  >>> mixer = make_mixer(lambda state, step: jnp.array([0.5, 0.5]), [900, 100], draw="natural")
  >>> p, r = mixer.weights(mixer.init(None), 0)
  >>> [round(float(x), 2) for x in p / r]
  [0.56, 5.0]
  """
  _check_draw(draw)
  natural = natural_probs(sizes)
  needs = frozenset(needs)
  for name in sorted(needs):
    _checks.check_choice("needs", name, OBSERVATIONS)

  def update_when_served(state, observation):
    return update(state, observation) if needs <= observation.keys() else state

  if isinstance(draw, str) and draw == "optimal":
    return _optimal_mixer(target, natural.shape[0], init, update_when_served, needs)

  def weights(state, step):
    p = target(state, step)
    if isinstance(draw, str):
      return p, (p if draw == "target" else natural)
    return p, draw_between(p, natural, draw)

  return Mixer(init, weights, update_when_served, needs)


def _optimal_mixer(target, num_groups, init, update, needs) -> Mixer:
  def init_measured(key):
    ones = jnp.ones(num_groups, jnp.result_type(float))
    return MeasuredState(init(key), ones, jnp.zeros((), jnp.int32))

  def weights(state, step):
    p = target(state.rule, step)
    return p, (1.0 - FLOOR) * optimal_sampling(p, state.second_moment) + FLOOR * p

  def update_measured(state, observation):
    rule = update(state.rule, observation)
    if "group_second_moment" not in observation:
      return state._replace(rule=rule)
    measured = observation["group_second_moment"]
    first = state.measurements == 0
    known = jnp.isfinite(measured)
    # A group without an example is NaN in `GradientMoments`. It keeps its estimate; before there is
    # one it counts as the mean of the others, as the scale of G is arbitrary.
    typical = jnp.sum(jnp.where(known, measured, 0.0)) / jnp.maximum(known.sum(), 1)
    measured = jnp.where(known, measured, jnp.where(first, typical, state.second_moment))
    running = MOMENT_DECAY * state.second_moment + (1.0 - MOMENT_DECAY) * measured
    second_moment = jnp.where(first, measured, running)
    return MeasuredState(rule, second_moment, state.measurements + known.any())

  return Mixer(init_measured, weights, update_measured, needs | {"group_second_moment"})


def _num_groups(mixer: Mixer) -> int:
  def read_out():
    return mixer.weights(mixer.init(jax.random.key(0)), jnp.zeros((), jnp.int32))[0]

  return jax.eval_shape(read_out).shape[0]


class SelectState(NamedTuple):
  """State of `select`: which mixer speaks, and the states of all."""

  index: jax.Array  # int32 scalar
  states: tuple


def select(mixers: Iterable[Mixer], index=0) -> Mixer:
  """One mixer that behaves as the `index`-th of several; `index` may be traced.

  With it a sweep over methods is one compiled program: every run carries its own index. Only the
  chosen mixer's state is updated. The K of all mixers must agree.

  Args:
    mixers: at least one mixer.
    index: int scalar in [0, len(mixers)).

  Returns:
    The `Mixer`; it needs whatever one of them needs.
  """
  mixers = tuple(mixers)
  if not mixers:
    raise ValueError("mixers is empty; select needs at least one")
  _checks.check_number("index", index, low=0, high=len(mixers) - 1, integer=True)
  lengths = [_num_groups(mixer) for mixer in mixers]
  if len(set(lengths)) > 1:
    raise ValueError(f"mixers have {lengths} groups; expected the same number in all")

  def init(key):
    # One key for all is safe, as one mixer speaks; so each starts as it would alone.
    return SelectState(jnp.asarray(index, jnp.int32), tuple(mixer.init(key) for mixer in mixers))

  def weights(state, step):
    branches = [
      lambda i=i, mixer=mixer: mixer.weights(state.states[i], step)
      for i, mixer in enumerate(mixers)
    ]
    return jax.lax.switch(state.index, branches)

  def update(state, observation):
    def branch(i):
      updated = mixers[i].update(state.states[i], observation)
      return (*state.states[:i], updated, *state.states[i + 1 :])

    branches = [lambda i=i: branch(i) for i in range(len(mixers))]
    return state._replace(states=jax.lax.switch(state.index, branches))

  needs = frozenset().union(*(mixer.needs for mixer in mixers))
  delay = min((mixer.delay for mixer in mixers if mixer.needs), default=1)
  return Mixer(init, weights, update, needs, delay)
