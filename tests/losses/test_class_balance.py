import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.losses import (
  LOSSES,
  cross_entropy,
  deferred_weights,
  effective_number_weights,
  focal_loss,
  ldam_loss,
  ldam_margins,
  weighted_mean,
)

MARGINS = np.array([0.1, 0.2, 0.3, 0.4, 0.5])


def nll(logits, labels):
  """Cross entropy in float64."""
  logits = np.asarray(logits, np.float64)
  shift = logits.max(axis=-1)
  log_z = shift + np.log(np.exp(logits - shift[..., None]).sum(axis=-1))
  return log_z - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


def focal_reference(logits, labels, gamma):
  p = np.exp(-nll(logits, labels))
  return -((1 - p) ** gamma) * np.log(p)


def ldam_reference(logits, labels, margins, scale):
  return nll(
    scale * (np.asarray(logits, np.float64) - np.eye(5)[labels] * margins[labels][..., None]),
    labels,
  )


def random_batch(shape=(3, 4), seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(0, 1, (*shape, 5)).astype(np.float32), rng.integers(0, 5, shape)


@functools.cache
def jitted(name, **settings):
  settings = {key: jnp.asarray(value) for key, value in settings.items()}
  return jax.jit(functools.partial(LOSSES[name], **settings))


def test_effective_numbers_by_hand():
  # Effective numbers of 1, 2 and 3 examples at beta = 0.5: 1, 1.5 and 1.75.
  inverse = 1 / np.array([1, 1.5, 1.75])
  np.testing.assert_allclose(
    effective_number_weights([1, 2, 3], beta=0.5), 3 * inverse / inverse.sum(), rtol=1e-6
  )


def test_effective_number_limits():
  counts = [5000, 500, 50, 0]
  np.testing.assert_array_equal(effective_number_weights(counts, beta=0), [1, 1, 1, 0])
  inverse = 1 / np.array(counts[:3])
  expected = [*(3 * inverse / inverse.sum()), 0]
  for beta in (1.0, 1 - 1e-12):  # close to 1, digits are lost unless the arithmetic is careful
    np.testing.assert_allclose(effective_number_weights(counts, beta=beta), expected, rtol=1e-6)
  # Counts beyond any exponent: the effective number is 1 / (1 - beta) for all of them.
  np.testing.assert_allclose(effective_number_weights([1e12, 1e9], beta=0.99), [1, 1], rtol=1e-6)
  weights = np.asarray(effective_number_weights(counts))
  assert weights.dtype == np.float32
  np.testing.assert_allclose(weights.sum(), 3, rtol=1e-6)
  assert weights[3] == 0 < weights[0] < weights[1] < weights[2] < 3


def test_deferred_weights():
  weights = jnp.array([0.5, 1.5])
  found = jax.jit(jax.vmap(deferred_weights, in_axes=(0, None, None)))(jnp.arange(4), 2, weights)
  np.testing.assert_array_equal(found, [[1, 1], [1, 1], [0.5, 1.5], [0.5, 1.5]])


def test_ldam_margins():
  counts = np.array([5000, 300, 20])
  expected = counts**-0.25 * (0.5 / (20**-0.25))
  np.testing.assert_allclose(ldam_margins(counts), expected, rtol=1e-6)
  np.testing.assert_allclose(ldam_margins([16, 1, 0], max_margin=0.8), [0.4, 0.8, 0.8], rtol=1e-6)
  np.testing.assert_array_equal(ldam_margins([16, 1], max_margin=0), [0, 0])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_equals_reference(gamma):
  logits, labels = random_batch()
  found = jitted("focal", gamma=gamma)(logits, labels)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, focal_reference(logits, labels, gamma), rtol=2e-5)


