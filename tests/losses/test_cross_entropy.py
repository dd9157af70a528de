import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.losses import LOSSES, cross_entropy, cross_entropy_with_z_loss, weighted_mean


def reference(logits, labels):
  """Cross entropy and log Z in float64."""
  logits = np.asarray(logits, np.float64)
  shift = logits.max(axis=-1)
  log_z = shift + np.log(np.exp(logits - shift[..., None]).sum(axis=-1))
  return log_z - np.take_along_axis(logits, labels[..., None].astype(int), -1)[..., 0], log_z


def random_batch(shape=(3, 4), num_classes=6, seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 3, (*shape, num_classes)).astype(np.float32)
  return logits, rng.integers(0, num_classes, shape)


def test_by_hand():
  logits = jnp.log(jnp.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])) + jnp.array([[2.0], [0.0]])
  with_z = jax.jit(lambda *args: cross_entropy_with_z_loss(*args, z_coefficient=0.5))
  loss, aux = with_z(logits, jnp.array([2, 0]))
  np.testing.assert_allclose(aux["cross_entropy"], -np.log([0.5, 0.6]), rtol=1e-5)
  np.testing.assert_allclose(aux["log_normalizer"], [2.0, 0.0], atol=1e-6)
  np.testing.assert_allclose(aux["z_loss"], [2.0, 0.0], atol=1e-6)
  np.testing.assert_allclose(loss, -np.log([0.5, 0.6]) + [2.0, 0.0], rtol=1e-5)
  assert {"cross_entropy", "cross_entropy_with_z_loss"} <= set(LOSSES)


@pytest.mark.parametrize(
  ("shape", "dtype"), [((), np.uint8), ((5,), np.int8), ((3, 4), np.int32), ((3, 4), np.uint32)]
)
def test_equals_reference(shape, dtype):
  logits, labels = random_batch(shape)
  expected, log_z = reference(logits, labels)
  both = jax.jit(lambda *args: (cross_entropy(*args), cross_entropy_with_z_loss(*args)))
  found, (total, aux) = both(logits, labels.astype(dtype))
  assert found.dtype == total.dtype == jnp.float32
  assert found.shape == total.shape == shape
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(aux["z_loss"], 1e-4 * log_z**2, rtol=1e-4, atol=1e-9)
  np.testing.assert_allclose(total, expected + 1e-4 * log_z**2, rtol=1e-5, atol=1e-5)


def test_jit_and_vmap():
  logits, labels = random_batch((3, 4))

  def losses(logits, labels):
    return cross_entropy(logits, labels), cross_entropy_with_z_loss(logits, labels)[0]

  batched = jax.jit(jax.vmap(losses))(logits, labels)
  for i in range(3):
    for found, alone in zip(batched, losses(logits[i], labels[i]), strict=True):
      np.testing.assert_allclose(found[i], alone, rtol=1e-5)


def test_labels_above_127_are_bytes():
  logits = jnp.zeros((2, 256)).at[0, 255].set(3.0)
  found = jax.jit(cross_entropy)(logits, jnp.array([255, 200], jnp.uint8))
  expected = np.log(255 + np.exp(3.0)) - 3.0, np.log(256)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_gradient_is_softmax_minus_one_hot():
  logits, labels = random_batch((4,))
  grad = jax.jit(jax.grad(lambda logits: cross_entropy(logits, labels).sum()))(logits)
  shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
  expected = shifted / shifted.sum(axis=-1, keepdims=True) - np.eye(6)[labels]
  np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_z_loss_gradient_equals_finite_differences():
  logits, labels = random_batch((4,))

  def objective(logits):
    return cross_entropy_with_z_loss(logits, labels, z_coefficient=0.3)[0].sum()

  def float64(logits):
    loss, log_z = reference(logits, labels)
    return np.sum(loss + 0.3 * log_z**2)

  grad = np.asarray(jax.jit(jax.grad(objective))(logits))
  for index in np.ndindex(logits.shape):
    step = np.zeros(logits.shape)
    step[index] = 1e-5
    slope = (float64(logits + step) - float64(logits - step)) / 2e-5
    np.testing.assert_allclose(grad[index], slope, rtol=1e-4, atol=1e-5)


def test_z_coefficient_may_be_traced_and_zero():
  logits, labels = random_batch((4,))
  losses = jax.jit(
    jax.vmap(lambda c: cross_entropy_with_z_loss(logits, labels, z_coefficient=c)[0], in_axes=0)
  )(jnp.array([0.0, 1e-4]))
  np.testing.assert_allclose(losses[0], cross_entropy(logits, labels), rtol=1e-6)
  np.testing.assert_allclose(losses[1], cross_entropy_with_z_loss(logits, labels)[0], rtol=1e-6)


def test_bfloat16_is_lifted_to_float32():
  logits, labels = random_batch((5,))
  low = jnp.asarray(logits, jnp.bfloat16)
  loss = jax.jit(cross_entropy_with_z_loss)
  _, aux = loss(low, labels)
  found = aux["cross_entropy"]
  assert found.dtype == jnp.float32
  expected, log_z = reference(np.asarray(low, np.float32), labels)
  # To float32 precision: the rounding to bfloat16 happened before, not in the loss.
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(aux["log_normalizer"], log_z, rtol=1e-5, atol=1e-5)
  with jax.enable_x64(True):
    found = loss(logits.astype(np.float64), labels)[1]["cross_entropy"]
    np.testing.assert_allclose(found, reference(logits, labels)[0], rtol=1e-12)


def test_large_logits_stay_finite():
  logits = jnp.array([[1e4, 0.0], [-1e4, -1e4], [0.0, -jnp.inf]])
  labels = jnp.array([1, 0, 0])
  found, grad = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, labels).sum()))(logits)
  np.testing.assert_allclose(found, 1e4 + np.log(2), rtol=1e-6)
  np.testing.assert_allclose(grad, [[1, -1], [-0.5, 0.5], [0, 0]], atol=1e-6)


def test_labels_out_of_range_are_nan_and_can_be_masked():
  logits, _ = random_batch((5,))
  labels = jnp.array([-1, 6, -100, 5, -6])

  def mean(logits):
    losses = cross_entropy(logits, labels)
    return weighted_mean(losses, where=labels == 5).mean(), losses

  grad, losses = jax.jit(jax.grad(mean, has_aux=True))(logits)
  np.testing.assert_array_equal(np.isnan(losses), [1, 1, 1, 0, 1])
  assert np.all(np.isfinite(grad))
  assert np.flatnonzero(np.any(np.asarray(grad) != 0, axis=1)).tolist() == [3]


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: cross_entropy(jnp.ones((2, 3)), jnp.ones(3, int)), r"labels has shape \(3,\)"),
    (lambda: cross_entropy(jnp.ones((2, 3)), jnp.ones((2, 3))), r"labels has shape \(2, 3\)"),
    (lambda: cross_entropy(jnp.ones(2), 0.5), "labels has dtype float32; expected integers"),
    (lambda: cross_entropy(1.0, 0), r"logits has shape \(\)"),
    (
      lambda: cross_entropy_with_z_loss(jnp.ones(2), 0, z_coefficient=-1.0),
      r"z_coefficient is -1\.0",
    ),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
