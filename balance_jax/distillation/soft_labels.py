"""Learning from a teacher's soft labels: their divergence and entropy, and two robust baselines.

Sources: Goldblum et al., "Adversarially Robust Distillation" (ARD), 2019 (arXiv 1905.09747); Zi et
al., "Revisiting Adversarial Robustness Distillation: Robust Soft Labels Make Student Better"
(RSLAD), 2021 (arXiv 2108.07969).
"""

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.losses.cross_entropy import cross_entropy

REDUCTIONS = ("mean", "batchmean")


def soft_kl(student_logits, teacher_logits, tau=1.0, reduction="mean", eps=1e-5) -> jax.Array:
  """Divergence sum_k p_k (log(p_k + eps) - log q_k) of the student's q from soft labels p.

  p = softmax(teacher_logits / tau), q = softmax(student_logits): the student has no temperature.

  Args:
    student_logits: float (..., K).
    teacher_logits: float (..., K). Gradients flow into them as well unless they are stopped.
    tau: temperature of the teacher, > 0; may be traced.
    reduction: "mean" divides the sum by K, as the published code of MTARD and RSLAD does by
      averaging over examples and classes alike; "batchmean" does not. The mean over examples is
      left to the caller.
    eps: added inside the logarithm, >= 0; 0 is the Kullback-Leibler divergence itself.

  Returns:
    float32 (or float64) (...), >= 0 up to rounding. A class with p = 0 adds nothing.

  >>> teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(float(soft_kl(student, teacher, reduction="batchmean", eps=0.0)), 4)
  0.1438
  """
  student_logits = _wide("student_logits", student_logits)
  _checks.check_shape("teacher_logits", teacher_logits, student_logits.shape)
  p, log_p = _soft_labels(teacher_logits, tau, eps)
  # A class ruled out by both has p = 0 and log q = -inf; their product is to be 0.
  log_q = jnp.where(p > 0, jax.nn.log_softmax(student_logits), 0.0)
  return _over_classes(p * (log_p - log_q), reduction)


def soft_entropy(teacher_logits, tau=1.0, reduction="mean", eps=1e-5) -> jax.Array:
  """Entropy -sum_k p_k log(p_k + eps) of the soft labels p = softmax(teacher_logits / tau).

  Args:
    teacher_logits: float (..., K).
    tau: > 0; may be traced.
    reduction: "mean" divides by K, "batchmean" does not.
    eps: >= 0; with eps > 0 the entropy of a sure teacher is -eps rather than 0.

  Returns:
    float32 (or float64) (...).

  >>> round(float(soft_entropy(jnp.zeros((4,)), reduction="batchmean", eps=0.0)), 4)
  1.3863
  """
  p, log_p = _soft_labels(_wide("teacher_logits", teacher_logits), tau, eps)
  return _over_classes(-p * log_p, reduction)


def ard_loss(
  student_adv, student_nat, teacher_nat, labels, *, alpha=1.0, tau=30.0, reduction="mean"
) -> jax.Array:
  """ARD: alpha tau^2 KL(T(x) || S(x')) with both at temperature tau, plus (1 - alpha) CE(S(x), y).

  The attack maximises the student's cross entropy.

  Args:
    student_adv: float (..., K), the student's logits on the attacked inputs x'.
    student_nat: float (..., K), the student's logits on the clean inputs x.
    teacher_nat: float (..., K), a robust teacher's logits on x; no gradient flows into them.
    labels: int (...), each in [0, K); any other gives NaN.
    alpha: in [0, 1]; may be traced. Default values as in the published code.
    tau: temperature of student and teacher, > 0; may be traced.
    reduction: over classes, see `soft_kl`; it scales the first term alone.

  Returns:
    float32 (or float64) (...), one loss per example.
  """
  _checks.check_number("alpha", alpha, low=0.0, high=1.0)
  _checks.check_number("tau", tau, low=0.0, open_low=True)
  teacher_nat = jax.lax.stop_gradient(jnp.asarray(teacher_nat))
  student_adv = _wide("student_adv", student_adv)
  distilled = soft_kl(student_adv / tau, teacher_nat, tau, reduction, eps=0.0)
  return alpha * tau**2 * distilled + (1.0 - alpha) * cross_entropy(student_nat, labels)


def rslad_loss(
  student_adv, student_nat, teacher_nat, *, adv_weight=5 / 6, reduction="mean"
) -> jax.Array:
  """RSLAD: 5/6 KL(T(x) || S(x')) + 1/6 KL(T(x) || S(x)), without hard labels.

  The attack maximises KL(T(x) || S(x')), that is `soft_kl` of the attacked logits.

  Args:
    student_adv: float (..., K), the student's logits on the attacked inputs x'.
    student_nat: float (..., K), the student's logits on the clean inputs x.
    teacher_nat: float (..., K), a robust teacher's logits on x; no gradient flows into them.
    adv_weight: weight of the first term, in [0, 1]; the second has the rest. May be traced.
    reduction: over classes, see `soft_kl`.

  Returns:
    float32 (or float64) (...), one loss per example.
  """
  _checks.check_number("adv_weight", adv_weight, low=0.0, high=1.0)
  teacher_nat = jax.lax.stop_gradient(jnp.asarray(teacher_nat))
  robust = soft_kl(student_adv, teacher_nat, reduction=reduction)
  natural = soft_kl(student_nat, teacher_nat, reduction=reduction)
  return adv_weight * robust + (1.0 - adv_weight) * natural


def _wide(argument, logits):
  logits = jnp.asarray(logits)
  if logits.ndim == 0:
    raise ValueError(f"{argument} has shape (); expected (..., K)")
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _soft_labels(teacher_logits, tau, eps):
  """p and log(p + eps), with 0 for the logarithm where p = 0."""
  _checks.check_number("tau", tau, low=0.0, open_low=True)
  _checks.check_number("eps", eps, low=0.0)
  p = jax.nn.softmax(_wide("teacher_logits", teacher_logits) / tau)
  present = p > 0
  return p, jnp.where(present, jnp.log(jnp.where(present, p, 1.0) + eps), 0.0)


def _over_classes(terms, reduction):
  _checks.check_choice("reduction", reduction, REDUCTIONS)
  return terms.mean(axis=-1) if reduction == "mean" else terms.sum(axis=-1)