def test_ldam_equals_reference():
  logits, labels = random_batch()
  found = jitted("ldam", margins=tuple(MARGINS), scale=30.0)(logits, labels)
  expected = ldam_reference(logits, labels, MARGINS, 30.0)
  # Float32 logits of 30 to 100 have an absolute rounding of about 1e-5.
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def test_limits_are_cross_entropy():
  logits, labels = random_batch()
  expected = cross_entropy(logits, labels)
  np.testing.assert_array_equal(jitted("focal", gamma=0.0)(logits, labels), expected)
  found = jitted("ldam", margins=(0.0,) * 5, scale=1.0)(logits, labels)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "settings", "reference"),
  [
    ("focal", {"gamma": 2.0}, focal_reference),
    ("focal", {"gamma": 0.5}, focal_reference),
    ("ldam", {"margins": tuple(MARGINS), "scale": 3.0}, ldam_reference),
  ],
)
def test_gradient_equals_finite_differences(name, settings, reference):
  logits, labels = random_batch((4,))
  loss = jitted(name, **settings)
  grad = np.asarray(jax.jit(jax.grad(lambda x: loss(x, labels).sum()))(logits))
  settings = {key: np.asarray(value) for key, value in settings.items()}
  for index in np.ndindex(logits.shape):
    step = np.zeros(logits.shape)
    step[index] = 1e-5
    up, down = (reference(logits + sign * step, labels, **settings).sum() for sign in (1, -1))
    np.testing.assert_allclose(grad[index], (up - down) / 2e-5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_of_sure_predictions_is_finite(gamma):
  logits = jnp.array([[200.0, 0.0], [0.0, 200.0], [0.0, -jnp.inf], [0.0, 0.0], [0.0, -80.0]])
  labels = jnp.array([0, 0, 0, 0, 0])
  loss = jitted("focal", gamma=gamma)
  found, grad = jax.jit(jax.value_and_grad(lambda x: loss(x, labels).sum()))(logits)
  np.testing.assert_allclose(found, 200 + 0.5**gamma * np.log(2), rtol=1e-6)
  assert np.all(np.isfinite(grad))
  # At p = 1/2 the derivative to the label's logit is (gamma log 2 / 2 - 1/2) / 2^gamma times 1/2.
  slope = -(0.5**gamma) * 0.5 * (1 + gamma * np.log(2))
  np.testing.assert_allclose(grad[3, 0], slope, rtol=1e-5)
  np.testing.assert_allclose(grad[1], [-1, 1], atol=1e-6)


def test_vmap_over_settings_equals_one_by_one():
  logits, labels = random_batch((4,))
  gammas = jnp.array([0.0, 1.0, 5.0])
  batched = jax.jit(jax.vmap(lambda g: focal_loss(logits, labels, gamma=g)))(gammas)
  margins = jnp.stack([jnp.zeros(5), jnp.asarray(MARGINS, jnp.float32)])
  ldam = jax.jit(jax.vmap(lambda m: ldam_loss(logits, labels, margins=m, scale=2.0)))(margins)
  for i, gamma in enumerate(gammas):
    np.testing.assert_allclose(batched[i], focal_reference(logits, labels, gamma), rtol=2e-5)
  for i in range(2):
    expected = ldam_reference(logits, labels, np.asarray(margins[i]), 2.0)
    np.testing.assert_allclose(ldam[i], expected, rtol=1e-5)


def test_bfloat16_and_small_label_types():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(6, 300)), jnp.bfloat16)
  # 300 classes do not fit into uint8, where 43 and 299 are the same number.
  labels = np.array([0, 44, 100, 200, 255, 43], np.uint8)
  logits = logits.at[5, 299].set(3.0)
  margins = np.linspace(0.0, 0.5, 300)
  wide = np.asarray(logits, np.float64)
  shifted = wide - np.eye(300)[labels] * margins
  found = ldam_loss(logits, labels, margins=margins, scale=10.0)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, nll(10 * shifted, labels.astype(int)), rtol=1e-5)
  found = focal_loss(logits, labels)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, focal_reference(wide, labels.astype(int), 2.0), rtol=1e-5)


@pytest.mark.parametrize(
  "loss", [focal_loss, functools.partial(ldam_loss, margins=jnp.asarray(MARGINS))]
)
def test_labels_out_of_range_are_nan_and_can_be_masked(loss):
  logits, _ = random_batch((4,))
  labels = jnp.array([-1, 5, 4, -100])

  def mean(logits):
    losses = loss(logits, labels)
    return weighted_mean(losses, where=labels == 4).mean(), losses

  grad, losses = jax.jit(jax.grad(mean, has_aux=True))(logits)
  np.testing.assert_array_equal(np.isnan(losses), [1, 1, 0, 1])
  assert np.all(np.isfinite(grad))
  assert np.flatnonzero(np.any(np.asarray(grad) != 0, axis=1)).tolist() == [2]


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: effective_number_weights([1, -2]), "counts must be >= 0"),
    (lambda: effective_number_weights([1, 2], beta=1.1), r"beta is 1\.1; allowed: \[0, 1\]"),
    (lambda: jax.jit(effective_number_weights)(jnp.ones(2)), "counts must be known"),
    (lambda: ldam_margins([]), r"counts has shape \(0,\)"),
    (lambda: ldam_margins([1], max_margin=-1.0), r"max_margin is -1\.0"),
    (lambda: ldam_loss(jnp.ones(2), 0, margins=jnp.ones(3)), r"margins has shape \(3,\)"),
    (lambda: ldam_loss(jnp.ones(2), 0, margins=jnp.ones(2), scale=0.0), r"scale is 0\.0"),
    (lambda: ldam_loss(jnp.ones(()), 0, margins=jnp.ones(2)), r"logits has shape \(\)"),
    (lambda: ldam_loss(jnp.ones((3, 2)), 0, margins=jnp.ones(2)), r"labels has shape \(\)"),
    (lambda: focal_loss(jnp.ones(2), 0, gamma=-1.0), r"gamma is -1\.0"),
    (lambda: focal_loss(jnp.ones(2), 0.0), "labels has dtype float32"),
    (lambda: deferred_weights(jnp.arange(2), 1, jnp.ones(2)), r"step has shape \(2,\)"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
