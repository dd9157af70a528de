"""Trains everything the table needs, one figure after another; what is finished is left alone.

  python experiments/small_scale_proxies/run.py RUNS [FIGURE ...]

Writes RUNS/<figure>, an hour in all on two CPU cores that other work shares. The same command goes
on where it was stopped.
"""

import subprocess
import sys
from pathlib import Path

from figures import FIGURES

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"predict": "predict_instability.py", "coordinate_check": "coordinate_check.py"}


def main(runs: Path, names: list[str]) -> None:
  """Runs the main job for each figure; stops at the first that fails."""
  unknown = sorted(set(names) - {*FIGURES, *CONFIGS})
  if unknown:
    raise SystemExit(f"unknown figures {unknown}; allowed: {', '.join((*FIGURES, *CONFIGS))}")
  for name in names or (*FIGURES, "coordinate_check"):
    config = CONFIGS.get(name, f"lr_sensitivity.py:{name}")
    command = [sys.executable, "-m", "balance_jax.main", f"--config=configs/{config}"]
    done = subprocess.run([*command, f"--workdir={(runs / name).resolve()}"], cwd=ROOT, check=False)
    if done.returncode:
      raise SystemExit(done.returncode)


if __name__ == "__main__":
  if len(sys.argv) < 2:
    raise SystemExit(__doc__)
  main(Path(sys.argv[1]), sys.argv[2:])
