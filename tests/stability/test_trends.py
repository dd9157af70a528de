import dataclasses

import jax
import numpy as np
import pytest

from balance_jax.stability.trends import (
  fit_scaling_trend,
  max_stable_learning_rate,
  predict_unstable,
)

# Largest attention logit of small decoders after 80 steps, by model size and learning rate.
SIZES = [12_288, 55_296, 98_304, 331_776]
MEASURED = {
  1e-2: [10.1, 14.8, 27.5, 52.4],
  3e-2: [22.0, 90.0, 198.6, 521.0],
  1e-1: [660.0, 3210.0, 5118.0, 14244.0],
}


def normal_equations(n_params, values, degree):
  """Coefficients and residual standard deviation, by another route than the library."""
  x, y = np.log10(np.asarray(n_params, np.float64)), np.log10(values)
  design = (x - x.mean())[:, None] ** np.arange(degree + 1)
  solution = np.linalg.solve(design.T @ design, design.T @ y)
  freedom = len(y) - degree - 1
  residual = np.sqrt(np.sum((y - design @ solution) ** 2) / freedom) if freedom else 0.0

  def predict(n):
    return 10 ** ((np.log10(n) - x.mean())[..., None] ** np.arange(degree + 1) @ solution)

  return predict, residual


def test_power_law_by_hand():
  trend = fit_scaling_trend([1e4, 1e6, 1e8], [2.0, 20.0, 200.0])
  assert trend.degree == 1
  np.testing.assert_allclose(trend.coefficients, [np.log10(2) - 2, 0.5], atol=1e-12)
  assert trend.residual_std == pytest.approx(0.0, abs=1e-12)
  np.testing.assert_allclose(trend.predict([1e10, 1e12]), [2e3, 2e4], rtol=1e-10)
  assert trend.crossing(2e3) == pytest.approx(1e10, rel=1e-10)


@pytest.mark.parametrize(
  ("rate", "line", "quadratic"), [(1e-2, 40, 241), (3e-2, 643, 1677), (1e-1, 18030, 10657)]
)
def test_measured_ladder(rate, line, quadratic):
  first, rest = MEASURED[rate][:3], SIZES[3]
  default = fit_scaling_trend(SIZES[:3], first)
  assert default.degree == 1  # three sizes: the safer fit
  # The reference figures come from logits that were not rounded as those above are.
  assert float(default.predict(rest)) == pytest.approx(line, rel=2e-3)
  parabola = fit_scaling_trend(SIZES[:3], first, degree=2)
  assert parabola.residual_std == 0
  np.testing.assert_allclose(parabola.predict(SIZES[:3]), first, rtol=1e-9)
  assert float(parabola.predict(rest)) == pytest.approx(quadratic, rel=2e-3)
  for trend in (default, parabola):
    assert bool(predict_unstable(trend, rest)) == (MEASURED[rate][3] > 1e4)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_equals_normal_equations(degree):
  rng = np.random.default_rng(degree)
  # Large sizes, where powers of the uncentred logarithm are all but collinear.
  n_params = 10 ** rng.uniform(8, 10, 12)
  values = 10 ** rng.normal(2, 1, 12)
  trend = fit_scaling_trend(n_params, values, degree)
  predict, residual = normal_equations(n_params, values, degree)
  n = 10 ** rng.uniform(8, 11, (4, 5))
  assert trend.predict(n).shape == (4, 5)
  assert trend.predict(n).dtype == np.float64
  np.testing.assert_allclose(trend.predict(n), predict(n), rtol=1e-6)
  assert trend.residual_std == pytest.approx(residual, rel=1e-8)
  plain = np.polynomial.polynomial.polyval(np.log10(n), trend.coefficients)
  np.testing.assert_allclose(10**plain, predict(n), rtol=1e-6)


