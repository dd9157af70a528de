import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance_jax import mixing
from balance_jax.mixing.probabilities import given_probs

SIZES = [2.7e12, 40_000, 400, 1, 0]  # English against one sentence of mC4, and an empty group.
TAUS = [0.05, 0.5, 1.0, 2.0, 5.0, 100.0, 1e6, np.inf]


def reference_temperature(sizes, tau):
  sizes = np.asarray(sizes, np.float64)
  power = np.where(sizes > 0, np.where(sizes > 0, sizes, 1.0) ** (1.0 / tau), 0.0)
  return power / power.sum()


def reference_inflation(sizes, tau):
  """F in the closed form N * sum n^(2s - 1) / (sum n^s)^2 with s = 1 / tau."""
  n, s = np.asarray(sizes, np.float64), 1.0 / tau
  return n.sum() * (n ** (2 * s - 1)).sum() / (n**s).sum() ** 2


def reference_unimax(sizes, budget, max_epochs):
  """Water filling by bisection: the level L with sum min(L, E * n) = budget."""
  caps = max_epochs * np.asarray(sizes, np.float64)
  low, high = 0.0, caps.max()
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if np.minimum(middle, caps).sum() < budget else (low, middle)
  return np.minimum(high, caps) / np.minimum(high, caps).sum()


def draws_of_groups(rng, num_groups=3, dim=4, sizes=(5, 3, 2)):
  """Gradients of a finite data set by group, with their exact moments: lists and G, g."""
  grads = [rng.normal(1.0, 1.0 + i, (sizes[i], dim)) for i in range(num_groups)]
  second_moment = np.array([np.mean(np.sum(x**2, axis=1)) for x in grads])
  return grads, second_moment, np.stack([x.mean(axis=0) for x in grads])


def test_by_hand():
  np.testing.assert_allclose(mixing.natural_probs([900, 100]), [0.9, 0.1], rtol=1e-6)
  np.testing.assert_allclose(mixing.temperature_probs([900, 100], 2), [0.75, 0.25], rtol=1e-6)
  weights = mixing.scalarization_weights([900, 100], 2.0)
  np.testing.assert_allclose(weights, [0.75 / 0.9, 2.5], rtol=1e-6)
  # 0.75^2 / 0.9 + 0.25^2 / 0.1
  np.testing.assert_allclose(mixing.chi2_inflation([900, 100], 2.0), 1.25, rtol=1e-6)
  np.testing.assert_allclose(mixing.capped_probs([900, 100, 20], 80), [4 / 9, 4 / 9, 1 / 9], 1e-6)


@pytest.mark.parametrize("tau", TAUS)
def test_temperature_equals_reference(tau):
  expected = reference_temperature(SIZES, tau)
  # At tau = 0.05 the logits reach 570, of which float32 keeps 3e-5.
  np.testing.assert_allclose(mixing.temperature_probs(SIZES, tau), expected, rtol=1e-4, atol=1e-7)
  with jax.enable_x64(True):
    probs = mixing.temperature_probs(SIZES, tau)
    assert probs.dtype == jnp.float64
    np.testing.assert_allclose(probs, expected, rtol=1e-10)
    natural = np.array(SIZES) / np.sum(SIZES)
    weights = mixing.scalarization_weights(SIZES, tau)
    np.testing.assert_allclose(weights[:4], expected[:4] / natural[:4], rtol=1e-10)
    np.testing.assert_allclose(natural @ np.asarray(weights), 1.0, rtol=1e-10)
    assert probs[4] == 0
    assert weights[4] == 0


@settings(max_examples=40, deadline=None)
@given(
  st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e15)), min_size=4, max_size=4).filter(any),
  st.one_of(st.just(np.inf), st.floats(1e-44, 1e30)),
)
def test_temperature_is_a_mixture(sizes, tau):
  probs = np.asarray(mixing.temperature_probs(sizes, tau), np.float64)
  np.testing.assert_allclose(probs.sum(), 1.0, rtol=1e-6)
  assert np.all(probs[np.equal(sizes, 0)] == 0)
  assert np.all(np.diff(probs[np.argsort(sizes)]) >= 0)  # a larger group never gets less


@pytest.mark.parametrize("tau", [1e-30, 1e-40, 1e-45])
def test_tiny_tau_leaves_the_largest(tau):
  assert mixing.temperature_probs([3, 2, 3, 0], tau).tolist() == [0.5, 0, 0.5, 0]


