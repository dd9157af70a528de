"""Writes the tables of README.md from the result files.

python experiments/small_scale_proxies/table.py
"""

from pathlib import Path

from claims import CLAIMS
from figures import FIGURES, RESULTS, Figure

from balance_jax.training import evidence
from balance_jax.training.evidence import MARKERS, insert

README = Path(__file__).parent / "README.md"
BEGIN, END = MARKERS
TITLES = {
  "qk_norm": "Sizes, with and without qk-norm",
  "remedies": "Remedies",
  "interventions": "Warm-up, z-loss, decay, eps",
  "decay_kind": "Kind of decay",
  "mup": "muP",
  "depth_width": "Depth against width",
  "batch_steps": "Batch size and steps",
  "kappa": "Forced attention logits",
  "predict": "Prediction from smaller models",
}


def claim_rows() -> dict[str, list[dict]]:
  """Figure -> its rows, from results/."""
  return {name: CLAIMS[name](Figure(name)) for name in FIGURES}


def tables() -> str:
  """All tables as Markdown."""
  parts = []
  for name, rows in claim_rows().items():
    lines = [f"### {TITLES[name]}", "", "| claim | setting | measured (95 % interval) | verdict |"]
    lines.append("| --- | --- | --- | --- |")
    for row in rows:
      assert row["verdict"] in evidence.VERDICTS
      cells = (row["claim"], row["setting"], row["measured"], f"**{row['verdict']}**")
      lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    parts.append("\n".join(lines))
  return "\n\n".join([*parts, _sensitivities(), _ladder(), _coordinates(), _times()])


def _sensitivities() -> str:
  """S of every curve."""
  lines = ["### Every curve", "", "| figure | architecture | size | setting | best rate | S |"]
  lines.append("| --- | --- | --- | --- | --- | --- |")
  for name in FIGURES:
    for entry in Figure(name).curves:
      s, best = entry["sensitivity"], entry["best_learning_rate"]
      cells = [name, entry["architecture"], f"{entry['width']}×{entry['depth']}"]
      cells += [entry["intervention"], f"{best:g}", f"{s['mean']:.3f} ± {s['std']:.3f}"]
      lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _ladder() -> str:
  """Largest logits by size, with the prediction for the one held back."""
  figure = Figure("predict")
  sizes = figure.ladders[0]["parameters"]
  header = ["attention", "rate", *(f"{n:,}" for n in sizes), "predicted for the last"]
  lines = ["### Largest attention logits at step 80, medians over seeds", ""]
  lines += [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
  for ladder in figure.ladders:
    logits = ["–" if x is None else f"{x:.3g}" for x in ladder["max_logit"]]
    cells = [ladder["architecture"], f"{ladder['learning_rate']:g}", *logits]
    cells.append(f"{ladder['held_back']['predicted']:.3g}")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _coordinates() -> str:
  checks = evidence.load(RESULTS / "coordinate_check.json")["checks"]
  lines = ["### Coordinate check, widths 64 to 256, five steps at rate 0.005", ""]
  lines += ["| variant | verdict | failing | steepest slope |", "| --- | --- | --- | --- |"]
  for name, check in checks.items():
    judged = [entry for entry in check["slopes"] if entry["judged"]]
    steepest = max(judged, key=lambda entry: abs(entry["slope"] or 99.0))
    cells = [name, "passes" if check["passes"] else "fails"]
    cells += [f"{len(check['failures'])} of {len(judged)}"]
    cells += [f"{steepest['activation']} {steepest['slope']:+.2f}"]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _times() -> str:
  """Training time of every figure."""
  seconds = {name: evidence.load(RESULTS / f"{name}.json")["seconds"] for name in FIGURES}
  listed = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
  return f"Minutes of training by the clock, compilation included: {listed}."


def main() -> None:
  """Replaces what lies between the marks."""
  README.write_text(insert(README.read_text(encoding="utf-8"), tables()), encoding="utf-8")


if __name__ == "__main__":
  main()
