"""What all scripts of this folder share: results as JSON, paired differences, verdicts by rule."""

import json
import math
import operator
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from balance_jax.training.mixture_summary import seed_stats

RESULTS = Path(__file__).parent / "results"
VERDICTS = ("reproduces", "does not", "not established")


def save(name: str, value, folder: Path = RESULTS) -> None:
  """Writes results/<name>.json, numbers rounded to five digits."""
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(rounded(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
  # One line a key of the first two levels, so that a new run gives a readable diff.
  (folder / f"{name}.json").write_text(text.replace('},"', '},\n"') + "\n")


def load(name: str, folder: Path = RESULTS):
  """The content of results/<name>.json."""
  return json.loads((folder / f"{name}.json").read_text())


def rounded(value):
  """Nested lists, dicts and arrays with floats to five digits; NaN becomes None."""
  if isinstance(value, dict):
    return {str(key): rounded(item) for key, item in value.items()}
  if hasattr(value, "tolist"):
    return rounded(value.tolist())
  if isinstance(value, list | tuple):
    return [rounded(item) for item in value]
  if isinstance(value, float):
    return float(f"{value:.5g}") if math.isfinite(value) else None
  return value


def paired(first: Iterable[float], second: Iterable[float]) -> dict:
  """Stats of first - second, seed by seed: mean, std, n and ci95 (half the interval's width)."""
  return seed_stats(map(operator.sub, first, second))


def verdict(*demands: tuple[dict, float]) -> str:
  """What the intervals say of a claim made of demands "effect > bound".

  Args:
    demands: pairs of the stats of an effect over seeds (see `paired`) and its bound.

  Returns:
    "reproduces" if every 95 % interval lies above its bound, "does not" if one lies below,
    otherwise "not established".
  """
  if any(effect["mean"] + effect["ci95"] < bound for effect, bound in demands):
    return "does not"
  if all(effect["mean"] - effect["ci95"] > bound for effect, bound in demands):
    return "reproduces"
  return "not established"


def show(effect: dict, digits: int = 3) -> str:
  """An effect for the table: mean and half width of its 95 % interval."""
  return f"{effect['mean']:+.{digits}f} ± {effect['ci95']:.{digits}f}"


def log2_speedup(steps, first, second) -> list[float]:
  """log2 of (steps of the second / steps of the first) to the same loss, by seed.

  The goal is what the slower of the two has at the last of the steps, so both get there.

  Args:
    steps: (E,), increasing.
    first: losses (S, E).
    second: losses (S, E).

  Returns:
    S numbers; positive where the first arm is faster.
  """
  result = []
  for a, b in zip(np.asarray(first), np.asarray(second), strict=True):
    goal = max(a[-1], b[-1])
    result.append(math.log2(first_step(steps, b, goal) / first_step(steps, a, goal)))
  return result


def first_step(steps, curve, goal: float) -> float:
  """The first step at which the interpolated curve is at or below `goal`, which it reaches.

  >>> first_step([0, 10, 20], [3.0, 2.0, 1.0], 1.5)
  15.0
  """
  at = next(i for i, value in enumerate(curve) if value <= goal)
  if at == 0:
    return float(steps[0])
  part = (curve[at - 1] - goal) / (curve[at - 1] - curve[at])
  return float(steps[at - 1] + part * (steps[at] - steps[at - 1]))


def overfit(by_seed: np.ndarray) -> np.ndarray:
  """Final loss minus the loss at the best step, chosen on the other seeds: (S, E, ...) to (S, ...).

  With the best step of its own curve the difference could not be negative.

  >>> overfit(np.array([[3.0, 1.0, 2.0], [3.0, 1.5, 1.0]])).tolist()
  [0.0, -0.5]
  """
  differences = []
  for seed, curve in enumerate(by_seed):
    best = np.delete(by_seed, seed, axis=0).mean(axis=0).argmin(axis=0)
    differences.append(curve[-1] - np.take_along_axis(curve, best[None], axis=0)[0])
  return np.stack(differences)