def test_default_degree_and_repeated_sizes():
  n_params = np.repeat([1e5, 1e6, 1e7, 1e8], 3)
  assert fit_scaling_trend(n_params, np.ones(12)).degree == 1  # 12 values of 4 sizes
  five = fit_scaling_trend([1e5, 1e6, 1e7, 1e8, 1e9], np.ones(5))
  assert five.degree == 2
  assert five.coefficients.shape == (3,)
  # Of two values at one size the fit sees the geometric mean, and the spread stays as residual.
  trend = fit_scaling_trend([1e5, 1e5, 1e7, 1e7], [1.0, 100.0, 10.0, 1000.0])
  np.testing.assert_allclose(trend.predict([1e5, 1e7]), [10.0, 100.0], rtol=1e-10)
  assert trend.residual_std == pytest.approx(np.sqrt(4 / 2))


def test_crossing_searches_above_the_largest_size():
  rising = fit_scaling_trend([1e4, 1e6], [1.0, 10.0])
  assert rising.crossing(1e3) == pytest.approx(1e10, rel=1e-10)
  assert isinstance(rising.crossing(1e3), float)
  assert rising.crossing(1e3, high=1e9) is None
  assert rising.crossing(1e5) is None  # at 1e14, past 1e6 times the largest size
  assert rising.crossing(1e5, high=1e15) == pytest.approx(1e14, rel=1e-10)
  assert rising.crossing(3.0) is None  # passed at 1e5, below the largest size
  assert rising.crossing(3.0, low=1e4) == pytest.approx(10**4.9542, rel=1e-4)
  assert rising.crossing(10.0) == pytest.approx(1e6, rel=1e-8)
  falling = fit_scaling_trend([1e4, 1e6], [1e-4, 1e-5])
  assert falling.crossing(1e-6) == pytest.approx(1e8, rel=1e-10)
  flat = fit_scaling_trend([1e4, 1e6], [5.0, 5.0])
  assert flat.crossing(6.0) is None
  assert flat.crossing(5.0) == 1e6


def test_crossing_of_a_parabola_is_the_first_one():
  # log10(value) = 4 - (log10 N - 8)^2: reaches 1e3 at 1e7 and 1e9, 1e4 at 1e8, 1e5 never.
  n_params = 10.0 ** np.arange(3, 8)
  values = 10 ** (4 - (np.log10(n_params) - 8) ** 2)
  trend = fit_scaling_trend(n_params, values)
  np.testing.assert_allclose(trend.coefficients, [-60.0, 16.0, -1.0], rtol=1e-8)
  assert trend.crossing(1e3, low=1e3) == pytest.approx(1e7, rel=1e-6)
  assert trend.crossing(1e3, low=2e7) == pytest.approx(1e9, rel=1e-6)
  # Tangent: found also where rounding, here by hand, leaves the double root a little complex.
  for rounding in (0.0, 2e-13):
    assert trend.crossing(1e4 * (1 + rounding)) == pytest.approx(1e8, rel=2e-6)
  assert trend.crossing(1e5) is None


def test_predictions_far_out_do_not_warn():
  trend = fit_scaling_trend([1.0, 10.0], [1e-100, 1e100])
  with np.errstate(all="raise"):
    assert trend.predict(1e3) == np.inf
    assert bool(predict_unstable(trend, 1e3))


def test_predict_unstable_is_strict_and_keeps_the_shape():
  trend = fit_scaling_trend([1e4, 1e6], [1.0, 10.0])
  found = predict_unstable(trend, [[1e9, 1e11], [1e13, 1e7]], threshold=1e3)
  np.testing.assert_array_equal(found, [[False, True], [True, False]])
  assert found.dtype == bool
  flat = fit_scaling_trend([1e4, 1e6], [1.0, 1.0])
  assert not predict_unstable(flat, 1e8, threshold=1.0)


