"""The training runs of a sweep: they advance together, and what is measured of them."""

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax.data import GroupReader
from balance_jax.training.reading import (
  ReadAhead,
  read_rows,
  rows_of_steps,
  sampler_of,
  steps_on_rows,
)
from balance_jax.training.run import check_finite, concatenate_history
from balance_jax.training.sharding import ONE_DEVICE, Placement
from balance_jax.training.state import TrainState
from balance_jax.training.sweep import plan_runs, shape_of_one, stack_cells


class SweepRuns:
  """Several training runs of one shape that advance together in one program.

  Both functions are called while tracing, with the cell's numbers traced, and must be pure.

  Args:
    build: build(cell) -> `Step` of one cell.
    init: init(cell, step) -> `TrainState` before training; see `init_state`.
    cells: list of R cells or dict of arrays (R,).
    table: the `GroupTable` all runs draw from, or a `GroupReader`, whose rows are read ahead as
      `run` does: for each run its own.
    how: see `sweep`.
    devices: see `sweep`.
    placement: of every single run. On a mesh all devices work on every run, so `how` cannot be
      "shard".

  Attributes:
    seconds: what of the time inside of these methods, so far, was no computing: "compile", the
      first call of each program until it returns, which traces and compiles it or reads it from the
      cache; "data", the devices waited for rows, known when the chunk is collected; none with a
      table.
  """

  def __init__(
    self,
    build: Callable,
    init: Callable,
    cells,
    table,
    *,
    how: str = "auto",
    devices=None,
    placement: Placement = ONE_DEVICE,
  ):
    self.cells = dict(cells) if isinstance(cells, Mapping) else stack_cells(cells)
    self._build = lambda cell: placement.spread(build(cell))
    self._init, self._placement, self.table = init, placement, table
    self._forget_programs()
    if placement.mesh is not None:
      if how == "shard":
        raise ValueError(
          "parallel is 'shard', which spreads runs over devices, with a mesh of "
          f"{placement.mesh.size} devices for every run; allowed with it: auto, map, vmap"
        )
      devices = placement.mesh.devices.flat[:1]
    reads = isinstance(table, GroupReader)
    self.cells, self._on_device = placement.put((self.cells, () if reads else table))
    states = jax.eval_shape(jax.vmap(lambda cell: init(cell, self._build(cell))), self.cells)
    self._shared = (() if reads else table, jax.ShapeDtypeStruct((), jnp.int32))
    given, self._one_step = (), functools.partial(self._advance_one, length=1)
    if reads:
      given, self._one_step = self._shapes_to_read(states), self._advance_one_on
    self._shapes = jax.tree.map(shape_of_one, (self.cells, states, given))
    self.plan = plan_runs(
      self._one_step, (self.cells, states, given), self._shared, how=how, devices=devices
    )
    self._reading = self._read_ahead() if reads else None

  def part(self, indices: Sequence[int]) -> "SweepRuns":
    """Some of the runs, mapped in the same way, in programs of their own."""
    chosen, count = copy.copy(self), len(indices)
    cells = {name: np.asarray(values)[list(indices)] for name, values in self.cells.items()}
    chosen.cells = self._placement.put(jax.tree.map(jnp.asarray, cells))
    chosen.plan = dataclasses.replace(self.plan, num_runs=count, devices=self.plan.devices[:count])
    chosen._forget_programs()
    if self._reading is not None:
      chosen._reading = chosen._read_ahead()
    return chosen

  def _forget_programs(self) -> None:
    self._programs: dict[Any, Callable] = {}
    self._compiled = set()
    self.seconds = {"compile": 0.0, "data": 0.0}

  @property
  def num_runs(self) -> int:
    return len(next(iter(self.cells.values())))

  @property
  def mesh_size(self) -> int:
    """Devices that work on every run together."""
    return 1 if self._placement.mesh is None else self._placement.mesh.size

  def compile_step(self) -> jax.stages.Compiled:
    """One step of one run, to look at."""
    cell, state, given = self._shapes

    def program(run, shared):
      state, *metrics = self._one_step(run, shared)
      return self._placement.hold(state), self._placement.everywhere(metrics)

    shapes = cell, self._placement.shapes(state), given
    return jax.jit(program).lower(shapes, self._shared).compile()

  def cost_of_step(self) -> dict[str, float]:
    """Of one step of one run, as compiled for a device: "flops" and "temporary_bytes"."""
    compiled = self.compile_step()
    memory = compiled.memory_analysis()
    return {
      "flops": (compiled.cost_analysis() or {}).get("flops", np.nan),
      "temporary_bytes": np.nan if memory is None else memory.temp_size_in_bytes,
    }

  def init(self) -> TrainState:
    """States before training, every array with a leading axis R."""

    def init_one(run, shared):
      cell, *_ = run
      return self._init(cell, self._build(cell))

    return self._call("init", init_one, (), self._hold)

  def shapes(self) -> TrainState:
    """Shapes, dtypes and, on a mesh, places of the states, to restore them."""
    return self._placement.shapes(jax.eval_shape(self.init), leading=1)

  def advance(self, states: TrainState, length: int, following: int = 0):
    """`length` steps of every run.

    Args:
      states: donated.
      length: steps, >= 1.
      following: steps of the next call, for a reader to read ahead; 0 if there is none.

    Returns:
      (states, metrics): metrics have the axes (R, length, ...); see `collect`.
    """
    if self._reading is not None:
      return self._reading.advance(states, int(states.step[0]), length, following)
    fn = functools.partial(self._advance_one, length=length)
    return self._call(("advance", length), fn, states, self._finish, donate=True)

  def collect(self, metrics: dict) -> dict:
    """What the last `advance` returned as NumPy arrays, when it is done."""
    if self._reading is None:
      return jax.device_get(metrics)
    metrics, seconds = self._reading.collect(metrics)
    self.seconds["data"] += seconds["data_seconds"]
    return metrics

  def _advance_one(self, run, shared, length):
    (cell, state, _), (table, now) = run, shared
    return self._build(cell).advance(_at_step(state, now), table, length)

  def _advance_one_on(self, run, shared):
    (cell, state, given), (_, now) = run, shared
    return steps_on_rows(self._build(cell), _at_step(state, now), *given)

  def _plan_one(self, run, shared, length):
    (cell, state, _), (_, now) = run, shared
    return rows_of_steps(self._build(cell), _at_step(state, now), length)

  def _finish(self, found):
    states, *others = found
    return self._hold(states), *self._placement.everywhere(others)

  def _read_ahead(self) -> ReadAhead:
    def plan(sampler, length):
      fn = functools.partial(self._plan_one, length=length)
      return self._call(("plan", length), fn, sampler, self._placement.everywhere)

    def advance(states, *given):
      return self._call("advance", self._advance_one_on, states, self._finish, (), True, given)

    cell = jax.tree.map(lambda x: x[0], self.cells)
    return ReadAhead(self.table, self._build(cell).mixer, plan, advance)

  def _shapes_to_read(self, states):
    """What `ReadAhead` gives to one step of every run."""

    def one(cell, state):
      return rows_of_steps(self._build(cell), sampler_of(state), 1)

    plan = jax.eval_shape(jax.vmap(one), self.cells, states)

    def rows(places):
      shape = places[0].shape
      return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*shape, *x.shape), x.dtype), self.table.row_shapes
      )

    measured = rows(plan.measured) if plan.measured else ()
    return rows((plan.groups, plan.indices)), measured, plan.groups, plan.positions

  def apply(self, fn: Callable, states: TrainState, shared: Any = ()) -> Any:
    """fn(step, state, shared) -> pytree, for every run: evaluation, measurements.

    `fn` is compiled once and recognised by equality, so give the same function every time.
    """

    def apply_one(run, inputs):
      (cell, state, _), (arrays, now) = run, inputs
      return fn(self._build(cell), _at_step(state, now), arrays)

    shared = self._placement.put(shared)
    return self._call(fn, apply_one, states, self._placement.everywhere, shared)

  def apply_to_rows(self, draw: Callable, fn: Callable, states: TrainState) -> Any:
    """fn(step, state, rows) -> pytree, for every run, on rows of the table that the state chooses.

    Args:
      draw: draw(step, state) -> list of (groups, indices), both int of one shape S.
      fn: is given a list of the rows, pytrees of arrays (*S, ...). Both functions as in `apply`.
      states: the states.
    """

    def choose_one(run, shared):
      (cell, state, _), (_, now) = run, shared
      return draw(self._build(cell), _at_step(state, now))

    def apply_one(run, shared):
      (cell, state, rows), (table, now) = run, shared
      step, state = self._build(cell), _at_step(state, now)
      if self._reading is None:
        rows = [table.take(*places) for places in draw(step, state)]
      return fn(step, state, rows)

    everywhere, given = self._placement.everywhere, ()
    if self._reading is not None:
      places = self._call(draw, choose_one, states, everywhere)
      given = [read_rows(self.table, *one, states) for one in places]
    return self._call(fn, apply_one, states, everywhere, given=given)

  def _hold(self, states: TrainState) -> TrainState:
    """The states of all runs, inside of a program, where the placement has them."""
    return self._placement.hold(states, leading=1)

  def _call(self, name, fn, states, finish, shared=None, donate=False, given=()):
    """finish(fn of every run), in a program that is compiled once for each name.

    `fn` is called fn((cell, state, what is given to it), (shared, step)); shared is the table where
    there is nothing else.
    """
    if name not in self._programs:
      mapped = self.plan.map(fn)

      def program(cells, states, given, shared):
        return finish(mapped((cells, states, given), shared))

      # The name shows in profiles and compilation logs.
      kind = name[0] if isinstance(name, tuple) else name
      program.__name__ = f"sweep_{kind if isinstance(kind, str) else type(kind).__name__}"
      self._programs[name] = jax.jit(program, donate_argnums=1 if donate else ())
    shared = self._on_device if shared is None else shared
    now = states.step[0] if states else ()
    began = time.monotonic()
    result = self._programs[name](self.cells, states, given, (shared, now))
    # Called for its shapes, a program is not compiled yet.
    if name not in self._compiled and _checks.is_concrete(result):
      self._compiled.add(name)
      self.seconds["compile"] += time.monotonic() - began
    return result


