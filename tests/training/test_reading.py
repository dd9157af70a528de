"""Runs whose rows the host reads: the batches and numbers of a device table, whatever the mixer."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balance_jax import data, mixing, training
from balance_jax.training.checkpoint import Checkpointer
from balance_jax.training.reading import _place, advance_on, plan_rows, sampler_of
from tests.training.problems import make_problem, make_table, per_example_loss
from tests.training.test_run import assert_same, copy

TABLE = make_table((300, 20, 70))
SECONDS = ("data_seconds", "compute_seconds")


class Recorder(data.GroupReader):
  """Keeps what it has read, and may take its time."""

  def __init__(self, table=TABLE, pause=0.0, **arguments):
    self.read, self.pause = [], pause
    super().__init__(groups_of(table), **arguments)

  def take(self, groups, indices):
    rows = super().take(groups, indices)
    self.read.append(rows)
    time.sleep(self.pause)
    return rows


def groups_of(table):
  parts = zip(table.names, table.offsets, table.group_sizes, strict=True)
  return {
    name: jax.tree.map(lambda x, i=start, n=size: np.asarray(x)[i : i + n], table.rows)
    for name, start, size in parts
  }


def follow_loss(sizes):
  """A mixer that learns: p and r go to the groups whose loss is high, from one step to the next."""
  return mixing.make_mixer(
    lambda state, step: jax.nn.softmax(state),
    sizes,
    init=lambda key: jnp.zeros(len(sizes)),
    update=lambda state, seen: 0.7 * state + seen["group_loss"],
    needs=("group_loss",),
  )


MIXERS = {
  "temperature": lambda n: mixing.temperature(n, 5.0),
  "cooldown": lambda n: mixing.cooldown(n, switch_step=6),
  "unimax": lambda n: mixing.unimax(n, mode="online", max_epochs=2.0),
  "delayed": lambda n: mixing.delayed(follow_loss(n), 8),
  "optimal": lambda n: mixing.delayed(mixing.temperature(n, 5.0, draw="optimal"), 8),
  "selected": lambda n: mixing.select([mixing.uniform(n), mixing.delayed(follow_loss(n), 8)], 1),
}


def device_batches(step, state, num_steps):
  """The batches that a device table gives, rows (num_steps, B, ...), and the state after them."""

  @jax.jit
  def body(state, table):
    after, batch = step.draw(state, table)
    return step(after, batch, table)[0], batch

  batches = []
  for _ in range(num_steps):
    state, batch = body(state, step.table)
    batches.append(batch)
  return jax.tree.map(lambda *x: np.stack(x), *batches), state


def assert_same_bytes(ours, expected):
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def recorded(reader, num_steps, batch=16):
  """Rows of the batches among what a reader has read, in the order of the steps."""
  chunks = [rows for rows in reader.read if np.shape(rows["y"])[1] == batch]
  rows = jax.tree.map(lambda *x: np.concatenate(x), *chunks)
  assert len(rows["y"]) == num_steps
  return rows


@pytest.mark.parametrize("name", MIXERS)
def test_batches_are_those_of_the_table(name):
  kwargs = {"measure_every": 3, "metrics": ("loss",)}
  step, state = make_problem(MIXERS[name](TABLE.sizes), table=TABLE, **kwargs)
  expected, last = device_batches(step, copy(state), 12)
  with Recorder(workers=5) as reader:
    step, state = make_problem(MIXERS[name](TABLE.sizes), table=reader, **kwargs)
    after, _ = training.run(step, state, 12, chunk=4)
    assert_same_bytes(recorded(reader, 12), expected.rows)
  assert_same((after.streams, after.step), (last.streams, last.step))
  # Programs of two shapes may round the losses differently, and with them what a mixer learns.
  assert_same(after, last, rtol=1e-4, atol=1e-5)


def test_history_and_random_quotas():
  step, state = make_problem(table=TABLE, allocation="multinomial")
  expected, _ = device_batches(step, state, 6)
  _, history = training.run(step, state, 6, chunk=6)
  reader = Recorder(workers=1)
  step, state = make_problem(table=reader, allocation="multinomial")
  _, read_history = training.run(step, state, 6, chunk=4)
  assert_same_bytes(recorded(reader, 6), expected.rows)
  for seconds in SECONDS:
    assert read_history.pop(seconds).shape == (6,)
  assert_same(read_history, history, rtol=1e-5, atol=1e-6)


def test_a_mixer_that_learns_is_exact_step_by_step_and_refused_in_chunks():
  step, state = make_problem(follow_loss(TABLE.sizes), table=TABLE)
  expected, _ = device_batches(step, state, 6)
  reader = Recorder()
  step, state = make_problem(follow_loss(TABLE.sizes), table=reader)
  training.run(step, copy(state), 6, chunk=1)
  assert_same_bytes(recorded(reader, 6), expected.rows)
  assert len(np.unique(expected.groups.sum(axis=1))) > 1  # the mixture did move
  with pytest.raises(ValueError, match=r"chunk is 3, .* after 1 steps; .*delay of 6 "):
    training.run(step, copy(state), 6, chunk=3)
  # What the refusal is for: further ahead, a plan would be wrong.
  plan = plan_rows(step, sampler_of(state), 6)
  assert_same_bytes(plan.groups[0], expected.groups[0])
  assert np.any(np.asarray(plan.groups) != expected.groups)


def test_a_delay_of_one_chunk_is_exact_too():
  mixer = mixing.delayed(follow_loss(TABLE.sizes), 4)
  step, state = make_problem(mixer, table=TABLE)
  expected, _ = device_batches(step, state, 12)
  reader = Recorder()
  step, state = make_problem(mixer, table=reader)
  training.run(step, state, 12, chunk=4)
  assert_same_bytes(recorded(reader, 12), expected.rows)


def test_slices_of_hosts_make_the_batch():
  step, state = make_problem(table=TABLE)
  _, whole = jax.jit(step.draw)(state, TABLE)
  reader = data.GroupReader(groups_of(TABLE))
  slices = [step.draw(state, reader, part=(i, 4))[1] for i in range(4)]
  assert {len(part.groups) for part in slices} == {4}
  assert_same_bytes(jax.tree.map(lambda *x: np.concatenate(x), *slices), whole)


def test_stopping_and_going_on_is_exact(tmp_path):
  mixer = mixing.delayed(mixing.cooldown(TABLE.sizes, switch_step=6, draw="optimal"), 8)
  kwargs = {"measure_every": 5, "optimizer": optax.adam(1e-2), "metrics": ("loss",)}
  step, state = make_problem(mixer, table=Recorder(), **kwargs)
  whole, history = training.run(step, copy(state), 12, chunk=4)
  with Checkpointer(tmp_path) as checkpoints:
    state, first = training.run(step, state, 4, chunk=4)
    checkpoints.save(4, state)
  # Nothing but the checkpoint is left: another reader, another step, another process as it were.
  step, fresh = make_problem(mixer, table=Recorder(workers=1), **kwargs)
  with Checkpointer(tmp_path) as checkpoints:
    state, _ = checkpoints.restore(fresh)
  state, second = training.run(step, state, 8, chunk=4)
  assert_same(whole, state)
  np.testing.assert_array_equal(history["loss"], np.concatenate([first["loss"], second["loss"]]))


def test_a_damaged_record_changes_its_row_only():
  class Damaged:
    def __init__(self, rows):
      self.rows = rows

    def __len__(self):
      return len(self.rows["y"])

    def __getitem__(self, index):
      if index == 7:
        raise OSError("unreadable")
      return jax.tree.map(lambda x: x[index], self.rows)

  groups = groups_of(TABLE)
  rows = jax.tree.map(np.array, groups["group1"])
  for x in jax.tree.leaves(rows):
    x[7] = x[8]
  mixer, kwargs = mixing.uniform(TABLE.sizes), {"metrics": ("loss",)}
  table = data.GroupTable.from_rows(groups | {"group1": rows})
  step, state = make_problem(mixer, table=table, **kwargs)
  expected, _ = training.run(step, state, 12, chunk=4)
  sources = groups | {"group1": Damaged(groups["group1"])}
  step, state = make_problem(mixer, table=data.GroupReader(sources, max_corrupt=1), **kwargs)
  with pytest.warns(UserWarning, match="record 7 of group 'group1'"):
    after, _ = training.run(step, state, 12, chunk=4)
  assert_same(after, expected, rtol=1e-6, atol=1e-7)
  step, state = make_problem(mixer, table=data.GroupReader(sources))
  with pytest.raises(data.CorruptedDataError, match="record 7 of group 'group1'"):
    training.run(step, state, 12, chunk=4)


def test_on_a_mesh_every_device_gets_its_rows():
  step, state = make_problem(table=TABLE)
  expected, history = training.run(step, copy(state), 8, chunk=4)
  mesh = training.data_mesh(4)
  reader = Recorder()
  step, state = make_problem(table=reader)
  spread = training.data_parallel(step, "jit", mesh)
  after, read_history = training.run(spread, training.replicate(copy(state), mesh), 8, chunk=4)
  assert_same(after, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(read_history["loss"], history["loss"], rtol=1e-5)
  plan = plan_rows(step, sampler_of(state), 4)
  rows = _place(
    lambda mine: TABLE.take(plan.groups[:, mine], plan.indices[:, mine]),
    (4, 16),
    jax.NamedSharding(mesh, jax.P(None, "data")),
  )
  for shard in rows["y"].addressable_shards:
    assert shard.data.shape == (4, 4)
  assert_same_bytes(rows, TABLE.take(plan.groups, plan.indices))


def test_reading_overlaps_with_computing():
  def slow_loss(params, rows, key):
    w = jax.lax.fori_loop(0, 60, lambda _, w: jnp.tanh(w @ jnp.eye(400)), jnp.ones((400, 400)))
    return per_example_loss(params, rows, key) + 0.0 * w.sum()

  step, state = make_problem(table=Recorder(), loss=slow_loss)
  state, history = training.run(step, state, 4, chunk=2)  # compiles
  chunk_seconds = 2 * history["compute_seconds"][-1]
  step.table.pause = chunk_seconds / 2
  start = time.perf_counter()
  _, history = training.run(step, state, 12, chunk=2)
  total = time.perf_counter() - start
  data_seconds, compute = (history[name] for name in SECONDS)
  assert data_seconds[0] * 2 >= step.table.pause  # the first chunk is waited for
  assert data_seconds[2:].sum() < 0.3 * 5 * step.table.pause  # what waiting for each would take
  assert data_seconds.sum() + compute.sum() <= total
  assert data_seconds.sum() + compute.sum() > 0.5 * total


def test_waiting_is_seen():
  step, state = make_problem(table=Recorder(pause=0.05))
  state, _ = training.run(step, state, 4, chunk=2)
  _, history = training.run(step, state, 8, chunk=2)
  waited, computed = (history[name].sum() for name in SECONDS)
  assert waited / (waited + computed) > 0.5
  assert 4 * 0.05 <= waited < 3 * 4 * 0.05


def test_another_run_compiles_nothing():
  step, state = make_problem(table=Recorder())
  state, _ = training.run(step, state, 6, chunk=2)
  before = advance_on._cache_size(), plan_rows._cache_size()
  state, _ = training.run(step, state, 6, chunk=2)
  assert (advance_on._cache_size(), plan_rows._cache_size()) == before


def test_on_chunk_and_divergence():
  def schedule(count):
    return jnp.where(count == 4, jnp.nan, 0.1)  # the update of step 4 ruins the loss of step 5

  step, state = make_problem(table=Recorder(), optimizer=optax.sgd(schedule))
  seen = []
  with pytest.raises(training.TrainingDivergedError, match="loss is not finite at step 5"):
    training.run(
      step, state, 9, chunk=3,
      on_chunk=lambda state, metrics: seen.append((int(state.step), metrics["data_seconds"].shape)),
    )  # fmt: skip
  assert seen == [(3, (3,))]


def test_carried_state_and_micro_batches():
  def loss(params, rows, key, context):
    values = per_example_loss(params, rows, key) * (1.0 + context.carried)
    return values, training.Observed(carried={"mean": values.mean()})

  carried = training.Carried(
    init=lambda key: jnp.zeros(()),
    update=lambda state, seen, step: 0.9 * state + 0.1 * seen["mean"],
  )
  kwargs = {"loss": loss, "carried": carried, "micro_batches": 2}
  step, state = make_problem(table=TABLE, **kwargs)
  expected, _ = training.run(step, state, 6, chunk=2)
  step, state = make_problem(table=Recorder(), **kwargs)
  after, _ = training.run(step, state, 6, chunk=3)
  assert_same(after, expected, rtol=1e-5, atol=1e-6)


def test_where_a_reader_does_not_serve():
  step, _ = make_problem(table=Recorder())
  with pytest.raises(ValueError, match="how is 'pmap'; rows of a GroupReader"):
    training.data_parallel(step, "pmap")


def test_a_table_that_is_replaced_by_a_reader_changes_nothing_else():
  step, state = make_problem(table=TABLE)
  other, other_state = make_problem(table=Recorder())
  assert_same(state, other_state)
  names = {field.name for field in dataclasses.fields(step)} - {"table", "optimizer", "mixer"}
  for name in names - {"streams", "constrain"}:
    assert getattr(step, name) == getattr(other, name), name


def hosts_problem(table, draw):
  mixer = mixing.delayed(mixing.temperature(TABLE.sizes, 5.0, draw=draw), 4)
  return make_problem(mixer, table=table, measure_every=1)


HOST = """
import json, sys, warnings
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import numpy as np
from balance_jax import training
from tests.training import test_reading as shared
mesh = training.data_mesh()
reader = shared.Recorder()
whole = jax.NamedSharding(mesh, jax.P())
step, _ = shared.hosts_problem(reader, sys.argv[3])
state = jax.jit(lambda: shared.hosts_problem(reader, sys.argv[3])[1], out_shardings=whole)()
step = training.data_parallel(step, "jit", mesh)
_, history = training.run(step, state, 4, chunk=2)
rows = shared.recorded(reader, 4, batch=8)
print(json.dumps({"loss": history["loss"].tolist(), "x": rows["x"].tolist()}))
jax.distributed.shutdown()
"""


@pytest.mark.parametrize("draw", ["target", pytest.param("optimal", marks=pytest.mark.slow)])
def test_two_hosts_read_their_own_rows(draw):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(data.__file__).parents[2])}
  hosts = [
    subprocess.Popen(
      [sys.executable, "-c", HOST, address, str(i), draw], stdout=subprocess.PIPE, env=environment
    )
    for i in range(2)
  ]
  try:
    found = [json.loads(host.communicate(timeout=120)[0].splitlines()[-1]) for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  step, state = hosts_problem(TABLE, draw)
  expected, _ = device_batches(step, copy(state), 4)
  halves = [np.array(host["x"], np.float32) for host in found]
  np.testing.assert_array_equal(np.concatenate(halves, axis=1), expected.rows["x"])
  _, history = training.run(step, state, 4, chunk=2)
  for host in found:
    np.testing.assert_allclose(host["loss"], history["loss"], rtol=1e-5)
