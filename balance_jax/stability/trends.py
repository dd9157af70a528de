"""Predicting an instability from smaller models: a trend over model size, extrapolated.

For one learning rate, the largest attention logit after a fixed number of steps is measured on a
ladder of model sizes, and a polynomial is fitted to its logarithm against the logarithm of the
size. Where the trend exceeds 1e4 the larger model is expected to diverge at that learning rate. The
same serves gradient sizes that fall with the model size towards the epsilon of Adam.

Host side, float64 NumPy. Source: Wortsman et al., 2023 (arXiv 2309.14322), section 3.3; it says
"quadratic", and that the logarithms are fitted is read off the axes of its figure.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from balance_jax import _checks

# Largest attention logit; every run of the paper with more than this diverged.
UNSTABLE_MAX_LOGIT = 1e4
# With fewer sizes than this the extrapolation of a quadratic is driven by noise: a line instead.
_SIZES_FOR_QUADRATIC = 5
# How far, in decades, a root may lie outside the interval through rounding alone.
_EDGE = 1e-9
# Imaginary part up to which a root counts as real: a tangent point is found as a close pair.
_IMAGINARY = 1e-6
_FLOAT_MAX = float(np.finfo(np.float64).max)


@dataclasses.dataclass(frozen=True, eq=False)
class Trend:
  """log10(value) as a polynomial of log10(N); made by `fit_scaling_trend`.

  Attributes:
    coefficients: float64 (degree + 1,), c_0 + c_1 log10(N) + ...; for reading, as powers of
      log10(N) cancel each other. Predictions use the centred form.
    degree: of the polynomial.
    residual_std: standard deviation of the residuals, in decades, with n - degree - 1 degrees of
      freedom; 0 where the points determine the polynomial exactly.
    n_params: float64 (n,), the sizes it was fitted on.
    values: float64 (n,), the measured values.
  """

  coefficients: np.ndarray
  degree: int
  residual_std: float
  n_params: np.ndarray
  values: np.ndarray
  _polynomial: np.polynomial.Polynomial = dataclasses.field(repr=False)

  def predict(self, n) -> np.ndarray:
    """Value of the trend at size n.

    Args:
      n: numbers (...), > 0 and finite.

    Returns:
      float64 (...); infinite where it exceeds the range of float64.
    """
    n = _positive("n", n)
    with np.errstate(over="ignore", under="ignore"):
      return np.asarray(np.power(10.0, self._polynomial(np.log10(n))))

  def crossing(
    self, threshold: float, low: float | None = None, high: float | None = None
  ) -> float | None:
    """Smallest size in [low, high] at which the trend equals the threshold, from either side.

    A trend that is beyond the threshold at `low` already and stays there has no crossing in the
    interval: compare `predict(low)`, or pass a smaller `low`.

    Args:
      threshold: > 0, in the unit of the values.
      low: start of the search; the largest fitted size by default.
      high: end of the search, > low; 1e6 times the largest fitted size by default.

    Returns:
      The size N, or None where there is none.
    """
    largest = float(self.n_params.max())
    low = largest if low is None else low
    high = 1e6 * largest if high is None else high
    _checks.check_number("threshold", threshold, low=0.0, high=_FLOAT_MAX, open_low=True)
    _checks.check_number("low", low, low=0.0, high=_FLOAT_MAX, open_low=True)
    _checks.check_number("high", high, low=float(low), high=_FLOAT_MAX, open_low=True)
    log_low, log_high = math.log10(low), math.log10(high)
    gap = self._polynomial - math.log10(threshold)
    if np.all(np.abs(gap.coef) < _EDGE):  # constant, and at the threshold
      return float(low)
    roots = gap.roots()
    roots = roots[np.abs(np.imag(roots)) <= _IMAGINARY * np.maximum(1.0, np.abs(roots))].real
    inside = roots[(roots >= log_low - _EDGE) & (roots <= log_high + _EDGE)]
    # Within rounding of an end is the end, so the answer never leaves the interval.
    return float(np.clip(10.0 ** inside.min(), low, high)) if inside.size else None


def fit_scaling_trend(n_params, values, degree: int | None = None) -> Trend:
  """Least-squares polynomial of log10(value) in log10(model size).

  Args:
    n_params: numbers (n,), model sizes, > 0; in the paper without embeddings and head.
    values: numbers (n,), > 0, measured at the same step and learning rate in every model. Several
      values for one size (seeds) are fine.
    degree: >= 1; by default 2 as in the paper, but 1 with fewer than 5 distinct sizes.

  Returns:
    The `Trend`.

  Raises:
    ValueError: shapes that differ, a number that is not finite or not positive (a run that diverged
      before it was measured is to be left out), fewer than degree + 1 distinct sizes.

  >>> trend = fit_scaling_trend([1e6, 1e7, 1e8], [10.0, 100.0, 1000.0])
  >>> print(f"{trend.predict(1e9):.0f}, reached at {trend.crossing(5e3):.1e}")
  10000, reached at 5.0e+08
  """
  n_params, values = _positive("n_params", n_params), _positive("values", values)
  _checks.check_shape("n_params", n_params, (None,))
  _checks.check_shape("values", values, n_params.shape)
  sizes = np.unique(n_params).size
  if degree is None:
    degree = 1 if sizes < _SIZES_FOR_QUADRATIC else 2
  _checks.check_known("degree", degree)
  _checks.check_number("degree", degree, low=1, integer=True)
  degree = int(degree)
  if sizes < degree + 1:
    raise ValueError(
      f"n_params holds {sizes} distinct sizes; degree {degree} needs at least {degree + 1}"
    )
  x, y = np.log10(n_params), np.log10(values)
  # `fit` maps the sizes to [-1, 1] first: powers of log10(N) near 8 are all but collinear.
  polynomial = np.polynomial.Polynomial.fit(x, y, degree)
  freedom = values.size - degree - 1
  residual_std = math.sqrt(np.sum((y - polynomial(x)) ** 2) / freedom) if freedom else 0.0
  coefficients = np.zeros(degree + 1)  # `convert` drops leading coefficients that are zero
  plain = polynomial.convert().coef
  coefficients[: plain.size] = plain
  return Trend(coefficients, degree, residual_std, n_params, values, polynomial)


def predict_unstable(trend: Trend, n, threshold: float = UNSTABLE_MAX_LOGIT) -> np.ndarray:
  """Whether the trend of the largest attention logit exceeds the threshold at size n.

  Args:
    trend: fitted to the largest attention logit (block 0; step 2000 in the paper).
    n: numbers (...), > 0.
    threshold: > 0; every run of the paper above 1e4 diverged.

  Returns:
    bool (...).
  """
  _checks.check_number("threshold", threshold, low=0.0, high=_FLOAT_MAX, open_low=True)
  return np.asarray(trend.predict(n) > threshold)


def max_stable_learning_rate(
  learning_rates, trends: Sequence[Trend], n: float, threshold: float = UNSTABLE_MAX_LOGIT
) -> float | None:
  """Largest learning rate that is predicted stable at size n together with all smaller ones.

  Args:
    learning_rates: numbers (K,), > 0, strictly increasing.
    trends: K trends of the largest attention logit, one per learning rate.
    n: model size, > 0.
    threshold: see `predict_unstable`.

  Returns:
    One of `learning_rates`, or None where even the smallest is predicted unstable.
  """
  rates = _positive("learning_rates", learning_rates)
  _checks.check_shape("learning_rates", rates, (None,))
  if rates.size == 0 or np.any(np.diff(rates) <= 0):
    raise ValueError(f"learning_rates must be increasing, at least one; got {rates.tolist()}")
  if len(trends) != rates.size:
    raise ValueError(f"trends holds {len(trends)} trends; expected {rates.size}, one per rate")
  _checks.check_number("n", n, low=0.0, high=_FLOAT_MAX, open_low=True)
  unstable = [bool(predict_unstable(trend, n, threshold)) for trend in trends]
  stable = unstable.index(True) if True in unstable else len(unstable)
  return float(rates[stable - 1]) if stable else None


def _positive(argument: str, numbers) -> np.ndarray:
  """`numbers` as float64, each finite and above zero."""
  _checks.check_known(argument, numbers)
  try:
    array = np.array(numbers, dtype=np.float64)
  except (TypeError, ValueError):
    raise ValueError(f"{argument} is {numbers!r}; expected numbers") from None
  bad = ~(np.isfinite(array) & (array > 0))
  if np.any(bad):
    first = np.unravel_index(int(np.argmax(bad)), array.shape)
    place = f" at {', '.join(str(int(i)) for i in first)}" if first else ""
    raise ValueError(f"{argument} must be finite and > 0, got {array[first]:g}{place}")
  return array
