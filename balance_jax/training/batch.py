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
  """What a loss reports beside its losses: one array (B, ...) for each name, without gradient.

  Attributes:
    means: averaged over the valid examples of the batch.
    maxima: their maximum over the valid examples.
  """

  means: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  maxima: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  def reduce(self, batch: Batch, count) -> "Observed":
    """This part's share of the means, and its maxima; every array loses its axis B."""

    def where(x):
      return batch.where.reshape((-1,) + (1,) * (x.ndim - 1))

    def mean(x):
      x = x.astype(jnp.float32)
      x = x if batch.where is None else jnp.where(where(x), x, 0.0)
      return x.sum(axis=0) / jnp.maximum(count, 1.0)

    def maximum(x):
      x = x.astype(jnp.float32)
      return (x if batch.where is None else jnp.where(where(x), x, -jnp.inf)).max(axis=0)

    return Observed(jax.tree.map(mean, self.means), jax.tree.map(maximum, self.maxima))


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
    return self.loss, self.grads, self.group_loss, self.observed.means

  def _combine(self, add, maximum) -> "Share":
    *sums, means = add(self._sums())
    return Share(*sums, Observed(means, maximum(self.observed.maxima)))
