"""Sweeps: every way to map the runs gives what each run gives alone, in one compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balance_jax import mixing, training
from balance_jax.training.sweep_runs import SweepRuns, run_sweep
from tests.training.problems import init_params, make_table, per_example_loss

TABLE = make_table()
MIXERS = (
  mixing.temperature(TABLE.sizes, 5.0),
  mixing.temperature(TABLE.sizes, 5.0, draw="optimal"),
  mixing.cooldown(TABLE.sizes, switch_step=3, draw="natural"),
)
CELLS = [
  *training.product(method=[0, 1, 2], rate=[0.1], seed=[3]),
  {"method": 0, "rate": 0.5, "seed": 4},
]


def build(cell):
  mixer = mixing.select(MIXERS, cell["method"])
  return training.make_step(
    per_example_loss, optax.sgd(cell["rate"]), mixer, TABLE, batch_size=8, measure_every=3
  )


def init(cell, step):
  return training.init_state(jax.random.key(cell["seed"]), init_params(), step)


@pytest.fixture(scope="module")
def alone():
  """Every cell by `run`, with its own mixer instead of the selected one."""
  results = []
  for cell in CELLS:
    step = training.make_step(
      per_example_loss, optax.sgd(cell["rate"]), MIXERS[cell["method"]], TABLE,
      batch_size=8, measure_every=3,
    )  # fmt: skip
    state = training.init_state(jax.random.key(cell["seed"]), init_params(), step)
    results.append(training.run(step, state, 6, chunk=3))
  return results


@pytest.mark.parametrize("how", ["vmap", "map", "shard"])
def test_all_ways_equal_single_runs(how, alone):
  runs = SweepRuns(build, init, CELLS, TABLE, how=how, devices=jax.devices()[:3])
  assert len(runs.plan.devices) == (3 if how == "shard" else 1)  # 4 runs on 3 devices: padded
  states, history = run_sweep(runs, 6, chunk=3)
  assert history["loss"].shape == (4, 6)
  for index, (state, single) in enumerate(alone):
    np.testing.assert_allclose(history["loss"][index], single["loss"], rtol=1e-5)
    np.testing.assert_allclose(
      history["mixture"]["r"][index], single["mixture"]["r"], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(states.params["w"][index], state.params["w"], rtol=1e-4, atol=1e-6)
  assert runs._programs[("advance", 3)]._cache_size() == 1  # one program for all cells


def test_apply_measures_every_run():
  runs = SweepRuns(build, init, CELLS, TABLE, how="map")

  def norm(step, state, shared):
    return jnp.sqrt(jnp.sum(state.params["w"] ** 2)) * shared

  values = runs.apply(norm, runs.init(), jnp.float32(2.0))
  np.testing.assert_allclose(values, 2 * np.linalg.norm(init_params()["w"]) * np.ones(4), rtol=1e-6)


def test_measurements_stay_a_branch_under_vmap():
  """Work done every n-th step must not become work of every step when runs are batched."""
  runs = SweepRuns(build, init, CELLS, TABLE, how="vmap")
  states = runs.init()
  runs.advance(states, 2)
  text = str(
    jax.make_jaxpr(lambda c, s, t: runs.plan.map(runs_fn(runs))((c, s), (t, s.step[0])))(
      runs.cells, runs.init(), TABLE
    )
  )
  assert "cond[" in text


def runs_fn(runs):
  return lambda run, shared: runs._advance_one((*run, ()), shared, 2)


def test_sweep_maps_any_function():
  def fn(cell, shared):
    return {"y": cell["a"] * shared + cell["b"]}

  cells = training.zip_(a=[1.0, 2.0, 3.0], b=[0.5, 0.25, 0.125])
  for how in ("auto", "vmap", "map", "shard"):
    out = training.sweep(fn, cells, shared=jnp.float32(10.0), how=how)
    np.testing.assert_allclose(out["y"], [10.5, 20.25, 30.125])


def test_lists_of_cells():
  assert training.chain(training.product(a=[1, 2], b=[3]), [{"a": 9, "b": 9}]) == [
    {"a": 1, "b": 3}, {"a": 2, "b": 3}, {"a": 9, "b": 9},
  ]  # fmt: skip


def test_divergence_names_the_run():
  runs = SweepRuns(build, init, [*CELLS, {"method": 0, "rate": jnp.inf, "seed": 0}], TABLE)
  with pytest.raises(training.TrainingDivergedError, match="run 4 is not finite at step 1"):
    run_sweep(runs, 4, chunk=2)


def test_bad_arguments():
  for call, message in (
    (lambda: training.zip_(a=[1], b=[1, 2]), "one length"),
    (lambda: training.stack_cells([]), "cells is empty"),
    (lambda: training.stack_cells([{"a": 1}, {"b": 1}]), "same keys"),
    (lambda: training.sweep(lambda c, s: c, {"a": jnp.ones(2), "b": jnp.ones(3)}), "one leading"),
    (lambda: training.sweep(lambda c, s: c, [{"a": 1}], how="vmapp"), "did you mean 'vmap'"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
