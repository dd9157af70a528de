"""Losses and class weights against imbalanced classes: head classes balanced against tail classes.

Sources: class-balanced weights from Cui et al., "Class-Balanced Loss Based on Effective Number of
Samples", 2019 (arXiv 1901.05555); focal loss from Lin et al., "Focal Loss for Dense Object
Detection", 2017 (arXiv 1708.02002); label-distribution-aware margins and deferred reweighting from
Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", 2019 (arXiv
1906.07413).
"""

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax.losses.cross_entropy import cross_entropy


def effective_number_weights(counts, beta: float = 0.9999) -> jax.Array:
  """Class-balanced weights w_k ~ (1 - beta) / (1 - beta^n_k), with sum K (Cui et al., section 4).

  (1 - beta^n) / (1 - beta) is the effective number of n examples that may cover the same ground.

  Args:
    counts: numbers (K,), examples of each class, >= 0, not all zero, known on the host.
    beta: in [0, 1], known on the host. 0 gives equal weights, 1 the inverse frequencies.

  Returns:
    float (K,). A class without examples has weight 0, and the others sum to their number.

  >>> [round(float(w), 3) for w in effective_number_weights([5000, 50], beta=0.999)]
  [0.094, 1.906]
  """
  counts = _checks.check_sizes(counts, "counts")
  _checks.check_known("beta", beta)
  _checks.check_number("beta", beta, low=0.0, high=1.0)
  present = counts > 0
  n = counts[present]
  # In float64 on the host: 1 - beta has three digits left in float32.
  if beta == 1:
    weights = 1.0 / n
  elif beta == 0:
    weights = np.ones_like(n)
  else:
    weights = -1.0 / np.expm1(n * np.log(float(beta)))
  balanced = np.zeros_like(counts)
  balanced[present] = weights * (n.size / weights.sum())
  return jnp.asarray(balanced, jnp.result_type(float))


def deferred_weights(step, start, weights) -> jax.Array:
  """Deferred reweighting: ones before `start`, `weights` from then on (Cao et al., section 3.3).

  Args:
    step: int scalar, the present step or epoch; may be traced.
    start: first step with weights; 0 is reweighting from the outset. May be traced.
    weights: float (K,).

  Returns:
    Like weights.

  >>> [deferred_weights(step, 160, jnp.array([0.5, 1.5])).tolist() for step in (159, 160)]
  [[1.0, 1.0], [0.5, 1.5]]
  """
  for name, value in (("step", step), ("start", start)):
    _checks.check_shape(name, value, ())
  weights = jnp.asarray(weights)
  return jnp.where(jnp.asarray(step) >= start, weights, jnp.ones_like(weights))


def focal_loss(logits, labels, *, gamma=2.0) -> jax.Array:
  """Focal loss (1 - p_y)^gamma * (-log p_y) over softmax probabilities (Lin et al., eq. 4).

  Args:
    logits: float (..., V).
    labels: int (...), each in [0, V); any other gives NaN (mask it with `where` in the mean).
    gamma: focus on hard examples, >= 0; 0 is cross entropy. May be traced.

  Returns:
    float32 (or float64) (...).

  >>> round(float(focal_loss(jnp.zeros((2,)), jnp.array(1))), 4)  # 0.5^2 log 2
  0.1733
  """
  _checks.check_number("gamma", gamma, low=0.0)
  logits, labels = jnp.asarray(logits), jnp.asarray(labels)
  nll = cross_entropy(logits, labels)
  # Where the label is invalid, a product with NaN would reach gradients through the mask.
  valid = ~jnp.isnan(nll)
  nll = jnp.where(valid, nll, 0.0)
  # 1 - p from the loss keeps its digits where p is close to 1. The floor makes gamma = 0 and
  # p = 1 exact, in value and gradient, where a power of 0 would not be.
  missing = jnp.maximum(-jnp.expm1(-nll), jnp.finfo(nll.dtype).tiny)
  return jnp.where(valid, jnp.exp(gamma * jnp.log(missing)) * nll, jnp.nan)


def ldam_margins(counts, max_margin: float = 0.5) -> jax.Array:
  """Label-distribution-aware margins C / n_k^(1/4), the largest `max_margin` (Cao et al.).

  Args:
    counts: numbers (K,), examples of each class, >= 0, not all zero, known on the host.
    max_margin: margin of the smallest class, >= 0, known on the host.

  Returns:
    float (K,); `max_margin` as well for a class without examples.

  >>> [round(float(m), 3) for m in ldam_margins([10_000, 1])]
  [0.05, 0.5]
  """
  counts = _checks.check_sizes(counts, "counts")
  _checks.check_known("max_margin", max_margin)
  _checks.check_number("max_margin", max_margin, low=0.0, high=np.finfo(np.float32).max)
  smallest = counts[counts > 0].min()
  margins = max_margin * (smallest / np.maximum(counts, smallest)) ** 0.25
  return jnp.asarray(margins, jnp.result_type(float))


def ldam_loss(logits, labels, *, margins, scale=30.0) -> jax.Array:
  """Cross entropy of scale * (logits - margin_y at the label) (Cao et al., section 3).

  Args:
    logits: float (..., V). In the paper they are cosines in [-1, 1], of normalised features and
      normalised columns of the last layer, which is what the scale of 30 is for.
    labels: int (...), each in [0, V); any other gives NaN (mask it with `where` in the mean).
    margins: float (V,), from `ldam_margins`; zeros and scale 1 give cross entropy.
    scale: > 0; may be traced.

  Returns:
    float32 (or float64) (...).

  >>> margins = ldam_margins([100, 10])
  >>> loss = ldam_loss(jnp.array([0.2, 0.9]), jnp.array(1), margins=margins, scale=10.0)
  >>> round(float(loss), 4)
  0.1269
  """
  _checks.check_number("scale", scale, low=0.0, open_low=True)
  logits, labels = jnp.asarray(logits), jnp.asarray(labels)
  if logits.ndim == 0:
    raise ValueError("logits has shape (); expected (..., V)")
  num_classes = logits.shape[-1]
  _checks.check_shape("margins", margins, (num_classes,))
  _checks.check_shape("labels", labels, logits.shape[:-1])
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  # int32 first: the class numbers themselves might not fit into the labels' dtype.
  at_label = jax.nn.one_hot(labels.astype(jnp.int32), num_classes, dtype=bool)
  margins = jnp.broadcast_to(jnp.asarray(margins, logits.dtype), logits.shape)
  return cross_entropy(scale * (logits - jnp.where(at_label, margins, 0.0)), labels)
