"""State that a loss carries from step to step, against NumPy float64 and in every way to run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balance_jax import mixing, training
from balance_jax.losses import cross_entropy
from balance_jax.training.checkpoint import Checkpointer
from balance_jax.training.measure import evaluate, evaluation_batches, gradient_variance
from balance_jax.training.mesh import HOW
from balance_jax.training.sweep_runs import SweepRuns, run_sweep
from tests.training.problems import (
  CLASSES,
  FEATURES,
  init_params,
  make_problem,
  make_table,
  per_example_loss,
)
from tests.training.test_run import assert_same, copy

MOMENTUM, EPSILON = 0.8, 1e-3


def moments(hidden, where=None):
  """Mean and mean square over the valid rows; both linear in the rows."""
  where = jnp.ones(hidden.shape[0]) if where is None else where.astype(jnp.float32)
  hidden = jnp.where(where[:, None] > 0, hidden, 0.0)
  return {"mean": hidden.sum(axis=0) / where.sum(), "square": (hidden**2).sum(axis=0) / where.sum()}


def running_moments(momentum=MOMENTUM) -> training.Carried:
  """Exponential averages of the moments of the logits, before any scaling."""

  def update(state, observed, step):
    del step
    return jax.tree.map(
      lambda old, new: momentum * old + (1 - momentum) * new, state, observed["logits"]
    )

  start = {"mean": jnp.zeros(CLASSES), "square": jnp.ones(CLASSES)}
  return training.Carried(lambda key: start, update)


def normalize(x, stats):
  mean, square = stats["mean"][None], stats["square"][None]
  return (x - mean) / jnp.sqrt(square - mean**2 + EPSILON)


def batch_normalized_loss(params, rows, key, context):
  """As batch norm: the statistics of the rows in training, the running ones in evaluation."""
  logits = rows["x"] @ params["w"]
  stats = moments(logits, context.where)
  losses = cross_entropy(normalize(logits, stats), rows["y"])
  return losses, training.Observed(carried={"logits": stats})


def running_normalized_loss(params, rows, key, context):
  """Losses and observations linear in the rows, with the running statistics fed back."""
  logits = rows["x"] @ params["w"]
  observed = {"logits": moments(logits, context.where)}
  losses = cross_entropy(normalize(logits, context.carried), rows["y"])
  return losses, training.Observed({"x": rows["x"]}, carried=observed)


def make(loss=running_normalized_loss, carried=None, **kwargs):
  return make_problem(loss=loss, carried=carried or running_moments(), **kwargs)


def step_once(step, state):
  """One step on a batch drawn for it."""
  return jax.jit(lambda state, table: step(*step.draw(state, table), table))(state, step.table)


def reference_update(state, w, x):
  """float64: one update of the running moments by the rows x."""
  logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  new = {"mean": logits.mean(axis=0), "square": (logits**2).mean(axis=0)}
  return {k: MOMENTUM * state[k] + (1 - MOMENTUM) * new[k] for k in state}


def test_running_moments_of_a_normalising_loss():
  step, state = make(batch_normalized_loss, optimizer=optax.sgd(1.0))
  one = jax.jit(lambda state, batch: step(state, batch, step.table)[0])
  expected = {"mean": np.zeros(CLASSES), "square": np.ones(CLASSES)}
  for _ in range(4):
    drawn, batch = jax.jit(step.draw)(state, step.table)
    expected = reference_update(expected, state.params["w"], batch.rows["x"])
    state = one(drawn, batch)
    for name, value in expected.items():
      np.testing.assert_allclose(state.carried[name], value, rtol=1e-5, atol=1e-6)
  assert np.abs(expected["mean"]).max() > 0.01  # the test would see a state left as it was

  batches = evaluation_batches(step.table, rows_per_group=10, batch_size=8)
  found = evaluate(step, state, batches, running_normalized_loss).mean()
  rows = np.asarray(step.table.rows["x"], np.float64)[[*range(10), *range(300, 310)]]
  labels = np.asarray(step.table.rows["y"])[[*range(10), *range(300, 310)]]
  std = np.sqrt(expected["square"] - expected["mean"] ** 2 + EPSILON)
  scores = (rows @ np.asarray(state.params["w"], np.float64) - expected["mean"]) / std
  losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(20), labels]
  np.testing.assert_allclose(found, [losses[:10].mean(), losses[10:].mean()], rtol=1e-5)


def test_parts_of_a_batch_carry_what_the_whole_batch_does():
  """Unequal weights, unequal numbers of valid rows, and one part without any."""
  step, state = make()
  drawn, batch = jax.jit(step.draw)(state, step.table)
  where = np.arange(16) % 3 > 0
  where[4:8] = False
  rows = {**batch.rows, "x": jnp.where(where[:, None], batch.rows["x"], jnp.nan)}
  batch = dataclasses.replace(batch, rows=rows, where=jnp.asarray(where))
  expected = reference_update(
    jax.device_get(state.carried), state.params["w"], np.asarray(rows["x"])[where]
  )
  for parts in (1, 4):
    split = dataclasses.replace(step, micro_batches=parts)
    after, _ = jax.jit(split)(drawn, batch, step.table)
    for name, value in expected.items():
      np.testing.assert_allclose(after.carried[name], value, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def single_device():
  step, state = make(optimizer=optax.adam(0.1), micro_batches=2)
  return step, state, *training.run(step, copy(state), 6, chunk=3)


@pytest.mark.parametrize("how", HOW)
def test_eight_devices_carry_what_one_does(how, single_device):
  step, state, after, history = single_device
  assert jax.device_count() == 8
  result, parallel = training.run(training.data_parallel(step, how), copy(state), 6, chunk=3)
  assert_same(result.carried, after.carried, rtol=1e-5, atol=1e-6)
  assert_same(result.params, after.params, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(parallel["loss"], history["loss"], rtol=1e-5)


def test_a_loss_sees_the_step_number():
  """With gradient 0, rate 1 and weights 1, the mean loss is the step itself."""

  def loss(params, rows, key, context):
    assert context.carried == ()
    losses = jnp.zeros_like(rows["x"][:, 0]) + 0.0 * params["w"].sum() + context.step
    return losses, training.Observed({"next": losses + 1.0})

  step, state = make(loss, training.Carried(), mixer=mixing.proportional(make_table().sizes))
  state, history = training.run(step, state, 5, chunk=2)
  np.testing.assert_array_equal(history["loss"], np.arange(5))
  np.testing.assert_array_equal(history["observed"]["next"], 1 + np.arange(5))
  assert state.carried == ()


def test_the_rule_sees_key_and_step():
  def update(state, observed, step):
    assert observed == {}
    return {**state, "steps": state["steps"].at[step].set(step), "number": 0.25}

  def init(key):
    return {"noise": jax.random.normal(key), "steps": jnp.full(4, -1), "number": 0.5, "key": key}

  step, state = make(lambda *args: per_example_loss(*args[:3]), training.Carried(init, update))
  _, other = make(carried=training.Carried(init, update), seed=1)
  after, _ = training.run(step, copy(state), 3, chunk=1)
  assert step.compiled_advance._cache_size() == 1  # a Python number has the type of an array
  np.testing.assert_array_equal(after.carried["steps"], [0, 1, 2, -1])
  assert after.carried["noise"] == state.carried["noise"] != other.carried["noise"]


TABLE = make_table()
CELLS = training.product(momentum=[0.5, 0.9], seed=[0, 1])[:3]


def build_cell(cell):
  return training.make_step(
    running_normalized_loss, optax.sgd(0.3), mixing.uniform(TABLE.sizes), TABLE,
    batch_size=8, metrics=("loss",), carried=running_moments(cell["momentum"]),
  )  # fmt: skip


def init_cell(cell, step):
  return training.init_state(jax.random.key(cell["seed"]), init_params(), step)


@pytest.fixture(scope="module")
def single_runs():
  steps = map(build_cell, CELLS)
  pairs = zip(CELLS, steps, strict=True)
  return [training.run(step, init_cell(cell, step), 4, chunk=2) for cell, step in pairs]


@pytest.mark.parametrize("how", ["vmap", "shard"])
def test_runs_of_a_sweep_carry_what_single_runs_do(how, single_runs):
  runs = SweepRuns(build_cell, init_cell, CELLS, TABLE, how=how, devices=jax.devices()[:2])
  states, history = run_sweep(runs, 4, chunk=2)
  for index, (state, single) in enumerate(single_runs):
    np.testing.assert_allclose(history["loss"][index], single["loss"], rtol=1e-5)
    for name, value in state.carried.items():
      np.testing.assert_allclose(states.carried[name][index], value, rtol=1e-5, atol=1e-6)


def test_a_saved_run_goes_on_exactly(tmp_path):
  step, state = make(optimizer=optax.adam(0.1))
  whole, history = training.run(step, copy(state), 6, chunk=3)
  state, first = training.run(step, state, 3, chunk=3)
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(3, state)
  with Checkpointer(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore(jax.eval_shape(lambda: state))
  after, second = training.run(step, restored, 3, chunk=3)
  assert_same(whole, after)
  np.testing.assert_array_equal(history["loss"], np.concatenate([first["loss"], second["loss"]]))


def test_measurements_use_the_carried_state():
  """A loss scaled by its state has the moments of the same loss scaled by a constant."""

  def scaled(params, rows, key, context):
    return context.carried["scale"] * per_example_loss(params, rows, key)

  def fixed(params, rows, key):
    return 3.0 * per_example_loss(params, rows, key)

  mixer = mixing.temperature(make_table().sizes, 5.0, draw="optimal")
  carried = training.Carried(lambda key: {"scale": jnp.float32(3.0)})
  found = []
  for loss, rule in ((scaled, carried), (fixed, None)):
    step, state = make_problem(mixer, loss=loss, carried=rule, metrics=())

    def measure(state, table, step=step):
      after, _ = step(*step.draw(state, table), table)
      return gradient_variance(step, state, table, examples=4, batches=3), after.mixer

    found.append(jax.jit(measure)(state, step.table))
  assert np.all(found[0][0]["second_moment"] > 0)
  assert_same(*found, rtol=1e-5, atol=1e-6)


def test_observations_of_a_rule_are_no_metrics_and_give_no_gradient():
  def plain(params, rows, key, context):
    return running_normalized_loss(params, rows, key, context)[0]

  reduced = {}
  for metrics in ((), ("observed", "loss")):
    step, state = make(metrics=metrics)
    reduced[metrics] = step_once(step, state)
  (silent, nothing), (after, shown) = reduced.values()
  assert nothing == {}
  assert list(shown["observed"]) == ["x"]
  assert_same(silent.carried, after.carried)
  assert not np.allclose(after.carried["mean"], 0.0, atol=1e-4)
  unobserved = dataclasses.replace(step, per_example_loss=plain, carried=training.Carried())
  assert_same(step_once(unobserved, state)[0].params, after.params)


def test_a_loss_without_carried_state_is_called_as_ever():
  calls = []

  def loss(*args):
    calls.append(len(args))
    return per_example_loss(*args)

  step, state = make_problem(loss=loss, metrics=("loss",))
  after, _ = step_once(step, state)
  batches = evaluation_batches(step.table, rows_per_group=4, batch_size=4)
  evaluate(step, after, batches)
  assert set(calls) == {3}
  assert after.carried == ()


def test_bad_arguments():
  with pytest.raises(ValueError, match=r"carried is \{'a': 1\}; expected a training.Carried"):
    make_problem(carried={"a": 1})

  def observing(observed):
    def loss(params, rows, key, context=None):
      return per_example_loss(params, rows, key), training.Observed(carried=observed(rows))

    return loss

  zero = {"mean": jnp.zeros(FEATURES), "square": jnp.zeros(FEATURES)}
  copying = training.Carried(lambda key: zero, lambda state, observed, step: observed["x"])
  for observed, message in (
    (lambda rows: {"n": {"y": rows["y"].sum()}}, r"carried\['n'\]\['y'\] is int32; expected a fl"),
    (
      lambda rows: {"x": {"mean": rows["x"].mean(axis=0)}},
      r"returned PyTreeDef.*expected .*'square'",
    ),
    (
      lambda rows: {"x": {"mean": rows["x"], "square": rows["x"]}},
      r"returned float32 \(16, 6\) at state\['mean'\]; expected float32 \(6,\)",
    ),
    (
      lambda rows: {"x": {"mean": zero["mean"], "square": 0.0}},
      r"returned float32 \(\) at state\['square'\]",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      step_once(*make(observing(observed), copying))
  with pytest.raises(ValueError, match=r"observes \['x'\] for a rule; give make_step its `carried"):
    step_once(*make_problem(loss=observing(lambda rows: {"x": rows["x"].mean(axis=0)})))