def test_traced_tau_equals_concrete():
  taus = jnp.array(TAUS, jnp.float32)
  names = ("temperature_probs", "scalarization_weights", "chi2_inflation")
  functions = [getattr(mixing, name) for name in names]
  traced = jax.jit(jax.vmap(lambda tau: [function(SIZES[:4], tau) for function in functions]))
  for function, stacked in zip(functions, traced(taus), strict=True):
    for tau, values in zip(TAUS, stacked, strict=True):
      np.testing.assert_allclose(values, function(SIZES[:4], tau), rtol=2e-4, atol=1e-7)


def test_arrays_of_the_host_are_constants_of_a_jitted_function():
  tau, sizes = jnp.float32(2.0), jnp.array([900, 100])
  inside = jax.jit(lambda: (mixing.temperature_probs(sizes, tau), mixing.capped_probs(sizes, tau)))
  np.testing.assert_allclose(inside()[0], [0.75, 0.25], rtol=1e-6)
  np.testing.assert_allclose(inside()[1], [0.5, 0.5], rtol=1e-6)


def test_inflation_closed_form_and_theorem_3():
  sizes = np.array([40_000.0, 4_000.0, 400.0, 7.0])
  below, above = np.linspace(0.3, 1.0, 15), np.geomspace(1.0, 200.0, 25)
  with jax.enable_x64(True):
    inflation = jax.jit(jax.vmap(lambda tau: mixing.chi2_inflation(sizes, tau)))
    values = inflation(np.concatenate([below, above]))
    for tau, value in zip(np.concatenate([below, above]), values, strict=True):
      np.testing.assert_allclose(value, reference_inflation(sizes, tau), rtol=1e-10)
    np.testing.assert_allclose(mixing.chi2_inflation(sizes, 1.0), 1.0, rtol=1e-12)
    at_infinity = np.sum(sizes.sum() / sizes) / len(sizes) ** 2
    np.testing.assert_allclose(mixing.chi2_inflation(sizes, np.inf), at_infinity, rtol=1e-10)
    np.testing.assert_allclose(mixing.chi2_inflation([7, 7, 7], 3.0), 1.0, rtol=1e-12)
  assert np.all(np.diff(values[:15]) < 0)
  assert np.all(np.diff(values[15:]) > 0)


