"""Attention logits over model size at each learning rate, and what their trend predicts.

Wortsman et al., 2023 (arXiv 2309.14322), section 3.3: logits measured early in the training of
small models tell at which size a learning rate will break.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from balance_jax.stability.trends import (
  UNSTABLE_MAX_LOGIT,
  Trend,
  fit_scaling_trend,
  predict_unstable,
)

LEAST_SIZES = 3


def logit_ladders(
  curves: Iterable[Mapping[str, Any]], hold_back_largest: bool = False
) -> list[dict[str, Any]]:
  """One ladder for each architecture, setting and learning rate with three sizes or more.

  Args:
    curves: of `stability_curves.sensitivity_curves`; those without attention logits are left out.
    hold_back_largest: whether the trend leaves out the largest size, which is then predicted.

  Returns:
    JSON-able entries; M sizes, "unstable" is a logit above `UNSTABLE_MAX_LOGIT`:
    - architecture, intervention, learning_rate, parameters [M] rising;
    - max_logit [M]: `median_logit` at the probe step of all runs of that size;
    - first_unstable: the smallest measured size that is unstable, or None;
    - trend: None with fewer than two sizes to fit, else {"coefficients" (of log10 of the logit in
      powers of log10 N), "fitted" (sizes), "predicted" [M], "crossing": the size beyond the fitted
      ones where the trend becomes unstable, or None};
    - held_back: None, or {"parameters", "measured", "predicted", "measured_unstable",
      "predicted_unstable", "agree"}. Without a finite logit, the held-back size is unstable.
  """
  logits = {}  # (architecture, setting, rate) -> {N: logits of all seeds}
  for curve in curves:
    if curve["max_logit"]:
      for k, rate in enumerate(curve["learning_rates"]):
        key = (curve["architecture"], curve["intervention"], rate)
        runs = logits.setdefault(key, {}).setdefault(curve["parameters"], [])
        runs.extend(row[k] for row in curve["max_logit"])
  return [
    _ladder(key, {n: median_logit(sizes[n]) for n in sorted(sizes)}, hold_back_largest)
    for key, sizes in logits.items()
    if len(sizes) >= LEAST_SIZES
  ]


def median_logit(values: Sequence[float | None]) -> float | None:
  """The median over runs; a run without a finite value is the largest, as the median is then None.

  >>> median_logit([5.0, None, 7.0]), median_logit([5.0, None])
  (7.0, None)
  """
  median = float(np.median([np.inf if value is None else value for value in values]))
  return median if np.isfinite(median) else None


def _ladder(key, medians: Mapping[int, float | None], hold_back: bool) -> dict[str, Any]:
  parameters = list(medians)
  fitted = parameters[:-1] if hold_back else parameters
  usable = {n: medians[n] for n in fitted if medians[n] is not None and medians[n] > 0}
  unstable = [n for n, logit in medians.items() if logit and logit > UNSTABLE_MAX_LOGIT]
  ladder = {
    **dict(zip(("architecture", "intervention", "learning_rate"), key, strict=True)),
    "parameters": parameters,
    "max_logit": list(medians.values()),
    "first_unstable": min(unstable, default=None),
    "trend": None,
    "held_back": None,
  }
  if len(usable) >= 2:
    trend = fit_scaling_trend(list(usable), list(usable.values()))
    ladder["trend"] = _trend(trend, parameters)
    if hold_back:
      ladder["held_back"] = _held_back(trend, parameters[-1], medians[parameters[-1]])
  return ladder


def _trend(trend: Trend, parameters: Sequence[int]) -> dict[str, Any]:
  crossing = None
  if not predict_unstable(trend, max(trend.n_params)):
    crossing = trend.crossing(UNSTABLE_MAX_LOGIT)
  return {
    "coefficients": trend.coefficients.tolist(),
    "fitted": [int(n) for n in trend.n_params],
    "predicted": [_finite(value) for value in trend.predict(parameters)],
    "crossing": crossing,
  }


def _held_back(trend: Trend, size: int, measured: float | None) -> dict[str, Any]:
  predicted = bool(predict_unstable(trend, size))
  broke = measured is None or measured > UNSTABLE_MAX_LOGIT
  return {
    "parameters": size,
    "measured": measured,
    "predicted": _finite(trend.predict(size)),
    "measured_unstable": broke,
    "predicted_unstable": predicted,
    "agree": broke == predicted,
  }


def _finite(value) -> float | None:
  # A steep trend leaves the range of float64, and JSON has no infinity.
  return float(value) if np.isfinite(value) else None
