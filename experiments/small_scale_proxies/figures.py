"""Reading the results of the figures: one summary each, curves by name, numbers by seed."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from balance_jax.training import evidence
from balance_jax.training.stability_curves import UNSTABLE_SHARE

SMALL, MIDDLE, LARGE = (32, 1), (48, 2), (64, 3)  # (width, depth)
RESULTS = Path(__file__).parent / "results"
# Order of the README; of configs/lr_sensitivity.py, but for the last.
FIGURES = (
  "qk_norm",
  "remedies",
  "interventions",
  "decay_kind",
  "mup",
  "depth_width",
  "batch_steps",
  "kappa",
  "predict",
)


class Figure:
  """The summary of one figure; see `stability_summary.summarize` for its entries."""

  def __init__(self, name: str, folder: Path = RESULTS):
    self.results = evidence.load(folder / f"{name}.json")
    self.curves = self.results["summary"]["curves"]
    self.ladders = self.results["summary"]["ladders"]

  def curve(self, architecture: str, size: tuple[int, int], setting: str = "default") -> "Curve":
    """The curve of an architecture at (width, depth) in a setting."""
    wanted = (architecture, *size, setting)
    names = ("architecture", "width", "depth", "intervention")
    return next(Curve(c) for c in self.curves if tuple(c[name] for name in names) == wanted)

  def sizes(self, architecture: str) -> list[tuple[int, int]]:
    """(width, depth) by parameters."""
    found = [c for c in self.curves if c["architecture"] == architecture]
    sizes = {(c["parameters"], c["width"], c["depth"]) for c in found}
    return [size[1:] for size in sorted(sizes)]


class Curve:
  """One curve over K learning rates; arrays have one entry, or row, for each of S seeds."""

  def __init__(self, entry: dict[str, Any]):
    self.entry = entry
    self.rates = np.array(entry["learning_rates"])
    self.parameters = entry["parameters"]
    start = np.array(entry["init_loss"], float)[:, None]
    final = np.array(entry["final_loss"], float)  # None becomes NaN
    self.start = start
    self.loss = np.where(np.isnan(final), start, np.minimum(final, start))

  @property
  def sensitivity(self) -> list[float]:
    return self.entry["sensitivity"]["values"]

  @property
  def best_window(self) -> list[float]:
    """S over the best seven neighbouring rates."""
    return (self.entry["sensitivity_best_window"] or self.entry["sensitivity"])["values"]

  @property
  def best_loss(self) -> np.ndarray:
    return self.loss.min(axis=1)

  @property
  def best_rate(self) -> np.ndarray:
    """log10 of the rate with the lowest loss."""
    return np.log10(self.rates[self.loss.argmin(axis=1)])

  @property
  def unstable_rate(self) -> np.ndarray:
    """log10 of the lowest rate above the best one that loses `UNSTABLE_SHARE` of the gain.

    Half a decade above the grid where there is none.
    """
    limit = self.best_loss + UNSTABLE_SHARE * (self.start[:, 0] - self.best_loss)
    found = []
    for row, best, bound in zip(self.loss, self.loss.argmin(axis=1), limit, strict=True):
      rates = [r for r, loss in zip(self.rates[best:], row[best:], strict=True) if loss > bound]
      found.append(min(rates, default=self.rates[-1] * math.sqrt(10)))
    return np.log10(found)

  def at(self, rate: float) -> np.ndarray:
    """Capped final loss at a rate."""
    return self.loss[:, self._index(rate)]

  def log10(self, field: str, rate: float, tensor: str | None = None) -> np.ndarray:
    """log10 of a recorded figure at a rate; NaN for a run without a finite one."""
    table = self.entry[field] if tensor is None else self.entry[field][tensor]
    values = np.array(table, float)[:, self._index(rate)]
    return np.log10(values)

  def value(self, field: str, rate: float) -> np.ndarray:
    """A recorded figure at a rate."""
    return np.array(self.entry[field], float)[:, self._index(rate)]

  def _index(self, rate: float) -> int:
    return int(np.argmin(np.abs(np.log(self.rates / rate))))
