import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.losses import (
  cross_entropy,
  effective_number_weights,
  feature_separation_loss,
  focal_loss,
  ldam_loss,
)
from balance_jax.robust.srat import gaussian_two_class_errors, robust_separation, srat_loss

LABELS = np.array([0, 0, 1, 2, 1, 0])
WEIGHTS = np.array([0.2, 0.8, 2.0])
LDAM = functools.partial(ldam_loss, margins=jnp.array([0.1, 0.2, 0.5]), scale=3.0)

phi = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))  # the normal distribution function


def random_batch(seed=0, size=6):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(size, d)).astype(np.float32) for d in (3, 4))


def reference(logits, features, labels, weights, lam, tau):
  """The objective with cross entropy, a scalar in float64."""
  logits, z = (np.asarray(x, np.float64) for x in (logits, features))
  losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
  z = z / np.linalg.norm(z, axis=1, keepdims=True)
  separations = []
  for i in range(len(z)):
    others = [a for a in range(len(z)) if a != i]
    log_sum = np.log(np.sum([np.exp(z[i] @ z[a] / tau) for a in others]))
    positives = [z[i] @ z[p] / tau - log_sum for p in others if labels[p] == labels[i]]
    if positives:
      separations.append(-np.mean(positives))
  return np.mean(weights[labels] * losses) + lam * np.mean(separations)


def objective(logits, features, labels=LABELS, lam=0.5, tau=0.5):
  return srat_loss(logits, features, labels, WEIGHTS, lam=lam, tau=tau)[0].mean()


value_and_grads = jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))


