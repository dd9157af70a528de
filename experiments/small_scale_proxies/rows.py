"""A row of the table, and the verdict on "no difference"."""

from balance_jax.training.evidence import verdict

ALIKE = 0.06  # nats within which two losses, or two S, count as alike


def row(claim: str, setting: str, measured: str, result: str) -> dict[str, str]:
  return {"claim": claim, "setting": setting, "measured": measured, "verdict": result}


def minus(effect: dict) -> dict:
  return {**effect, "mean": -effect["mean"]}


def alike(effect: dict, bound: float = ALIKE) -> str:
  """The verdict on "no difference": the whole interval lies within the bound."""
  return verdict((effect, -bound), (minus(effect), -bound))


def name_of(size: tuple[int, int]) -> str:
  return f"{size[0]}×{size[1]}"
