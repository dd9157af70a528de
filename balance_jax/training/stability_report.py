"""The page of a stability experiment: which model bears which learning rate, and what breaks next.

`stability_summary` computes, `stability_figures` draws, `report` writes; this module says in words
how to read it.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from balance_jax.training import report
from balance_jax.training import stability_figures as figures
from balance_jax.training.stability_summary import reading, summarize, table_rows, verdict

_OWN = ("title", "verdict", "summary", "probe_step", "hold_back_largest")


def write_stability_report(
  path: str | os.PathLike,
  records: Sequence[Mapping[str, Any]],
  description: Mapping[str, Any],
) -> None:
  """Writes the HTML page of an experiment.

  Args:
    path: file to write.
    records: train and eval records (see `stability_summary.summarize`); figures without records are
      left out, spreads need two seeds.
    description: what was run. Required: "title". Used if there: "probe_step", "hold_back_largest"
      (see `summarize`), "verdict" (lines that replace `verdict`'s), "summary" (a paragraph below
      the title), and eps of Adam, under "config" as "optimizer.eps" or nested. Everything else,
      nested or not, is listed as it is: config, device, versions, time.

  Raises:
    ValueError: no title, or the records are refused by `summarize`.
  """
  report.check_title(description)
  summary = summarize(
    records,
    probe_step=description.get("probe_step"),
    hold_back_largest=bool(description.get("hold_back_largest", False)),
  )
  facts = report.flat_facts(description)
  report.write_experiment(
    path,
    description,
    _OWN,
    what_was_run=_what_was_run(summary),
    verdict=verdict(summary),
    results=[_table(summary), *_figure_blocks(summary, facts.get("config.optimizer.eps"))],
    steps=_steps(summary),
  )


def _what_was_run(summary) -> str:
  curves = summary["curves"]
  runs = sum(len(curve["seeds"]) * len(curve["learning_rates"]) for curve in curves)
  counts = {
    "architecture": len({curve["architecture"] for curve in curves}),
    "size": len({(curve["width"], curve["depth"]) for curve in curves}),
    "setting": len({curve["intervention"] for curve in curves}),
    "learning rate": len({rate for curve in curves for rate in curve["learning_rates"]}),
    "seed": len(summary["seeds"]),
  }
  parts = ", ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items())
  return f"{runs} runs: {parts}; {_steps(summary)} steps."


def _steps(summary) -> str:
  return " or ".join(str(step) for step in sorted({c["steps"] for c in summary["curves"]}))


def _table(summary) -> report.Table:
  header, rows = table_rows(summary)
  column, strong = header.index("S"), set()
  for size in {(c["width"], c["depth"]) for c in summary["curves"]}:
    values = {
      r: c["sensitivity"]["mean"]
      for r, c in enumerate(summary["curves"])
      if (c["width"], c["depth"]) == size
    }
    if len(values) > 1:
      strong |= {(r, column) for r, v in values.items() if v == min(values.values())}
  caption = "The lowest S of each size is stressed. " + reading(summary)
  return report.Table(header, rows, caption, frozenset(strong))


def _figure_blocks(summary, eps: float | None) -> Iterable[report.Block]:
  """The figures that the records can fill, each under its heading."""
  curves = summary["curves"]
  names = ", ".join(dict.fromkeys(curve["architecture"] for curve in curves))
  several = len(summary["seeds"]) > 1
  sizes = len({(curve["width"], curve["depth"]) for curve in curves})
  yield report.Heading("Loss over learning rate")
  yield report.Figure(
    figures.loss_curves(summary),
    f"Final validation loss over learning rate for: {names}.",
    "A flat curve forgives a learning rate that is off; one that rises to the dashed initial loss "
    "has broken. A cross marks rates at which at least one run has no finite final loss; such a "
    "run, or one above its initial loss, counts as that loss."
    + (" Lines are means over seeds, bands one standard deviation." if several else ""),
  )
  yield report.Heading("Sensitivity over size" if sizes > 1 else "Sensitivity")
  yield report.Figure(
    figures.sensitivity_over_size(summary),
    f"Learning-rate sensitivity for: {names}.",
    "Lower is better: the mean loss given away over the range of learning rates, against the best "
    "of them. It does not see the level of the loss; read it with the curves above."
    + (" Bars are one standard deviation over seeds." if several else ""),
  )
  if any(curve["max_logit"] for curve in curves):
    yield from _logit_blocks(summary, names)
  if summary["heat"]:
    yield report.Heading("Settings")
    yield report.Figure(
      figures.setting_map(summary),
      f"Final validation loss by setting and learning rate for: {names}.",
      "Mean final loss over seeds, darker is worse. A × marks cells where at least one run has no "
      "finite final loss. A setting that widens the pale range helps; one that only deepens it "
      "helps at one learning rate." + _left_out(len(summary["heat"]), "smallest models", "maps"),
    )
  if figures.has_gradient_ladder(summary):
    yield from _gradient_blocks(summary, eps)


def _logit_blocks(summary, names: str) -> Iterable[report.Block]:
  probes = sorted({curve["probe_step"] for curve in summary["curves"] if curve["max_logit"]})
  at = " or ".join(str(step) for step in probes)
  yield report.Heading("Attention logits")
  yield report.Figure(
    figures.logit_curves(summary),
    f"Largest attention logit of block 0 over learning rate for: {names}.",
    f"Largest attention logit of block 0 at step {at}, median over seeds; both axes are "
    "logarithmic. Logits that grow with learning rate and size turn attention into a choice of "
    "one position, and then the run diverges.",
  )
  if not summary["ladders"]:
    return
  held = (
    "The largest size (star) took no part in the fit: a star on its line was predicted; a hollow "
    "one at the upper edge has no finite logit."
    if summary["hold_back_largest"]
    else "The line is extended by one more step of size."
  )
  groups = {(ladder["architecture"], ladder["intervention"]) for ladder in summary["ladders"]}
  yield report.Heading("Which size breaks next", 3)
  yield report.Figure(
    figures.logit_ladders(summary),
    f"Largest attention logit over model size, with trends, for: {names}.",
    "One colour a learning rate. Where its line crosses 1e4 a model of that size is expected to "
    f"diverge at that rate. {held} The trend is a line in both logarithms "
    "with fewer than five fitted sizes, else a quadratic."
    + _left_out(len(groups), "other settings", "panels"),
  )


def _gradient_blocks(summary, eps: float | None) -> Iterable[report.Block]:
  known = {} if eps is None else {"eps": float(eps)}
  yield report.Heading("Gradient size")
  yield report.Figure(
    figures.gradient_ladders(summary, **known),
    "Root mean square of a gradient over model size.",
    "At the end of training, median over seeds, before clipping. It falls with learning rate and "
    "size; where it comes near eps of Adam the updates shrink and the layer stops learning: lower "
    "eps then.",
  )


def _left_out(count: int, what: str, unit: str) -> str:
  if count <= figures.MAX_PANELS:
    return ""
  return f" {figures.MAX_PANELS} of {count} {unit} are shown, without the {what}."
