"""Takes what the table needs from a finished run of the ablation.

  python -m balance_jax.main --config=configs/certified_digits.py --workdir=RUN
  python experiments/fast_certified/collect.py RUN

Writes results/ablation.json: the measures of every run on test images, by arm, in order of seeds.
"""

import json
import sys
from pathlib import Path

from balance_jax.training import evidence
from balance_jax.training.metric_log import read_records

RESULTS = Path(__file__).parent / "results"
MEASURES = (
  "natural",
  "attacked",
  "certified",
  "certified_ibp",
  "certified_crown_ibp",
  "violations",
)


def main(run: Path) -> None:
  """Copies the measures of every arm."""
  results = json.loads((run / "results.json").read_text())
  arms = {}
  for name in results["summary"]["arms"]:
    records = read_records(run / "arms" / name / "metrics.jsonl")
    tests = sorted((r for r in records if r["event"] == "test"), key=lambda r: r["seed"])
    arms[name] = {measure: [r[measure] for r in tests] for measure in MEASURES}
    arms[name]["seeds"] = [r["seed"] for r in tests]
  kept = {key: results[key] for key in ("examples", "parameters", "device", "versions", "seconds")}
  evidence.save(RESULTS / "ablation.json", {"arms": arms, **kept})


if __name__ == "__main__":
  if len(sys.argv) != 2:
    raise SystemExit(__doc__)
  main(Path(sys.argv[1]))
