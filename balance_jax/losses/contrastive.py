"""Supervised contrastive loss: features of one class drawn together, those of others apart.

Source: Khosla et al., "Supervised Contrastive Learning", 2020 (arXiv 2004.11362), eq. 2; as the
feature separation loss of Wang et al., "Imbalanced Adversarial Training with Reweighting", 2021
(arXiv 2107.13639).
"""

import jax
import jax.numpy as jnp

from balance_jax import _checks


def feature_separation_loss(
  features, labels, tau=0.1, normalize: bool = True, where=None
) -> tuple[jax.Array, jax.Array]:
  """Supervised contrastive loss of every anchor against the rest of the batch.

  With P(i) the other examples of the label of i and A(i) all other examples,

    -1/|P(i)| sum_{p in P(i)} log( exp(z_i.z_p / tau) / sum_{a in A(i)} exp(z_i.z_a / tau) ).

  Mean over anchors: `weighted_mean(values, where=valid).mean()`.

  Args:
    features: float (B, D), such as the activations before the last layer.
    labels: int (B,); any numbers, equal for examples of one class.
    tau: temperature, > 0; may be traced. Infinity gives log |A(i)|.
    normalize: scale every feature vector to length 1; a zero vector stays zero, with gradient 0.
    where: bool (B,); False rows exist neither as anchors nor as anything else, whatever they hold.

  Returns:
    (values, valid): float32 (or float64) (B,), each >= 0 up to rounding, and bool (B,). An anchor
    without a positive (the only one of its class in the batch) has value 0 and is not valid.

  >>> features = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
  >>> values, valid = feature_separation_loss(features, jnp.array([0, 0, 1]), tau=0.5)
  >>> [round(float(v), 4) for v in values], valid.tolist()  # log(1 + exp(-2)) twice
  ([0.1269, 0.1269, 0.0], [True, True, False])
  """
  _checks.check_number("tau", tau, low=0.0, open_low=True)
  features, labels = jnp.asarray(features), jnp.asarray(labels)
  _checks.check_shape("features", features, (None, None))
  _checks.check_shape("labels", labels, features.shape[:1])
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels has dtype {labels.dtype}; expected integers")
  features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
  others = ~jnp.eye(features.shape[0], dtype=bool)
  if where is not None:
    _checks.check_shape("where", where, labels.shape)
    where = jnp.asarray(where).astype(bool)
    # On the input side: a masked row may be NaN or infinite and must leave no trace.
    features = jnp.where(where[:, None], features, 0.0)
    others &= where[:, None] & where[None, :]
  if normalize:
    features = _unit_length(features)
  positives = others & (labels[:, None] == labels[None, :])
  count = positives.sum(axis=1)
  valid = count > 0

  # Full precision: a division by a small tau would magnify rounded products.
  logits = jnp.matmul(features, features.T, precision="highest") / tau
  log_sum = jax.nn.logsumexp(logits, axis=1, where=others)
  mean_positive = jnp.where(positives, logits, 0.0).sum(axis=1) / jnp.maximum(count, 1)
  return jnp.where(valid, log_sum - mean_positive, 0.0), valid


def _unit_length(features):
  """Rows scaled to length 1; rows of zeros stay."""
  # Scale out the largest entry first, so that no square over- or underflows. The result does not
  # depend on the factor, which therefore needs no gradient.
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(features), axis=1, keepdims=True))
  empty = largest == 0
  features = features / jnp.where(empty, 1.0, largest)
  squares = jnp.sum(jnp.square(features), axis=1, keepdims=True)
  return features / jnp.sqrt(jnp.where(empty, 1.0, squares))