def test_max_stable_learning_rate():
  rates = list(MEASURED)
  trends = [fit_scaling_trend(SIZES, values) for values in MEASURED.values()]
  assert max_stable_learning_rate(rates, trends, 1e5) == 0.1
  assert max_stable_learning_rate(rates, trends, 331_776) == 0.03
  assert max_stable_learning_rate(rates, trends, 331_776, threshold=60.0) == 0.01
  assert max_stable_learning_rate(rates, trends, 331_776, threshold=1.0) is None
  # A larger rate that looks stable above an unstable one does not count.
  assert max_stable_learning_rate(rates, [trends[0], trends[2], trends[1]], 331_776) == 0.01


def test_trend_is_frozen_and_copies():
  values = np.array([1.0, 10.0])
  trend = fit_scaling_trend([1e4, 1e6], values)
  values[0] = 7.0
  np.testing.assert_array_equal(trend.values, [1.0, 10.0])
  with pytest.raises(dataclasses.FrozenInstanceError):
    trend.degree = 2


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (([1e4, 1e5], [1.0, 0.0]), "values must be finite and > 0, got 0 at 1"),
    (([1e4, 1e5], [-1.0, 1.0]), "values must be finite and > 0, got -1 at 0"),
    (([1e4, 1e5], [1.0, np.nan]), "values must be finite and > 0, got nan at 1"),
    (([1e4, 1e5, 1e6], [1.0, 2.0, np.inf]), "values must be finite and > 0, got inf at 2"),
    (([1e4, 1e5], [1.0, None]), "values must be finite and > 0, got nan at 1"),
    (([1e4, -5], [1.0, 2.0]), "n_params must be finite and > 0, got -5 at 1"),
    (([1e4, "a"], [1.0, 2.0]), "n_params is .*; expected numbers"),
    (([1e4, 1e5], [1.0]), r"values has shape \(1,\); expected \(2\)"),
    (([[1e4, 1e5]], [[1.0, 2.0]]), r"n_params has shape \(1, 2\); expected \(any\)"),
    (([1e4, 1e4], [1.0, 2.0]), "n_params holds 1 distinct sizes; degree 1 needs at least 2"),
    (([1e4, 1e5, 1e5], [1.0, 2.0, 3.0], 2), "2 distinct sizes; degree 2 needs at least 3"),
    (([1e4, 1e5], [1.0, 2.0], 0), "degree is 0"),
    (([1e4, 1e5], [1.0, 2.0], 1.5), "degree is 1.5"),
    (([], []), "n_params holds 0 distinct sizes"),
  ],
)
def test_fit_refuses(arguments, message):
  with pytest.raises(ValueError, match=message):
    fit_scaling_trend(*arguments)


def test_reading_refuses():
  trend = fit_scaling_trend([1e4, 1e6], [1.0, 10.0])
  for n in (0.0, -1.0, np.nan, np.inf):
    with pytest.raises(ValueError, match="n must be finite and > 0"):
      trend.predict(n)
  with pytest.raises(ValueError, match="n must be known when the function is traced"):
    jax.jit(trend.predict)(1e6)
  with pytest.raises(ValueError, match="threshold is 0"):
    trend.crossing(0.0)
  with pytest.raises(ValueError, match="low is -1"):
    trend.crossing(1.0, low=-1.0)
  with pytest.raises(ValueError, match="high is 1000"):
    trend.crossing(1.0, high=1e3)
  with pytest.raises(ValueError, match="threshold is nan"):
    predict_unstable(trend, 1e6, np.nan)
  for rates in ([], [0.1, 0.01], [0.1, 0.1]):
    with pytest.raises(ValueError, match="learning_rates must be increasing"):
      max_stable_learning_rate(rates, [trend] * len(rates), 1e6)
  with pytest.raises(ValueError, match="trends holds 1 trends; expected 2"):
    max_stable_learning_rate([0.1, 0.2], [trend], 1e6)
  with pytest.raises(ValueError, match="n is 0"):
    max_stable_learning_rate([0.1], [trend], 0)
