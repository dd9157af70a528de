"""Draws the README's picture from a finished run of the quickstart.

python docs/figures.py runs/quickstart
"""

import json
import sys
from pathlib import Path

from balance_jax.training.metric_log import read_records
from balance_jax.training.mixture_figures import loss_curves
from balance_jax.training.mixture_summary import Groups


def main(workdir: str) -> None:
  folder = Path(workdir)
  rows = json.loads((folder / "results.json").read_text())["rows"]
  figure = loss_curves(
    read_records(folder / "metrics.jsonl"), Groups(list(rows), list(rows.values()))
  )
  figure.savefig(
    Path(__file__).parent / "quickstart_loss.png", dpi=95, facecolor="white", bbox_inches="tight"
  )


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit("usage: python docs/figures.py WORKDIR")
  main(sys.argv[1])