def test_mean_is_the_objective_and_gradients_match_finite_differences():
  logits, features = random_batch()
  value, grads = value_and_grads(logits, features)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(
    value, reference(logits, features, LABELS, WEIGHTS, 0.5, 0.5), rtol=1e-6
  )
  for which, array in enumerate((logits, features)):
    for index in np.ndindex(array.shape):
      step = [np.zeros(logits.shape), np.zeros(features.shape)]
      step[which][index] = 1e-5
      up, down = (
        reference(logits + s * step[0], features + s * step[1], LABELS, WEIGHTS, 0.5, 0.5)
        for s in (1.0, -1.0)
      )
      np.testing.assert_allclose(grads[which][index], (up - down) / 2e-5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("base", [cross_entropy, focal_loss, LDAM])
def test_parts_add_up(base):
  logits, features = random_batch()
  losses, aux = jax.jit(functools.partial(srat_loss, lam=2.0, tau=0.3, base=base))(
    logits, features, LABELS, WEIGHTS
  )
  np.testing.assert_allclose(aux["base"], base(logits, LABELS), rtol=1e-5)
  separation, anchors = feature_separation_loss(features, LABELS, 0.3)
  np.testing.assert_allclose(aux["separation"], separation, rtol=1e-5)
  assert aux["anchors"].tolist() == anchors.tolist() == [True, True, True, False, True, True]
  expected = WEIGHTS[LABELS] * aux["base"] + 2.0 * 6 / 5 * separation
  np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_without_separation_or_weights_it_is_the_base_loss():
  logits, features = random_batch()
  losses, _ = srat_loss(logits, features, LABELS, jnp.ones(3), lam=0.0)
  np.testing.assert_allclose(losses, cross_entropy(logits, LABELS), rtol=1e-6)
  balanced = effective_number_weights([50, 50, 50])
  with_weights, _ = srat_loss(logits, features, LABELS, balanced, lam=0.0)
  np.testing.assert_allclose(with_weights, losses, rtol=1e-6)


def test_mask_equals_the_subset():
  logits, features = random_batch(size=8)
  where = np.array([1, 1, 1, 0, 1, 1, 1, 0], bool)
  labels = np.array([0, 0, 1, -5, 2, 1, 0, 99])
  alone, alone_grads = value_and_grads(logits[where], features[where], labels[where])
  logits[~where], features[~where] = np.nan, np.inf

  def masked(logits, features):
    losses, _ = srat_loss(logits, features, labels, WEIGHTS, lam=0.5, tau=0.5, where=where)
    return losses.sum() / where.sum(), losses

  (value, losses), grads = jax.jit(jax.value_and_grad(masked, argnums=(0, 1), has_aux=True))(
    logits, features
  )
  np.testing.assert_allclose(value, alone, rtol=1e-6)
  assert not np.any(losses[~where])
  for grad, expected in zip(grads, alone_grads, strict=True):
    np.testing.assert_allclose(grad[where], expected, rtol=1e-4, atol=1e-6)
    assert not np.any(grad[~where])


def test_batch_without_anchors_and_vmap_over_strength():
  logits, features = random_batch(size=3)
  labels = np.array([0, 1, 2])
  many = jax.jit(jax.vmap(lambda lam: value_and_grads(logits, features, labels, lam)))
  values, (_, feature_grads) = many(jnp.array([0.0, 10.0]))
  np.testing.assert_allclose(values[0], values[1], rtol=1e-6)
  np.testing.assert_array_equal(feature_grads, 0)
  logits, features = random_batch()
  many = jax.jit(jax.vmap(lambda lam: objective(logits, features, lam=lam)))
  for lam, value in zip((0.1, 2.0), many(jnp.array([0.1, 2.0])), strict=True):
    expected = reference(logits, features, LABELS, WEIGHTS, lam, 0.5)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_labels_out_of_range_are_nan():
  logits, features = random_batch()
  losses, _ = srat_loss(logits, features, np.array([0, 0, 3, -1, 1, 1]), WEIGHTS)
  np.testing.assert_array_equal(np.isnan(losses), [0, 0, 1, 1, 0, 0])


# Separation S, imbalance K, minority weight rho.
CASES = [(1.0, 100.0, 1.0), (2.0, 100.0, 10.0), (1.5, 20.0, 60.0), (3.0, 1.0, 1.0)]


@pytest.mark.parametrize(("s", "k", "rho"), CASES)
def test_gaussian_rule_is_optimal(s, k, rho):
  found = gaussian_two_class_errors(s, k, rho)
  # All thresholds of the projection on the mean, the best direction: predict majority above it.
  coarse = np.linspace(-6, 6, 1201)
  risk = k * phi(coarse - s) + rho * phi(-coarse - s)
  fine = coarse[np.argmin(risk)] + np.linspace(-0.02, 0.02, 4001)
  majority, minority = phi(fine - s), phi(-fine - s)
  best = np.argmin(k * majority + rho * minority)
  # The threshold is found to within 1e-5, the errors to within that times a density below 0.4.
  np.testing.assert_allclose(found.majority, majority[best], atol=5e-6)
  np.testing.assert_allclose(found.minority, minority[best], atol=5e-6)


def test_gaussian_errors_equal_monte_carlo():
  rng = np.random.default_rng(0)
  s, k, rho, mean = 1.3, 10.0, 2.0, np.array([0.6, -0.8])
  n = 200_000
  for sign, found in zip((1, -1), gaussian_two_class_errors(s, k, rho), strict=True):
    x = sign * s * mean + rng.normal(size=(n, 2))
    log_odds = (np.sum((x + s * mean) ** 2, 1) - np.sum((x - s * mean) ** 2, 1)) / 2 + np.log(
      k / rho
    )
    rate = np.mean(np.sign(log_odds) != sign)
    # Four standard errors of a binomial rate.
    assert abs(rate - found) < 4 * np.sqrt(rate / n)


def test_gaussian_errors_are_those_of_a_trained_classifier():
  rng = np.random.default_rng(1)
  s, k, rho, n = 1.5, 9.0, 3.0, 100_000
  y = rng.random(n) < k / (k + 1)
  x = np.stack([np.where(y, s, -s), np.zeros(n)], 1) + rng.normal(size=(n, 2))
  design, weights = np.column_stack([x, np.ones(n)]), np.where(y, 1.0, rho)
  theta = np.zeros(3)
  for _ in range(12):  # Newton steps of weighted logistic regression
    p = 1 / (1 + np.exp(-design @ theta))
    hessian = design.T @ (design * (weights * p * (1 - p))[:, None])
    theta += np.linalg.solve(hessian, design.T @ (weights * (y - p)))
  norm = np.linalg.norm(theta[:2])
  trained = [phi(-(s * sign * theta[0] + theta[2]) * sign / norm) for sign in (1, -1)]
  # With 10,000 minority examples the intercept is known to about 0.03, the error to 0.005.
  np.testing.assert_allclose(gaussian_two_class_errors(s, k, rho), trained, atol=0.01)


def test_gaussian_sensitivity_to_the_weight():
  def majority(log_rho, s):
    return gaussian_two_class_errors(s, 100.0, jnp.exp(log_rho)).majority

  separations = jnp.array([1.0, 2.0, 3.0])
  slopes = jax.jit(jax.vmap(jax.grad(majority), in_axes=(None, 0)))(jnp.log(10.0), separations)
  at = np.asarray(separations, np.float64)
  shifted = at + np.log(10) / (2 * at)
  expected = np.exp(-(shifted**2) / 2) / np.sqrt(2 * np.pi) / (2 * at)
  np.testing.assert_allclose(slopes, expected, rtol=1e-5)
  assert np.all(np.diff(slopes) < 0)  # better separated features pay less for weighting
  gaps = np.diff(gaussian_two_class_errors(separations, 100.0), axis=0)
  assert np.all(np.diff(gaps) < 0)


def test_gaussian_limits():
  even = gaussian_two_class_errors(jnp.array([0.0, 1.0, 40.0]), 7.0, 7.0)
  np.testing.assert_allclose(even.majority, [0.5, phi(-1.0), 0.0], atol=1e-7)
  np.testing.assert_array_equal(even.majority, even.minority)
  assert [float(x) for x in gaussian_two_class_errors(0.0, 100.0)] == [0.0, 1.0]
  assert [float(x) for x in gaussian_two_class_errors(0.0, 100.0, 200.0)] == [1.0, 0.0]
  # Rates of 1e-20 keep their digits.
  np.testing.assert_allclose(gaussian_two_class_errors(9.3, 1.0).majority, phi(-9.3), rtol=1e-4)


def test_robust_separation_is_the_best_of_all_directions():
  rng = np.random.default_rng(2)
  mean, sigma, eps = np.array([1.5, -0.8, 0.3, 0.0]), 0.7, 0.4
  found = robust_separation(mean, sigma, eps)

  def margin(w):
    """Distance of the attacked mean from the plane w x = 0, in standard deviations."""
    return (w @ mean - eps * np.abs(w).sum(axis=-1)) / (sigma * np.linalg.norm(w, axis=-1))

  assert np.all(margin(rng.normal(size=(20_000, 4))) < found)
  best = np.sign(mean) * np.maximum(np.abs(mean) - eps, 0)
  np.testing.assert_allclose(found, margin(best), rtol=1e-6)
  np.testing.assert_allclose(
    jax.vmap(robust_separation, in_axes=(None, None, 0))(mean, sigma, jnp.array([0.0, 0.2, 2.0])),
    [np.linalg.norm(mean) / sigma, np.linalg.norm([1.3, 0.6, 0.1]) / sigma, 0.0],
    rtol=1e-6,
  )


def call_srat(labels=LABELS, weights=WEIGHTS, **changes):
  logits, features = random_batch()
  return srat_loss(logits, changes.pop("features", features), labels, weights, **changes)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: call_srat(lam=-1.0), r"lam is -1\.0"),
    (lambda: call_srat(tau=0.0), r"tau is 0\.0"),
    (lambda: call_srat(labels=LABELS[1:]), r"labels has shape \(5,\)"),
    (lambda: call_srat(weights=np.ones(4)), r"class_weights has shape \(4,\); expected \(3\)"),
    (lambda: call_srat(features=np.ones((5, 2))), r"features has shape \(5, 2\)"),
    (lambda: call_srat(where=np.ones(2, bool)), r"where has shape \(2,\)"),
    (lambda: call_srat(base=lambda logits, labels: 0.0), r"the result of base has shape \(\)"),
    (lambda: gaussian_two_class_errors(-1.0, 2.0), r"separation is -1\.0"),
    (lambda: gaussian_two_class_errors(jnp.array([1.0, np.nan]), 2.0), "separation is nan"),
    (lambda: gaussian_two_class_errors(1.0, 0.0), r"imbalance is 0\.0"),
    (lambda: gaussian_two_class_errors(1.0, 2.0, -3.0), r"minority_weight is -3\.0"),
    (lambda: robust_separation(1.0, 1.0, 0.1), r"mean has shape \(\)"),
    (lambda: robust_separation(np.ones(2), 0.0, 0.1), r"sigma is 0\.0"),
    (lambda: robust_separation(np.ones(2), 1.0, -0.1), r"eps is -0\.1"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
