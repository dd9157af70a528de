"""Takes what the table needs from finished runs.

  python experiments/small_scale_proxies/collect.py RUNS

RUNS holds the workdirs of run.py. Writes results/<figure>.json and the figures as PNG.
"""

import json
import sys
from pathlib import Path

from figures import FIGURES, RESULTS

from balance_jax.training import evidence
from balance_jax.training import stability_figures as draw

KEPT = ("summary", "seconds", "device", "versions")
# What is drawn of each figure: file name -> (figure, function of the summary).
PICTURES = {
  "loss": ("qk_norm", draw.loss_curves),
  "sensitivity": ("qk_norm", draw.sensitivity_over_size),
  "gradients": ("qk_norm", draw.gradient_ladders),
  "ladder": ("predict", draw.logit_ladders),
  "remedies": ("remedies", draw.loss_curves),
}


def main(runs: Path) -> None:
  """Copies the results of every figure and draws the pictures."""
  missing = [name for name in FIGURES if not (runs / name / "results.json").exists()]
  if missing:
    raise SystemExit(f"{runs} lacks finished runs of: {', '.join(missing)}; see run.py")
  summaries = {}
  for name in FIGURES:
    results = json.loads((runs / name / "results.json").read_text())
    summaries[name] = results["summary"]
    evidence.save(RESULTS / f"{name}.json", {key: results[key] for key in KEPT})
  checks = json.loads((runs / "coordinate_check" / "results.json").read_text())
  kept = {key: checks[key] for key in ("checks", "seconds", "device", "versions")}
  evidence.save(RESULTS / "coordinate_check.json", kept)
  for file, (name, function) in PICTURES.items():
    function(summaries[name]).savefig(RESULTS / f"{file}.png", dpi=110)


if __name__ == "__main__":
  if len(sys.argv) != 2:
    raise SystemExit(__doc__)
  main(Path(sys.argv[1]))
