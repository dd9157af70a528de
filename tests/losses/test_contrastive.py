import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.losses import feature_separation_loss, weighted_mean

LABELS = np.array([0, 1, 0, 2, 1, 0, 7])  # classes 2 and 7 once only


def reference(features, labels, tau, normalize=True):
  """Values in float64, by loops; NaN for an anchor without a positive."""
  z = np.asarray(features, np.float64)
  if normalize:
    z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-300)
  values = np.full(len(z), np.nan)
  for i in range(len(z)):
    others = [a for a in range(len(z)) if a != i]
    positives = [p for p in others if labels[p] == labels[i]]
    log_sum = np.logaddexp.reduce([z[i] @ z[a] / tau for a in others]) if others else 0.0
    if positives:
      values[i] = -np.mean([z[i] @ z[p] / tau - log_sum for p in positives])
  return values


def random_features(seed=0):
  return np.random.default_rng(seed).normal(0, 2, (7, 4)).astype(np.float32)


def mean_loss(features, labels=LABELS, tau=0.1, where=None):
  values, valid = feature_separation_loss(features, labels, tau, where=where)
  return weighted_mean(values, where=valid).mean()


# Compiled once a shape: the tests share them.
separation = jax.jit(feature_separation_loss, static_argnums=3)
loss_and_grad = jax.jit(jax.value_and_grad(mean_loss))


@pytest.mark.parametrize("tau", [0.05, 0.5, np.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_reference(tau, normalize):
  features = random_features()
  values, valid = separation(features, LABELS, tau, normalize)
  expected = reference(features, LABELS, tau, normalize)
  np.testing.assert_array_equal(valid, ~np.isnan(expected))
  assert valid.tolist() == [True, True, True, False, True, True, False]
  assert values.dtype == jnp.float32
  np.testing.assert_allclose(values, np.nan_to_num(expected), rtol=1e-5, atol=1e-5)


def test_limits():
  features = random_features()
  # A temperature of infinity sees no features; the loss is log of the number of others.
  values, _ = separation(features, LABELS, jnp.inf)
  np.testing.assert_allclose(values[0], np.log(6), rtol=1e-6)
  # One class at one point, the other opposite: all of the sum is on the positives.
  apart = jnp.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
  values, _ = separation(apart, jnp.array([0, 0, 1, 1]), 0.01)
  np.testing.assert_allclose(values, 0, atol=1e-6)
  values, _ = separation(apart, jnp.array([0, 1, 0, 1]), 0.01)
  np.testing.assert_allclose(values, 200, rtol=1e-5)


def test_only_directions_count_when_normalized():
  features = random_features()
  scales = np.array([1e-30, 1e-3, 1.0, 1e3, 1e30, 5.0, 0.1], np.float32)[:, None]
  values, _ = separation(features * scales, LABELS)
  np.testing.assert_allclose(values, separation(features, LABELS)[0], rtol=1e-4)


def test_gradient_equals_finite_differences():
  features = random_features()
  grad = np.asarray(loss_and_grad(features, tau=0.5)[1])
  for index in np.ndindex(features.shape):
    step = np.zeros(features.shape)
    step[index] = 1e-5
    up, down = (np.nanmean(reference(features + sign * step, LABELS, 0.5)) for sign in (1.0, -1.0))
    np.testing.assert_allclose(grad[index], (up - down) / 2e-5, rtol=1e-4, atol=1e-6)


def test_mask_equals_the_subset_and_hides_anything():
  features = random_features()
  where = np.array([1, 1, 1, 1, 0, 1, 0], bool)
  hidden = features.copy()
  hidden[4], hidden[6] = np.nan, np.inf
  labels = np.where(where, LABELS, -100)
  values, valid = separation(hidden, labels, where=where)
  alone, alone_valid = separation(features[where], LABELS[where])
  np.testing.assert_allclose(values[where], alone, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(valid[where], alone_valid)
  assert not valid[~where].any()
  assert not values[~where].any()
  assert not valid[1]  # its only positive is masked
  grad = loss_and_grad(hidden, labels, where=where)[1]
  expected = loss_and_grad(features[where], LABELS[where])[1]
  np.testing.assert_allclose(grad[where], expected, rtol=1e-4, atol=1e-6)
  assert not np.any(grad[~where])


@pytest.mark.parametrize(
  ("features", "labels"),
  [
    (np.ones((1, 3)), [0]),  # nobody else
    (np.eye(3), [0, 1, 2]),  # no positives
    (np.zeros((3, 2)), [0, 0, 1]),  # no directions, such as after dead relus
    (np.zeros((0, 2)), np.zeros(0, int)),
  ],
)
def test_degenerate_batches_are_finite(features, labels):
  value, grad = loss_and_grad(jnp.asarray(features, jnp.float32), jnp.array(labels))
  assert np.isfinite(value)
  np.testing.assert_array_equal(grad, np.zeros(np.shape(features)))


def test_small_temperature_does_not_overflow():
  value, grad = loss_and_grad(random_features(), tau=1e-6)
  assert np.isfinite(value)
  assert np.all(np.isfinite(grad))


def test_jit_vmap_and_bfloat16():
  features = np.stack([random_features(0), random_features(1)])
  batched = jax.jit(jax.vmap(feature_separation_loss, in_axes=(0, None, 0)))
  values, _ = batched(features, LABELS, jnp.array([0.1, 0.5]))
  for i, tau in enumerate((0.1, 0.5)):
    expected = np.nan_to_num(reference(features[i], LABELS, tau))
    np.testing.assert_allclose(values[i], expected, rtol=1e-5, atol=1e-5)
  low = jnp.asarray(features[0], jnp.bfloat16)
  values, _ = separation(low, LABELS)
  assert values.dtype == jnp.float32
  expected = np.nan_to_num(reference(np.asarray(low, np.float32), LABELS, 0.1))
  # To float32 precision: the rounding to bfloat16 happened before, not in the loss.
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: feature_separation_loss(jnp.ones(3), jnp.ones(3, int)), r"features has shape \(3,\)"),
    (lambda: feature_separation_loss(jnp.eye(3), jnp.ones(2, int)), r"labels has shape \(2,\)"),
    (lambda: feature_separation_loss(jnp.eye(3), jnp.ones(3)), "labels has dtype float32"),
    (lambda: feature_separation_loss(jnp.eye(2), jnp.ones(2, int), 0.0), r"tau is 0\.0"),
    (
      lambda: feature_separation_loss(jnp.eye(2), jnp.ones(2, int), where=jnp.ones(3)),
      r"where has shape \(3,\)",
    ),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
