"""Margins: rows and order, equality with the cross entropy of the logits, strictness, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.losses import cross_entropy
from balance_jax.robust.margins import margin_cross_entropy, margin_matrix, margins, verified


def reference(logits, labels):
  """Loops over examples and classes, float64."""
  rows = [
    [row[label] - row[j] for j in range(len(row)) if j != label]
    for row, label in zip(np.asarray(logits, np.float64), labels, strict=True)
  ]
  return np.array(rows)


def random_batch(batch=7, num_classes=5):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 3, (batch, num_classes)).astype(np.float32)
  return logits, np.arange(batch) % num_classes


def test_matrix_rows_are_in_order():
  want = [[[1, -1, 0], [1, 0, -1]], [[-1, 1, 0], [0, 1, -1]], [[-1, 0, 1], [0, -1, 1]]]
  np.testing.assert_array_equal(margin_matrix(np.arange(3), 3), want)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int8])
def test_against_loops(dtype):
  logits, labels = random_batch()
  labels = labels.astype(dtype)
  matrix, exact = jax.jit(lambda z, y: (margin_matrix(y, 5), margins(z, y)))(logits, labels)
  assert matrix.dtype == exact.dtype == jnp.float32
  np.testing.assert_allclose(exact, reference(logits, labels), rtol=1e-6)
  np.testing.assert_allclose(np.einsum("bjk,bk->bj", matrix, logits), exact, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_margins_is_that_of_the_logits():
  logits, labels = random_batch()
  loss, plain = jax.jit(
    lambda z: (margin_cross_entropy(margins(z, labels)), cross_entropy(z, labels))
  )(logits)
  np.testing.assert_allclose(loss, np.log1p(np.exp(-reference(logits, labels)).sum(-1)), rtol=1e-5)
  np.testing.assert_allclose(loss, plain, rtol=1e-5, atol=1e-6)
  # Binary, and labels without a batch axis.
  np.testing.assert_allclose(margin_cross_entropy(jnp.array([0.3])), np.log1p(np.exp(-0.3)), 1e-6)
  np.testing.assert_array_equal(margins(jnp.array([1.0, 4.0]), 0), [-3.0])


def test_large_margins_stay_finite():
  values = jnp.array([[1e4, 2e4], [-1e4, 5.0], [0.0, 0.0]])
  loss, grad = jax.jit(jax.value_and_grad(lambda m: margin_cross_entropy(m).sum()))(values)
  np.testing.assert_allclose(margin_cross_entropy(values), [0, 1e4, np.log(3)], rtol=1e-6)
  np.testing.assert_allclose(loss, 1e4 + np.log(3), rtol=1e-6)
  np.testing.assert_allclose(grad, [[0, 0], [-1, 0], [-1 / 3, -1 / 3]], atol=1e-6)


def test_gradient_equals_finite_differences():
  logits, labels = random_batch(batch=4)

  def float64(logits):
    return np.log1p(np.exp(-reference(logits, labels)).sum(-1)).sum()

  grad = jax.jit(jax.grad(lambda z: margin_cross_entropy(margins(z, labels)).sum()))(logits)
  for index in np.ndindex(logits.shape):
    step = np.zeros(logits.shape)
    step[index] = 1e-5
    slope = (float64(logits + step) - float64(logits - step)) / 2e-5
    np.testing.assert_allclose(grad[index], slope, rtol=1e-4, atol=1e-6)


def test_vmap_and_wider_batches():
  logits, labels = random_batch(batch=6)
  stacked = logits.reshape(2, 3, 5), labels.reshape(2, 3)

  def everything(z, y):
    found = margins(z, y)
    return found, margin_cross_entropy(found), verified(found), margin_matrix(y, 5)

  batched = jax.jit(jax.vmap(everything))(*stacked)
  for got, want in zip(batched, everything(logits, labels), strict=True):
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-6)
  np.testing.assert_allclose(margins(*stacked), batched[0], rtol=1e-6)


def test_verified_is_strict_and_refuses_what_is_not_finite():
  tiny = np.finfo(np.float32).tiny
  rows = [[1, tiny], [1, 0], [1, -0.0], [1, -1e-9], [1, np.nan], [1, np.inf], [-np.inf, 1]]
  got = verified(jnp.array(rows))
  assert got.tolist() == [True] + [False] * 6
  assert got.dtype == bool


def test_bfloat16_and_float64():
  logits, labels = random_batch()
  low = jnp.asarray(logits, jnp.bfloat16)
  found = margins(low, labels)
  assert found.dtype == margin_cross_entropy(found.astype(jnp.bfloat16)).dtype == jnp.float32
  np.testing.assert_allclose(found, reference(np.asarray(low, np.float32), labels), rtol=1e-6)
  with jax.enable_x64(True):
    found = margins(logits.astype(np.float64), labels)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, reference(logits, labels), rtol=1e-14)


def test_traced_labels_out_of_range_are_never_verified():
  labels = jnp.array([-1, 3, 2, -3], jnp.int32)
  logits = jnp.zeros((4, 3)).at[:, 2].set(1.0)
  matrix, exact = jax.jit(lambda y: (margin_matrix(y, 3), margins(logits, y)))(labels)
  through_matrix = jnp.einsum("bjk,bk->bj", matrix, logits)
  for found in (exact, through_matrix):
    assert verified(found).tolist() == [False, False, True, False]
    assert np.isnan(found[jnp.array([0, 1, 3])]).all()


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: margin_matrix(np.array([0, 3]), 3), "labels holds 3; allowed: 0 to 2"),
    (lambda: margin_matrix(np.array([-1]), 3), "labels holds -1; allowed: 0 to 2"),
    (lambda: margin_matrix(np.array([0]), 1), "num_classes is 1"),
    (lambda: margin_matrix(np.array([[0]]), 3), r"labels has shape \(1, 1\)"),
    (lambda: margin_matrix(np.array([0.5]), 3), "labels has dtype float32; expected integers"),
    (lambda: margins(jnp.ones((2, 3)), np.array([0, 7])), "labels holds 7; allowed: 0 to 2"),
    (lambda: margins(jnp.ones((2, 3)), np.array([0])), r"labels has shape \(1,\)"),
    (lambda: margins(jnp.ones((2, 1)), np.array([0, 0])), r"logits has shape \(2, 1\)"),
    (lambda: margin_cross_entropy(1.0), r"margins has shape \(\)"),
    (lambda: verified(jnp.ones((2, 3), int)), "margins .* dtype int32"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