def _at_step(state: TrainState, step) -> TrainState:
  """All runs are at one step. Said once for all, it stays a scalar under vmap, and what happens
  every n-th step is a branch there, not work done in every step and thrown away."""
  return dataclasses.replace(state, step=step)


def run_sweep(
  runs: SweepRuns,
  num_steps: int,
  *,
  chunk: int = 100,
  states: TrainState | None = None,
  on_chunk: Callable[[TrainState, dict], None] | None = None,
  allow_divergence: bool = False,
) -> tuple[TrainState, dict]:
  """`run` for all runs of a sweep: (states, history) with metrics (R, num_steps, ...).

  Args:
    runs: the runs.
    num_steps: >= 1.
    chunk: steps in a program; see `run`.
    states: where to start; before training by default. Donated.
    on_chunk: called on_chunk(states, metrics) after each chunk.
    allow_divergence: go on after a loss that is not finite.

  Raises:
    TrainingDivergedError: names the first run and step whose loss is not finite.
  """
  _checks.check_number("num_steps", num_steps, low=1, integer=True)
  _checks.check_number("chunk", chunk, low=1, integer=True)
  states = runs.init() if states is None else states
  history = []
  for start in range(0, num_steps, chunk):
    first_step = int(states.step[0])
    length, left = min(chunk, num_steps - start), num_steps - start
    states, metrics = runs.advance(states, length, min(chunk, left - length))
    metrics = runs.collect(metrics)
    if not allow_divergence:
      for index in range(runs.num_runs):
        check_finite(jax.tree.map(lambda x, i=index: x[i], metrics), first_step, str(index))
    history.append(metrics)
    if on_chunk is not None:
      on_chunk(states, metrics)
  return states, concatenate_history(history, axis=1)
