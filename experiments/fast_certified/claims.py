"""The claims of the ablation as rules on paired seeds; errors in points (per cent)."""

import numpy as np

from balance_jax.training.evidence import paired, show, verdict

# Verified error by which the whole recipe beats batch normalisation alone, from a first repeat.
LEAST_GAIN = 4.0


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
  broken = sum(sum(arm["violations"]) for arm in arms.values())
  sound = "reproduces" if broken == 0 else "does not"
  rows.append(("No attack breaks a certified example", "all runs", f"{broken:g} broken", sound))
  return rows


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
