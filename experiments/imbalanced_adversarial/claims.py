"""Every claim as a row with a verdict, from the results alone.

The rules below were written before any run. A verdict is computed by `evidence.verdict`, never
typed: an effect is a difference over paired seeds with its 95 % t-interval, and a claim is a list
of demands "effect > bound". Accuracies are shares of the test images of a class; "head" is the mean
over the five larger classes, "tail" over the five smaller ones, "balanced" over all ten. "Robust"
is under PGD with 20 steps, unless a row says otherwise. Added after a look at the results: the rows
at the larger radius, by the same rules, and of what weighting costs robust head accuracy.
"""

import dataclasses

import numpy as np

from balance_jax.training.evidence import paired, show, verdict
from balance_jax.training.mixture_summary import seed_stats

# A gap between head and tail is 5 points larger, or it does not count.
GAP = 0.05
# SRAT is a point of balanced robust accuracy better, or it does not count.
GAIN = 0.01
# Largest mean difference of a trained error rate from the closed form.
THEORY = 0.005

HEAD, TAIL, ALL = slice(0, 5), slice(5, 10), slice(None)
BASELINES = ("AT", "AT + weights", "AT + DRW", "AT + LDAM-DRW")


@dataclasses.dataclass(frozen=True)
class Row:
  """A claim in one setting, what was measured, and the verdict."""

  claim: str
  setting: str
  measured: str
  verdict: str


def exactly(holds: bool) -> str:
  """The verdict on a claim that is checked without chance."""
  return "reproduces" if holds else "does not"


# --- Two Gaussian classes ---


def theory_rows(theory: dict) -> list[Row]:
  curves = [np.array(theory["curves"][name]) for name in ("majority", "minority")]
  separations, weights = theory["separations"], theory["weights"]
  majority, minority = curves  # (separation, weight)
  where = f"closed form, K = {theory['imbalance']:g}, S = {_listed(separations)}"
  gap = minority[:, 0] - majority[:, 0]
  cost = majority[:, -1] - majority[:, 0]
  marginal = np.array(theory["marginal"])
  wrong = [w for w, column in zip(weights, marginal.T, strict=True) if np.any(np.diff(column) > 0)]
  rows = [
    Row(
      "The gap between the classes falls with S",
      where,
      f"unweighted {_listed(gap)}",
      exactly(np.all(np.diff(gap) < 0)),
    ),
    Row(
      "What full weighting (ρ = K) costs the majority falls with S",
      where,
      _listed(cost),
      exactly(np.all(np.diff(cost) < 0)),
    ),
    Row(
      "So does what the next bit of weight costs it, d error / d log ρ, at every ρ",
      f"closed form, K = {theory['imbalance']:g}, S from {theory['marginal_separations'][0]:g} to"
      f" {theory['marginal_separations'][-1]:g}, ρ = {_listed(weights)}",
      f"rises somewhere at ρ = {_listed(wrong)}" if wrong else "falls everywhere",
      exactly(not wrong),
    ),
  ]
  for name, label in (("natural", "logistic regression"), ("robust", "the same, trained robustly")):
    rows.append(_trained_row(theory, name, label))
  return rows


def _trained_row(theory: dict, name: str, label: str) -> Row:
  """Trained error rates against the closed form: every mean within THEORY of it."""
  case = theory["trained"][name]
  differences = np.array(case["errors"]) - np.array(case["expected"])[None]
  stats = [seed_stats(column) for column in differences.reshape(len(differences), -1).T]
  worst = max(stats, key=lambda x: abs(x["mean"]))
  demands = [(sign, -THEORY) for x in stats for sign in (x, {**x, "mean": -x["mean"]})]
  return Row(
    "Trained error rates are those of the closed form",
    f"{label}, S = {_listed(case['separations'])}, ρ = {_listed(theory['trained_weights'])}",
    f"largest mean difference of {len(stats)}: {show(worst, 4)} (at most {THEORY:g})",
    verdict(*demands),
  )


def _listed(values) -> str:
  return ", ".join(f"{value:.3g}" for value in values)


# --- Digits ---


