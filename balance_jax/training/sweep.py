"""Many runs in one compiled program: method x seed x numeric hyper-parameters.

A cell is a dict of numbers; the cells of a sweep have the same keys. The function of a cell is
traced once, with the numbers as traced values, and applied to all cells by `vmap` (one batched
program), `map` (one run after another) or `shard` (the cells spread over the devices).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from balance_jax import _checks
from balance_jax.data import GroupReader
from balance_jax.training.run import check_finite, concatenate_history
from balance_jax.training.sharding import ONE_DEVICE, Placement, auto_mesh
from balance_jax.training.state import TrainState

HOW = ("auto", "vmap", "map", "shard")

# On a CPU batching the runs pays only while one run's step is too small to fill the cores; measured
# in benchmarks/sweep_modes.py. Floating-point operations of one step of one run.
VMAP_FLOPS = 2e6


def product(**axes: Sequence) -> list[dict]:
  """Every combination of the values, the last axis fastest.

  >>> product(method=[0, 1], seed=[7])
  [{'method': 0, 'seed': 7}, {'method': 1, 'seed': 7}]
  """
  return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def zip_(**axes: Sequence) -> list[dict]:
  """The i-th values of all axes together; they must have one length.

  >>> zip_(width=[64, 128], learning_rate=[1e-2, 5e-3])
  [{'width': 64, 'learning_rate': 0.01}, {'width': 128, 'learning_rate': 0.005}]
  """
  lengths = {name: len(values) for name, values in axes.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f"axes must have one length, got {lengths}")
  return [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]


def chain(*parts: Sequence[dict]) -> list[dict]:
  """Several lists of cells, one after another."""
  return [cell for part in parts for cell in part]


def stack_cells(cells: Sequence[Mapping[str, Any]]) -> dict[str, jax.Array]:
  """List of R dicts of numbers -> dict of arrays (R,)."""
  if not cells:
    raise ValueError("cells is empty; a sweep needs at least one")
  names = list(cells[0])
  for cell in cells:
    if list(cell) != names:
      raise ValueError(f"cells must have the same keys, got {names} and {list(cell)}")
  return {name: jnp.asarray([cell[name] for cell in cells]) for name in names}


def sweep(
  fn: Callable,
  axes: Mapping[str, Any] | Sequence[Mapping],
  *,
  shared: Any = None,
  how: str = "auto",
  devices: Sequence | None = None,
) -> Any:
  """Applies `fn` to every cell in one compiled program.

  Args:
    fn: fn(cell, shared) -> pytree of arrays; cell is a dict of traced scalars.
    axes: list of R cells (see `product`, `zip_`, `chain`), or a dict of arrays (R, ...).
    shared: pytree of arrays that all cells read, such as the data; passed, not closed over, so that
      it does not become a constant of the program.
    how: "vmap", "map", "shard" (over `devices`), or "auto", the fastest as measured for this kind
      of device.
    devices: for "shard"; all devices by default.

  Returns:
    The pytree of results with a leading axis R.

  >>> sweep(lambda cell, _: cell["x"] ** 2, product(x=[1.0, 2.0, 3.0])).tolist()
  [1.0, 4.0, 9.0]
  """
  cells = axes if isinstance(axes, Mapping) else stack_cells(axes)
  cells = jax.tree.map(jnp.asarray, dict(cells))
  plan = plan_runs(fn, cells, shared, how=how, devices=devices)
  return jax.jit(plan.map(fn))(cells, shared)


@dataclasses.dataclass(frozen=True)
class RunPlan:
  """How R runs share the devices.

  Attributes:
    how: "vmap" or "map" on each device.
    num_runs: R.
    devices: the devices the runs are spread over.
  """

  how: str
  num_runs: int
  devices: tuple

  def map(self, fn: Callable) -> Callable:
    """fn(run, shared) -> out becomes mapped(runs, shared) -> outs, to be jitted by the caller."""
    if self.how == "vmap":
      mapped = jax.vmap(fn, in_axes=(0, None))
    else:

      def mapped(runs, shared):
        return jax.lax.map(lambda run: fn(run, shared), runs)

    return mapped if len(self.devices) == 1 else self._shard(mapped)

  def _shard(self, mapped):
    mesh = auto_mesh(self.devices, run=len(self.devices))
    # Runs do not speak to each other, so there is no collective for check_vma to check.
    sharded = jax.shard_map(
      mapped,
      mesh=mesh,
      in_specs=(PartitionSpec("run"), PartitionSpec()),
      out_specs=PartitionSpec("run"),
      check_vma=False,
    )
    pad = -self.num_runs % len(self.devices)

    def padded(runs, shared):
      # The last run once more where the devices do not divide the runs; dropped at the end.
      runs = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], pad, axis=0)]), runs)
      return jax.tree.map(lambda x: x[: self.num_runs], sharded(runs, shared))

    return padded if pad else sharded


def plan_runs(fn: Callable, runs: Any, shared: Any, *, how: str = "auto", devices=None) -> RunPlan:
  """Chooses how to map `fn` over runs.

  Args:
    fn: fn(run, shared), the function that takes most of the time.
    runs: pytree of arrays or shapes (R, ...); only the shapes matter.
    shared: pytree of arrays or shapes.
    how: see `sweep`.
    devices: see `sweep`.

  Returns:
    `RunPlan`.
  """
  _checks.check_choice("how", how, HOW)
  sizes = {leaf.shape[0] for leaf in jax.tree.leaves(runs)}
  if len(sizes) != 1:
    raise ValueError(f"all arrays of a sweep need one leading length, got {sorted(sizes)}")
  num_runs = sizes.pop()
  devices = tuple(jax.devices() if devices is None else devices)[:num_runs]
  if how in ("vmap", "map"):
    return RunPlan(how, num_runs, devices[:1])
  return RunPlan(_on_one_device(fn, runs, shared), num_runs, devices)


def _on_one_device(fn, runs, shared) -> str:
  """The faster of vmap and map: batching fills an accelerator, but not a core already full."""
  if jax.default_backend() != "cpu":
    return "vmap"
  one = jax.tree.map(_shape_of_one, runs)
  # The compiler counts the body of a scan once, so this is about one step of one run.
  cost = jax.jit(fn).lower(one, shared).cost_analysis() or {}
  return "vmap" if cost.get("flops", np.inf) < VMAP_FLOPS else "map"


def _shape_of_one(array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)


class SweepRuns:
  """Several training runs of one shape that advance together in one program.

  Both functions are called while tracing, with the cell's numbers traced, and must be pure.

  Args:
    build: build(cell) -> `Step` of one cell.
    init: init(cell, step) -> `TrainState` before training; see `init_state`.
    cells: list of R cells or dict of arrays (R,).
    table: the `GroupTable` all runs draw from.
    how: see `sweep`.
    devices: see `sweep`.
    placement: of every single run. On a mesh all devices work on every run, so `how` cannot be
      "shard".
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
    if isinstance(table, GroupReader):
      raise ValueError("table is a GroupReader, which serves one run; give each its own `run`")
    self.cells = dict(cells) if isinstance(cells, Mapping) else stack_cells(cells)
    self._build = lambda cell: placement.spread(build(cell))
    self._init, self._placement = init, placement
    self._programs: dict[Any, Callable] = {}
    if placement.mesh is not None:
      if how == "shard":
        raise ValueError(
          "parallel is 'shard', which spreads runs over devices, with a mesh of "
          f"{placement.mesh.size} devices for every run; allowed with it: auto, map, vmap"
        )
      devices = placement.mesh.devices.flat[:1]
    self.cells, self.table = placement.put((self.cells, table))
    states = jax.eval_shape(jax.vmap(lambda cell: init(cell, self._build(cell))), self.cells)
    self._shared = (table, jax.ShapeDtypeStruct((), jnp.int32))
    self._shapes = jax.tree.map(_shape_of_one, (self.cells, states))
    self._one_step = functools.partial(self._advance_one, length=1)
    self.plan = plan_runs(
      self._one_step, (self.cells, states), self._shared, how=how, devices=devices
    )

  @property
  def num_runs(self) -> int:
    return len(next(iter(self.cells.values())))

  @property
  def mesh_size(self) -> int:
    """Devices that work on every run together."""
    return 1 if self._placement.mesh is None else self._placement.mesh.size

  def compile_step(self) -> jax.stages.Compiled:
    """One step of one run, to look at."""
    cell, state = self._shapes

    def program(run, shared):
      state, metrics = self._one_step(run, shared)
      return self._placement.hold(state), self._placement.everywhere(metrics)

    shapes = cell, self._placement.shapes(state)
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
      cell, _ = run
      return self._init(cell, self._build(cell))

    return self._call("init", init_one, (), (), self._hold)

  def shapes(self) -> TrainState:
    """Shapes, dtypes and, on a mesh, places of the states, to restore them."""
    return self._placement.shapes(jax.eval_shape(self.init), leading=1)

  def advance(self, states: TrainState, length: int) -> tuple[TrainState, dict]:
    """`length` steps of every run; donates `states`. Metrics have the axes (R, length, ...)."""
    fn = functools.partial(self._advance_one, length=length)

    def finish(found):
      return self._hold(found[0]), self._placement.everywhere(found[1])

    shared = self.table, states.step[0]
    return self._call(("advance", length), fn, states, shared, finish, donate=True)

  def _advance_one(self, run, shared, length):
    (cell, state), (table, now) = run, shared
    return self._build(cell).advance(_at_step(state, now), table, length)

  def apply(self, fn: Callable, states: TrainState, shared: Any = ()) -> Any:
    """fn(step, state, shared) -> pytree, for every run: evaluation, measurements.

    `fn` is compiled once and recognised by equality, so give the same function every time.
    """

    def apply_one(run, inputs):
      (cell, state), (arrays, now) = run, inputs
      return fn(self._build(cell), _at_step(state, now), arrays)

    shared = self._placement.put(shared), states.step[0]
    return self._call(fn, apply_one, states, shared, self._placement.everywhere)

  def _hold(self, states: TrainState) -> TrainState:
    """The states of all runs, inside of a program, where the placement has them."""
    return self._placement.hold(states, leading=1)

  def _call(self, name, fn, states, shared, finish, donate=False):
    if name not in self._programs:
      mapped = self.plan.map(fn)

      def program(cells, states, shared):
        return finish(mapped((cells, states), shared))

      # The name shows in profiles and compilation logs.
      kind = name[0] if isinstance(name, tuple) else name
      program.__name__ = f"sweep_{kind if isinstance(kind, str) else type(kind).__name__}"
      self._programs[name] = jax.jit(program, donate_argnums=1 if donate else ())
    return self._programs[name](self.cells, states, shared)


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
    states, metrics = runs.advance(states, min(chunk, num_steps - start))
    metrics = jax.device_get(metrics)
    if not allow_divergence:
      for index in range(runs.num_runs):
        check_finite(jax.tree.map(lambda x, i=index: x[i], metrics), first_step, str(index))
    history.append(metrics)
    if on_chunk is not None:
      on_chunk(states, metrics)
  return states, concatenate_history(history, axis=1)
