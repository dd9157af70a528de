"""Takes what the tables need from a finished run of a study.

  python -m balance_jax.main --config=configs/certified_digits.py:methods --workdir=RUN
  python experiments/fast_certified/collect.py methods RUN

Writes results/STUDY.json: for every arm, setting and radius the measures of its runs, in order of
seeds, on test images and, for what chooses the setting, on validation images.
"""

import json
import sys
from pathlib import Path

from balance_jax.training import evidence
from balance_jax.training.metric_log import read_records

RESULTS = Path(__file__).parent / "results"
STUDIES = ("ablation", "methods", "ramp", "fashion")
MEASURES = {
  "eval": ("natural", "certified"),
  "test": (
    "natural",
    "attacked",
    "certified",
    "certified_ibp",
    "certified_crown_ibp",
    "violations",
  ),
}


def point(row: dict, records: list[dict]) -> dict:
  """What one arm did with one setting at one radius."""
  own = [r for r in records if all(r.get(k) == row[k] for k in ("arm", "setting", "eps"))]
  found = {key: row[key] for key in ("arm", "setting", "eps", "chosen", "front")}
  for event, names in MEASURES.items():
    last = {r["seed"]: r for r in own if r["event"] == event}
    found |= {"seeds": sorted(last)}
    found[event] = {name: [last[seed][name] for seed in sorted(last)] for name in names}
  return found


def main(study: str, run: Path) -> None:
  """Copies the measures of every arm."""
  results = json.loads((run / "results.json").read_text())
  records = [r for log in run.glob("arms/*/metrics.jsonl") for r in read_records(log)]
  points = [point(row, records) for row in results["summary"]["rows"]]
  kept = {key: results[key] for key in ("examples", "parameters", "device", "versions", "seconds")}
  evidence.save(RESULTS / f"{study}.json", {"points": points, **kept})


if __name__ == "__main__":
  if len(sys.argv) != 3 or sys.argv[1] not in STUDIES:
    raise SystemExit(f"{__doc__}\nSTUDY is one of {', '.join(STUDIES)}.")
  main(sys.argv[1], Path(sys.argv[2]))
