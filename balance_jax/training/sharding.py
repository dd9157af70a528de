"""Where the arrays of a run lie on a mesh with the axes "data" and "model": one table of rules.

Batches are split along "data". Parameters are replicated, split along "model" by the rules below
(tensor parallelism, for the decoder), and on request kept in parts along "data" as well, each along
its longest axis that divides (fully sharded data parallelism): a loss gathers them, and its
gradient is summed into parts. The state of the optimizer lies as the parameters do, whose names end
its own. The compiler adds the collectives; losses know nothing.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from balance_jax import _checks

DATA, MODEL = "data", "model"

# The end of a parameter's name -> how its axes lie. Every pair of matrices is split between them:
# the first by columns, the second by rows, so that their product needs one sum over devices.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"attention/(query|key|value)$", (None, MODEL)),
  (r"attention/out$", (MODEL, None)),
  (r"mlp/up$", (None, MODEL)),
  (r"mlp/down$", (MODEL, None)),
  (r"embedding$", (MODEL, None)),
  (r"head$", (None, MODEL)),
)


def make_mesh(data: int = -1, model: int = 1) -> jax.sharding.Mesh:
  """A mesh of `data` x `model` devices, of all processes.

  Args:
    data: devices that share a batch, >= 1; -1 for as many as there are.
    model: devices that share a matrix, >= 1.

  Raises:
    ValueError: more devices than there are, or with -1 a number that does not divide it.
  """
  _checks.check_number("mesh.model", model, low=1, integer=True)
  available = jax.device_count()
  if data == -1:
    if available % model:
      raise ValueError(f"mesh.model is {model}; expected a divisor of the {available} devices")
    data = available // model
  _checks.check_number("mesh.data", data, low=1, integer=True)
  if data * model > available:
    raise ValueError(f"mesh.data x mesh.model is {data} x {model}; there are {available} devices")
  return auto_mesh(jax.devices()[: data * model], **{DATA: data, MODEL: model})


def auto_mesh(devices, **axes: int) -> jax.sharding.Mesh:
  """A mesh whose splits the compiler completes; axes: name -> number of devices."""
  # Auto: with explicit axes the scatters and sorts of the losses would raise.
  kinds = (AxisType.Auto,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the arrays of a run lie.

  Attributes:
    mesh: with the axis "data" and, or without, the axis "model"; None for one device.
    shard_parameters: whether parameters and optimizer state are kept in parts along "data".
  """

  mesh: jax.sharding.Mesh | None = None
  shard_parameters: bool = False

  def state(self, shapes: Any, leading: int = 0) -> Any:
    """The shardings of a `TrainState`; all but parameters and optimizer state is replicated.

    Args:
      shapes: the state, or its shapes.
      leading: axes in front that are not split, such as that of the runs of a sweep.
    """

    def place(path, leaf):
      inner = path[0].name in ("params", "opt_state")
      axes = self._axes(path, leaf.shape[leading:], self.shard_parameters) if inner else ()
      return self._at(*(None,) * leading, *axes)

    return jax.tree_util.tree_map_with_path(place, shapes)

  def shapes(self, shapes: Any, leading: int = 0) -> Any:
    """The shapes of a `TrainState` with the places of `state`."""
    if self.mesh is None:
      return shapes

    def placed(leaf, sharding):
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, shapes, self.state(shapes, leading))

  def spread(self, step):
    """The `Step` on the mesh.

    Raises:
      ValueError: a mesh without the axis "data", a batch that its devices do not divide.
    """
    if self.mesh is not None and DATA not in self.mesh.shape:
      raise ValueError(f"mesh has the axes {tuple(self.mesh.shape)}; expected one named {DATA!r}")
    parts = 1 if self.mesh is None else self._size(DATA)
    if step.batch_size % (parts * step.micro_batches):
      raise ValueError(
        f"batch_size is {step.batch_size}; the mesh's {parts} devices times {step.micro_batches} "
        "micro-batches must divide it"
      )
    return dataclasses.replace(step, placement=self)

  def put(self, tree: Any) -> Any:
    """A pytree of arrays, the same in every process, copied to every device."""
    if self.mesh is None:
      return tree
    if jax.process_count() > 1:  # an array of one process is no part of a global one
      tree = jax.device_get(tree)
    return jax.device_put(tree, self._at())

  def everywhere(self, tree: Any) -> Any:
    """Inside of a program: every device has all of the arrays."""
    return self._constrain(tree, lambda path, leaf: self._at())

  def hold(self, state: Any, leading: int = 0) -> Any:
    """Inside of a program: a `TrainState` where `state` says."""
    if self.mesh is None:
      return state
    return jax.lax.with_sharding_constraint(state, self.state(state, leading))

  def parts(self, tree: Any) -> Any:
    """Inside of a program: arrays (B, ...) split along "data", where its devices divide B."""

    def place(path, leaf):
      divides = leaf.ndim and leaf.shape[0] % self._size(DATA) == 0
      return self._at(DATA) if divides else self._at()

    return self._constrain(tree, place)

  def whole(self, params: Any) -> Any:
    """Inside of a program: parameters as a loss uses them, gathered along "data"."""
    if not self.shard_parameters:
      return params
    return self._constrain(params, lambda path, x: self._at(*self._axes(path, x.shape, False)))

  def _axes(self, path, shape: tuple[int, ...], shard: bool) -> tuple[str | None, ...]:
    """How the axes of one parameter lie."""
    axes, name = [None] * len(shape), _name(path)
    rules = (rule for pattern, rule in RULES if re.search(rf"(^|/){pattern}", name))
    rule = next(rules, ())
    if len(rule) == len(shape):
      axes = [
        axis if axis and self._size(axis) > 1 and size % self._size(axis) == 0 else None
        for axis, size in zip(rule, shape, strict=True)
      ]
    free = [i for i, axis in enumerate(axes) if axis is None and shape[i] % self._size(DATA) == 0]
    # Vectors are small, and each would cost a collective.
    if shard and len(shape) > 1 and free:
      axes[max(free, key=lambda i: shape[i])] = DATA
    return tuple(axes)

  def _size(self, axis: str) -> int:
    return self.mesh.shape.get(axis, 1)

  def _at(self, *axes) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec(*axes))

  def _constrain(self, tree, place):
    if self.mesh is None:
      return tree
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: jax.lax.with_sharding_constraint(leaf, place(path, leaf)), tree
    )


ONE_DEVICE = Placement()


def placement(spec: Mapping[str, Any]) -> Placement:
  """The placement that `config.mesh` asks for.

  Args:
    spec: "data", "model" and "shard_parameters"; see `make_mesh` and `Placement`.

  Raises:
    ValueError: as `make_mesh`, or devices left out where there are several processes.
  """
  mesh = make_mesh(spec["data"], spec["model"])
  if jax.process_count() > 1 and mesh.size < jax.device_count():
    raise ValueError(
      f"mesh.data x mesh.model is {spec['data']} x {spec['model']}; expected all "
      f"{jax.device_count()} devices of the {jax.process_count()} processes: --config.mesh.data=-1"
    )
  return Placement(mesh, spec["shard_parameters"]) if mesh.size > 1 else ONE_DEVICE


def _name(path) -> str:
  """The names on the way to a leaf, "block_0/mlp/up"; positions and fields do not count."""
  return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
