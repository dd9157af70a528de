import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import mixing
from balance_jax.mixing.mixer import FLOOR, MOMENT_DECAY, draw_between

SIZES = [6000, 300, 40, 0]
NATURAL = np.array(SIZES) / np.sum(SIZES)
ARGUMENTS = {
  "capped": {"cap": 100},
  "cooldown": {"switch_step": 5},
  "fixed": {"p": [0.2, 0.3, 0.5, 0.0]},
  "order_matters": {"switch_step": 5},
  "proportional": {},
  "staged": {"mixtures": [[1, 1, 1, 0], [1, 2, 0, 0]], "boundaries": [5]},
  "tau_schedule": {
    "schedule": mixing.decay_tau("exponential", start=5.0, end=0.5, num_steps=9),
  },
  "temperature": {"tau": 3.0},
  "temperature_warmup": {"warmup_steps": 7},
  "uniform": {},
  "unimax": {"mode": "online"},
}
OBSERVED = {
  "epochs_seen": jnp.array([0.1, 0.2, 1.0, 0.0]),
  "group_second_moment": jnp.array([1e-4, 1.0, 400.0, 0.0]),
}
DRAWS = (*mixing.DRAWS, 0.0, 0.3, 1.0)


def constant(p):
  return lambda state, step: jnp.asarray(p)


def test_by_hand():
  p = [0.5, 0.5]
  expected = {"target": p, "natural": [0.8, 0.2], "optimal": p, 0.5: [2 / 3, 1 / 3]}
  for draw, r in expected.items():
    mixer = mixing.make_mixer(constant(p), [80, 20], draw=draw)
    weights = mixer.weights(mixer.init(None), 0)
    np.testing.assert_allclose(weights[0], p, rtol=1e-6)
    np.testing.assert_allclose(weights[1], r, rtol=1e-6)


def test_every_mixer_and_draw_is_on_the_simplex_and_unbiased():
  assert set(ARGUMENTS) == set(mixing.MIXERS), "a mixer is missing in ARGUMENTS"
  mixers = {
    (name, draw): mixing.MIXERS[name](sizes=SIZES, draw=draw, **arguments)
    for name, arguments in ARGUMENTS.items()
    for draw in DRAWS
  }

  def read_out(step):  # at the start and after two updates
    def one(mixer):
      state = mixer.init(jax.random.key(0))
      updated = mixer.update(mixer.update(state, OBSERVED), OBSERVED)
      return mixer.weights(state, step), mixer.weights(updated, step)

    return [one(mixer) for mixer in mixers.values()]

  steps = [0, 4, 5, 100]
  compiled = dict(zip(mixers, jax.jit(jax.vmap(read_out))(jnp.array(steps)), strict=True))
  for key, pairs in compiled.items():
    for p, r in pairs:
      for vector in (p, r):
        assert vector.shape == (4, 4)
        assert vector.dtype == jnp.float32
        assert np.all(np.asarray(vector) >= 0), key
        np.testing.assert_allclose(vector.sum(axis=1), 1.0, rtol=2e-6, err_msg=str(key))
      weights = jax.vmap(mixing.importance_weights)(p, r)
      # What is optimised does not depend on what is drawn: r * (p / r) = p, with sum 1.
      np.testing.assert_allclose(r * weights, p, rtol=1e-5, err_msg=str(key))
      assert np.all(np.asarray(p[:, 3]) == 0), key
  for name in ARGUMENTS:
    for draw, expected in ((0.0, "natural"), (1.0, "target")):
      for found, wanted in zip(compiled[name, draw], compiled[name, expected], strict=True):
        # Where p is 0, a > 0 draws nothing and a = 0 is natural all the same.
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, err_msg=name)
  for name in ("cooldown", "unimax"):  # jit and vmap change nothing
    mixer = mixers[name, 0.3]
    for i, step in enumerate(steps):
      alone = mixer.weights(mixer.init(None), step)
      for found, wanted in zip(compiled[name, 0.3][0], alone, strict=True):
        np.testing.assert_allclose(found[i], wanted, rtol=1e-6)


def test_draw_between_moves_monotonically_from_natural_to_target():
  p, natural = np.array([0.1, 0.2, 0.7]), np.array([0.9, 0.09, 0.01])
  exponents = np.linspace(0.0, 1.0, 11)
  draws = jax.vmap(lambda a: draw_between(jnp.asarray(p), jnp.asarray(natural), a))(exponents)
  for a, r in zip(exponents, draws, strict=True):
    expected = p**a * natural ** (1 - a)
    np.testing.assert_allclose(r, expected / expected.sum(), rtol=1e-5)
  assert np.all(np.diff(draws[:, 0]) < 0)  # p / q is least in the first group, largest in the last
  assert np.all(np.diff(draws[:, 2]) > 0)


def test_traced_draw_equals_concrete():
  def r_of(a):
    return mixing.temperature(SIZES, 5.0, draw=a).weights((), 0)[1]

  traced = jax.jit(jax.vmap(r_of))(jnp.array([0.0, 0.25, 1.0]))
  for a, r in zip((0.0, 0.25, 1.0), traced, strict=True):
    np.testing.assert_allclose(r, r_of(a), rtol=1e-6)


