import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import mixing
from balance_jax.gradients import GradientMoments, measure_gradient_moments

NUM_GROUPS = 4
GROUPS = np.array([0, 1, 0, 1, 1, 0, 2, 1, 0, 1, 0])  # 5, 5 and 1 examples; nobody in group 3.


def linear_loss(params, rows, key):
  """A softmax regression, one loss per row."""
  del key
  logits = rows["x"] @ params["w"] + params["b"][None, :]
  log_probs = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_probs, rows["y"][:, None], axis=1)[:, 0]


def problem(seed=0):
  rng = np.random.default_rng(seed)
  params = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)}
  rows = {"x": rng.normal(size=(11, 3)), "y": rng.integers(0, 4, 11)}
  single = {"x": rows["x"].astype(np.float32), "y": rows["y"]}
  return params, rows, jax.tree.map(lambda x: x.astype(np.float32), params), single


def reference_gradients(params, rows):
  """Gradients (B, P) in float64, one example after another, in the order b, w of the pytree."""
  grads = []
  with jax.enable_x64(True):
    gradient = jax.jit(jax.grad(lambda params, row: linear_loss(params, row, None)[0]))
    for i in range(len(rows["y"])):
      grad = gradient(params, jax.tree.map(lambda x, i=i: x[i : i + 1], rows))
      grads.append(np.concatenate([np.ravel(grad["b"]), np.ravel(grad["w"])]))
  return np.stack(grads)


def measure(params, rows, groups, num_groups=NUM_GROUPS, **kwargs):
  def function(*args):
    return measure_gradient_moments(linear_loss, *args, num_groups, **kwargs)

  return jax.jit(function)(params, rows, groups)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_equals_a_loop_over_examples(chunk):
  params, rows, params32, rows32 = problem()
  grads = reference_gradients(params, rows)
  found = measure(params32, rows32, GROUPS, chunk=chunk)
  assert isinstance(found, GradientMoments)
  assert found.count.tolist() == [5, 5, 1, 0]
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
  for i in range(3):
    mine = grads[i == GROUPS]
    np.testing.assert_allclose(found.second_moment[i], np.mean(np.sum(mine**2, axis=1)), rtol=1e-5)
    np.testing.assert_allclose(found.mean_grad[i], mine.mean(axis=0), rtol=1e-4, atol=1e-6)
    for j in range(3):
      other = grads[j == GROUPS]
      products = mine @ other.T
      if i != j:
        expected = products.mean()
      elif len(mine) > 1:  # the mean over pairs of different examples
        expected = (products.sum() - np.trace(products)) / (len(mine) * (len(mine) - 1))
      else:
        expected = np.nan
      np.testing.assert_allclose(found.gram[i, j], expected, rtol=1e-4, atol=1e-6)


def test_missing_groups_are_nan_and_nothing_else():
  _, _, params, rows = problem()
  found = measure(params, rows, GROUPS)
  np.testing.assert_array_equal(np.isnan(found.second_moment), [0, 0, 0, 1])
  np.testing.assert_array_equal(np.isnan(found.mean_grad).any(axis=1), [0, 0, 0, 1])
  expected = np.zeros((4, 4), bool)
  expected[3, :] = expected[:, 3] = True
  expected[2, 2] = True  # one example does not tell its noise
  np.testing.assert_array_equal(np.isnan(found.gram), expected)


def test_gram_is_unbiased_and_the_plain_square_is_not():
  # Gradient of row . params is the row: two draws of N(mean, 1) in 6 dimensions, 4000 times over.
  rng, repeats = np.random.default_rng(1), 4000
  mean = np.array([0.5, -0.5, 0.0, 0.25, 0.0, 0.0])
  groups = jnp.array([0, 0, 1, 1])
  means = np.stack([mean, mean, -mean, -mean])
  rows = (means[None] + rng.normal(size=(repeats, 4, 6))).astype(np.float32)

  def gram_of(rows):
    found = measure_gradient_moments(lambda w, x, key: x @ w, jnp.zeros(6), rows, groups, 2)
    return found.gram, found.second_moment, jnp.sum(jnp.square(found.mean_grad[0]))

  gram, second, plain = (np.asarray(x) for x in jax.jit(jax.vmap(gram_of))(rows))
  square = np.sum(mean**2)

  def z(sample, truth):
    return abs(sample.mean() - truth) / (sample.std() / np.sqrt(repeats))

  assert z(gram[:, 0, 0], square) < 5
  assert z(gram[:, 1, 1], square) < 5
  assert z(gram[:, 0, 1], -square) < 5
  assert z(second[:, 0], square + 6) < 5
  assert z(plain, square) > 50
  assert gram[:, 0, 0].min() < 0  # as documented


