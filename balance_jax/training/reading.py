"""A run whose rows the host reads: the next chunk is read while the device computes this one.

Which rows a step draws follows from the state without its parameters, so `plan_rows` is the
sampling half of `Step.advance`, run on the same device by the same functions, and `advance_on` the
other half, given the rows. Together they are the run of a device table: same rows, same state.

What a chunk draws must be known when the chunk before starts. For mixers that learn nothing from
the training it always is. One that does moves r in the very next step: it is read step by step, and
the device waits, unless it is given a delay (`mixing.delayed`).
"""

import collections
import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from balance_jax.mixing.mixer import MEASURED
from balance_jax.training.batch import Batch
from balance_jax.training.mesh import AXIS
from balance_jax.training.state import TrainState
from balance_jax.training.step import Step


class RowPlan(NamedTuple):
  """Rows of the next L steps.

  Attributes:
    groups: int32 (L, B).
    indices: int32 (L, B), within the groups.
    positions: streams and carry after each step, arrays (L, K).
    measured: (groups, indices), int32 (M, K * examples), of the next M measurements of gradient
      moments; () for mixers without.
    after: the state that the next plan starts from.
  """

  groups: jax.Array
  indices: jax.Array
  positions: tuple
  measured: tuple
  after: TrainState


class _Measured(NamedTuple):
  """In place of the table in a measurement of gradient moments: what was read for it."""

  rows: Any
  number: jax.Array
  group_sizes: tuple[int, ...]

  def take(self, groups, indices):
    del groups, indices  # those that the plan foresaw
    return jax.tree.map(lambda x: x[self.number], self.rows)


def sampler_of(state: TrainState) -> TrainState:
  """The part of a state that says what is drawn; copies, as a run donates its state."""
  return jax.tree.map(jnp.copy, dataclasses.replace(state, params=(), opt_state=(), carried=()))


