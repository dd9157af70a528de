"""The claims as rules on paired seeds; errors in points (per cent)."""

import numpy as np

from balance_jax.training.evidence import paired, show, verdict

# Verified error by which the whole recipe beats batch normalisation alone, from a first repeat.
LEAST_GAIN = 4.0
# Points that count as nearly nothing: in the verified error of methods at a large radius, and in
# what a short ramp costs.
NEAR = 2.0
# Points of certified accuracy that adversarial training loses to IBP if its networks cannot be
# certified.
UNCERTIFIED = 20.0


def chosen(study: dict, eps: float | None = None) -> dict[str, dict]:
  """{arm: its test measures}, with the setting that validation chose, at one radius."""
  return {
    point["arm"]: point["test"]
    for point in study["points"]
    if point["chosen"] and eps in (None, point["eps"])
  }


def broken(study: dict) -> int:
  """Test examples that were certified and yet attacked, over all runs of a study."""
  return sum(sum(point["test"]["violations"]) for point in study["points"])


def sound_row(studies: dict) -> tuple[str, str, str, str]:
  """The invariant, over everything that was evaluated."""
  count = sum(broken(study) for study in studies.values())
  return (
    "No attack breaks a certified example",
    "all runs",
    f"{count:g} broken",
    "reproduces" if count == 0 else "does not",
  )


def errors(arm: dict, measure: str = "certified") -> list[float]:
  """Per cent, seed by seed."""
  return [100 * (1 - share) for share in arm[measure]]


def lower(arms: dict, better: str, worse: str, bound: float = 0.0, measure: str = "certified"):
  """(measured, verdict) of: the error of `better` is lower than that of `worse` by over `bound`."""
  effect = paired(errors(arms[worse], measure), errors(arms[better], measure))
  return show(effect, 2), verdict((effect, bound))


def ablation_rows(arms: dict) -> list[tuple[str, str, str, str]]:
  """Claim, difference that is measured, value, verdict."""
  claims = (
    ("The whole recipe lowers the verified error by 4 points", "all", "BN", LEAST_GAIN),
    ("Batch normalisation lowers the verified error", "BN", "no BN", 0.0),
    ("The initialisation lowers the verified error", "+ init", "BN", 0.0),
    ("The tightness regulariser does, on top", "+ init + tight", "+ init", 0.0),
    ("The balance regulariser does, on top", "+ init + relu", "+ init", 0.0),
    ("Both regularisers do, on top", "all", "+ init", 0.0),
  )
  rows = [
    (claim, f"{worse} − {better}", *lower(arms, better, worse, bound))
    for claim, better, worse, bound in claims
  ]
  natural = lower(arms, "all", "BN", measure="natural")
  rows.append(("The whole recipe lowers the natural error", "BN − all", *natural))
  return rows


def ramp_rows(arms: dict) -> list[tuple[str, str, str, str]]:
  """What a ramp of 5 epochs costs, with the recipe and with batch normalisation alone."""

  def cost(recipe):
    return [
      short - long
      for short, long in zip(
        errors(arms[f"{recipe}, ramp 5"]), errors(arms[f"{recipe}, ramp 30"]), strict=True
      )
    ]

  zero = [0.0] * len(cost("all"))
  saved, less = paired(zero, cost("all")), paired(cost("BN"), cost("all"))
  shown = {**saved, "mean": -saved["mean"]}
  rows = [
    (
      f"With the recipe a ramp of 5 epochs costs less than {NEAR:g} points against 30",
      "all, ramp 5 − ramp 30",
      show(shown, 2),
      verdict((saved, -NEAR)),
    ),
    (
      "It costs less with the recipe than without",
      "(BN, 5 − 30) − (all, 5 − 30)",
      show(less, 2),
      verdict((less, 0.0)),
    ),
  ]
  for epochs in (5, 15, 30):
    better, worse = f"all, ramp {epochs}", f"BN, ramp {epochs}"
    claim = f"The recipe lowers the verified error with a ramp of {epochs}"
    rows.append((claim, f"{worse} − {better}", *lower(arms, better, worse)))
  return rows


def method_rows(study: dict) -> list[tuple[str, str, str, str]]:
  """Methods against IBP, each with its own chosen setting."""
  rows = []
  small, large = sorted({point["eps"] for point in study["points"]})
  for name in ("sabr", "mtl-ibp", "exp-ibp", "cc-ibp", "taps"):
    for eps in (small, large):
      claim = f"{name} has a lower natural error than IBP at {eps:g}"
      at = chosen(study, eps)
      rows.append((claim, f"ibp − {name}", *lower(at, name, "ibp", measure="natural")))
  at = chosen(study, large)
  for name in ("sabr", "mtl-ibp", "exp-ibp", "cc-ibp", "taps"):
    difference = paired(errors(at["ibp"]), errors(at[name]))
    ends = (difference, -NEAR), ({**difference, "mean": -difference["mean"]}, -NEAR)
    claim = f"{name} has the verified error of IBP at {large:g}, within {NEAR:g} points"
    rows.append((claim, f"ibp − {name}", show(difference, 2), verdict(*ends)))
  claim = f"CROWN-IBP has a higher verified error than IBP at {large:g}"
  rows.append((claim, "crown-ibp − ibp", *lower(at, "ibp", "crown-ibp")))
  for eps in (small, large):
    claim = f"Networks of PGD-AT cannot be certified at {eps:g} ({UNCERTIFIED:g} points behind IBP)"
    measured = lower(chosen(study, eps), "ibp", "pgd-at", UNCERTIFIED)
    rows.append((claim, "pgd-at − ibp", *measured))
  return rows


def fashion_rows(arms: dict) -> list[tuple[str, str, str, str]]:
  """The recipe against batch normalisation alone on Fashion-MNIST."""
  return [
    (
      f"The whole recipe lowers the {name} error",
      "BN − all",
      *lower(arms, "all", "BN", measure=measure),
    )
    for name, measure in (("verified", "certified"), ("natural", "natural"))
  ]


def gain_rows(gains: dict) -> list[tuple[str, str, str, str]]:
  """Growth of bounds over the last five of six layers, in powers of ten."""

  def growth(name):
    values = np.log10(np.array(gains[name]))
    return (values[:, -1] - values[:, 0]).tolist()

  flat = [abs(value) for value in growth("no BN, ibp")]
  explodes = paired(growth("no BN, default"), [0.0] * len(flat))
  stays = paired([0.0] * len(flat), flat)
  same = paired(growth("BN, default"), growth("BN, ibp"))
  return [
    (
      "Bounds explode with the default initialisation, without BN",
      "log10 of last over first radius, must exceed 2",
      show(explodes, 2),
      verdict((explodes, 2.0)),
    ),
    (
      "With the IBP initialisation they stay near the input's",
      "its size, must stay below 0.5",
      show({**stays, "mean": -stays["mean"]}, 2),
      verdict((stays, -0.5)),
    ),
    (
      "Behind batch normalisation the initialisation hardly matters at step 0 (within 0.5)",
      "default − IBP",
      show(same, 2),
      verdict((same, -0.5), ({**same, "mean": -same["mean"]}, -0.5)),
    ),
  ]
