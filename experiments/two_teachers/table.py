"""Rewrites the tables of README.md and draws the figure, from the results.

python experiments/two_teachers/table.py
"""

from pathlib import Path

import claims

from balance_jax.training import evidence
from balance_jax.training.evidence import insert, markdown
from balance_jax.training.mixture_summary import seed_stats

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
RESULTS = FOLDER / "results"
PANELS = {
  "gap": "entropy gap |E_adv - E_nat|",
  "tau_nat": "temperature of the clean teacher",
  "tau_adv": "temperature of the robust teacher",
  "w_nat": "weight of the clean teacher",
}


def claims_table(found: dict, heading: str) -> str:
  """The claims under one heading, radius after radius."""
  cells = [
    (row["claim"], name, row["setting"], row["measured"], f"**{row['verdict']}**")
    for name, part in found.items()
    for row in claims.rows(part)[heading]
  ]
  return markdown(("claim", "part", "setting", "measured (95 % interval)", "verdict"), cells)


def spread(values: list[float]) -> str:
  """Mean and standard deviation over seeds."""
  stats = seed_stats(values)
  return f"{stats['mean']:.2f} ({stats['std']:.2f})"


def arms_table(part: dict) -> str:
  """Accuracies of all arms and of the teachers."""
  measured = ("clean", "robust", "w_robust")
  cells = [
    (name, *(spread(arm[what]) for what in measured), *_chosen(arm["chosen"]))
    for name, arm in part["arms"].items()
  ]
  cells += [
    (f"teacher: {name}", *(spread(accuracy[what]) for what in measured), "", "")
    for name, accuracy in part["teachers"].items()
  ]
  return markdown(("arm", "clean", "PGD-20", "W-Robust", "learning rate", "r_tau"), cells)


def _chosen(chosen: dict) -> tuple[str, str]:
  edge = "*" if chosen["at_edge"] else ""
  return f"{chosen['rate']:g}{edge}", f"{chosen['temp_rate']:.3g}" if chosen["temp_rate"] else ""


def search_table(part: dict) -> str:
  """W-Robust on validation digits of every candidate."""
  rates = part["settings"]["rates"]
  rows: dict[str, list[str]] = {}
  for name, candidates in part["search"].items():
    for row in candidates:
      label = f"{name}, r_tau {row['temp_rate']:.3g}" if row["temp_rate"] else name
      rows.setdefault(label, []).append(f"{row['w_robust']:.1f}")
  header = ("arm", *(f"rate {rate:g}" for rate in rates))
  return markdown(header, [(label, *cells) for label, cells in rows.items()])


def balances_table(part: dict) -> str:
  """Where the balances end: means of the last epoch over seeds."""
  cells = []
  for name in claims.TWO_TEACHERS:
    arm = part["arms"][name]
    values = [arm["first_gap"], *(arm["last"][key] for key in PANELS)]
    cells.append((name, *(f"{seed_stats(value)['mean']:.3f}" for value in values)))
  header = ("arm", "gap, first step", "gap", "τ clean", "τ robust", "weight of the clean teacher")
  return markdown(header, cells)


def render(found: dict) -> str:
  """All tables, in Markdown."""
  headings = claims.rows(next(iter(found.values())))
  tables = [f"### {heading}\n\n{claims_table(found, heading)}" for heading in headings]
  for name, part in found.items():
    seeds = len(part["settings"]["seeds"])
    tables += [
      f"### All arms, {name}: test digits, percent, means of {seeds} seeds (standard deviation)\n\n"
      + arms_table(part),
      f"### The balances in the last epoch, {name}\n\n" + balances_table(part),
      f"### The choice of rates, {name}: W-Robust on validation digits\n\n" + search_table(part),
    ]
  return "\n\n".join(tables)


def draw(part: dict, path: Path) -> None:
  """The course of gap, temperatures and weights at one radius, means over seeds."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True)
  for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
    for name in claims.TWO_TEACHERS:
      axis.plot(part["arms"][name]["course"][key], label=name)
    axis.set(title=title)
    axis.grid(alpha=0.3)
  for axis in axes[1]:
    axis.set_xlabel("epoch")
  handles = axes[0, 0].get_legend_handles_labels()
  figure.legend(*handles, loc="lower center", ncols=len(claims.TWO_TEACHERS))
  figure.tight_layout(rect=(0, 0.06, 1, 1))
  figure.savefig(path, dpi=100)
  plt.close(figure)


def load(folder: Path = RESULTS) -> dict:
  """The results."""
  return evidence.load(folder / "two_teachers.json")


if __name__ == "__main__":
  results = load()
  rendered = render(results)
  README.write_text(insert(README.read_text(encoding="utf-8"), rendered), encoding="utf-8")
  draw(results["radius 0.2"], RESULTS / "two_teachers.png")
  print(rendered)
