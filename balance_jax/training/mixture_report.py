"""The table and the page of a mixture experiment: which method serves which group, at what cost.

`mixture_summary` computes, `mixture_figures` draws, `report` writes; this module says it in words.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from balance_jax.training import mixture_figures as figures
from balance_jax.training import report
from balance_jax.training.mixture_summary import Groups, seed_stats, summarize

__all__ = ["console_table", "seed_stats", "summarize", "verdict", "write_mixture_report"]

_REQUIRED = ("title", "groups", "sizes")


def write_mixture_report(
  path: str | os.PathLike,
  records: Sequence[Mapping[str, Any]],
  description: Mapping[str, Any],
) -> None:
  """Writes the HTML page of an experiment.

  Args:
    path: file to write.
    records: train, eval and moments records (see `summarize`); figures without records are left
      out, spreads need two seeds.
    description: what was run. Required: "title", "groups" (K names in record order), "sizes" (K).
      Used if there: "reference" (see `summarize`), "verdict" (lines that replace `verdict`'s),
      "summary" (a paragraph below the title). Everything else, nested or not, is listed as it is:
      config, device, versions, time.

  Raises:
    ValueError: a required key is missing, or the records are refused by `summarize`.
  """
  missing = [key for key in _REQUIRED if key not in description]
  if missing:
    raise ValueError(f"description must have the keys {list(_REQUIRED)}, missing: {missing}")
  split = Groups(list(description["groups"]), list(description["sizes"]))
  summary = summarize(records, split.names, split.sizes, reference=description.get("reference"))
  report.write_experiment(
    path,
    description,
    (*_REQUIRED, "reference", "verdict", "summary"),
    what_was_run=_what_was_run(summary),
    verdict=verdict(summary),
    results=[
      _main_table(summary),
      _group_table(summary),
      *_figure_blocks(records, split, summary),
    ],
    steps=summary["steps"],
  )


def console_table(summary: Mapping[str, Any]) -> str:
  """The main table of `summarize`'s result as plain text, with a line that says how to read it.

  Args:
    summary: what `summarize` returned.

  >>> eval_ = {"event": "eval", "method": "uniform", "seed": 0}
  >>> records = [{**eval_, "step": s, "group_loss": [2., 4. - s]} for s in (0, 1)]
  >>> print(console_table(summarize(records, ["fr", "rm"], [28, 1])).splitlines()[2])
  uniform  2.000  3.000        0.000       –      –      –     0 (1/1)    1 (1/1)
  """
  header, rows = _main_rows(summary)
  return report.render_table([name for name, _ in header], rows) + "\n" + _reading(summary)


def verdict(summary: Mapping[str, Any]) -> list[str]:
  """What the final losses establish, one line for each half and one for the gradient noise.

  A difference to the reference counts as established when Student's 95 % interval of the paired
  differences over seeds excludes 0; that takes two seeds or more.

  Args:
    summary: what `summarize` returned.
  """
  lines = [line for half in ("low", "high") for line in _half_verdict(summary, half)]
  noisy = {
    method: row["grad_variance"]["mean"]
    for method, row in summary["methods"].items()
    if row["grad_variance"] and method != summary["reference"]
  }
  if noisy:
    least, most = min(noisy, key=noisy.get), max(noisy, key=noisy.get)
    ends = dict.fromkeys((least, most))
    lines.append(
      f"Variance of the gradient norm late in training, {summary['reference']} = 1: "
      + ", ".join(f"{method} {noisy[method]:.2f}" for method in ends)
      + (" (least and most)." if len(noisy) > 1 else ".")
    )
  return lines


def _half_verdict(summary, half: str) -> Iterable[str]:
  finals = {
    method: row[half]["final"]["mean"]
    for method, row in summary["methods"].items()
    if row[half]["final"]
  }
  if not finals:
    yield f"No method has a final {half}-resource loss."
    return
  best = min(finals, key=finals.get)
  reference = summary["reference"]
  difference = summary["methods"][best][half]["versus_reference"]
  change = difference and _number(difference["mean"], "+.3f")
  line = f"Lowest final {half}-resource loss: {best}, {finals[best]:.3f} nats/byte"
  if best == reference:
    line += " (the reference itself)."
  elif difference is None:
    line += f"; no seed in common with {reference}."
  elif difference["ci95"] is None:
    line += f", {change} against {reference}: one seed, so not established."
  else:
    established = abs(difference["mean"]) > difference["ci95"]
    line += (
      f", {change} ± {difference['ci95']:.3f} against {reference} (95 % interval, "
      f"{difference['n']} paired seeds): {'established' if established else 'not established'}."
    )
  yield line


def _what_was_run(summary) -> str:
  methods, seeds = len(summary["methods"]), len(summary["seeds"])
  return (
    f"{methods} method{'s' * (methods > 1)}, {seeds} seed{'s' * (seeds > 1)} each, "
    f"{len(summary['groups'])} groups, {summary['steps']} steps."
  )


def _reading(summary) -> str:
  target = summary["target"]
  goals = "; ".join(
    f"{half} {target[half]['loss']:.3f} ({target[half]['method']})"
    for half in ("high", "low")
    if target[half]
  )
  seeds, largest = len(summary["seeds"]), len(summary["high_groups"])
  over = f"mean over {seeds} seeds; ± is the standard deviation" if seeds > 1 else "one seed"
  return (
    f"Loss in nats/byte, {over}. "
    f"High-resource: the {largest} largest of {len(summary['groups'])} groups "
    f"({_short_list(summary['high_groups'])}); low-resource: {_short_list(summary['low_groups'])}. "
    f"Overfit: final minus best. Δ: paired difference to {summary['reference']}. "
    f"Noise: variance of the gradient norm in the last quarter, {summary['reference']} = 1. "
    f"Steps: first evaluation at or below the target loss ({goals or 'none'}), in brackets "
    "how many seeds get there."
  )


def _short_list(names: Sequence[str]) -> str:
  return ", ".join(names if len(names) <= 6 else [*names[:3], "…", *names[-2:]])


def _stat(stats: Mapping[str, Any] | None, form: str = ".3f") -> str | None:
  if stats is None:
    return None
  spread = "" if stats["std"] is None else f" ± {format(stats['std'], form.lstrip('+'))}"
  return _number(stats["mean"], form) + spread


def _number(value: float, form: str) -> str:
  """Formatted without "-0.000": adding 0.0 turns a rounded -0.0 into 0.0."""
  return format(round(value, int(form[-2])) + 0.0, form)


def _steps(row: Mapping[str, Any], half: str) -> str | None:
  stats = row[half]["steps_to_target"]
  runs = row[half]["final"]["n"] if row[half]["final"] else 0
  return None if stats is None else f"{stats['mean']:.0f} ({stats['n']}/{max(runs, stats['n'])})"


def _main_rows(summary) -> tuple[list[tuple[str, str]], list[list[str | None]]]:
  """[(short name for the console, long name)] of the columns, and the cells."""
  header = [
    ("method", "method"),
    ("high", "high-resource loss"),
    ("low", "low-resource loss"),
    ("low overfit", "low-resource overfit"),
    ("Δ high", "Δ high"),
    ("Δ low", "Δ low"),
    ("noise", "gradient noise"),
    ("steps high", "steps to high target"),
    ("steps low", "steps to low target"),
  ]
  rows = []
  for method, row in summary["methods"].items():
    delta = [_stat(row[half]["versus_reference"], "+.3f") for half in ("high", "low")]
    rows.append(
      [
        method,
        _stat(row["high"]["final"]),
        _stat(row["low"]["final"]),
        _stat(row["low"]["overfit"]),
        *([None] * 2 if method == summary["reference"] else delta),
        _stat(row["grad_variance"], ".2f"),
        _steps(row, "high"),
        _steps(row, "low"),
      ]
    )
  return header, rows


def _main_table(summary) -> report.Table:
  header, rows = _main_rows(summary)
  strong = set()
  for column, half in ((1, "high"), (2, "low")):
    means = [row[half]["final"] for row in summary["methods"].values()]
    strong |= {(r, column) for r in _lowest_rows([stats and stats["mean"] for stats in means])}
  caption = "Final validation loss; the lowest is stressed. " + _reading(summary)
  return report.Table([name for _, name in header], rows, caption, frozenset(strong))


def _lowest_rows(values: Sequence[float | None]) -> list[int]:
  known = [value for value in values if value is not None]
  return [r for r, value in enumerate(values) if known and value == min(known)]


def _group_table(summary) -> report.Table:
  split = Groups(summary["groups"], summary["sizes"])
  rows, strong = [], set()
  for r, k in enumerate(split.by_size):
    finals = [row["groups"][k]["final"] for row in summary["methods"].values()]
    rows.append([split.names[k], *map(_stat, finals)])
    strong |= {(r, c + 1) for c in _lowest_rows([stats and stats["mean"] for stats in finals])}
  caption = "Final validation loss of each group (nats/byte), the largest group first."
  return report.Table(["group", *summary["methods"]], rows, caption, frozenset(strong))


def _figure_blocks(records, split: Groups, summary) -> Iterable[report.Block]:
  """The figures that the records can fill, each under its heading."""
  methods = ", ".join(summary["methods"])
  has = {record["event"] for record in records}
  shown = figures.shown_groups(split)
  limited = ""
  if len(shown) < len(split.names):
    limited = f" Of {len(split.names)} groups the {len(shown) // 2} largest and smallest are shown."
  spread = "{} one standard deviation over seeds." if len(summary["seeds"]) > 1 else ""
  yield report.Heading("Loss curves")
  yield report.Figure(
    figures.loss_curves(records, split),
    f"Validation loss over steps, one panel a group, one line for each of: {methods}.",
    "Each panel is a group with its share of the data, largest first; lower is better. A curve "
    "that turns upwards overfits. Panels have their own loss axis, which leaves out the steep "
    f"first fifth of training.{spread.format(' The band is')}{limited}",
  )
  yield report.Heading("High-resource against low-resource")
  yield report.Figure(
    figures.trade_off(records, split),
    f"High-resource against low-resource loss at the best step and at the end, for: {methods}.",
    "Down and to the left is better for both. Hollow: the evaluation with the lowest mean loss of "
    "both halves; filled: the end of training. A line from hollow to filled that climbs is "
    "overfitting on the low-resource half." + spread.format(" Bars are"),
  )
  if "train" in has:
    yield from _train_blocks(records, split, methods, limited)
  if "moments" in has:
    yield report.Heading("Gradient variance, predicted against observed")
    yield report.Figure(
      figures.gradient_variance(records),
      f"Predicted against observed variance of one mini-batch gradient, for: {methods}.",
      "One mark a measurement. On the diagonal the prediction from the groups' measured moments "
      "is exact; above it the prediction is too high. " + _prediction_text(summary),
    )


def _train_blocks(records, split: Groups, methods: str, limited: str) -> Iterable[report.Block]:
  yield report.Heading("Mixture over time")
  yield report.Figure(
    figures.mixture_over_time(records, split),
    f"Share of each group over steps, optimised (p) above drawn (r), for: {methods}.",
    "Upper row: p, the weight of each group in the objective. Lower row: r, how often it is drawn; "
    "an example counts p/r. Equal rows are upsampling, a lower row equal to the data's shares is "
    "upweighting. Blue: high-resource groups; orange: low-resource groups. First seed.",
  )
  yield report.Heading("Epochs seen")
  yield report.Figure(
    figures.epochs_seen(records, split),
    f"Passes over each group's data at the end of training, for: {methods}.",
    "How often each group's data had been drawn by the end, on a logarithmic axis. Right of the "
    "line at 1 data is repeated; far to the right, expect overfitting." + limited,
  )


def _prediction_text(summary) -> str:
  ratios = {
    method: row["variance_prediction"]["median_ratio"]
    for method, row in summary["methods"].items()
    if row["variance_prediction"]
  }
  known = ", ".join(f"{method} {ratio:.2g}" for method, ratio in ratios.items())
  return f"Median of predicted / observed: {known}." if known else ""