def test_between_group_formula():
  params, rows, params32, rows32 = problem(2)
  groups = np.where(GROUPS == 2, 0, GROUPS)
  found = measure(params32, rows32, groups, 2)
  grads = reference_gradients(params, rows)
  with_noise = np.stack([grads[groups == i].mean(axis=0) for i in range(2)])
  exact = GradientMoments(found.count, found.second_moment, None, with_noise @ with_noise.T)
  p, r = np.array([0.3, 0.7]), np.array([0.6, 0.4])
  mean = p @ with_noise
  expected = np.sum(p * np.sum((with_noise - mean) ** 2, axis=1))
  np.testing.assert_allclose(exact.between_group(p), expected, rtol=1e-5)
  weighted = p[:, None] / r[:, None] * with_noise
  expected = np.sum(r * np.sum((weighted - mean) ** 2, axis=1))
  np.testing.assert_allclose(exact.between_group(p, r), expected, rtol=1e-5)
  moments = mixing.estimator_moments(p, r, found.second_moment, gram=found.gram)
  gap = moments["variance"] - moments["variance_stratified"]
  np.testing.assert_allclose(found.between_group(p, r), gap, rtol=1e-3, atol=1e-5)
  alone = found.between_group([1.0, 0.0], [1.0, 0.0])
  np.testing.assert_allclose(alone, 0.0, atol=1e-6)


def test_low_precision_and_key():
  def loss(params, rows, key):
    return (rows @ params["w"]) * jax.random.uniform(key)

  key, rows = jax.random.key(3), jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
  params = {"w": jnp.ones(2, jnp.bfloat16)}
  groups = jnp.zeros(3, jnp.uint8)
  found = jax.jit(lambda *args: measure_gradient_moments(loss, *args, groups, 1, key=key, chunk=2))(
    params, rows
  )
  assert found.mean_grad.dtype == jnp.float32
  scale = float(jax.random.uniform(key))
  np.testing.assert_allclose(found.mean_grad, [[3 * scale, 4 * scale]], rtol=1e-2)


def test_products_ask_for_full_precision():
  # On CPUs the setting changes nothing; TPUs and recent GPUs round the factors without it.
  def gram(rows):
    def loss(params, rows, key):
      return jnp.sum(rows * params[None, :], axis=1)

    found = measure_gradient_moments(loss, jnp.zeros(2), rows, jnp.array([0]), 1)
    return found.between_group(jnp.ones(1))

  program = str(jax.make_jaxpr(gram)(jnp.ones((1, 2))))
  assert program.count("dot_general[") >= 4
  assert program.count("precision=") == program.count("HIGHEST, ") == program.count("dot_general[")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rows": {}}, r"rows has shapes \[\], groups \(11,\)"),
    ({"rows": {"x": jnp.ones((11, 3)), "y": jnp.ones(10, int)}}, r"rows has shapes .*\(10,\)\]"),
    ({"rows": jnp.ones((0, 3)), "groups": jnp.ones(0, int)}, r"rows has shapes \[\(0, 3\)\]"),
    ({"groups": jnp.zeros((11, 1), int)}, r"groups has shape \(11, 1\)"),
    ({"num_groups": 0}, "num_groups is 0"),
    ({"chunk": 0}, "chunk is 0"),
    ({"chunk": 2.5}, r"chunk is 2\.5; expected an integer"),
  ],
)
def test_bad_input(changes, message):
  _, _, params, rows = problem()
  arguments = {"params": params, "rows": rows, "groups": GROUPS, "num_groups": 4} | changes
  with pytest.raises(ValueError, match=message):
    measure_gradient_moments(linear_loss, **arguments)
