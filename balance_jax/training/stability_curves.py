"""From the records of a stability experiment to loss over learning rate, one curve a model.

A curve holds all learning rates and seeds of one architecture, size and setting. What it sums up,
the learning-rate sensitivity, is that of Wortsman et al., "Small-scale proxies for large-scale
Transformer training instabilities", 2023 (arXiv 2309.14322), section 2.2.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from balance_jax.stability.sensitivity import lr_sensitivity, lr_sensitivity_best_window
from balance_jax.training.mixture_summary import seed_stats

# A learning rate is called unstable where more than this share of what training gained is lost.
UNSTABLE_SHARE = 0.1

_CURVE = ("architecture", "width", "depth", "intervention")
_LABEL = (*_CURVE, "parameters", "learning_rate", "seed", "step")


@dataclasses.dataclass(frozen=True)
class _Run:
  """The records of one run by event and step; a step logged twice keeps its last record."""

  train: dict[int, Mapping] = dataclasses.field(default_factory=dict)
  eval: dict[int, Mapping] = dataclasses.field(default_factory=dict)


def number(value: Any) -> float | None:
  """A float, or None for None, NaN and infinity."""
  return float(value) if value is not None and math.isfinite(value) else None


def sensitivity_curves(
  records: Iterable[Mapping[str, Any]], probe_step: int | None = None, window: int = 7
) -> list[dict[str, Any]]:
  """One entry for each architecture, size and setting.

  S seeds and K learning rates; a loss is a validation loss in nats per token. "Capped" means that a
  run that diverged, stopped early or ended above its initial loss counts as that initial loss.

  Args:
    records: train and eval records of all runs, see `stability_summary.summarize`.
    probe_step: step at which attention logits are read; None takes each curve's last train record.
    window: neighbouring learning rates of `sensitivity_best_window`.

  Returns:
    Entries by architecture and setting, in order of first record, then by parameters; JSON-able:
    - architecture, width, depth, intervention, parameters, learning_rates [K] rising, seeds [S];
    - steps: the last evaluation's; probe_step: the last train record's, or the one asked for;
    - init_loss [S]; final_loss [S][K], None where it is not finite or never came;
    - mean [K], std [K] of the capped final loss over seeds (std None with one seed), and
      diverged [K], how many seeds have no final loss;
    - sensitivity: `seed_stats` over seeds and "values" [S]; sensitivity_best_window: the same over
      the best `window` neighbouring learning rates, None unless there are more than that;
    - best_learning_rate, best_loss: where `mean` is lowest, None where every run diverged;
    - first_unstable_learning_rate: the lowest above the best one whose mean is more than
      `UNSTABLE_SHARE` of the way from the best back to the initial loss, or None;
    - max_logit [S][K]: largest attention logit of block 0 at the probe step; max_logit_run: that of
      all recorded steps; log_z, log_z_square, entropy (block 0), block_rms ([S][K][blocks]),
      grad_rms and update_rms ({tensor: [S][K]}): of the last train record. Each is None where no
      run has it, and holds None for a run without a finite value.

  Raises:
    ValueError: no records, a record without its label, a run or an evaluation that is missing, one
      learning rate only, or a probe step at which nothing was recorded.
  """
  return [_curve(key, runs, probe_step, window) for key, runs in _ordered(_collect(records))]


def _collect(records) -> dict[tuple, dict[tuple, _Run]]:
  """{curve: {(seed, learning rate): run}}; a curve's key ends with its parameters."""
  curves = {}
  for i, record in enumerate(records):
    if record.get("event") not in ("train", "eval"):
      continue
    missing = [name for name in _LABEL if record.get(name) is None]
    if missing:
      raise ValueError(f"records[{i}] must hold {', '.join(_LABEL)}; missing: {missing}")
    key = tuple(record[name] for name in (*_CURVE, "parameters"))
    runs = curves.setdefault(key, {})
    run = runs.setdefault((record["seed"], float(record["learning_rate"])), _Run())
    getattr(run, record["event"])[record["step"]] = record
  if not any(run.eval for runs in curves.values() for run in runs.values()):
    raise ValueError("records must hold eval records of at least one run, got none")
  return curves


def _ordered(curves: Mapping[tuple, Any]) -> list[tuple[tuple, Any]]:
  architectures = list(dict.fromkeys(key[0] for key in curves))
  settings = list(dict.fromkeys(key[3] for key in curves))

  def place(item):
    architecture, width, depth, setting, parameters = item[0]
    return architectures.index(architecture), settings.index(setting), parameters, width, depth

  return sorted(curves.items(), key=place)


