"""Margins z_y - z_j between the logit of the label and the others: what is bounded and certified.

An example is robust if all its K - 1 margins are above zero all over the box. Bounds of margins are
tighter than differences of logit bounds, because the last affine layer is merged with
`margin_matrix`. Source: Gowal et al., "Scalable Verified Training for Provably Robust Image
Classification", 2018 (arXiv 1810.12715), section 3; Shi et al., 2021 (arXiv 2103.17268), section 2.
"""

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks


def margin_matrix(labels, num_classes: int) -> jax.Array:
  """Rows e_y - e_j for j != y, j ascending: margins = matrix @ logits.

  Args:
    labels: int (B,), each in [0, K). Of traced labels, one out of range gives a row of NaN, which
      `verified` refuses; a padded row needs a valid label, because NaN factors survive a mask.
    num_classes: K, static, >= 2.

  Returns:
    float32 (B, K - 1, K).

  Raises:
    ValueError: labels that are known and out of range, or no integers.

  >>> margin_matrix(jnp.array([1]), 3)[0].tolist()
  [[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]
  """
  _checks.check_number("num_classes", num_classes, low=2, integer=True)
  _checks.check_shape("labels", labels, (None,))
  labels = _check_labels(labels, num_classes)[:, None]
  position = jnp.arange(num_classes - 1)[None, :]
  other = position + (position >= labels)
  matrix = jax.nn.one_hot(labels, num_classes) - jax.nn.one_hot(other, num_classes)
  return jnp.where(_in_range(labels, num_classes)[..., None], matrix, jnp.nan)


def margins(logits, labels) -> jax.Array:
  """z_y - z_j for j != y, j ascending: the margins of one point, in the order of `margin_matrix`.

  Args:
    logits: float (..., K), K >= 2.
    labels: int (...), each in [0, K); a traced one out of range gives NaN.

  Returns:
    float32 (or float64) (..., K - 1).

  >>> margins(jnp.array([[1.0, 4.0, 2.0]]), jnp.array([1])).tolist()
  [[3.0, 2.0]]
  """
  logits = jnp.asarray(logits)
  if logits.ndim == 0 or logits.shape[-1] < 2:
    raise ValueError(f"logits has shape {logits.shape}; expected (..., K) with K >= 2")
  _checks.check_shape("labels", labels, logits.shape[:-1])
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  num_classes = logits.shape[-1]
  labels = _check_labels(labels, num_classes)[..., None]
  # A negative index would count from the end.
  index = jnp.where(labels < 0, num_classes, labels)
  picked = jnp.take_along_axis(logits, index, axis=-1, mode="fill")
  # Leaving out column y shifts the later ones by one: a choice of two slices, not a gather.
  before = jnp.expand_dims(jnp.arange(num_classes - 1), tuple(range(labels.ndim - 1))) < labels
  return picked - jnp.where(before, logits[..., :-1], logits[..., 1:])


def margin_cross_entropy(margins) -> jax.Array:
  """log(1 + sum_j exp(-m_j)): cross entropy of the logits (0, -m_1, ...) with label 0.

  Of exact margins this is the cross entropy of the logits; of lower bounds, an upper bound of the
  worst one in the box.

  Args:
    margins: float (..., K - 1).

  Returns:
    float32 (or float64) (...), >= 0; finite for finite margins, however large.

  >>> round(float(margin_cross_entropy(jnp.zeros(9))), 4)
  2.3026
  """
  margins = _floating("margins", margins)
  margins = margins.astype(jnp.promote_types(margins.dtype, jnp.float32))
  label = jnp.zeros_like(margins, shape=(*margins.shape[:-1], 1))
  return jax.nn.logsumexp(jnp.concatenate([label, -margins], axis=-1), axis=-1)


def verified(margins) -> jax.Array:
  """True where every margin (bound) is finite and above zero; a tie is no success.

  Args:
    margins: float (..., K - 1), lower bounds with the slack that the caller wants.

  Returns:
    bool (...).

  >>> verified(jnp.array([[0.1, 2.0], [0.0, 2.0], [jnp.nan, 2.0], [jnp.inf, 2.0]])).tolist()
  [True, False, False, False]
  """
  margins = _floating("margins", margins)
  return jnp.all((margins > 0) & jnp.isfinite(margins), axis=-1)


def _in_range(labels, num_classes):
  return (labels >= 0) & (labels < num_classes)


def _check_labels(labels, num_classes) -> jax.Array:
  """Labels as int32; raises where their type or, if known, a value is wrong."""
  dtype = jnp.result_type(labels)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(f"labels has dtype {dtype}; expected integers")
  if _checks.is_concrete(labels):
    known = np.asarray(labels)
    outside = known[~_in_range(known, num_classes)]
    if outside.size:
      raise ValueError(f"labels holds {outside[0]}; allowed: 0 to {num_classes - 1}")
  return jnp.asarray(labels).astype(jnp.int32)


def _floating(argument, array) -> jax.Array:
  array = jnp.asarray(array)
  if array.ndim == 0 or not jnp.issubdtype(array.dtype, jnp.floating):
    raise ValueError(
      f"{argument} has shape {array.shape} and dtype {array.dtype}; expected float (..., K - 1)"
    )
  return array