def test_optimal_draw_follows_the_running_second_moment():
  p = np.array([0.5, 0.3, 0.2])
  mixer = mixing.make_mixer(constant(jnp.asarray(p)), [5, 4, 1], draw="optimal")
  assert mixer.needs == {"group_second_moment"}
  measured = [np.array([1.0, 4.0, 9.0]), np.array([9.0, 16.0, 1.0]), np.array([2.0, 2.0, 2.0])]
  state, running = mixer.init(None), None
  np.testing.assert_allclose(mixer.weights(state, 0)[1], p, rtol=1e-6)
  for i, moment in enumerate(measured):
    state = mixer.update(state, {"group_second_moment": jnp.asarray(moment, jnp.float32)})
    state = mixer.update(state, {})  # steps without a measurement change nothing
    running = moment if i == 0 else MOMENT_DECAY * running + (1 - MOMENT_DECAY) * moment
    best = p * np.sqrt(running) / np.sum(p * np.sqrt(running))
    np.testing.assert_allclose(mixer.weights(state, 0)[1], 0.9 * best + 0.1 * p, rtol=1e-5)
    np.testing.assert_allclose(state.second_moment, running, rtol=1e-6)
    assert state.measurements == i + 1


def test_optimal_draw_bounds_the_loss_weights():
  mixer = mixing.make_mixer(constant([0.5, 0.5]), [5, 5], draw="optimal")
  state = mixer.update(mixer.init(None), {"group_second_moment": jnp.array([0.0, 1e8])})
  p, r = mixer.weights(state, 0)
  weights = mixing.importance_weights(p, r)
  assert FLOOR == 0.1
  np.testing.assert_allclose(weights, [10.0, 0.5 / 0.95], rtol=1e-5)
  np.testing.assert_allclose(r @ weights, 1.0, rtol=1e-6)


def test_optimal_draw_with_missing_groups():
  mixer = mixing.make_mixer(constant(jnp.full(3, 1 / 3)), [5, 5, 5], draw="optimal")

  def update(state, moment):
    return mixer.update(state, {"group_second_moment": jnp.array(moment)})

  nan = np.nan
  state = update(mixer.init(None), [nan, nan, nan])
  assert state.measurements == 0
  np.testing.assert_allclose(mixer.weights(state, 0)[1], np.full(3, 1 / 3), rtol=1e-6)
  state = update(state, [2.0, nan, 4.0])
  assert state.second_moment.tolist() == [2.0, 3.0, 4.0]  # the mean of the others
  state = update(state, [nan, 5.0, np.inf])
  assert state.second_moment.tolist() == [2.0, 4.0, 4.0]  # what is missing stays
  assert state.measurements == 2


def test_rule_is_called_only_with_all_it_needs():
  seen = []

  def update(state, observation):
    seen.append(sorted(observation))
    return state + 1

  for draw in ("target", "optimal"):
    mixer = mixing.make_mixer(
      constant([0.5, 0.5]),
      [1, 1],
      draw=draw,
      init=lambda key: 0,
      update=update,
      needs=["group_loss", "group_gram"],
    )
    assert {"group_loss", "group_gram"} <= mixer.needs
    state = mixer.update(mixer.init(None), {"group_loss": 1.0})
    state = mixer.update(state, {"group_loss": 1.0, "group_gram": 1.0})
    assert (state.rule if draw == "optimal" else state) == 1
  assert seen == [["group_gram", "group_loss"]] * 2


def test_select_under_vmap_equals_each_mixer_alone():
  mixers = [
    mixing.uniform(SIZES),
    mixing.cooldown(SIZES, switch_step=2, draw="natural"),
    mixing.unimax(SIZES, max_epochs=0.5, mode="online"),
    mixing.unimax(SIZES, max_epochs=0.5, mode="online", draw="optimal"),
  ]
  scale = jnp.arange(1.0, 5.0)[:, None]
  observations = {name: scale * value[None, :] for name, value in OBSERVED.items()}

  def train(mixer):
    def body(state, inputs):
      step, observation = inputs
      return mixer.update(state, observation), mixer.weights(state, step)

    return jax.lax.scan(body, mixer.init(jax.random.key(0)), (jnp.arange(4), observations))

  batched = jax.jit(jax.vmap(lambda index: train(mixing.select(mixers, index))))(jnp.arange(4))
  start = mixing.select(mixers).init(jax.random.key(0))
  for i, alone in enumerate(jax.jit(lambda: [train(mixer) for mixer in mixers])()):
    state, weights = jax.tree.map(lambda x, i=i: x[i], batched)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), weights, alone[1])
    assert state.index == i
    for j in range(len(mixers)):  # the other mixers do not move
      wanted = alone[0] if j == i else start.states[j]
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b), state.states[j], wanted)
  moved = batched[0].states[2][2]
  assert moved.tolist() == [True, False, False, False]
  assert mixing.select(mixers).needs == {"epochs_seen", "group_second_moment"}


def test_select_one_index():
  mixers = [mixing.uniform([30, 10]), mixing.proportional([30, 10])]
  for index, expected in ((0, 0.5), (1, 0.75)):
    mixer = mixing.select(mixers, index)
    assert mixer.weights(mixer.init(None), 0)[0][0] == expected


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: mixing.uniform([1, 1], draw="naturel"), "draw is 'naturel'.*did you mean 'natural'"),
    (lambda: mixing.uniform([1, 1], draw=1.5), r"draw is 1\.5; allowed: \[0, 1\]"),
    (lambda: mixing.uniform([1, 1], draw=None), "draw is None"),
    (lambda: mixing.make_mixer(constant([1.0]), [-1]), "sizes must be >= 0"),
    (lambda: mixing.make_mixer(constant([1.0]), [1], needs=["group_los"]), "needs is 'group_los'"),
    (lambda: mixing.select([]), "mixers is empty"),
    (lambda: mixing.select([mixing.uniform([1, 1])], 1), r"index is 1; allowed: \[0, 0\]"),
    (
      lambda: mixing.select([mixing.uniform([1, 1]), mixing.uniform([1, 1, 1])]),
      r"mixers have \[2, 3\] groups",
    ),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
