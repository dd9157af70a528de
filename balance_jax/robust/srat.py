"""SRAT: head against tail classes in adversarial training, by separated features and reweighting.

Adversarial training on imbalanced data costs tail classes more than natural training does, and
weighting them up costs head classes more as well, because its features are poorly separable. SRAT
separates them first and weights afterwards.

Source: Wang, Xu, Liu, Li, Thuraisingham, Tang, "Imbalanced Adversarial Training with Reweighting",
2021 (arXiv 2107.13639). The details of the objective and the default values are our reconstruction;
the closed forms of the Gaussian example are ours.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax.losses import cross_entropy, feature_separation_loss


def srat_loss(
  logits,
  features,
  labels,
  class_weights,
  *,
  lam=1.0,
  tau=0.1,
  base: Callable[..., jax.Array] = cross_entropy,
  where=None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Class-weighted loss plus feature separation, both on attacked inputs, one value per example.

  The mean over the n examples is the objective

    1/n sum_i w_{y_i} base(logits_i, y_i) + lam * (mean separation over anchors with a positive).

  It depends on the batch as a whole: a micro-batch separates features among its own examples only.
  The attack itself maximises the plain, unweighted cross entropy.

  Args:
    logits: float (B, K), of the attacked inputs.
    features: float (B, D), penultimate activations of the same forward pass. The separation term
      reaches whatever computed them and no layer after them.
    labels: int (B,), each in [0, K); any other gives NaN.
    class_weights: float (K,), such as `deferred_weights(step, start, effective_number_weights(n))`,
      whose sum is K; ones for no weighting.
    lam: strength of the separation, >= 0; may be traced.
    tau: temperature of the separation, > 0; may be traced.
    base: base(logits, labels) -> float (B,): `cross_entropy`, `focal_loss`, or `ldam_loss` with its
      margins bound by functools.partial.
    where: bool (B,); False rows do not exist, whatever they hold, and get value 0.

  Returns:
    (losses, aux): float32 (or float64) (B,); aux a dict of float (B,) arrays "base" (unweighted)
    and "separation", and of bool (B,) "anchors", where the separation counts.
  """
  _checks.check_number("lam", lam, low=0.0)
  logits, labels = jnp.asarray(logits), jnp.asarray(labels)
  _checks.check_shape("logits", logits, (None, None))
  _checks.check_shape("labels", labels, logits.shape[:1])
  _checks.check_shape("features", features, (logits.shape[0], None))
  _checks.check_shape("class_weights", class_weights, logits.shape[1:])
  if where is None:
    where = jnp.ones(labels.shape, bool)
  _checks.check_shape("where", where, labels.shape)
  where = jnp.asarray(where).astype(bool)
  logits = jnp.where(where[:, None], logits, 0.0)
  labels = jnp.where(where, labels, 0)

  losses = base(logits, labels)
  _checks.check_shape("the result of base", losses, labels.shape)
  losses = jnp.where(where, losses, 0.0)
  separation, anchors = feature_separation_loss(features, labels, tau, where=where)
  # So that the mean over all examples is a mean over the anchors.
  share = where.sum() / jnp.maximum(anchors.sum(), 1)
  total = jnp.asarray(class_weights)[labels] * losses + lam * share * separation
  return total, {"base": losses, "separation": separation, "anchors": anchors}


class ClassErrors(NamedTuple):
  """Error rates of a two-class problem: float arrays of one shape, each in [0, 1]."""

  majority: jax.Array
  minority: jax.Array


def gaussian_two_class_errors(separation, imbalance, minority_weight=1.0) -> ClassErrors:
  """Errors by class of the best linear rule for two Gaussian classes of unequal frequency.

  With x | y ~ N(y mu, sigma^2 I), S = |mu| / sigma, P(majority) / P(minority) = K and the
  minority's errors counted rho times,

    error(minority) = Phi(-S + log(K / rho) / (2 S)),
    error(majority) = Phi(-S - log(K / rho) / (2 S)).

  The gap between the classes falls with S, and so does what full weighting, from rho = 1 to K,
  costs the majority. The cost of a little weight, d error(majority) / d log rho =
  phi(S + L / (2 S)) / (2 S) with L = log(K / rho), falls with S only where
  S^2 > (sqrt(1 + L^2) - 1) / 2. Robust training acts on the smaller S of `robust_separation`.

  Args:
    separation: S, >= 0. At 0 all go to the heavier class, or half of each if the classes balance.
    imbalance: K, > 0.
    minority_weight: rho, > 0. The three broadcast and may be traced.

  Returns:
    `ClassErrors`, float32 (or float64).

  >>> errors = gaussian_two_class_errors(2.0, 100.0)
  >>> round(float(errors.majority), 5), round(float(errors.minority), 5)
  (0.00081, 0.19802)
  """
  for name, value, open_low in (
    ("separation", separation, False),
    ("imbalance", imbalance, True),
    ("minority_weight", minority_weight, True),
  ):
    _check_all_above_zero(name, value, open_low)
  separation = jnp.asarray(separation, jnp.result_type(float))
  log_odds = jnp.log(imbalance) - jnp.log(minority_weight)
  # Only 0 / 0 is replaced: at balanced classes the gradient is not zero.
  undecided = (separation == 0) & (log_odds == 0)
  shift = jnp.where(undecided, 0.0, log_odds / jnp.where(undecided, 1.0, 2.0 * separation))
  return ClassErrors(_normal_cdf(-separation - shift), _normal_cdf(-separation + shift))


def robust_separation(mean, sigma, eps) -> jax.Array:
  """S of `gaussian_two_class_errors` under an l_inf attack of radius `eps`.

  The best robust linear rule takes each coordinate of the mean eps closer to zero, or to zero, and
  its robust errors are the errors at S = |max(|mu| - eps, 0)| / sigma.

  Args:
    mean: float (..., D), mean mu of one class; that of the other is -mu.
    sigma: standard deviation of every coordinate, a number > 0.
    eps: a number >= 0. All may be traced.

  Returns:
    float (...).

  >>> print(f"{robust_separation(jnp.array([4.0, -5.0, 0.5]), 2.0, 1.0):g}")
  2.5
  """
  _checks.check_number("sigma", sigma, low=0.0, open_low=True)
  _checks.check_number("eps", eps, low=0.0)
  mean = jnp.asarray(mean, jnp.result_type(float))
  if mean.ndim == 0:
    raise ValueError("mean has shape (); expected (..., D)")
  return jnp.linalg.norm(jnp.maximum(jnp.abs(mean) - eps, 0.0), axis=-1) / sigma


def _check_all_above_zero(argument, values, open_low) -> None:
  if _checks.is_concrete(values):
    for value in np.asarray(values).flat:
      _checks.check_number(argument, value, low=0.0, open_low=open_low)


def _normal_cdf(x):
  # From the complementary error function: small error rates keep their digits.
  return 0.5 * jax.lax.erfc(-x / math.sqrt(2.0))
