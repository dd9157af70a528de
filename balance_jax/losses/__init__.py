"""Per-example losses (arrays in, unreduced array out) and the one reducer."""

from balance_jax.losses.cross_entropy import cross_entropy, cross_entropy_with_z_loss
from balance_jax.losses.reduce import WeightedMean, group_weighted_mean, weighted_mean

LOSSES = {
  "cross_entropy": cross_entropy,
  "cross_entropy_with_z_loss": cross_entropy_with_z_loss,
}

__all__ = [
  "LOSSES",
  "WeightedMean",
  "cross_entropy",
  "cross_entropy_with_z_loss",
  "group_weighted_mean",
  "weighted_mean",
]
