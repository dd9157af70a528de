"""Rewrites the tables of README.md from the results.

python experiments/fast_certified/table.py
"""

from pathlib import Path

import claims

from balance_jax.training import evidence
from balance_jax.training.evidence import insert, markdown
from balance_jax.training.mixture_summary import seed_stats

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"


def spread(values: list[float]) -> str:
  """Mean and standard deviation over seeds."""
  stats = seed_stats(values)
  return f"{stats['mean']:.2f} ± {stats['std']:.2f}"


def render(found: dict) -> str:
  """All tables, in Markdown."""
  arms, gains = found["ablation"]["arms"], found["gain"]
  header = ("claim", "difference", "measured (95 % interval)", "verdict")
  rows = [*claims.ablation_rows(arms), *claims.gain_rows(gains)]
  measures = ("natural", "attacked", "certified", "certified_ibp")
  values = [
    (name, *(spread(claims.errors(arm, measure)) for measure in measures))
    for name, arm in arms.items()
  ]
  layers = [
    (name, *(f"{seed_stats(layer)['mean']:.3g}" for layer in zip(*seeds, strict=True)))
    for name, seeds in gains.items()
  ]
  count = len(next(iter(gains.values()))[0])
  return "\n\n".join(
    [
      markdown(header, [(*row[:3], f"**{row[3]}**") for row in rows]),
      "Errors on test digits in %, mean ± standard deviation over the seeds:",
      markdown(("arm", "natural", "attacked", "verified", "verified by IBP alone"), values),
      "Mean radius of each layer over that of the input at initialisation, mean over seeds:",
      markdown(("", *(f"layer {i + 1}" for i in range(count))), layers),
    ]
  )


def load() -> dict:
  """The results, by file."""
  return {name: evidence.load(FOLDER / "results" / f"{name}.json") for name in ("ablation", "gain")}


def main() -> None:
  """Puts the tables between the markers."""
  readme = README.read_text(encoding="utf-8")
  README.write_text(insert(readme, render(load())), encoding="utf-8")


if __name__ == "__main__":
  main()
