import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.losses import WeightedMean, group_weighted_mean, weighted_mean

NORMALIZE = ("count", "weights")


def reference(values, weights, where, normalize):
  """num, den in float64 over the entries that exist."""
  values, weights = np.asarray(values, np.float64)[where], np.asarray(weights, np.float64)[where]
  return np.sum(weights * values), np.sum(weights) if normalize == "weights" else len(values)


def random_batch(seed, shape=(24,)):
  rng = np.random.default_rng(seed)
  arrays = rng.normal(size=shape), rng.pareto(1.0, shape)
  return (*(x.astype(np.float32) for x in arrays), rng.random(shape) < 0.7)


def test_by_hand():
  values, weights = jnp.array([1.0, 3.0, 100.0]), jnp.array([0.5, 2.0, 7.0])
  where = jnp.array([True, True, False])
  count, by_weight = (weighted_mean(values, weights, where, how) for how in NORMALIZE)
  assert (count.num, count.den, count.mean()) == (6.5, 2.0, 3.25)
  assert (by_weight.num, by_weight.den) == (6.5, 2.5)
  np.testing.assert_allclose(by_weight.mean(), 2.6, rtol=1e-6)
  for how in NORMALIZE:  # without weights the two agree
    assert weighted_mean(values, None, where, how).mean() == 2.0
    assert weighted_mean(values[:2], normalize=how).mean() == 2.0


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("shape", [(24,), (4, 6)])
def test_equals_reference_and_jit_and_vmap(normalize, shape):
  values, weights, where = random_batch(0, shape)
  expected = reference(values, weights, where, normalize)
  found = weighted_mean(values, weights, where, normalize)
  assert found.num.shape == found.den.shape == ()
  np.testing.assert_allclose([found.num, found.den], expected, rtol=1e-5)
  np.testing.assert_allclose(found.mean(), expected[0] / expected[1], rtol=1e-5)
  batches = [random_batch(seed, shape) for seed in range(3)]
  stacked = [np.stack(arrays) for arrays in zip(*batches, strict=True)]
  reduce = jax.jit(jax.vmap(lambda *args: weighted_mean(*args, normalize)))
  for i, batch in enumerate(batches):
    one = jax.tree.map(lambda x, i=i: x[i], reduce(*stacked))
    np.testing.assert_allclose([one.num, one.den], reference(*batch, normalize), rtol=1e-5)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_masked_entries_leave_no_trace(normalize, garbage):
  values, weights, where = random_batch(1)
  dirty_values, dirty_weights = (np.where(where, x, garbage) for x in (values, weights))

  def mean(values, weights):
    return weighted_mean(values, weights, where, normalize).mean()

  value, grads = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(dirty_values, dirty_weights)
  subset = weighted_mean(values[where], weights[where], normalize=normalize).mean()
  np.testing.assert_allclose(value, subset, rtol=1e-5)
  num, den = reference(values, weights, where, normalize)
  np.testing.assert_allclose(grads[0], np.where(where, weights, 0) / den, rtol=1e-5)
  by_weight = (values - num / den) / den if normalize == "weights" else values / den
  np.testing.assert_allclose(grads[1], np.where(where, by_weight, 0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_nothing_selected_is_zero_with_zero_gradient(normalize):
  where = jnp.zeros(3, bool)
  dirty = jnp.array([1.0, jnp.nan, jnp.inf])

  def mean(values):
    return weighted_mean(values, dirty, where, normalize).mean()

  value, grad = jax.jit(jax.value_and_grad(mean))(dirty)
  assert value == 0
  assert grad.tolist() == [0, 0, 0]
  zero_weights = weighted_mean(jnp.ones(2), jnp.zeros(2), normalize="weights")
  assert zero_weights.mean() == 0
  of_the_pair = jax.grad(lambda num, den: WeightedMean(num, den).mean(), argnums=(0, 1))
  assert of_the_pair(1.0, 0.0) == (0, 0)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_unequal_parts_merge_to_the_whole(normalize):
  values, weights, where = random_batch(2)
  whole = weighted_mean(values, weights, where, normalize)
  parts = [
    weighted_mean(values[part], weights[part], where[part], normalize)
    for part in (slice(0, 3), slice(3, 19), slice(19, 24))
  ]
  merged = parts[0] + parts[1] + parts[2]
  assert isinstance(merged, WeightedMean)
  np.testing.assert_allclose(merged.mean(), whole.mean(), rtol=1e-5)
  averaged = np.mean([part.mean() for part in parts])
  assert abs(averaged - whole.mean()) > 0.05  # what a mean of means would give


def test_bfloat16_is_summed_in_float32():
  values = jnp.full(4096, 1.0, jnp.bfloat16)  # a bfloat16 sum stops at 256
  found = weighted_mean(values, values)
  assert found.num.dtype == found.den.dtype == jnp.float32
  assert (found.num, found.den) == (4096, 4096)
  assert weighted_mean(jnp.arange(3)).mean() == 1
  with jax.enable_x64(True):
    assert weighted_mean(jnp.ones(3, jnp.float64)).num.dtype == jnp.float64


def test_a_mask_of_numbers_is_read_as_truth():
  found = weighted_mean(jnp.array([1.0, 2.0, 4.0]), where=jnp.array([1, 2, 0]))
  assert (found.num, found.den) == (3, 2)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_groups_equal_a_loop(normalize):
  values, weights, where = random_batch(3)
  groups = np.random.default_rng(3).integers(0, 4, 24)
  groups[groups == 2] = 1  # nobody in group 2
  args = (values, groups, 5, weights, where, normalize)
  found = group_weighted_mean(*args)
  jitted = jax.jit(group_weighted_mean, static_argnums=(2, 5))(*args)
  for k in range(5):
    mine = where & (groups == k)
    num, den = reference(values, weights, mine, normalize)
    for pair in (found, jitted):
      np.testing.assert_allclose(pair.num[k], num, rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(pair.den[k], den, rtol=1e-5)
  assert found.mean()[2] == 0
  total = weighted_mean(values, weights, where, normalize)
  np.testing.assert_allclose(found.num.sum() / found.den.sum(), total.mean(), rtol=1e-5)


def test_an_infinite_loss_stays_in_its_group():
  values = jnp.array([1.0, jnp.inf, 3.0, jnp.nan])
  groups = jnp.array([0, 1, 0, 2], jnp.uint8)
  means = jax.jit(lambda *args: group_weighted_mean(*args, 4).mean())(values, groups)
  np.testing.assert_array_equal(means, [2.0, np.inf, np.nan, 0.0])


def test_group_gradient():
  def objective(values):
    return group_weighted_mean(values, jnp.array([0, 0, 1]), 3).mean() @ jnp.array([1.0, 5.0, 9.0])

  np.testing.assert_allclose(jax.jit(jax.grad(objective))(jnp.ones(3)), [0.5, 0.5, 5.0], rtol=1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: weighted_mean(jnp.ones(3), jnp.ones(2)), r"weights has shape \(2,\); .*\(3,\)"),
    (lambda: weighted_mean(jnp.ones(3), where=jnp.ones(())), r"where has shape \(\)"),
    (lambda: weighted_mean(jnp.ones(3), normalize="sum"), "normalize is 'sum'"),
    (lambda: group_weighted_mean(jnp.ones((2, 2)), jnp.ones((2, 2)), 2), "values has shape"),
    (lambda: group_weighted_mean(jnp.ones(3), jnp.ones(2), 2), r"groups has shape \(2,\)"),
    (lambda: group_weighted_mean(jnp.ones(3), jnp.ones(3), 0), "num_groups is 0"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