def test_theorem_1_equal_full_gradients():
  rng, sizes = np.random.default_rng(0), np.array([70, 20, 10])
  groups = np.repeat(np.arange(3), sizes)
  inputs, labels = rng.normal(size=(100, 5)), rng.integers(0, 4, 100)

  def losses(params):
    return -jax.nn.log_softmax(inputs @ params)[np.arange(100), labels]

  def sampled(params, tau):  # sum_i p_i * mean of the group
    p, values = mixing.temperature_probs(sizes, tau), losses(params)
    return sum(p[i] * values[groups == i].mean() for i in range(3))

  def weighted(params, tau):
    return jnp.mean(mixing.scalarization_weights(sizes, tau)[groups] * losses(params))

  with jax.enable_x64(True):
    both = jax.jit(lambda *args: [jax.value_and_grad(f)(*args) for f in (sampled, weighted)])
    for tau in (0.5, 1.0, 5.0, np.inf):
      (loss_a, grads_a), (loss_b, grads_b) = both(rng.normal(size=(5, 4)), tau)
      np.testing.assert_allclose(loss_a, loss_b, rtol=1e-12)
      np.testing.assert_allclose(grads_a, grads_b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("r", [(0.5, 0.3, 0.2), (0.2, 0.2, 0.6), (0.1, 0.8, 0.1)])
def test_moments_by_exact_enumeration(r):
  p = np.array([0.2, 0.2, 0.6])
  grads, second_moment, mean_grad = draws_of_groups(np.random.default_rng(1))
  values = np.concatenate([p[i] / r[i] * x for i, x in enumerate(grads)])
  chance = np.concatenate([np.full(len(x), r[i] / len(x)) for i, x in enumerate(grads)])
  mean = chance @ values
  with jax.enable_x64(True):
    moments = mixing.estimator_moments(p, r, second_moment, mean_grad)
    by_gram = mixing.estimator_moments(p, r, second_moment, gram=mean_grad @ mean_grad.T)
  np.testing.assert_allclose(mean, p @ mean_grad, rtol=1e-12)  # unbiased, whatever r
  np.testing.assert_allclose(moments["second"], chance @ np.sum(values**2, axis=1), rtol=1e-10)
  variance = chance @ np.sum((values - mean) ** 2, axis=1)
  np.testing.assert_allclose(moments["variance"], variance, rtol=1e-10)
  for name, value in moments.items():
    np.testing.assert_allclose(by_gram[name], value, rtol=1e-10)


def test_stratified_variance_by_exact_enumeration():
  p, counts = np.array([0.2, 0.2, 0.6]), np.array([2, 1, 1])
  grads, second_moment, mean_grad = draws_of_groups(np.random.default_rng(2))
  w = p / (counts / 4)
  batches = [  # every batch of quotas (2, 1, 1) from the 5, 3 and 2 examples
    (w[0] * (a + b) + w[1] * c + w[2] * d) / 4
    for a in grads[0]
    for b in grads[0]
    for c in grads[1]
    for d in grads[2]
  ]
  observed = np.sum(np.var(batches, axis=0))
  with jax.enable_x64(True):
    moments = mixing.estimator_moments(p, counts / 4, second_moment, mean_grad)
    np.testing.assert_allclose(moments["variance_stratified"] / 4, observed, rtol=1e-10)
    assert moments["variance_stratified"] < moments["variance"]


def test_moments_against_monte_carlo():
  rng, draws = np.random.default_rng(3), 40_000
  p, r = np.array([0.4, 0.4, 0.2]), np.array([0.6, 0.3, 0.1])
  means, scale = rng.normal(size=(3, 6)), np.array([0.5, 1.0, 3.0])
  second_moment = np.sum(means**2, axis=1) + 6 * scale**2
  moments = mixing.estimator_moments(p, r, second_moment, means)
  groups = rng.choice(3, draws, p=r)
  sample = means[groups] + scale[groups, None] * rng.normal(size=(draws, 6))
  sample *= (p / r)[groups, None]
  centre = p @ means
  for name, squares in (
    ("second", np.sum(sample**2, axis=1)),
    ("variance", np.sum((sample - centre) ** 2, axis=1)),
  ):
    # A z-score of 5 has the chance 6e-7.
    assert abs(squares.mean() - moments[name]) < 5 * squares.std() / np.sqrt(draws), name
  z = (sample.mean(axis=0) - centre) / (sample.std(axis=0) / np.sqrt(draws))
  assert np.all(np.abs(z) < 5)


def test_theorem_2_fails_for_unequal_second_moments():
  p, q, second_moment = [0.5, 0.5], [0.9, 0.1], [10.0, 0.1]
  seconds = [mixing.estimator_moments(p, r, second_moment)["second"] for r in (q, p)]
  np.testing.assert_allclose(seconds, [0.25 / 0.9 * 10 + 0.25, 5.05], rtol=1e-6)
  assert round(float(seconds[0]), 2) == 3.03
  equal = [mixing.estimator_moments(p, r, [2.0, 2.0])["second"] for r in (q, p)]
  np.testing.assert_allclose(equal[0] / equal[1], 0.25 / 0.9 + 2.5, rtol=1e-6)


def test_optimal_sampling_beats_every_other_draw():
  rng = np.random.default_rng(4)
  p, second_moment = rng.dirichlet(np.ones(4)), rng.pareto(1.0, 4)
  with jax.enable_x64(True):
    best = mixing.optimal_sampling(p, second_moment)
    second = jax.jit(
      jax.vmap(lambda r: mixing.estimator_moments(p, r, second_moment)["second"], in_axes=0)
    )
    least = second(best[None, :])[0]
    others = second(np.concatenate([rng.dirichlet(np.ones(4), 200), p[None, :]]))
    np.testing.assert_allclose(least, np.sum(p * np.sqrt(second_moment)) ** 2, rtol=1e-10)
    assert np.all(np.asarray(others) > float(least))


@pytest.mark.parametrize("second_moment", [[0.0, 0.0], [np.nan, 1.0]])
def test_optimal_sampling_without_a_measure_is_p(second_moment):
  assert mixing.optimal_sampling([0.75, 0.25], second_moment).tolist() == [0.75, 0.25]


def test_unimax_equals_bisection():
  rng = np.random.default_rng(5)
  with jax.enable_x64(True):
    for share in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0):
      sizes = np.where(rng.random(6) < 0.2, 0.0, rng.pareto(0.5, 6) * 100)
      sizes[0] = 50.0
      budget = share * 3.0 * sizes.sum()
      expected = reference_unimax(sizes, budget, 3.0)
      np.testing.assert_allclose(mixing.unimax_probs(sizes, budget, 3.0), expected, rtol=1e-10)
  # The whole budget and no more: every cap binds, which is proportional.
  np.testing.assert_allclose(mixing.unimax_probs([6, 2], 16, 2), [0.75, 0.25], rtol=1e-6)
  np.testing.assert_allclose(mixing.unimax_probs([6, 2, 0], 4, 2), [0.5, 0.5, 0], rtol=1e-6)
  with pytest.raises(ValueError, match=r"budget is 16\.01, more than max_epochs"):
    mixing.unimax_probs([6, 2], 16.01, 2)