@functools.partial(jax.jit, static_argnums=(0, 2))
def plan_rows(step: Step, state: TrainState, length: int) -> RowPlan:
  """Plans the rows of `length` steps.

  Args:
    step: a `Step` made with a reader.
    state: `sampler_of` the state before the first of the steps.
    length: L; what the plan says is true of `step.mixer.foreseen` steps.
  """
  start = state

  def body(state, _):
    state, groups, indices = step.plan(state)
    positions = state.streams, state.carry
    mixer = state.mixer
    if step.mixer.needs == {"epochs_seen"}:  # known without training
      mixer = step.mixer.update(mixer, {"epochs_seen": step.streams.epochs_seen(state.streams)})
    state = dataclasses.replace(state, step=state.step + 1, mixer=mixer)
    return state, (groups, indices, positions)

  after, (groups, indices, positions) = jax.lax.scan(body, state, None, length=length)
  measured = ()
  if step.mixer.needs & MEASURED:
    every = step.measure_every
    first = -(-start.step // every) * every
    due = first + every * jnp.arange(-(-length // every))
    measured = jax.vmap(
      lambda now: step.measured_rows(dataclasses.replace(start, step=now), step.table)
    )(due)
  return RowPlan(groups, indices, positions, measured, after)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def advance_on(step: Step, state: TrainState, rows, measured, groups, positions):
  """Takes the steps of a plan on rows that were read for it.

  Args:
    step: the `Step` of the plan.
    state: the state before the steps; donated.
    rows: pytree of arrays (L, B, ...).
    measured: pytree of arrays (M, K * examples, ...), or ().
    groups: as in `RowPlan`.
    positions: as in `RowPlan`.

  Returns:
    (state, metrics stacked along the first axis, a number to wait for that is not donated).
  """
  every, first_step = step.measure_every, state.step

  def body(state, given):
    rows, groups, (streams, carry) = given
    state = dataclasses.replace(state, streams=streams, carry=carry)
    batch = Batch(rows, groups, step.example_weights(state, groups))
    number = state.step // every - -(-first_step // every)
    table = _Measured(measured, number, step.table.group_sizes)
    return step(state, step.placement.parts(batch), table)

  state, metrics = jax.lax.scan(body, state, (rows, groups, positions))
  return state, metrics, state.step.astype(jnp.float32)


class ReadAhead:
  """Advances a state chunk by chunk, a chunk of rows ahead; made by `run` for a `GroupReader`.

  Memory for rows: the chunk being computed, the one after it on the device, and the same once more
  on the host while it is read.

  Args:
    step: a `Step` made with a `GroupReader`.
    lengths: steps of all chunks.

  Raises:
    ValueError: the mixer's draw is not known for a whole chunk.
  """

  def __init__(self, step: Step, lengths: list[int]):
    chunk, foreseen = max(lengths), step.mixer.foreseen
    if foreseen < chunk:
      raise ValueError(
        f"chunk is {chunk}, but what the mixer learns moves its draw after {foreseen} steps; give "
        f"it mixing.delayed(mixer, {2 * chunk}) to read ahead, or take chunk <= {foreseen} and wait"
      )
    self._step, self._lengths = step, collections.deque(lengths)
    self._ahead = foreseen >= 2 * chunk
    self._learns = foreseen < math.inf
    self._next: tuple | None = None  # plan and rows of the next chunk
    self._waiter = concurrent.futures.ThreadPoolExecutor(1, "device")
    self._last_done: concurrent.futures.Future | None = None
    self._times: collections.deque = collections.deque()

  def advance(self, state: TrainState) -> tuple[TrainState, dict]:
    """Starts the next chunk, then reads the one after it: (state, metrics), not yet computed."""
    if self._next is None:
      self._fetch(plan_rows(self._step, sampler_of(state), self._lengths[0]), state)
    plan, rows, read = self._next
    self._next, following = None, None
    self._lengths.popleft()
    if self._ahead and self._lengths:
      after = plan.after
      if self._learns:
        after = dataclasses.replace(after, mixer=state.mixer)
      # Before the chunk: a device runs its programs in turn, and the chunk takes the state.
      following = plan_rows(self._step, after, self._lengths[0])
    started = time.perf_counter()
    state, metrics, end = advance_on(self._step, state, *rows, plan.groups, plan.positions)
    done = self._waiter.submit(_time_ready, end)
    self._times.append((len(plan.groups), read, started, self._last_done, done))
    self._last_done = done
    if following is not None:
      self._fetch(following, state)
    return state, metrics

  def collect(self, metrics: dict) -> dict:
    """The chunk's metrics as NumPy arrays, with its times in seconds per step: see `run`."""
    metrics = jax.device_get(metrics)
    length, (asked, read), started, before, done = self._times.popleft()
    before = -math.inf if before is None else before.result()
    waited = max(0.0, read - max(asked, before))
    computed = done.result() - max(started, before)
    seconds = {"data_seconds": waited, "compute_seconds": computed}
    return metrics | {name: np.full(length, value / length) for name, value in seconds.items()}

  def _fetch(self, plan: RowPlan, state: TrainState) -> None:
    """Reads the rows of a plan and puts them on the devices of the state."""
    asked = time.perf_counter()
    table = self._step.table
    measured = ()
    if plan.measured:
      mesh = _mesh_of(state)
      whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
      measured = jax.device_put(table.take(*map(np.asarray, plan.measured)), whole)
    groups, indices = np.asarray(plan.groups), np.asarray(plan.indices)
    rows = _place(
      lambda mine: table.take(groups[:, mine], indices[:, mine]), groups.shape, _mesh_of(state)
    )
    jax.block_until_ready((rows, measured))
    self._next = plan, (rows, measured), (asked, time.perf_counter())


def _mesh_of(state: TrainState) -> jax.sharding.Mesh | None:
  """The mesh that the state is spread over, or None where it has one device."""
  sharding = state.step.sharding
  on_mesh = isinstance(sharding, NamedSharding) and AXIS in sharding.mesh.shape
  return sharding.mesh if on_mesh else None


def _place(take: Callable, shape: tuple[int, int], mesh: jax.sharding.Mesh | None) -> Any:
  """Rows (L, B, ...) split along B over a mesh; a process reads those of its own devices only.

  Args:
    take: take(columns) -> rows (L, len(columns), ...) of these columns of the batches.
    shape: (L, B).
    mesh: has an axis "data"; None for one device.
  """
  if mesh is None:
    return jax.device_put(take(slice(None)))
  sharding = NamedSharding(mesh, PartitionSpec(None, AXIS))
  columns = np.arange(shape[1])
  indices = sharding.addressable_devices_indices_map(shape).values()
  mine = np.unique(np.concatenate([columns[index[1]] for index in indices]))

  def spread(leaf):
    def of_device(index):
      return leaf[:, np.searchsorted(mine, columns[index[1]])]

    return jax.make_array_from_callback((*shape, *leaf.shape[2:]), sharding, of_device)

  return jax.tree.map(spread, take(mine))


def _time_ready(array: jax.Array) -> float:
  array.block_until_ready()
  return time.perf_counter()
