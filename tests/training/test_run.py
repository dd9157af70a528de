"""Runs: chunks change nothing, stopping and going on changes nothing, NaN stops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balance_jax import mixing, training
from tests.training.problems import make_problem, make_table


def copy(state):
  """`run` donates its state, so every run of a comparison gets its own."""
  return jax.tree.map(jnp.copy, state)


def assert_same(a, b, **tolerance):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_allclose(x, y, **({"rtol": 0, "atol": 0} | tolerance))


def test_run_equals_a_python_loop_of_steps():
  step, state = make_problem(optimizer=optax.adam(1e-2))
  after, history = training.run(step, copy(state), 7, chunk=3)
  losses = []
  one = jax.jit(lambda state, table: step(*step.draw(state, table), table))
  for _ in range(7):
    state, metrics = one(state, step.table)
    losses.append(metrics["loss"])
  np.testing.assert_allclose(history["loss"], losses, rtol=1e-6)
  assert_same(after, state, rtol=1e-5, atol=1e-6)
  assert history["mixture"]["p"].shape == (7, 2)


def test_the_chunk_length_changes_no_number():
  step, state = make_problem()
  whole, history = training.run(step, copy(state), 12, chunk=12)
  for chunk in (1, 5):
    parts, part_history = training.run(step, copy(state), 12, chunk=chunk)
    assert_same(whole, parts, rtol=1e-6, atol=1e-7)
    assert_same(history, part_history, rtol=1e-6, atol=1e-6)


def test_stopping_and_going_on_is_exact():
  table = make_table()
  mixer = mixing.cooldown(table.sizes, switch_step=6, draw="optimal")
  step, state = make_problem(mixer, table=table, measure_every=5, optimizer=optax.adam(1e-2))
  whole, history = training.run(step, copy(state), 12, chunk=4)
  state, first = training.run(step, state, 4, chunk=4)
  state, second = training.run(step, state, 8, chunk=4)
  assert_same(whole, state)
  np.testing.assert_array_equal(history["loss"], np.concatenate([first["loss"], second["loss"]]))


def test_another_run_compiles_nothing():
  step, state = make_problem()
  state, _ = training.run(step, state, 4, chunk=2)
  state, _ = training.run(step, state, 6, chunk=2)
  assert step.compiled_advance._cache_size() == 1


def test_on_chunk_sees_state_and_metrics():
  step, state = make_problem()
  seen = []
  training.run(
    step, state, 5, chunk=2,
    on_chunk=lambda state, metrics: seen.append((int(state.step), len(metrics["loss"]))),
  )  # fmt: skip
  assert seen == [(2, 2), (4, 2), (5, 1)]


def test_divergence_names_the_first_bad_step():
  def schedule(count):
    return jnp.where(count == 4, jnp.nan, 0.1)  # the update of step 4 ruins the loss of step 5

  step, state = make_problem(optimizer=optax.sgd(schedule))
  with pytest.raises(training.TrainingDivergedError, match="loss is not finite at step 5") as error:
    training.run(step, copy(state), 9, chunk=3)
  assert error.value.step == 5
  _, history = training.run(step, state, 9, chunk=3, allow_divergence=True)
  assert np.isnan(history["loss"][5:]).all()
  assert np.isfinite(history["loss"][:5]).all()


def test_bad_arguments():
  step, state = make_problem()
  with pytest.raises(ValueError, match="num_steps is 0"):
    training.run(step, state, 0)
  with pytest.raises(ValueError, match="chunk is 0"):
    training.run(step, state, 1, chunk=0)
