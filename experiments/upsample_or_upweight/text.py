"""Trims a finished run of configs/upsample_or_upweight_text.py to what the table needs.

  python experiments/upsample_or_upweight/text.py WORKDIR

Chooses each method's learning rate on validation rows, takes the final figures from test rows, and
writes results/text.json and text.png.
"""

import sys
from pathlib import Path

import evidence
import numpy as np

from balance_jax.mixing import temperature_probs
from balance_jax.training.metric_log import read_records
from balance_jax.training.mixture_summary import curves
from balance_jax.training.workdir import Workdir

DRAWN = ("proportional", "temperature_5", "scalarization_5", "cooldown", "increasing")


def summarize(records: list[dict], results: dict) -> dict:
  """The table's figures.

  Args:
    records: of metrics.jsonl.
    results: results.json of the run.

  Returns:
    groups and sizes; run facts; "speedup" of TS over S, see `evidence.log2_speedup`, on validation
    rows; and for every method the records (see `_record`) "final" and "early": of the learning rate
    with the lowest mean validation loss at the end, all languages alike, and of that with the
    lowest p(5)-weighted one at 25 % of the steps.
  """
  config, sizes = results["config"], list(results["rows"].values())
  rates = config["sweep.learning_rate"]
  found = {
    name: curves(records, event, field)
    for name, event, field in (
      ("validation", "eval", "group_loss"),
      ("test", "test", "group_loss"),
      ("epochs", "train", "epochs"),
      ("second_moment", "moments", "second_moment"),
      ("predicted", "moments", "predicted_variance"),
      ("observed", "moments", "observed_variance"),
    )
  }
  p = np.asarray(temperature_probs(sizes, 5.0))
  steps = next(iter(next(iter(found["validation"].values())).values()))[0]
  until = int(np.flatnonzero(steps == steps[-1] // 4)[0]) + 1
  methods = {}
  for method in config["methods"]:
    kept = [_record(found, f"{method} learning_rate={rate:g}", rate) for rate in rates]
    final = min(kept, key=lambda record: record["curve"][-1].mean())
    early = min(kept, key=lambda record: (record["quarter"] @ p).mean())
    for record in (final, early):
      record["at_edge"] = record["rate"] in (min(rates), max(rates))
    methods[method] = {"final": final, "early": early}
  objectives = [
    _stack(found["validation"][f"{method} learning_rate={methods[method]['early']['rate']:g}"]) @ p
    for method in ("temperature_5", "scalarization_5")
  ]
  return {
    "groups": list(results["rows"]),
    "sizes": sizes,
    "rates": rates,
    "steps": config["train.steps"],
    "eval_steps": steps,
    "methods": methods,
    "speedup": evidence.log2_speedup(steps[:until], *(x[:, :until] for x in objectives)),
    **{name: results[name] for name in ("model", "device", "versions", "seconds")},
  }


def _record(found: dict, name: str, rate: float) -> dict:
  """One method at one learning rate, by seed (S) and language (K).

  Returns:
    "final" (S, K), test loss; "quarter" (S, K), validation loss at 25 % of the steps; "overfit" (S,
    K), of validation losses, see `evidence.overfit`; "curve" (E, K), mean validation loss; "epochs"
    (K,), passes over each language; "moments", gradient moments by seed.
  """
  by_seed = _stack(found["validation"][name])
  steps = next(iter(found["validation"][name].values()))[0]
  quarter = int(np.flatnonzero(steps == steps[-1] // 4)[0])
  return {
    "rate": rate,
    "final": _stack(found["test"][name])[:, -1],
    "quarter": by_seed[:, quarter],
    "overfit": evidence.overfit(by_seed),
    "curve": by_seed.mean(axis=0),
    "epochs": _stack(found["epochs"][name])[:, -1].mean(axis=0),
    "moments": {
      key: _stack(found[key][name]) for key in ("second_moment", "predicted", "observed")
    },
  }


def _stack(runs) -> np.ndarray:
  return np.stack([values for _, values in runs.values()])


def draw(results: dict, path) -> None:
  """Validation loss of the largest and the smallest three languages against the step."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  middle = len(results["groups"]) // 2
  figure, axes = plt.subplots(1, 2, figsize=(9, 3.7))
  halves = (slice(None, middle), slice(middle, None))
  for axis, half in zip(axes, halves, strict=True):
    for name in DRAWN:
      curve = np.asarray(results["methods"][name]["final"]["curve"])[:, half].mean(axis=1)
      axis.plot(results["eval_steps"], curve, label=name)
    axis.set(title=", ".join(results["groups"][half]), xlabel="step", ylabel="nats per byte")
    axis.set_ylim(1.9, 3.2)
  figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(DRAWN))
  figure.tight_layout(rect=(0, 0.08, 1, 1))
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main(workdir: str, folder: Path = evidence.RESULTS) -> dict:
  """Reads the folder of the run and writes the results."""
  run = Workdir(workdir)
  results = run.read("results.json")
  if results is None:
    raise SystemExit(f"{workdir} holds no results.json; run the config first")
  summary = evidence.rounded(summarize(read_records(run.metrics), results))
  evidence.save("text", summary, folder)
  draw(summary, folder / "text.png")
  return summary


if __name__ == "__main__":
  if len(sys.argv) != 2:
    raise SystemExit(__doc__)
  main(sys.argv[1])
