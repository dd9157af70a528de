"""Cross entropy from logits, plain and with the z-loss of large Transformers.

Source of the z-loss: Wortsman et al., "Small-scale proxies for large-scale Transformer training
instabilities", 2023 (arXiv 2309.14322), section 3.1.2.
"""

import jax
import jax.numpy as jnp

from balance_jax import _checks


def _log_normalizer_and_loss(logits, labels):
  logits, labels = jnp.asarray(logits), jnp.asarray(labels)
  if logits.ndim == 0:
    raise ValueError("logits has shape (); expected (..., V)")
  _checks.check_shape("labels", labels, logits.shape[:-1])
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels has dtype {labels.dtype}; expected integers")
  # At least float32: a bfloat16 log Z has no digits left for the z-loss.
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  log_normalizer = jax.nn.logsumexp(logits, axis=-1)
  # A negative index would count from the end: -100, the padding of other libraries, is a class too.
  index = jnp.where(labels < 0, logits.shape[-1], labels.astype(jnp.int32))
  picked = jnp.take_along_axis(logits, index[..., None], axis=-1, mode="fill")[..., 0]
  return log_normalizer, log_normalizer - picked


def cross_entropy(logits, labels) -> jax.Array:
  """Negative log-likelihood of the labels, in nats, one value per label.

  Args:
    logits: float (..., V).
    labels: int (...), each in [0, V); any other gives NaN (mask it with `where` in the mean).

  Returns:
    float32 (or float64) (...).

  >>> round(float(cross_entropy(jnp.zeros((4,)), jnp.array(2))), 4)
  1.3863
  """
  return _log_normalizer_and_loss(logits, labels)[1]


def cross_entropy_with_z_loss(logits, labels, *, z_coefficient=1e-4):
  """Cross entropy plus z_coefficient * (log Z)^2, which keeps the output logits from drifting.

  Args:
    logits: float (..., V).
    labels: int (...), each in [0, V).
    z_coefficient: weight of (log Z)^2, >= 0; 1e-4 in the paper. May be traced.

  Returns:
    (loss, aux): loss float (...), cross entropy plus z-term; aux a dict of float (...) arrays
    "cross_entropy", "z_loss" and "log_normalizer". Report the cross entropy at validation.
  """
  _checks.check_number("z_coefficient", z_coefficient, low=0.0)
  log_normalizer, loss = _log_normalizer_and_loss(logits, labels)
  z_loss = z_coefficient * jnp.square(log_normalizer)
  aux = {"cross_entropy": loss, "z_loss": z_loss, "log_normalizer": log_normalizer}
  return loss + z_loss, aux