@pytest.mark.parametrize("cap", [1, 300, 1e6, 1e13, np.inf])
def test_capped_equals_reference(cap):
  expected = np.minimum(SIZES, cap) / np.sum(np.minimum(SIZES, cap))
  np.testing.assert_allclose(mixing.capped_probs(SIZES, cap), expected, rtol=1e-6)
  traced = jax.jit(lambda cap: mixing.capped_probs(SIZES, cap))(cap)
  np.testing.assert_allclose(traced, expected, rtol=1e-6)


def test_importance_weights():
  weights = mixing.importance_weights([0.5, 0.0, 0.5, 0.0], [0.25, 0.75, 0.0, 0.0])
  assert weights.tolist() == [2.0, 0.0, np.inf, 0.0]


def test_given_probs():
  expected = [0.25, 0.75, 0.0]
  assert given_probs([1, 3, 0], [5, 5, 0]).tolist() == expected
  traced = jax.jit(lambda a: given_probs([a, 3.0, 0.0], [5, 5, 0]))(1.0)
  np.testing.assert_allclose(traced, expected, rtol=1e-6)
  with pytest.raises(ValueError, match="p is 3 at 1, a group of size 0; expected 0"):
    given_probs([1, 3, 0], [5, 0, 5])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: mixing.natural_probs([1, -3, -2]), "sizes must be >= 0, got -3 at 1"),
    (lambda: mixing.natural_probs([0, 0]), "sizes must hold at least one group above zero"),
    (lambda: mixing.temperature_probs([1, np.inf], 2), "sizes must be finite"),
    (lambda: mixing.temperature_probs([[1, 2]], 2), r"sizes has shape \(1, 2\)"),
    (lambda: mixing.temperature_probs([1, 2], 0.0), r"tau is 0\.0; allowed: \(0, inf\]"),
    (lambda: mixing.scalarization_weights([1, 2], np.nan), "tau is nan"),
    (lambda: mixing.chi2_inflation([1, 2], -1), "tau is -1"),
    (lambda: mixing.capped_probs([1, 2], 0), "cap is 0"),
    (lambda: mixing.unimax_probs([1, 2], np.inf, np.inf), "budget is inf"),
    (lambda: mixing.unimax_probs([1, 2], 1, 0), "max_epochs is 0"),
    (lambda: jax.jit(mixing.unimax_probs, static_argnums=0)((1, 2), 1, 2), "budget must be known"),
    (lambda: jax.jit(mixing.natural_probs)(jnp.ones(2)), "sizes must be known"),
    (lambda: mixing.importance_weights([1.0], [0.5, 0.5]), r"r has shape \(2,\)"),
    (lambda: mixing.optimal_sampling([0.5, 0.5], [1.0]), r"second_moment has shape \(1,\)"),
    (lambda: mixing.estimator_moments(0.5, 0.5, 1.0), r"p has shape \(\)"),
    (lambda: mixing.estimator_moments([1.0], [0.5, 0.5], [1.0]), "r has shape"),
    (lambda: mixing.estimator_moments([1.0], [1.0], [1.0, 2.0]), "second_moment has shape"),
    (lambda: mixing.estimator_moments([1.0], [1.0], [1.0], np.ones(1)), "mean_grad has shape"),
    (lambda: mixing.estimator_moments([1.0], [1.0], [1.0], gram=np.ones(1)), "gram has shape"),
    (
      lambda: mixing.estimator_moments([1.0], [1.0], [1.0], np.ones((1, 2)), gram=np.ones((1, 1))),
      "give mean_grad or gram, not both",
    ),
    (lambda: given_probs([1.0], [1, 2], "mixtures"), r"mixtures has shape \(1,\)"),
    (lambda: given_probs([0.0, 0.0], [1, 2]), "p must hold at least one group above zero"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