class Arms:
  """Test figures of the chosen settings, by seed."""

  def __init__(self, digits: dict):
    self._arms = digits["arms"]
    self.name = f"eps {digits['settings']['eps']:g}"

  def accuracy(self, arm: str, part: slice = ALL, under: str = "pgd") -> np.ndarray:
    """(S,): mean accuracy over the classes of `part`, "clean" or under an attack."""
    return np.array(self._arms[arm][under])[:, part].mean(axis=1)

  def gap(self, arm: str, under: str) -> np.ndarray:
    return self.accuracy(arm, HEAD, under) - self.accuracy(arm, TAIL, under)

  def cost(self, kind: str, weighted: str, under: str = "clean") -> np.ndarray:
    """(S,): head accuracy that weighting takes."""
    return self.accuracy(kind, HEAD, under) - self.accuracy(weighted, HEAD, under)

  def log_scatter(self, arm: str, under: str) -> np.ndarray:
    return np.log2(np.array(self._arms[arm][f"scatter_{under}"]))


def tail_rows(digits: dict) -> list[Row]:
  """Adversarial training loses more on the tail than natural training."""
  arms = Arms(digits)
  natural = arms.gap("natural", "clean")
  rows = []
  for under, label in (("clean", "clean accuracy of both"), ("pgd", "robust accuracy of AT")):
    own = arms.gap("AT", under)
    effect = paired(own, natural)
    rows.append(
      Row(
        "Head − tail is ≥ 5 points larger in AT than in natural training",
        f"{arms.name}, {label}, no weights",
        f"{show(effect)} ({own.mean():.3f} and {natural.mean():.3f})",
        verdict((effect, GAP)),
      )
    )
  return rows


def weight_rows(digits: dict) -> list[Row]:
  """Weighting costs head classes more in adversarial than in natural training."""
  arms = Arms(digits)
  rows = []
  for kind in ("weights", "DRW"):
    natural = arms.cost("natural", f"natural + {kind}")
    for under, label in (("clean", "clean accuracy of both"), ("pgd", "robust accuracy of AT")):
      own = arms.cost("AT", f"AT + {kind}", under)
      effect = paired(own, natural)
      rows.append(
        Row(
          "Weighting costs head accuracy more in AT than in natural training",
          f"{arms.name}, {kind}, {label}",
          f"{show(effect)} ({own.mean():.3f} and {natural.mean():.3f})",
          verdict((effect, 0.0)),
        )
      )
  return rows


def separation_rows(digits: dict) -> list[Row]:
  """Features of adversarial training are poorly separable; SRAT separates them."""
  arms = Arms(digits)
  clean = paired(arms.log_scatter("natural", "clean"), arms.log_scatter("AT", "clean"))
  rows = [
    Row(
      "Features of AT are less separable than those of natural training",
      f"{arms.name}, clean test images, no weights; log2 of the ratio of the scatter ratios",
      show(clean, 2),
      verdict((clean, 0.0)),
    )
  ]
  for under, label in (("attacked", "attacked"), ("clean", "clean")):
    effect = paired(arms.log_scatter("SRAT", under), arms.log_scatter("AT + DRW", under))
    rows.append(
      Row(
        "SRAT has a larger ratio of between- to within-class scatter than AT + DRW",
        f"{arms.name}, {label} test images; log2 of the ratio of the scatter ratios",
        show(effect, 2),
        verdict((effect, 0.0)),
      )
    )
  return rows


def srat_rows(digits: dict) -> list[Row]:
  """SRAT against its baselines."""
  arms = Arms(digits)
  rows = []
  for under, label in (("pgd", "PGD-20"), ("both", "PGD-20 and APGD-DLR")):
    effect = paired(arms.accuracy("SRAT", under=under), arms.accuracy("AT + DRW", under=under))
    rows.append(
      Row(
        "SRAT is ≥ 1 point above AT + DRW (SRAT with λ = 0) in balanced robust accuracy",
        f"{arms.name}, {label}",
        show(effect),
        verdict((effect, GAIN)),
      )
    )
  for part, under, label in (
    (ALL, "clean", "balanced clean accuracy"),
    (TAIL, "clean", "tail clean accuracy"),
    (ALL, "pgd", "balanced robust accuracy"),
    (TAIL, "pgd", "tail robust accuracy"),
  ):
    effects = {
      name: paired(arms.accuracy("SRAT", part, under), arms.accuracy(name, part, under))
      for name in BASELINES
    }
    rows.append(
      Row(
        "SRAT beats all baselines",
        f"{arms.name}, {label}",
        "; ".join(f"{name}: {show(effect)}" for name, effect in effects.items()),
        verdict(*((effect, 0.0) for effect in effects.values())),
      )
    )
  without = paired(arms.accuracy("SRAT"), arms.accuracy("AT + separation"))
  rows.append(
    Row(
      "Both parts are needed: SRAT beats separation without weights",
      f"{arms.name}, balanced robust accuracy (the other half, λ = 0, is the first row)",
      show(without),
      verdict((without, 0.0)),
    )
  )
  return rows
