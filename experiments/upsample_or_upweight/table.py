"""Rewrites the tables of README.md from the results: the claims with verdicts, all arms, all rates.

python experiments/upsample_or_upweight/table.py
"""

from pathlib import Path

import evidence
import numpy as np
from claims import (
  TEXT_ARMS,
  Row,
  cooldown_rows,
  overfit_rows,
  repeat_rows,
  settings,
  speed_rows,
  theorem_rows,
  variance_rows,
)

from balance_jax.training.evidence import insert, markdown

README = Path(__file__).parent / "README.md"

# Final loss of large and small domain, best and 25 % loss of the small one, variance of the
# gradient norm: an independent float64 NumPy run of the same problem, three seeds.
NUMPY_RUN = {
  "TS 1": (0.970, 2.461, 2.460, 2.578, 0.032),
  "TS 5": (0.974, 2.261, 1.921, 1.935, 0.043),
  "TS 100": (0.979, 2.481, 1.918, 1.999, 0.060),
  "S 5": (0.978, 2.541, 2.369, 2.421, 13.2),
  "cooldown": (0.971, 2.078, 1.921, 1.935, 0.043),
  "increasing": (0.977, 2.042, 1.950, 2.578, 0.032),
}


def claims_table(rows: list[Row]) -> str:
  cells = [(row.claim, row.setting, row.measured, f"**{row.verdict}**") for row in rows]
  return markdown(("claim", "setting", "measured (95 % interval)", "verdict"), cells)


def reference_table(found: dict) -> str:
  """Our run at the fixed rate next to the independent one."""
  cells = []
  for name, reference in NUMPY_RUN.items():
    record = found["synthetic"]["sgd"]["arms"][name]["fixed"]
    final, best, quarter = (np.mean(record[key], axis=0) for key in ("final", "best", "quarter"))
    ours = (final[0], final[-1], best[-1], quarter[-1], np.mean(record["spread"]))
    cells.append((name, *(f"{a:.3g} ({b:g})" if b > 9 else f"{a:.3f} ({b:.3f})"
                          for a, b in zip(ours, reference, strict=True))))  # fmt: skip
  header = ("arm", "large final", "small final", "small best", "small at 25 %", "norm variance")
  return markdown(header, cells)


def arms_table(found: dict) -> str:
  """Final test loss of every arm in every setting: large / small."""
  columns = settings(found)
  cells = []
  for arm in TEXT_ARMS:
    losses = [(x.high[arm].mean(), x.low[arm].mean()) for x in columns]
    cells.append((arm, *(f"{high:.3f} / {low:.3f}" for high, low in losses)))
  return markdown(("arm", *(x.name for x in columns)), cells)


def rates_table(found: dict) -> str:
  """The learning rate each arm was given; an asterisk where it lies at an end of the grid."""

  def cell(record):
    return f"{record['rate']:g}" + ("*" if record["at_edge"] else "")

  cells = []
  for arm, method in TEXT_ARMS.items():
    parts = [found["synthetic"][part]["arms"][arm]["final"] for part in ("sgd", "adam")]
    cells.append((arm, *map(cell, [*parts, found["text"]["methods"][method]["final"]])))
  return markdown(("arm", "synthetic, SGD", "synthetic, Adam", "text, AdamW"), cells)


def all_rows(found: dict) -> dict[str, list[Row]]:
  """Rows by heading."""
  return {
    "Theorems and formulas": theorem_rows(found) + variance_rows(found),
    "Speed": speed_rows(found),
    "Overfitting": overfit_rows(found),
    "Cooldown": cooldown_rows(found),
    "What the small-scale repeat must show": repeat_rows(found),
  }


def render(found: dict) -> str:
  """All tables, in Markdown."""
  parts = [f"### {title}\n\n{claims_table(rows)}" for title, rows in all_rows(found).items()]
  parts += [
    "### All arms: final test loss, large / small domain\n\n" + arms_table(found),
    "### The fixed-rate repeat next to the independent NumPy run (in brackets)\n\n"
    + reference_table(found),
    "### Learning rates chosen on validation points (* = end of the grid)\n\n" + rates_table(found),
  ]
  return "\n\n".join(parts)


def load(folder: Path = evidence.RESULTS) -> dict:
  """All results."""
  return {
    name: evidence.load(name, folder) for name in ("theory", "synthetic", "memorised", "text")
  }


if __name__ == "__main__":
  rendered = render(load())
  README.write_text(insert(README.read_text(), rendered))
  print(rendered)
