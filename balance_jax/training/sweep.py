"""Many runs in one compiled program: method x seed x numeric hyper-parameters.

A cell is a dict of numbers; the cells of a sweep have the same keys. The function of a cell is
traced once, with the numbers as traced values, and applied to all cells by `vmap` (one batched
program), `map` (one run after another) or `shard` (the cells spread over the devices).
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from balance_jax import _checks
from balance_jax.training.sharding import auto_mesh

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
  one = jax.tree.map(shape_of_one, runs)
  # The compiler counts the body of a scan once, so this is about one step of one run.
  cost = jax.jit(fn).lower(one, shared).cost_analysis() or {}
  return "vmap" if cost.get("flops", np.inf) < VMAP_FLOPS else "map"


def shape_of_one(array) -> jax.ShapeDtypeStruct:
  """Of one run's part of an array (R, ...)."""
  return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
