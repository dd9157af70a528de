"""The claims as rows with verdicts, from one part of the results. Rules were set before the runs.

A verdict is computed by `evidence.verdict`: an effect is a difference over seeds, paired, with its
95 % t-interval, and a claim is a list of demands "effect > bound". Accuracies are in points.
"""

import numpy as np

from balance_jax.training.evidence import paired, show, verdict
from balance_jax.training.mixture_summary import seed_stats

ONE_TEACHER = ("RSLAD", "ARD", "robust teacher")
TWO_TEACHERS = ("fixed", "NLB", "EBB", "NLB + EBB")

CLEAN_GAIN = 1.0  # points of clean accuracy over RSLAD
EQUAL = 1.0  # points of robust accuracy that "about equal" allows to lose
MARGIN = 0.5  # points of W-Robust over fixed weights and temperatures
HALVINGS = 1.0  # a gap that shrinks is at the end below half of the first
COLD, HOT = 1.1, 1.5  # a temperature that stays at 1, and one that does not


def rows(part: dict) -> dict[str, list[dict]]:
  """The claims at one radius: heading -> rows of "claim", "setting", "measured", "verdict"."""
  arms = part["arms"]
  return {
    "Clean accuracy": _clean_rows(arms),
    "W-Robust": _weighted_rows(arms),
    "The balances": _entropy_rows(arms),
  }


def _row(claim: str, setting: str, measured: str, *demands) -> dict:
  return {"claim": claim, "setting": setting, "measured": measured, "verdict": verdict(*demands)}


def _difference(arms: dict, first: str, second: str, what: str) -> dict:
  return paired(arms[first][what], arms[second][what])


def _clean_rows(arms: dict) -> list[dict]:
  found = []
  for name in TWO_TEACHERS:
    effect = _difference(arms, name, "RSLAD", "clean")
    found.append(
      _row(
        f"Two teachers gain ≥ {CLEAN_GAIN:g} point of clean accuracy over the robust teacher alone",
        f"{name} − RSLAD",
        show(effect, 2),
        (effect, CLEAN_GAIN),
      )
    )
  effect = _difference(arms, "fixed", "robust teacher", "clean")
  found.append(
    _row(
      "The same with one loss in both arms: weights .5/.5 against 1/0",
      "fixed − robust teacher",
      show(effect, 2),
      (effect, CLEAN_GAIN),
    )
  )
  effect = _difference(arms, "NLB + EBB", "RSLAD", "robust")
  found.append(
    _row(
      f"The gain is at about equal robustness (loses < {EQUAL:g} point)",
      "NLB + EBB − RSLAD, PGD-20",
      show(effect, 2),
      (effect, -EQUAL),
    )
  )
  return found


def _weighted_rows(arms: dict) -> list[dict]:
  others = [name for name in arms if name != "NLB + EBB"]
  effects = {name: _difference(arms, "NLB + EBB", name, "w_robust") for name in others}
  found = [
    _row(
      "NLB + EBB has the highest W-Robust",
      "NLB + EBB − each other arm",
      "; ".join(f"{name}: {show(effect, 2)}" for name, effect in effects.items()),
      *((effect, 0.0) for effect in effects.values()),
    ),
    _row(
      f"It is ≥ {MARGIN:g} points above fixed weights and temperatures",
      "NLB + EBB − fixed",
      show(effects["fixed"], 2),
      (effects["fixed"], MARGIN),
    ),
  ]
  for name in ("NLB", "EBB"):
    effect = _difference(arms, name, "fixed", "w_robust")
    found.append(
      _row(f"{name} alone helps", f"{name} − fixed, W-Robust", show(effect, 2), (effect, 0.0))
    )
  return found


def _entropy_rows(arms: dict) -> list[dict]:
  found = []
  for name in TWO_TEACHERS:
    effect = paired(np.log2(arms[name]["first_gap"]), np.log2(arms[name]["last"]["gap"]))
    if "EBB" in name:
      claim, demand = "With EBB the entropy gap shrinks to less than half", (effect, HALVINGS)
    else:
      effect = paired(np.log2(arms[name]["last"]["gap"]), np.log2(arms[name]["first_gap"]))
      claim, demand = "Without EBB it does not", (effect, -HALVINGS)
    which = "first / last" if "EBB" in name else "last / first"
    found.append(_row(claim, f"{name}, log2 of {which}", show(effect, 2), demand))
  for name in ("EBB", "NLB + EBB"):
    cold = seed_stats(COLD - np.array(arms[name]["last"]["tau_adv"]))
    hot = seed_stats(np.array(arms[name]["last"]["tau_nat"]) - HOT)
    found.append(
      _row(
        f"EBB heats the clean teacher (above {HOT:g}) and leaves the robust one (below {COLD:g})",
        f"{name}, last epoch",
        f"clean {np.mean(arms[name]['last']['tau_nat']):.2f},"
        f" robust {np.mean(arms[name]['last']['tau_adv']):.2f}",
        (cold, 0.0),
        (hot, 0.0),
      )
    )
  return found
