"""Per-example losses (arrays in, unreduced array out) and the one reducer."""

from balance_jax.losses.class_balance import (
  deferred_weights,
  effective_number_weights,
  focal_loss,
  ldam_loss,
  ldam_margins,
)
from balance_jax.losses.contrastive import feature_separation_loss
from balance_jax.losses.cross_entropy import cross_entropy, cross_entropy_with_z_loss
from balance_jax.losses.reduce import WeightedMean, group_weighted_mean, weighted_mean

LOSSES = {
  "cross_entropy": cross_entropy,
  "cross_entropy_with_z_loss": cross_entropy_with_z_loss,
  "focal": focal_loss,
  "ldam": ldam_loss,
}

__all__ = [
  "LOSSES",
  "WeightedMean",
  "cross_entropy",
  "cross_entropy_with_z_loss",
  "deferred_weights",
  "effective_number_weights",
  "feature_separation_loss",
  "focal_loss",
  "group_weighted_mean",
  "ldam_loss",
  "ldam_margins",
  "weighted_mean",
]
