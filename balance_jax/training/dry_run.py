"""What a config would train, without training: parameters, operations and memory of every arm."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from balance_jax.training import byte_text, report
from balance_jax.training.task import Task


def dry_run(task: Task) -> str:
  """A table of all arms, from shapes and compiled programs; no array of a model is made.

  Args:
    task: built on stand-in data, see `without_data`.

  Returns:
    For every arm its runs, and for one of them the parameters, and on each of its devices the
    floating-point operations of a step, the bytes of the state and the compiled step's peak of
    temporary memory.
  """
  from balance_jax import models

  rows, devices = [], 1
  for name, build in task.arms.items():
    arm = build()
    cost, devices = arm.runs.cost_of_step(), arm.runs.mesh_size
    state = arm.runs.shapes()
    count = models.count_params(state.params) // arm.runs.num_runs
    rows.append(
      [
        name or "all",
        arm.runs.num_runs,
        f"{count:,}",
        # The compiler counts the body of a loop once, and the micro-batches are a loop.
        f"{cost['flops'] * arm.train['micro_batches']:.3g}",
        _size(sum(map(bytes_of, jax.tree.leaves(state))) / arm.runs.num_runs),
        _size(cost["temporary_bytes"]),
        arm.train["steps"],
      ]
    )
  header = ["arm", "runs", "parameters", "FLOPs a step", "state", "temporary", "steps"]
  device = jax.devices()[0]
  text = report.render_table(header, rows)
  each = f" and each of its {devices} devices" if devices > 1 else ""
  return f"{text}\nOf one run{each}, as compiled for {device.device_kind} ({device.platform})."


def without_data(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config on zeros in place of its text: the shapes are those of the real thing."""
  data = {**config.get("data", {}), "source": byte_text.STAND_IN}
  return {**config, "data": data}


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
