"""A plain multilayer perceptron."""

import flax.linen as nn
import jax

from balance_jax import _checks
from balance_jax.models.image_layers import (
  INITIALIZATIONS,
  dense_layer,
  norm_layer,
  normalize_pixels,
)


class MLP(nn.Module):
  """Dense layers, each with batch normalisation if asked for and ReLU, then the classifier.

  Called with x, float (B, ...), flattened behind the first axis, and train; returns logits, float
  (B, K). Training mode normalises by the batch and updates "batch_stats" (make it mutable).

  Attributes:
    features: units of the hidden layers; () is a linear classifier.
    num_classes: K, >= 1.
    batch_norm: whether hidden layers are normalised.
    initialization: "default" or "ibp", see `ImageNetwork`.
    mean: what is subtracted from x, one number or one for each entry of its last axis.
    std: what it is divided by, likewise, each > 0.

  Raises:
    ValueError: x of rank below 2, an unknown initialization, mean or std of another length.

  >>> import jax.numpy as jnp
  >>> model = MLP(features=(8, 8), num_classes=3)
  >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4)))
  >>> sorted(variables["params"]), model.apply(variables, jnp.zeros((2, 4))).shape
  (['dense_0', 'dense_1', 'head'], (2, 3))
  """

  features: tuple[int, ...] = (128, 128)
  num_classes: int = 10
  batch_norm: bool = False
  initialization: str = "default"
  mean: tuple[float, ...] = (0.0,)
  std: tuple[float, ...] = (1.0,)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    _checks.check_choice("initialization", self.initialization, INITIALIZATIONS)
    if x.ndim < 2:
      raise ValueError(f"x has shape {x.shape}; expected (B, ...)")
    x = normalize_pixels(x, self.mean, self.std).reshape(len(x), -1)
    for i, features in enumerate(self.features):
      x = dense_layer(x, features, f"dense_{i}", INITIALIZATIONS[self.initialization](1.0))
      x = nn.relu(norm_layer(x, f"norm_{i}", train) if self.batch_norm else x)
    return dense_layer(x, self.num_classes, "head")
