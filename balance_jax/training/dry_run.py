"""What a config would train, without training: operations, memory, sizes of the data, mixture."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from balance_jax.data import GroupReader
from balance_jax.training import byte_text, report
from balance_jax.training.batch import Batch
from balance_jax.training.profiling import parse_window
from balance_jax.training.task import Arm, Task

# Groups at each end of a long list that are shown.
ENDS = 4


def dry_run(task: Task, *, missing: str | None = None, profile: str = "") -> str:
  """Tables of all arms, from shapes and compiled programs; no array of a model is made.

  Args:
    task: built on the data, or on the stand-in of `without_data`.
    missing: why the data could not be read; then it is said in place of sizes and mixture.
    profile: `config.profile`, to be checked.

  Returns:
    For every arm its runs, and for one of them the parameters, and on each of its devices the
    floating-point operations of a step, the bytes of the state and the compiled step's peak of
    temporary memory; the memory of a device, and of all, for all runs. Then the rows by group, the
    bytes of the table, and p and r of every method before the first step.

  Raises:
    ValueError: a wrong `profile`.
  """
  rows, data, mixture = [], "", {}
  for index, (name, build) in enumerate(task.arms.items()):
    arm = build()
    if index == 0:
      parse_window(profile, arm.train["steps"])
      data = _data_text(arm)
    rows.append([name or "all", *_cells(arm)])
    if missing is None and len(arm.groups) > 1:
      mixture |= _mixture(arm)
  if not rows:
    parse_window(profile, 0)
  header = ["arm", "runs", "parameters", "FLOPs a step", "state", "temporary", "steps"]
  header += ["devices", "of a device", "of all"]
  device = jax.devices()[0]
  about = (
    "Parameters, operations, state and temporary memory are those of one run, on each of the "
    f"devices that share it, as compiled for {device.device_kind} ({device.platform}); the last "
    "two columns are the memory of training all runs: states, temporary memory of those that "
    "advance together, training rows."
  )
  parts = [f"{report.render_table(header, rows)}\n{about}" if rows else _facts_text(task)]
  if missing is not None:
    parts.append(f"Data not installed: shapes only; no table, sizes or mixture ({missing}).")
  else:
    parts += [data, _mixture_text(arm.groups, mixture)] if rows else []
  return "\n\n".join(part for part in parts if part)


def without_data(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config on zeros in place of its data: the shapes are those of the real thing."""
  data = {**config["data"], "source": byte_text.STAND_IN}
  return {**config, "data": data}


def _cells(arm: Arm) -> list:
  """The columns of an arm."""
  from balance_jax import models

  runs = arm.runs
  cost, state = runs.cost_of_step(), runs.shapes()
  of_state = sum(map(bytes_of, jax.tree.leaves(state))) / runs.num_runs
  # On a mesh all its devices work on every run; else every device has runs of its own.
  devices = max(runs.mesh_size, len(runs.plan.devices))
  on_one = math.ceil(runs.num_runs / len(runs.plan.devices))
  together = on_one if runs.plan.how == "vmap" else 1
  of_device = on_one * (of_state + _rows_read(arm)) + together * cost["temporary_bytes"]
  of_device += _table_bytes(arm)
  return [
    runs.num_runs,
    f"{models.count_params(state.params) // runs.num_runs:,}",
    # The compiler counts the body of a loop once, and the micro-batches are a loop.
    f"{cost['flops'] * arm.train['micro_batches']:.3g}",
    _size(of_state),
    _size(cost["temporary_bytes"]),
    arm.train["steps"],
    devices,
    _size(of_device),
    _size(of_device * devices),
  ]


def _facts_text(task: Task) -> str:
  """Of a task without arms."""
  facts = ", ".join(f"{name} {value}" for name, value in task.facts.items())
  return f"No arms: what is computed takes no training of many steps ({facts})."


def _table_bytes(arm: Arm) -> int:
  table = arm.runs.table
  return 0 if isinstance(table, GroupReader) else sum(x.nbytes for x in jax.tree.leaves(table.rows))


def _rows_read(arm: Arm) -> int:
  """Bytes on the device of what is read for one run: the chunk in progress and the next."""
  if not isinstance(arm.runs.table, GroupReader):
    return 0
  row = sum(map(bytes_of, jax.tree.leaves(arm.runs.table.row_shapes)))
  return 2 * arm.train["chunk"] * arm.train["batch_size"] * row // arm.runs.mesh_size


def _data_text(arm: Arm) -> str:
  sizes = {"train": arm.runs.table.group_sizes}
  sizes |= {"validation": _held_out(arm, arm.validation), "test": _held_out(arm, arm.test)}
  rows = [
    [name, f"{sum(counts):,}", *_ends([f"{count:,}" for count in counts])]
    for name, counts in sizes.items()
    if counts
  ]
  table = report.render_table(["rows", "sum", *_ends(arm.groups)], rows)
  if isinstance(arm.runs.table, GroupReader):
    return f"{table}\nThe training rows are read from disk, {_size(_rows_read(arm))} for each run."
  return f"{table}\nThe table of the training rows takes {_size(_table_bytes(arm))} of each device."


def _held_out(arm: Arm, inputs: Any) -> list[int]:
  """Rows by group of all batches in what an evaluation reads; none where there is no evaluation."""
  leaves = jax.tree.leaves(inputs, is_leaf=lambda x: isinstance(x, Batch))
  batches = [leaf for leaf in leaves if isinstance(leaf, Batch)]
  count = len(arm.groups)
  return (
    sum(
      np.bincount(np.asarray(batch.groups)[np.asarray(batch.where)], minlength=count)
      for batch in batches
    ).tolist()
    if batches
    else []
  )


def _mixture(arm: Arm) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Method -> (p, r), float (K,), before the first step; of the first run of each method."""
  # In one program, which drops the parameters, as nothing reads them.
  p, r = jax.device_get(jax.jit(lambda: arm.runs.apply(_weights, arm.runs.init()))())
  methods = [label["method"] for label in arm.labels]
  return {name: (p[methods.index(name)], r[methods.index(name)]) for name in methods}


def _weights(step, state, inputs):
  del inputs
  return step.mixer.weights(state.mixer, state.step)


def _mixture_text(groups: Sequence[str], mixture: Mapping[str, tuple]) -> str:
  if not mixture:
    return f"One group, {groups[0]}: p = r = 1."
  rows = [
    [f"{method}, {name}", *_ends([f"{share:.3g}" for share in shares])]
    for method, both in mixture.items()
    for name, shares in zip("pr", both, strict=True)
  ]
  table = report.render_table(["mixture", *_ends(groups)], rows)
  return f"{table}\nBefore the first step: p is what is optimised, r what is drawn."


def _ends(items: Sequence) -> list:
  """The items, or those at both ends of a long list."""
  if len(items) <= 2 * ENDS:
    return list(items)
  return [*items[:ENDS], "…", *items[-ENDS:]]


def bytes_of(leaf) -> int:
  """Of the part of an array, given by its shape, that one device holds."""
  shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
  # A typed key has no itemsize on every version; it is a few bytes.
  return math.prod(shape) * getattr(leaf.dtype, "itemsize", 4)


def _size(count: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if count < 1000:
      return f"{count:.3g} {unit}"
    count /= 1000
  return f"{count:.3g} TB"
