"""The page of a robust training experiment: which arm certifies how much, at what natural accuracy.

`robust_summary` computes, `robust_figures` draws, `report` writes; this module says in words how to
read it.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from balance_jax.training import report
from balance_jax.training import robust_figures as figures
from balance_jax.training.robust_summary import (
  chosen,
  eps_name,
  reading,
  settings_rows,
  summarize,
  table_rows,
  verdict,
)

_OWN = ("title", "verdict", "summary", "selection")


def write_robust_report(
  path: str | os.PathLike,
  records: Sequence[Mapping[str, Any]],
  description: Mapping[str, Any],
) -> None:
  """Writes the HTML page of an experiment.

  Args:
    path: file to write.
    records: train, eval and test records (see `robust_summary.summarize` and `robust_figures`);
      figures without records are left out, spreads need two seeds.
    description: what was run. Required: "title". Used if there: "selection" (see `summarize`),
      "verdict" (lines that replace `verdict`'s) and "summary" (a paragraph below the title).
      Everything else, nested or not, is listed as it is: config, device, versions, time.

  Raises:
    ValueError: no title, or the records are refused by `summarize`.
  """
  report.check_title(description)
  records = list(records)
  summary = summarize(records, description.get("selection") or "certified")
  report.write_experiment(
    path,
    description,
    _OWN,
    what_was_run=_what_was_run(summary),
    verdict=verdict(summary),
    results=[_table(summary), *_result_blocks(summary), *_training_blocks(summary, records)],
    steps=summary["steps"],
  )


def _what_was_run(summary) -> str:
  rows = summary["rows"]
  runs = sum(len(row["seeds"]) for row in rows)
  counts = {
    ("arm", "arms"): len(summary["arms"]),
    ("setting", "settings"): len({(row["setting"], row["learning_rate"]) for row in rows}),
    ("radius", "radii"): len(summary["eps"]),
    ("seed", "seeds"): len(summary["seeds"]),
  }
  parts = ", ".join(f"{count} {names[count > 1]}" for names, count in counts.items())
  return f"{runs} run{'s' * (runs > 1)}: {parts}; {summary['steps']} steps."


def _table(summary) -> report.Table:
  header, rows = table_rows(summary)
  column, strong, start = header.index("verified error"), set(), 0
  for eps in summary["eps"]:
    found = list(chosen(summary, eps).values())
    shares = [row["test"]["certified"]["mean"] if row["test"]["certified"] else -1 for row in found]
    if len(found) > 1 and max(shares) >= 0:
      strong |= {(start + i, column) for i, share in enumerate(shares) if share == max(shares)}
    start += len(found)
  caption = reading(summary)
  if strong:
    caption = f"The lowest verified error{' of each eps' * (len(summary['eps']) > 1)} is stressed. "
    caption += reading(summary)
  return report.Table(header, rows, caption, frozenset(strong))


def _result_blocks(summary) -> Iterable[report.Block]:
  """Figures of the test records, each under its heading."""
  names = ", ".join(summary["arms"])
  if any(row["test"]["certified"] for row in summary["rows"]):
    yield report.Heading("Natural against certified accuracy")
    yield report.Figure(
      figures.pareto(summary),
      f"Certified over natural test accuracy for: {names}.",
      "Up and to the right is better. A mark is a setting; the larger one of each arm was chosen, "
      "those joined are on its front, where no other setting is better in both. Choice and front "
      "are made in validation, the values are of the test split, so a front may bend."
      + (" Settings whose every run collapsed are left out." if _collapsed(summary) else "")
      + _spread(summary, "bars are")
      + _radii(summary),
    )
  if len(summary["rows"]) > len({(row["arm"], row["eps"]) for row in summary["rows"]}):
    yield report.Table(
      *settings_rows(summary),
      "All settings, errors in %. The front is decided by the validation errors; the chosen one is "
      "on it, but for ties.",
    )
  picked = [row for eps in summary["eps"] for row in chosen(summary, eps).values()]
  if any(row["curve"] for row in picked):
    yield report.Heading("Accuracy over the radius of the test")
    yield report.Figure(
      figures.curves_over_eps(summary),
      f"Certified and attacked accuracy over eps for: {names}.",
      "Chosen settings. Each line starts at the natural accuracy. The true robust accuracy lies "
      "between the certified (upper row) and the attacked accuracy (lower row): where they are far "
      "apart, the bounds are loose or the attack is weak."
      + _spread(summary, "bands are")
      + _radii(summary),
    )
  if any(row["margin"] for row in picked):
    yield report.Heading("Margins")
    yield report.Figure(
      figures.margin_histogram(summary),
      f"Histogram of the least certified margin of the test examples for: {names}.",
      "The lower bound of (logit of the right class - logit of another), at its worst class, in "
      "the whole box. Right of 0 an example is certified; mass just left of 0 is within reach of "
      "tighter bounds. The first and the last bin hold everything beyond." + _radii(summary),
    )
  if found := figures.by_class(summary):
    yield report.Heading("Classes")
    yield report.Figure(
      figures.class_shares(summary),
      f"Natural, attacked and certified accuracy by class for: {', '.join(found)}.",
      f"{_at_largest(summary)}. The bars lie in "
      "front of each other: what is certified is not broken by an attack, and what resists is "
      "right without one." + _left_out(len(found), figures.MAX_PANELS, "arms"),
    )


def _training_blocks(summary, records) -> Iterable[report.Block]:
  """Figures of the train records, each under its heading."""
  if not any(figures.training_of(summary, records, "loss", eps) for eps in summary["eps"]):
    return
  names = ", ".join(summary["arms"])
  yield report.Heading("Training")
  yield report.Figure(
    figures.training_curves(summary, records),
    f"Training loss, verified share and radius over epochs for: {names}.",
    "Chosen settings. The loss may rise while the radius grows: the task becomes harder. Losses of "
    "different methods have different meanings; the verified share is that of training batches "
    "at the radius of the moment." + _spread(summary, "bands are") + _radii(summary),
  )
  if found := figures.training_of(summary, records, "relu_states", max(summary["eps"])):
    yield report.Heading("ReLU states")
    yield report.Figure(
      figures.relu_states_over_training(summary, records),
      f"Shares of active, inactive and undecided units by layer for: {', '.join(found)}.",
      f"{_at_largest(summary)}. In the whole box an active unit is "
      "above 0, an inactive one below, an undecided one may be either: it loosens the bounds, but "
      "a layer that is all inactive has lost its capacity. Balance means that active units remain."
      + _left_out(len(found), figures.MAX_ROWS, "arms")
      + _layers(found),
    )
  if found := figures.training_of(summary, records, "radius", max(summary["eps"])):
    yield report.Heading("Bound widths")
    yield report.Figure(
      figures.radius_by_layer(summary, records),
      f"Mean radius of the bounds by layer for: {', '.join(found)}.",
      f"{_at_largest(summary)}, half the width of the bounds before "
      "each ReLU; the axes are logarithmic. At the first record a level line is an initialisation "
      "that keeps the width; a slope is the gain of each layer. The epochs at eps 0 lie below the "
      "other panels. Later, training pulls the lines of "
      "the layers together or lets them spread."
      + _left_out(len(found), figures.MAX_PANELS - 1, "arms")
      + _layers(found),
    )


def _collapsed(summary) -> bool:
  """Whether `robust_figures.pareto` leaves something out."""
  shown = sum(len(figures.alive(summary, eps)) for eps in summary["eps"])
  return shown < sum(row["test"]["natural"] is not None for row in summary["rows"])


def _at_largest(summary) -> str:
  several = len(summary["seeds"]) > 1
  return f"Chosen settings at eps {eps_name(max(summary['eps']))}{', mean over seeds' * several}"


def _spread(summary, start: str) -> str:
  several = len(summary["seeds"]) > 1
  return f" Means over seeds, {start} one standard deviation." if several else ""


def _radii(summary) -> str:
  return _left_out(len(summary["eps"]), figures.MAX_RADII, "radii")


def _layers(found) -> str:
  count = max(values.shape[2] for _, values in found.values())
  return _left_out(count, figures.MAX_COLUMNS, "layers")


def _left_out(count: int, most: int, what: str) -> str:
  return f" {most} of {count} {what} are shown." if count > most else ""
