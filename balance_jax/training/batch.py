"""What goes into a step and what comes out of a part of it, before the optimizer.

Parts of a batch, be they micro-batches or the parts of several devices, merge to what the whole
batch gives, whatever the weights.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from balance_jax.losses import WeightedMean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Examples with their groups and loss weights.

  Attributes:
    rows: pytree of arrays (B, ...), what the loss reads.
    groups: int (B,), each in [0, K).
    weights: float (B,), loss weights p / r.
    where: bool (B,), False for padding; None where every example is valid.
  """

  rows: Any
  groups: jax.Array
  weights: jax.Array
  where: jax.Array | None = None

  def count(self) -> jax.Array:
    """Number of valid examples, float32 scalar."""
    if self.where is None:
      return jnp.asarray(self.weights.shape[0], jnp.float32)
    return self.where.sum(dtype=jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed:
  """What a loss reports beside its losses, by name and without gradient.

  Attributes:
    means: arrays (B, ...), averaged over the valid examples of the batch.
    maxima: arrays (B, ...), their maximum over the valid examples.
    carried: pytrees of float arrays without a batch axis, already means over the valid examples of
      the rows the loss was given, for the step's `Carried` rule alone. The parts of a batch are
      averaged by their number of examples. So report what is linear in the examples, a mean and a
      mean square instead of a variance, and the parts give what the whole batch gives.
  """

  means: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  maxima: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  carried: dict[str, Any] = dataclasses.field(default_factory=dict)

  def reduce(self, batch: Batch, count) -> "Observed":
    """This part's share of all means, and its maxima; the arrays (B, ...) lose that axis."""
    own = batch.count()

    def where(x):
      return batch.where.reshape((-1,) + (1,) * (x.ndim - 1))

    def mean(x):
      x = x.astype(jnp.float32)
      x = x if batch.where is None else jnp.where(where(x), x, 0.0)
      return x.sum(axis=0) / jnp.maximum(count, 1.0)

    def maximum(x):
      x = x.astype(jnp.float32)
      return (x if batch.where is None else jnp.where(where(x), x, -jnp.inf)).max(axis=0)

    def share(path, x):
      x = jnp.asarray(x)
      if not jnp.issubdtype(x.dtype, jnp.floating):
        name = jax.tree_util.keystr(path)
        raise ValueError(f"Observed.carried{name} is {x.dtype}; expected a float array, a mean")
      x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      # The mean of a part without a valid example may be 0 / 0.
      return jnp.where(own > 0, x * (own / jnp.maximum(count, 1.0)), 0.0)

    return Observed(
      jax.tree.map(mean, self.means),
      jax.tree.map(maximum, self.maxima),
      jax.tree_util.tree_map_with_path(share, self.carried),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Share:
  """A part of a batch's loss, gradient and observations; parts merge to the batch's."""

  loss: jax.Array
  grads: Any
  group_loss: WeightedMean | None
  observed: Observed

  @classmethod
  def empty(cls, shapes: "Share") -> "Share":
    """The share of no example, to merge others with."""

    # full_like, not full: under shard_map it must vary over the mesh as the shares do.
    def fill(value):
      return lambda tree: jax.tree.map(lambda x: jnp.full_like(x, value), tree)

    return shapes._combine(fill(0), fill(-jnp.inf))

  def merge(self, other: "Share") -> "Share":
    """This part and another one: everything adds up, but of maxima the larger one stays."""
    return self._combine(
      lambda sums: jax.tree.map(jnp.add, sums, other._sums()),
      lambda maxima: jax.tree.map(jnp.maximum, maxima, other.observed.maxima),
    )

  def across(self, axis: str) -> "Share":
    """The whole of the parts that the devices along a mapped axis hold."""
    return self._combine(lambda x: jax.lax.psum(x, axis), lambda x: jax.lax.pmax(x, axis))

  def _sums(self):
    return self.loss, self.grads, self.group_loss, self.observed.means, self.observed.carried

  def _combine(self, add, maximum) -> "Share":
    *sums, means, carried = add(self._sums())
    return Share(*sums, Observed(means, maximum(self.observed.maxima), carried))
