"""Rewrites the tables of README.md and the figure from the results.

python experiments/imbalanced_adversarial/table.py
"""

import itertools
from pathlib import Path

import numpy as np
from claims import (
  ALL,
  HEAD,
  TAIL,
  Arms,
  Row,
  separation_rows,
  srat_rows,
  tail_rows,
  theory_rows,
  weight_rows,
)

from balance_jax.training import evidence
from balance_jax.training.evidence import insert, markdown

FOLDER = Path(__file__).parent
README, RESULTS = FOLDER / "README.md", FOLDER / "results"
PARTS = ("digits", "stronger")


def all_rows(found: dict) -> dict[str, list[Row]]:
  """Rows by heading."""
  parts = [found[name] for name in PARTS]
  problems = (rows(part) for rows in (tail_rows, weight_rows) for part in parts)
  return {
    "Theory: two Gaussian classes": theory_rows(found["theory"]),
    "The two problems: tail and weights": list(itertools.chain(*problems)),
    "Separable features": list(itertools.chain(*map(separation_rows, parts))),
    "SRAT": list(itertools.chain(*map(srat_rows, parts))),
  }


def claims_table(rows: list[Row]) -> str:
  cells = [(row.claim, row.setting, row.measured, f"**{row.verdict}**") for row in rows]
  return markdown(("claim", "setting", "measured (95 % interval)", "verdict"), cells)


def arms_table(digits: dict) -> str:
  """Mean accuracies in percent; standard deviation over seeds where it is judged."""
  arms, cells = Arms(digits), []
  for name, record in digits["arms"].items():
    means = [
      "/".join(f"{100 * arms.accuracy(name, part, under).mean():.1f}" for part in (HEAD, TAIL))
      for under in ("clean", "pgd")
    ]
    balanced = [
      f"{100 * x.mean():.1f} ± {100 * x.std(ddof=1):.1f}"
      for x in (arms.accuracy(name, ALL, under) for under in ("clean", "pgd", "both"))
    ]
    scatter = [f"{np.mean(record[f'scatter_{under}']):.2f}" for under in ("clean", "attacked")]
    cells.append((name, means[0], balanced[0], means[1], *balanced[1:], "/".join(scatter)))
  header = (
    "arm", "clean, head/tail", "clean, balanced", "robust, head/tail", "robust, balanced",
    "with APGD-DLR", "scatter ratio, clean/attacked",
  )  # fmt: skip
  return markdown(header, cells)


def choices_table(digits: dict) -> str:
  """What each arm chose on validation images; an asterisk where a rate lies at an end."""
  rates, cells = digits["settings"]["rates"], []
  for name, record in digits["arms"].items():
    chosen, tried = record["chosen"], digits["tried"][name]
    edge = "*" if chosen["rate"] in (min(rates), max(rates)) else ""
    strengths = [f"{chosen[key]:g}" if "separation" in name or name == "SRAT" else "–"
                 for key in ("lam", "tau")]  # fmt: skip
    best, second = tried[0]["score"], tried[1]["score"]
    cells.append((name, f"{len(tried)}", f"{chosen['rate']:g}{edge}", *strengths,
                  f"{100 * best:.1f}", f"{100 * second:.1f}"))  # fmt: skip
  header = ("arm", "settings tried", "rate", "λ", "τ", "best score", "second")
  return markdown(header, cells)


def strengths_table(digits: dict) -> str:
  """Validation score of SRAT by lambda and tau, each at its best rate."""
  settings, cells = digits["settings"], []
  scores = {}
  for row in digits["tried"]["SRAT"]:
    key = (row["lam"], row["tau"])
    scores[key] = max(scores.get(key, 0.0), row["score"])
  none = digits["tried"]["AT + DRW"][0]["score"]
  for tau in settings["taus"]:
    line = (f"{100 * x:.1f}" for x in (none, *(scores[lam, tau] for lam in settings["lams"])))
    cells.append((f"{tau:g}", *line))
  return markdown(("τ", "λ = 0", *(f"λ = {lam:g}" for lam in settings["lams"])), cells)


def render(found: dict) -> str:
  """All tables, in Markdown."""
  tables = [f"### {title}\n\n{claims_table(rows)}" for title, rows in all_rows(found).items()]
  for part in (found[name] for name in PARTS):
    eps = f"eps {part['settings']['eps']:g}"
    tables += [
      f"### All arms, {eps}: test accuracy in percent (mean, ± standard deviation over seeds)\n\n"
      + arms_table(part),
      f"### Settings chosen on validation images, {eps} (* = end of the grid)\n\n"
      + choices_table(part),
      f"### SRAT by λ and τ, {eps}: balanced robust accuracy on validation images\n\n"
      + strengths_table(part),
    ]
  return "\n\n".join(tables)


def load(folder: Path = RESULTS) -> dict:
  """All results."""
  return {name: evidence.load(folder / f"{name}.json") for name in ("theory", *PARTS)}


def draw(found: dict, path: Path) -> None:
  """Left: the closed form against the weight. Right: robust accuracy of every class."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
  theory, digits = found["theory"], found["digits"]
  for i, separation in enumerate(theory["separations"]):
    for name, style in (("minority", "-"), ("majority", "--")):
      label = f"S = {separation:g}, {name}"
      curve = theory["curves"][name][i]
      left.plot(theory["weights"], curve, style, color=f"C{i}", label=label)
  left.set(xscale="log", xlabel="weight ρ of the minority", ylabel="error rate", title="K = 100")
  left.legend(fontsize=8)
  for name, record in digits["arms"].items():
    if name.startswith(("AT", "SRAT")):
      right.plot(digits["counts"], np.mean(record["pgd"], axis=0), "o-", ms=3, label=name)
  right.set(xscale="log", xlabel="training images of the class", ylabel="robust test accuracy")
  right.set(title="digits, PGD-20 at eps 0.1")
  right.invert_xaxis()
  right.legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=100)
  plt.close(figure)


if __name__ == "__main__":
  results = load()
  rendered = render(results)
  README.write_text(insert(README.read_text(encoding="utf-8"), rendered), encoding="utf-8")
  draw(results, RESULTS / "imbalanced.png")
  print(rendered)
