"""What the records of a mixture experiment say: one table row a method, with its spread over seeds.

Groups are split into halves by size: of K groups the K // 2 largest are "high-resource", the others
"low-resource". The loss of a half is the mean of its groups' losses, every group counting the same.
Means and spreads are over seeds; the spread is the standard deviation with n - 1.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Record -> {method: {seed: (steps [T], values [T, ...])}}.
Curves = dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]

HALVES = ("high", "low")


@dataclasses.dataclass(frozen=True)
class Groups:
  """The groups of a mixture, and their order by size.

  Attributes:
    names: K >= 2 different names, in the order of the lists in the records.
    sizes: [K] positive, in the same order, any unit.
  """

  names: Sequence[str]
  sizes: Sequence[float]

  def __post_init__(self):
    if len(self.names) < 2 or len(set(self.names)) < len(self.names):
      raise ValueError(f"groups must be two or more different names, got {list(self.names)}")
    if len(self.sizes) != len(self.names) or not all(0 < size < math.inf for size in self.sizes):
      raise ValueError(
        f"sizes must hold one positive number for each of {len(self.names)} groups, "
        f"got {list(self.sizes)}"
      )

  @property
  def by_size(self) -> list[int]:
    """Positions from the largest to the smallest; equal sizes keep their order."""
    return sorted(range(len(self.names)), key=lambda k: -self.sizes[k])

  def half(self, which: str) -> list[int]:
    """Positions of the "high" or the "low" half, larger first."""
    middle = len(self.names) // 2
    return self.by_size[:middle] if which == "high" else self.by_size[middle:]


def curves(records: Iterable[Mapping[str, Any]], event: str, field: str) -> Curves:
  """One field over the steps of every run.

  Args:
    records: see `metric_log`; each of this event has a method, a seed and a step.
    event: "train", "eval" or "moments".
    field: a number or a list of one number a group; null becomes NaN.

  Returns:
    {method: {seed: (int [T] increasing steps, float64 [T] or [T, K])}}, methods in the order of
    their first record. A step that was logged twice keeps its last record.

  Raises:
    ValueError: a list of one run is longer than another.
  """
  found = collections.defaultdict(lambda: collections.defaultdict(dict))
  for record in records:
    if record.get("event") == event and record.get(field) is not None:
      found[record["method"]][record["seed"]][record["step"]] = record[field]
  return {
    method: {
      seed: _arrays(points, f"{field} of method {method}, seed {seed}")
      for seed, points in sorted(seeds.items())
    }
    for method, seeds in found.items()
  }


def _arrays(points: Mapping[int, Any], what: str) -> tuple[np.ndarray, np.ndarray]:
  shapes = {np.shape(value) for value in points.values()}
  if len(shapes) > 1:
    raise ValueError(f"records: {what} must always have the same length, got {sorted(shapes)}")
  steps = sorted(points)
  return np.array(steps), np.array([points[step] for step in steps], np.float64)


def half_curves(evals: Curves, split: Groups) -> dict[str, Curves]:
  """The mean loss of each half.

  Args:
    evals: `curves` of the eval records' group_loss.
    split: the groups.

  Returns:
    {"high" or "low": curves of values [T]}; NaN where a group of the half has no value, but groups
    without a value in any record are left out.
  """
  losses = np.concatenate([values for runs in evals.values() for _, values in runs.values()])
  evaluated = set(np.flatnonzero(~np.isnan(losses).all(axis=0)))
  result = {}
  for half in HALVES:
    members = [k for k in split.half(half) if k in evaluated]
    result[half] = {
      method: {
        seed: (steps, values[:, members].mean(axis=1) if members else np.full(len(steps), np.nan))
        for seed, (steps, values) in runs.items()
      }
      for method, runs in evals.items()
    }
  return result


def seed_stats(values: Iterable[float]) -> dict[str, Any] | None:
  """Mean, spread and number of values; NaN are left out.

  Args:
    values: one number a seed.

  Returns:
    {"mean", "std", "n", "ci95"} or None without a value. `ci95` is half the width of Student's 95 %
    interval of the mean; `std` and `ci95` are None with one value.

  >>> seed_stats([1.0, 3.0])["std"]
  1.4142135623730951
  """
  known = np.array([value for value in values if not math.isnan(value)], np.float64)
  if not known.size:
    return None
  stats = {"mean": float(known.mean()), "std": None, "n": int(known.size), "ci95": None}
  if known.size > 1:
    from scipy.special import stdtrit  # Student's quantile; comes with jax

    stats["std"] = float(known.std(ddof=1))
    stats["ci95"] = float(stdtrit(known.size - 1, 0.975) * stats["std"] / math.sqrt(known.size))
  return stats


def summarize(
  records: Sequence[Mapping[str, Any]],
  groups: Sequence[str],
  sizes: Sequence[float],
  *,
  reference: str | None = None,
) -> dict[str, Any]:
  """Compares the methods of a mixture experiment.

  Args:
    records: train, eval and moments records of any number of methods and seeds.
    groups: K >= 2 names, in the order of the lists in the records.
    sizes: [K] positive sizes.
    reference: method the others are compared with, seed by seed; None takes the first whose name
      starts with "temperature", or else the first one.

  Returns:
    A JSON-able dict; a "stat" is what `seed_stats` returns, None where there is no value.
    - groups, sizes, high_groups, low_groups (by falling size), reference, seeds, steps;
    - target: {"high", "low"}: {"method", "loss"}. The target of a half is the final loss of the
      method "proportional" or, without it, of the method that ends worst; a run has to reach the
      final loss of the target method's run with the same seed (their mean if it lacks the seed);
    - methods: {name: row}; a row holds
      groups: [K] of {"final", "best"} stats, nats per byte; best is the lowest of the run;
      high, low: {"final", "best", "overfit" (final - best) stats, "steps_to_target" stat over the
      runs that reach it at an evaluation, "versus_reference" stat of paired differences of final};
      grad_variance: stat of (variance of the gradient norm / that of the reference run with the
      same seed), each the mean over the train records that both runs have in the last quarter of
      training;
      variance_prediction: {"n", "median_ratio"} of predicted / observed gradient variance, or None.
    A half's loss is None when one of its groups has no value there, as after divergence; groups
    never evaluated in any record are left out of the halves.

  Raises:
    ValueError: no eval records, lists of the wrong length, or an unknown reference.

  >>> eval_ = {"event": "eval", "method": "uniform", "seed": 0}
  >>> records = [{**eval_, "step": 0, "group_loss": [3., 5.]},
  ...            {**eval_, "step": 9, "group_loss": [1., 4.]}]
  >>> summarize(records, ["fr", "rm"], [28, 1])["methods"]["uniform"]["low"]["final"]["mean"]
  4.0
  """
  split = Groups(list(groups), list(sizes))
  evals = curves(records, "eval", "group_loss")
  if not evals:
    raise ValueError("records must hold at least one eval record with a group_loss, got none")
  _check_lengths(evals, len(split.names))
  reference = _reference(reference, evals)
  halves = half_curves(evals, split)
  targets = {half: _target(halves[half]) for half in HALVES}
  rows = {}
  for method, runs in evals.items():
    rows[method] = {"groups": _group_rows(runs)}
    for half in HALVES:
      rows[method][half] = _half_row(halves[half], method, reference, targets[half][1])
    rows[method]["grad_variance"] = _grad_variance(records, method, reference)
    rows[method]["variance_prediction"] = _variance_prediction(records, method)
  return {
    "groups": split.names,
    "sizes": [float(size) for size in split.sizes],
    **{f"{half}_groups": [split.names[k] for k in split.half(half)] for half in HALVES},
    "reference": reference,
    "seeds": sorted({seed for runs in evals.values() for seed in runs}),
    "steps": int(max(steps[-1] for runs in evals.values() for steps, _ in runs.values())),
    "target": {half: targets[half][0] for half in HALVES},
    "methods": rows,
  }


def _check_lengths(evals: Curves, count: int) -> None:
  for method, runs in evals.items():
    for seed, (_, losses) in runs.items():
      if losses.ndim != 2 or losses.shape[1] != count:
        raise ValueError(
          f"records: group_loss of method {method}, seed {seed} must hold {count} numbers, one a "
          f"group, got shape {losses.shape[1:]}"
        )


def _reference(name: str | None, evals: Curves) -> str:
  if name is None:
    return next((method for method in evals if method.startswith("temperature")), next(iter(evals)))
  if name not in evals:
    raise ValueError(f"reference must be one of {sorted(evals)}, got {name!r}")
  return name


def _lowest(values: np.ndarray) -> np.ndarray:
  """The minimum over axis 0; NaN only where all are."""
  lowest = np.where(np.isnan(values), np.inf, values).min(axis=0)
  return np.where(np.isinf(lowest), np.nan, lowest)


def _group_rows(runs) -> list[dict[str, Any]]:
  final = np.array([values[-1] for _, values in runs.values()])
  best = np.array([_lowest(values) for _, values in runs.values()])
  return [
    {"final": seed_stats(final[:, k]), "best": seed_stats(best[:, k])}
    for k in range(final.shape[1])
  ]


def _finals(runs) -> dict[int, float]:
  return {seed: float(values[-1]) for seed, (_, values) in runs.items()}


def _target(half: Curves) -> tuple[dict[str, Any] | None, dict[int, float]]:
  """What to reach, for the reader; and the loss to reach by seed (None for other seeds)."""
  means = {method: seed_stats(_finals(runs).values()) for method, runs in half.items()}
  means = {method: stats["mean"] for method, stats in means.items() if stats}
  if not means:
    return None, {None: math.nan}
  method = "proportional" if "proportional" in means else max(means, key=means.get)
  target = {"method": method, "loss": means[method]}
  return target, {**_finals(half[method]), None: means[method]}


def _half_row(half: Curves, method: str, reference: str, target) -> dict[str, Any]:
  final = _finals(half[method])
  best = {seed: float(_lowest(values)) for seed, (_, values) in half[method].items()}
  reached = []
  for seed, (steps, values) in half[method].items():
    hits = steps[values <= target.get(seed, target[None])]
    reached += [float(hits[0])] if hits.size else []
  base = _finals(half[reference])
  return {
    "final": seed_stats(final.values()),
    "best": seed_stats(best.values()),
    "overfit": seed_stats(final[seed] - best[seed] for seed in final),
    "steps_to_target": seed_stats(reached),
    "versus_reference": seed_stats(final[seed] - base[seed] for seed in final if seed in base),
  }


def _grad_variance(records, method: str, reference: str) -> dict[str, Any] | None:
  train = curves(records, "train", "grad_norm_var")
  if method not in train or reference not in train:
    return None
  last = max(steps[-1] for runs in train.values() for steps, _ in runs.values())
  ratios = []
  for seed in train[method].keys() & train[reference].keys():
    (steps, values), (base_steps, base) = train[method][seed], train[reference][seed]
    common, at, base_at = np.intersect1d(steps, base_steps, return_indices=True)
    late = common > 0.75 * last
    if late.any() and base[base_at[late]].mean() > 0:
      ratios.append(float(values[at[late]].mean() / base[base_at[late]].mean()))
  return seed_stats(ratios)


def _variance_prediction(records, method: str) -> dict[str, Any] | None:
  ratios = [
    record["predicted_variance"] / record["observed_variance"]
    for record in records
    if record.get("event") == "moments" and record["method"] == method
    if record.get("predicted_variance") is not None and record.get("observed_variance")
  ]
  return {"n": len(ratios), "median_ratio": float(np.median(ratios))} if ratios else None