def _curve(key, runs: Mapping[tuple, _Run], probe_step, window: int) -> dict[str, Any]:
  name = "{}, width {}, depth {}, {}".format(*key)
  seeds, rates = (sorted(set(column)) for column in zip(*runs, strict=True))
  if len(rates) < 2:
    raise ValueError(f"records: {name} has one learning rate, {rates[0]:g}; a curve takes two")
  absent = [pair for pair in ((s, r) for s in seeds for r in rates) if pair not in runs]
  if absent:
    pairs = ", ".join(f"seed {s} at {r:g}" for s, r in absent[:3])
    raise ValueError(f"records: {name} lacks {len(absent)} of its runs, such as {pairs}")
  grid = [[runs[seed, rate] for rate in rates] for seed in seeds]
  last = max((step for run in runs.values() for step in run.eval), default=0)
  init = [_init_loss(row, f"{name}, seed {seed}") for seed, row in zip(seeds, grid, strict=True)]
  final = [[number(run.eval.get(last, {}).get("loss")) for run in row] for row in grid]
  return {
    **dict(zip((*_CURVE, "parameters"), key, strict=True)),
    "learning_rates": rates,
    "seeds": seeds,
    "steps": last,
    "init_loss": init,
    "final_loss": final,
    **_sensitivity(final, init, window),
    **_optimum(final, init, rates),
    **_statistics(grid, probe_step, name),
  }


def _init_loss(row: Sequence[_Run], name: str) -> float:
  """The loss at step 0, the same at every learning rate."""
  losses = [number(run.eval.get(0, {}).get("loss")) for run in row]
  known = [loss for loss in losses if loss is not None]
  if not known:
    raise ValueError(f"records: {name} has no eval record with a finite loss at step 0")
  return known[0]


def _capped(final, init) -> np.ndarray:
  losses = np.array(final, np.float64)  # None becomes NaN
  cap = np.broadcast_to(np.array(init)[:, np.newaxis], losses.shape)
  return np.where(np.isnan(losses), cap, np.minimum(losses, cap))


def _sensitivity(final, init, window: int) -> dict[str, Any]:
  losses, start = np.array(final, np.float64), np.array(init, np.float64)

  def stats(values):
    values = np.asarray(values, np.float64).tolist()
    return {**seed_stats(values), "values": values}

  wide = losses.shape[1] > window
  best = stats(lr_sensitivity_best_window(losses, start, window=window)) if wide else None
  return {"sensitivity": stats(lr_sensitivity(losses, start)), "sensitivity_best_window": best}


def _optimum(final, init, rates) -> dict[str, Any]:
  capped = _capped(final, init)
  mean, start = capped.mean(axis=0), float(np.mean(init))
  lost = [sum(loss is None for loss in column) for column in zip(*final, strict=True)]
  found = {"best_learning_rate": None, "best_loss": None, "first_unstable_learning_rate": None}
  if sum(lost) < capped.size:
    best = int(mean.argmin())
    limit = mean[best] + UNSTABLE_SHARE * (start - mean[best])
    unstable = [rate for rate, loss in zip(rates, mean, strict=True) if loss > limit]
    found = {
      "best_learning_rate": rates[best],
      "best_loss": float(mean[best]),
      "first_unstable_learning_rate": min((r for r in unstable if r > rates[best]), default=None),
    }
  return {
    "mean": mean.tolist(),
    "std": capped.std(axis=0, ddof=1).tolist() if len(capped) > 1 else None,
    "diverged": lost,
    **found,
  }


def _statistics(grid, probe_step: int | None, name: str) -> dict[str, Any]:
  """What the train records say beyond the loss."""
  steps = sorted({step for row in grid for run in row for step in run.train})
  last = steps[-1] if steps else None
  probe = last if probe_step is None else probe_step
  if steps and probe not in steps:
    raise ValueError(
      f"probe_step is {probe_step}; {name} has train records at the steps {_short(steps)}"
    )

  def at(step, read):
    return _table(grid, lambda run: read(run.train[step]) if step in run.train else None)

  def of_run(run):
    logits = [_first(record.get("max_logit")) for record in run.train.values()]
    return max((logit for logit in logits if logit is not None), default=None)

  return {
    "probe_step": probe,
    "max_logit": at(probe, lambda r: _first(r.get("max_logit_last", r.get("max_logit")))),
    "max_logit_run": _table(grid, of_run),
    "log_z": at(last, lambda r: number(r.get("log_z"))),
    "log_z_square": at(last, lambda r: number(r.get("log_z_square"))),
    "entropy": at(last, lambda r: _first(r.get("entropy"))),
    "block_rms": at(last, lambda r: [*map(number, r["block_rms"])] if r.get("block_rms") else None),
    **{field: _by_tensor(grid, last, field) for field in ("grad_rms", "update_rms")},
  }


def _by_tensor(grid, step, field: str) -> dict[str, list] | None:
  found = [run.train.get(step, {}).get(field) or {} for row in grid for run in row]
  tensors = dict.fromkeys(name for sizes in found for name in sizes)

  def size(run, tensor):
    return number((run.train.get(step, {}).get(field) or {}).get(tensor))

  tables = {tensor: _table(grid, lambda run, t=tensor: size(run, t)) for tensor in tensors}
  return {tensor: table for tensor, table in tables.items() if table} or None


def _table(grid, read) -> list[list] | None:
  """[S][K] of what `read` finds, None where it finds nothing at all."""
  values = [[read(run) for run in row] for row in grid]
  return values if any(value is not None for row in values for value in row) else None


def _first(values: Sequence | None) -> float | None:
  """The value of block 0."""
  return number(values[0]) if values else None


def _short(steps: Sequence[int]) -> str:
  shown = steps if len(steps) <= 6 else [*steps[:3], "…", *steps[-2:]]
  return ", ".join(map(str, shown))
