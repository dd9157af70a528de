"""Data parallelism: one step, three ways to spread it over devices, the same numbers.

The losses know nothing of devices. Under `jit` the compiler splits one global program; under
`shard_map` and `pmap` every device computes a share of its part of the batch and the shares are
summed. Nothing is averaged, so unequal weights come out right on any number of devices.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from balance_jax import _checks
from balance_jax.data import GroupReader
from balance_jax.training.sharding import DATA as AXIS
from balance_jax.training.sharding import Placement, auto_mesh
from balance_jax.training.state import TrainState
from balance_jax.training.step import Step

HOW = ("jit", "shard_map", "pmap")


def data_mesh(num_devices: int | None = None) -> jax.sharding.Mesh:
  """A mesh with the one axis "data" over the first `num_devices` devices (all by default)."""
  available = jax.device_count()
  num_devices = available if num_devices is None else num_devices
  _checks.check_number("num_devices", num_devices, low=1, high=available, integer=True)
  return auto_mesh(jax.devices()[:num_devices], **{AXIS: num_devices})


def replicate(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Copies a pytree to every device of the mesh."""
  return Placement(mesh).put(tree)


def data_parallel(step: Step, how: str = "jit", mesh: jax.sharding.Mesh | None = None):
  """Spreads the batches of a step over the devices of a mesh.

  Args:
    step: a `Step` that draws from a table.
    how: "jit" (one global program, the default and the one to build on), "shard_map", or "pmap" for
      programs that still use it. The last two hand every part of the batch the same loss key, and a
      loss that normalises by its rows sees those of one part.
    mesh: a mesh with an axis "data"; all devices by default.

  Returns:
    A step for `run`, with the numbers of the one given.

  Raises:
    ValueError: for an unknown `how`, a mesh without the axis, a batch the devices do not divide.
  """
  _checks.check_choice("how", how, HOW)
  mesh = data_mesh() if mesh is None else mesh
  spread = Placement(mesh).spread(step)
  if how == "jit":
    return spread
  if isinstance(step.table, GroupReader):
    raise ValueError(f"how is {how!r}; rows of a GroupReader are spread by 'jit' only")
  return ShardedStep(step, how, mesh)


@dataclasses.dataclass(frozen=True, eq=False)
class ShardedStep:
  """A step whose devices are programmed one by one; made by `data_parallel`, used by `run`."""

  step: Step
  how: str
  mesh: jax.sharding.Mesh

  @property
  def table(self):
    return self.step.table

  def _advance(self, state: TrainState, table, length: int):
    """What one device does."""
    parts = self.mesh.shape[AXIS]

    def body(state, _):
      state, batch = self.step.draw(state, table, (jax.lax.axis_index(AXIS), parts))
      count = jax.lax.psum(batch.count(), AXIS)
      local = state
      if self.how == "shard_map":
        # Replicated parameters would get the summed gradient already; make the share local.
        vary = functools.partial(jax.lax.pcast, axis_name=AXIS, to="varying")
        local = dataclasses.replace(state, params=jax.tree.map(vary, state.params))
      share = self.step.share(local, batch, count).across(AXIS)
      return self.step.finish(state, share, table)

    return jax.lax.scan(body, state, None, length=length)

  @functools.cached_property
  def compiled_advance(self):
    if self.how == "pmap":
      mapped = jax.pmap(
        lambda index, state, table, length: self._advance(state, table, length),
        axis_name=AXIS,
        in_axes=(0, None, None),
        out_axes=None,
        static_broadcasted_argnums=3,
        devices=list(self.mesh.devices.flat),
      )
      # pmap wants one mapped argument; the devices' numbers serve.
      indices = np.arange(self.mesh.shape[AXIS])
      return lambda state, table, length: mapped(indices, state, table, length)

    def program(state, table, length):
      spec = PartitionSpec()
      return jax.shard_map(
        functools.partial(self._advance, length=length),
        mesh=self.mesh,
        in_specs=(spec, spec),
        out_specs=spec,
      )(state, table)

    return jax.jit(program, static_argnums=2, donate_argnums=0)
