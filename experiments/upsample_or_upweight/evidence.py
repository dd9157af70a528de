"""What all scripts of this folder share: its results as JSON, speed and overfitting."""

import math
from pathlib import Path

import numpy as np

from balance_jax.training import evidence
from balance_jax.training.evidence import VERDICTS, paired, rounded, show, verdict
from balance_jax.training.mixture_summary import seed_stats

__all__ = [
  "RESULTS", "VERDICTS", "first_step", "load", "log2_speedup", "overfit", "paired", "rounded",
  "save", "seed_stats", "show", "verdict",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"


def save(name: str, value, folder: Path = RESULTS) -> None:
  """Writes results/<name>.json, numbers rounded to five digits."""
  evidence.save(folder / f"{name}.json", value)


def load(name: str, folder: Path = RESULTS):
  """The content of results/<name>.json."""
  return evidence.load(folder / f"{name}.json")


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
