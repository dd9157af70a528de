import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.distillation import ard_loss, rslad_loss, soft_entropy, soft_kl


def softmax(x):
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


def kl_reference(student, teacher, tau=1.0, eps=1e-5):
  """Sum over classes, in float64."""
  student, teacher = (np.asarray(x, np.float64) for x in (student, teacher))
  p = softmax(teacher / tau)
  return np.sum(p * (np.log(p + eps) - np.log(softmax(student))), axis=-1)


def random_logits(shape=(3, 4), classes=5, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.normal(0, 2, (*shape, classes)).astype(np.float32) for _ in range(3)]


kl = jax.jit(soft_kl, static_argnums=3)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("reduction", "share"), [("mean", 1 / 5), ("batchmean", 1.0)])
def test_divergence_and_entropy_equal_references(tau, reduction, share):
  student, teacher, _ = random_logits()
  found = kl(student, teacher, tau, reduction)
  assert found.dtype == jnp.float32
  assert found.shape == (3, 4)
  np.testing.assert_allclose(
    found, share * kl_reference(student, teacher, tau), rtol=1e-5, atol=1e-6
  )
  p = softmax(teacher.astype(np.float64) / tau)
  entropy = soft_entropy(teacher, tau, reduction)
  np.testing.assert_allclose(entropy, -share * np.sum(p * np.log(p + 1e-5), -1), rtol=1e-5)


def test_limits():
  student, teacher, _ = random_logits()
  np.testing.assert_allclose(kl(teacher, teacher, 1.0, "mean", 0.0), 0, atol=1e-6)
  np.testing.assert_allclose(kl(student / 3, student, 3.0, "mean", 0.0), 0, atol=1e-6)
  # An infinite temperature: uniform labels.
  log_q = np.log(softmax(student.astype(np.float64)))
  np.testing.assert_allclose(
    kl(student, teacher, np.inf, "batchmean", 0.0), -np.log(5) - log_q.mean(-1), rtol=1e-5
  )
  np.testing.assert_allclose(soft_entropy(teacher, np.inf, "batchmean", 0.0), np.log(5), rtol=1e-6)
  # A teacher that is sure: cross entropy of its class.
  sure = jnp.where(jnp.eye(5, dtype=bool)[2], 0.0, -jnp.inf)
  np.testing.assert_allclose(
    kl(student[0, 0], sure, 1.0, "batchmean", 0.0), -log_q[0, 0, 2], rtol=1e-5
  )
  assert soft_entropy(sure, 1.0, "batchmean", 0.0) == 0
  np.testing.assert_allclose(soft_entropy(sure, 1.0, "batchmean"), -1e-5, rtol=0.01)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_gradient_equals_finite_differences(eps):
  student, teacher, _ = random_logits((2,))

  def objective(student, teacher):
    return soft_kl(student, teacher, 2.0, "batchmean", eps).sum()

  grads = jax.jit(jax.grad(objective, argnums=(0, 1)))(student, teacher)
  for which in range(2):
    for index in np.ndindex(student.shape):
      step = [np.zeros(student.shape), np.zeros(student.shape)]
      step[which][index] = 1e-5
      up, down = (
        kl_reference(student + s * step[0], teacher + s * step[1], 2.0, eps).sum() for s in (1, -1)
      )
      np.testing.assert_allclose(grads[which][index], (up - down) / 2e-5, rtol=1e-4, atol=1e-5)


def test_classes_ruled_out_by_both_add_nothing():
  student, teacher, _ = random_logits((2,))
  student[:, 3], teacher[:, 3] = -np.inf, -np.inf
  keep = [0, 1, 2, 4]
  both = jax.jit(jax.value_and_grad(lambda s: soft_kl(s, teacher, 1.0, "batchmean", 0.0).sum()))
  value, grad = both(student)
  expected = kl_reference(student[:, keep], teacher[:, keep], eps=0.0).sum()
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(
    grad[:, keep], softmax(student[:, keep]) - softmax(teacher[:, keep]), rtol=1e-4, atol=1e-6
  )
  np.testing.assert_array_equal(grad[:, 3], 0)


def test_ard_and_rslad_equal_references():
  adv, nat, teacher = random_logits((6,))
  labels = np.array([0, 1, 2, 3, 4, 0])
  ce = -np.log(softmax(nat.astype(np.float64)))[np.arange(6), labels]
  ard = jax.jit(ard_loss)
  for alpha, tau in ((1.0, 30.0), (0.9, 4.0), (0.0, 1.0)):
    distilled = tau**2 * kl_reference(adv / np.float64(tau), teacher, tau, eps=0.0) / 5
    found = ard(adv, nat, teacher, labels, alpha=alpha, tau=tau)
    # tau^2 = 900 multiplies a small difference of float32 logarithms near log 5.
    np.testing.assert_allclose(found, alpha * distilled + (1 - alpha) * ce, rtol=1e-5, atol=2e-4)
  rslad = jax.jit(rslad_loss)
  robust, natural = kl_reference(adv, teacher) / 5, kl_reference(nat, teacher) / 5
  np.testing.assert_allclose(rslad(adv, nat, teacher), (5 * robust + natural) / 6, rtol=1e-5)
  only = rslad(adv, nat, teacher, adv_weight=1.0)
  np.testing.assert_allclose(only, soft_kl(adv, teacher), rtol=1e-6)


def test_baselines_stop_at_the_teacher():
  adv, nat, teacher = random_logits((2,))
  labels = np.array([0, 1])

  def total(adv, nat, teacher):
    return (ard_loss(adv, nat, teacher, labels, alpha=0.5) + rslad_loss(adv, nat, teacher)).sum()

  grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(adv, nat, teacher)
  assert np.any(grads[0])
  assert np.any(grads[1])
  assert not np.any(grads[2])


def test_vmap_over_temperature_and_bfloat16():
  student, teacher, _ = random_logits((4,))
  taus = jnp.array([0.5, 1.0, 7.0])
  found = jax.jit(jax.vmap(soft_kl, in_axes=(None, None, 0)))(student, teacher, taus)
  for i, tau in enumerate(taus):
    expected = kl_reference(student, teacher, float(tau)) / 5
    np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)
  low = [jnp.asarray(x, jnp.bfloat16) for x in (student, teacher)]
  found = soft_kl(*low)
  assert found.dtype == jnp.float32
  # To float32 precision: the rounding to bfloat16 happened before, not in the loss.
  np.testing.assert_allclose(found, kl_reference(*low) / 5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: soft_kl(jnp.ones(3), jnp.ones(4)), r"teacher_logits has shape \(4,\)"),
    (lambda: soft_kl(1.0, 1.0), r"student_logits has shape \(\)"),
    (lambda: soft_kl(jnp.ones(3), jnp.ones(3), 0.0), r"tau is 0\.0"),
    (lambda: soft_kl(jnp.ones(3), jnp.ones(3), reduction="none"), "reduction is 'none'"),
    (lambda: soft_kl(jnp.ones(3), jnp.ones(3), eps=-1.0), r"eps is -1\.0"),
    (lambda: soft_entropy(1.0), r"teacher_logits has shape \(\)"),
    (lambda: ard_loss(*[jnp.ones(3)] * 3, 0, alpha=2.0), r"alpha is 2\.0"),
    (lambda: ard_loss(*[jnp.ones(3)] * 3, 0, tau=-1.0), r"tau is -1\.0"),
    (lambda: ard_loss(*[jnp.ones(3)] * 3, 0.5), "labels has dtype float32"),
    (lambda: rslad_loss(*[jnp.ones(3)] * 3, adv_weight=-1.0), r"adv_weight is -1\.0"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
