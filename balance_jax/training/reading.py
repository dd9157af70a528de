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
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from balance_jax.data import GroupReader
from balance_jax.mixing import Mixer
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


def check_foreseen(mixer: Mixer, chunk: int) -> None:
  """Raises ValueError unless the mixer's draw is known for a whole chunk of steps."""
  if mixer.foreseen < chunk:
    raise ValueError(
      f"chunk is {chunk}, but what the mixer learns moves its draw after {mixer.foreseen} steps; "
      f"give it a delay of {2 * chunk} (mixing.delayed) to read ahead, or take chunk <= "
      f"{mixer.foreseen} and wait"
    )


def sampler_of(state: TrainState) -> TrainState:
  """The part of a state that says what is drawn; copies, as a run donates its state."""
  return jax.tree.map(jnp.copy, dataclasses.replace(state, params=(), opt_state=(), carried=()))


def rows_of_steps(step: Step, state: TrainState, length: int) -> RowPlan:
  """Plans the rows of `length` steps; pure.

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


def steps_on_rows(step: Step, state: TrainState, rows, measured, groups, positions):
  """Takes the steps of a plan on rows that were read for it; pure.

  Args:
    step: the `Step` of the plan.
    state: the state before the steps.
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


plan_rows = jax.jit(rows_of_steps, static_argnums=(0, 2))
advance_on = jax.jit(steps_on_rows, static_argnums=0, donate_argnums=1)


class ReadAhead:
  """Advances states chunk by chunk, a chunk of rows ahead.

  Memory for rows: the chunk being computed, the one after it on the device, and the same once more
  on the host while it is read.

  Args:
    reader: the `GroupReader`.
    mixer: what is drawn, or one with the same `foreseen`.
    plan: plan(sampler, length) -> `RowPlan`; all arrays may have further axes in front of (L, ...).
    advance: advance(state, rows, measured, groups, positions) -> as `steps_on_rows`; donates state.
  """

  def __init__(self, reader: GroupReader, mixer: Mixer, plan: Callable, advance: Callable):
    self._reader, self._mixer, self._plan, self._advance = reader, mixer, plan, advance
    # (first step, length) of the next chunk, its plan, its rows, when they were asked for and read.
    self._next: tuple | None = None
    self._waiter = concurrent.futures.ThreadPoolExecutor(1, "device")
    self._last_done: concurrent.futures.Future | None = None
    self._times: collections.deque = collections.deque()

  def advance(
    self, state: TrainState, first_step: int, length: int, following: int = 0
  ) -> tuple[TrainState, dict]:
    """Starts a chunk, then reads the rows of the one after it.

    Args:
      state: before the chunk; donated.
      first_step: its step, which the host knows without asking the device. Rows that were read for
        another step or length are read anew.
      length: steps of the chunk.
      following: steps of the next one; 0 if there is none.

    Returns:
      (state, metrics), not yet computed.

    Raises:
      ValueError: see `check_foreseen`.
      CorruptedDataError: from the reader.
    """
    check_foreseen(self._mixer, max(length, following))
    if self._next is None or self._next[0] != (first_step, length):
      self._fetch((first_step, length), self._plan(sampler_of(state), length), state)
    _, plan, rows, read = self._next
    self._next, after = None, None
    if following and self._mixer.foreseen >= length + following:
      after = plan.after
      if self._mixer.foreseen < math.inf:  # it learns; what it knows now is enough
        after = dataclasses.replace(after, mixer=state.mixer)
      # Before the chunk: a device runs its programs in turn, and the chunk takes the state.
      after = self._plan(after, following)
    started = time.perf_counter()
    state, metrics, end = self._advance(state, *rows, plan.groups, plan.positions)
    done = self._waiter.submit(_time_ready, end)
    self._times.append((read, started, self._last_done, done))
    self._last_done = done
    if after is not None:
      self._fetch((first_step + length, following), after, state)
    return state, metrics

  def collect(self, metrics: dict) -> tuple[dict, dict[str, float]]:
    """The next chunk's metrics as NumPy arrays, and the seconds that its device waited for rows and
    computed: "data_seconds", "compute_seconds"."""
    metrics = jax.device_get(metrics)
    (asked, read), started, before, done = self._times.popleft()
    before = -math.inf if before is None else before.result()
    waited = max(0.0, read - max(asked, before))
    computed = done.result() - max(started, before)
    return metrics, {"data_seconds": waited, "compute_seconds": computed}

  def _fetch(self, chunk: tuple[int, int], plan: RowPlan, state: TrainState) -> None:
    """Reads the rows of a plan and puts them on the devices of the state."""
    asked = time.perf_counter()
    measured = ()
    if plan.measured:
      measured = read_rows(self._reader, *plan.measured, state)
    groups, indices = np.asarray(plan.groups), np.asarray(plan.indices)
    rows = _place(
      lambda mine: self._reader.take(groups[..., mine], indices[..., mine]),
      groups.shape,
      _sharding_of(state, groups.ndim),
    )
    jax.block_until_ready((rows, measured))
    self._next = chunk, plan, (rows, measured), (asked, time.perf_counter())


def read_rows(reader: GroupReader, groups, indices, state: TrainState) -> Any:
  """Rows (*S, ...) for indices of shape S, whole on every device of the state."""
  mesh = _mesh_of(state)
  whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  return jax.device_put(reader.take(np.asarray(groups), np.asarray(indices)), whole)


def _mesh_of(state: TrainState) -> jax.sharding.Mesh | None:
  """The mesh that the state is spread over, or None where it has one device."""
  sharding = state.step.sharding
  on_mesh = isinstance(sharding, NamedSharding) and AXIS in sharding.mesh.shape
  return sharding.mesh if on_mesh else None


def _sharding_of(state: TrainState, ndim: int) -> NamedSharding | None:
  """Of rows (..., L, B, ...) with `ndim` axes up to B: in parts along B on a mesh."""
  mesh = _mesh_of(state)
  return mesh and NamedSharding(mesh, PartitionSpec(*[None] * (ndim - 1), AXIS))


def _place(take: Callable, shape: tuple[int, ...], sharding: NamedSharding | None) -> Any:
  """Rows (..., L, B, ...) on their devices; a process reads those of its own devices only.

  Args:
    take: take(columns) -> rows (..., L, len(columns), ...) of these columns of the batches.
    shape: (..., L, B).
    sharding: of arrays of this shape, in parts along B only; None for one device.
  """
  if sharding is None:
    return jax.device_put(take(slice(None)))
  columns = np.arange(shape[-1])
  axis = len(shape) - 1
  indices = sharding.addressable_devices_indices_map(shape).values()
  mine = np.unique(np.concatenate([columns[index[axis]] for index in indices]))

  def spread(leaf):
    def of_device(index):
      return leaf[..., np.searchsorted(mine, columns[index[axis]]), *[slice(None)] * behind]

    behind = leaf.ndim - len(shape)
    return jax.make_array_from_callback((*shape, *leaf.shape[len(shape) :]), sharding, of_device)

  return jax.tree.map(spread, take(mine))


def _time_ready(array: jax.Array) -> float:
  array.block_until_ready()
  return time.perf_counter()
