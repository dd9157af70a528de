"""Plots of a robust training experiment; functions of `robust_summary.summarize`'s result.

Those that show training take the train records as well. An arm has the same colour and marker in
all of them, layers and radii run from blue to gold, see `stability_styles`. Lines are means over
seeds, bands and bars one standard deviation. Black takes the page's text colour, see `report`.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from balance_jax.training.mixture_figures import (
  HIGH_SHADES,
  PALETTE,
  WIDTH,
  legend_below,
  new_figure,
)
from balance_jax.training.mixture_summary import curves
from balance_jax.training.robust_summary import chosen, eps_name
from balance_jax.training.stability_styles import Style, blend, legend, line_styles, log_axis
from balance_jax.training.stability_summary import short_number

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Summary = Mapping[str, Any]
Records = Sequence[Mapping[str, Any]]

MAX_PANELS = 12
# Of a grid: rows are arms, columns layers or radii.
MAX_ROWS = 6
MAX_COLUMNS = 6
MAX_RADII = 3
STATES = {"active": PALETTE[0], "inactive": PALETTE[2], "undecided": PALETTE[1]}
CLASS_SHADES = blend(HIGH_SHADES[::-1], [0.0, 0.5, 1.0])
_CLASSES = ("natural", "attacked", "certified")
_RAMP = {"color": "#000000", "linewidth": 0.8, "linestyle": "dashed"}


def pareto(summary: Summary) -> "Figure":
  """Certified over natural test accuracy; a panel a radius, a mark a setting.

  Settings on the validation front of their arm are joined and have error bars, the others are
  pale; the chosen one is larger.

  Args:
    summary: rows with test records are drawn, see `alive`.
  """
  shown, styles = shown_eps(summary), line_styles(summary["arms"])
  with new_figure(4.2, _width(len(shown))) as figure:
    for i, eps in enumerate(shown):
      axes = figure.add_subplot(1, len(shown), i + 1)
      for arm in summary["arms"]:
        _front(axes, [row for row in alive(summary, eps) if row["arm"] == arm], styles[arm])
      axes.set_title(f"eps {eps_name(eps)}")
      axes.set_xlabel("natural accuracy (%)")
      axes.set_ylabel("" if i else "certified accuracy (%)")
      axes.margins(0.1)
    legend(figure, {arm: {**style, "linewidth": 1.0} for arm, style in styles.items()})
  return figure


def curves_over_eps(summary: Summary) -> "Figure":
  """Certified (upper row) and attacked accuracy over the test radius; a column a training radius.

  Args:
    summary: chosen rows with a curve are drawn; the natural accuracy stands at 0.
  """
  shown, styles = shown_eps(summary), line_styles(summary["arms"])
  with new_figure(5.2, _width(len(shown))) as figure:
    axes = figure.subplots(2, len(shown), squeeze=False, sharex="col", sharey=True)
    for column, eps in enumerate(shown):
      for row, name in enumerate(("certified", "attacked")):
        panel = axes[row, column]
        for arm, found in chosen(summary, eps).items():
          if found["curve"]:
            x = [0.0, *found["curve"]["eps"]]
            _band(panel, x, [found["test"]["natural"], *found["curve"][name]], styles[arm])
        panel.axvline(eps, **_RAMP)
        panel.set_ylabel("" if column else f"{name} accuracy (%)")
      axes[0, column].set_title(f"trained at eps {eps_name(eps)}")
      axes[1, column].set_xlabel("eps at test")
      axes[1, column].locator_params(axis="x", nbins=5)
    axes[0, 0].set_ylim(bottom=0)
    legend(figure, {**styles, "eps of training": _RAMP})
  return figure


def margin_histogram(summary: Summary) -> "Figure":
  """Share of test examples by their least certified margin; a panel an arm, a line a radius.

  Args:
    summary: chosen rows with a histogram are drawn, the first `MAX_PANELS` arms.
  """
  shown = shown_eps(summary)
  styles = line_styles([f"eps {eps_name(eps)}" for eps in shown], ordered=True)
  arms = {}
  for eps in shown:
    for arm, row in chosen(summary, eps).items():
      if row["margin"]:
        arms.setdefault(arm, {})[f"eps {eps_name(eps)}"] = row["margin"]
  arms = dict(list(arms.items())[:MAX_PANELS])
  with new_figure(2.0 * math.ceil(len(arms) / 3) + 0.7, _width(len(arms))) as figure:
    for axes, lines in _panels(figure, arms, "least certified margin", "share (%)"):
      for label, margin in lines.items():
        colour, share = styles[label]["color"], 100 * np.array(margin["share"])
        axes.stairs(share, margin["edges"], color=colour, linewidth=1.6)
        axes.stairs(share, margin["edges"], color=colour, alpha=0.2, fill=True)
      axes.axvline(0, **_RAMP)
    keys = {label: {"color": style["color"]} for label, style in styles.items()}
    legend(figure, {**keys, "certified to the right": _RAMP})
  return figure


def relu_states_over_training(summary: Summary, records: Records) -> "Figure":
  """Shares of active, inactive and undecided units over epochs; a row an arm, a column a layer.

  Args:
    summary: its chosen rows at the largest radius are drawn, the first `MAX_ROWS` with states.
    records: train records with "epoch" and "relu_states".
  """
  from matplotlib.lines import Line2D
  from matplotlib.patches import Patch

  found = training_of(summary, records, "relu_states", max(summary["eps"]), MAX_ROWS)
  layers = max(values.shape[2] for _, values in found.values())
  columns = shown_layers(layers)
  with new_figure(1.35 * len(found) + 1.0, _width(len(columns))) as figure:
    axes = figure.subplots(len(found), len(columns), squeeze=False, sharex=True, sharey=True)
    for row, (arm, (epochs, values)) in enumerate(found.items()):
      ramp = ramp_ends(summary, records, arm)
      for column, layer in enumerate(columns):
        panel = axes[row, column]
        if layer < values.shape[2]:
          _stack(panel, epochs, values[:, :, layer].mean(axis=0))
        for epoch in ramp:
          panel.axvline(epoch, **_RAMP)
        if not row:
          panel.set_title(f"layer {layer + 1}")
      axes[row, 0].set_ylabel(textwrap.fill(arm, 18, max_lines=2))
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("share of units (%)", fontsize=9)
    handles = [Patch(facecolor=colour, label=name) for name, colour in STATES.items()]
    legend_below(figure, [*handles, Line2D([], [], **_RAMP, label="eps starts, is reached")])
  return figure


def radius_by_layer(summary: Summary, records: Records) -> "Figure":
  """Mean radius of the bounds before each ReLU: over layers at the start, then over epochs.

  The first panel compares the arms at their first record; each other is an arm, a line a layer.

  Args:
    summary: its chosen rows at the largest radius are drawn, the first `MAX_PANELS` - 1.
    records: train records with "epoch" and "radius".
  """
  found = training_of(summary, records, "radius", max(summary["eps"]), MAX_PANELS - 1)
  layers = shown_layers(max(values.shape[2] for _, values in found.values()))
  arm_styles = line_styles(summary["arms"])
  styles = line_styles([f"layer {layer + 1}" for layer in layers], ordered=True)
  panels = {"at the first record": None, **found}
  lowest = _lowest_radius(summary, records, found)
  with new_figure(2.4 * math.ceil(len(panels) / 3) + 1.2) as figure:
    for i, (axes, content) in enumerate(_panels(figure, panels, "epoch", "mean radius", 1)):
      if i == 0:
        for arm, (_, values) in found.items():
          start = _positive(values[:, 0].mean(axis=0))
          axes.plot(np.arange(1, len(start) + 1), start, **arm_styles[arm])
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
      else:
        epochs, values = content
        for layer, style in zip(layers, styles.values(), strict=True):
          if layer < values.shape[2]:
            axes.plot(epochs, _positive(values[:, :, layer].mean(axis=0)), color=style["color"])
        axes.set_ylim(bottom=lowest and lowest / 1.5)
      log_axis(axes, "y", short_number)
    lines = {label: {"color": style["color"]} for label, style in styles.items()}
    legend(figure, {arm: arm_styles[arm] for arm in found} | lines)
  return figure


def training_curves(summary: Summary, records: Records) -> "Figure":
  """Loss, verified share and radius over epochs; a column a target radius, a line an arm.

  Args:
    summary: its chosen rows are drawn.
    records: train records with "epoch" and any of "loss", "verified" and "eps_now".
  """
  shown, styles = shown_eps(summary), line_styles(summary["arms"])
  fields = {"loss": "training loss", "verified": "verified (%)", "eps_now": "eps"}
  found = {(f, eps): training_of(summary, records, f, eps) for f in fields for eps in shown}
  fields = {f: name for f, name in fields.items() if any(found[f, eps] for eps in shown)}
  with new_figure(1.7 * len(fields) + 0.9, _width(len(shown))) as figure:
    axes = figure.subplots(len(fields), len(shown), squeeze=False, sharex="col", sharey="row")
    for row, (field, name) in enumerate(fields.items()):
      for column, eps in enumerate(shown):
        for arm, (epochs, values) in found[field, eps].items():
          values = values * (100 if field == "verified" else 1)
          _spread(axes[row, column], epochs, values, styles[arm], marker="")
      axes[row, 0].set_ylabel(name)
    for column, eps in enumerate(shown):
      axes[0, column].set_title(f"eps {eps_name(eps)}")
      axes[-1, column].set_xlabel("epoch")
    legend(figure, {arm: {**style, "marker": ""} for arm, style in styles.items()})
  return figure


def class_shares(summary: Summary) -> "Figure":
  """Natural, attacked and certified test accuracy by class, as nested bars; a panel an arm.

  Args:
    summary: its chosen rows at the largest radius with shares by class, the first `MAX_PANELS`.
  """
  from matplotlib.patches import Patch

  arms = dict(list(by_class(summary).items())[:MAX_PANELS])
  with new_figure(1.9 * math.ceil(len(arms) / 3) + 0.7, _width(len(arms))) as figure:
    for axes, shares in _panels(figure, arms, "class", "accuracy (%)"):
      for name, colour in zip(_CLASSES, CLASS_SHADES, strict=True):
        if name in shares:
          heights = 100 * np.array(shares[name], np.float64)
          axes.bar(range(len(heights)), heights, 0.8, color=colour)
      axes.xaxis.get_major_locator().set_params(integer=True)
      axes.grid(False, axis="x")
    pairs = zip(_CLASSES, CLASS_SHADES, strict=True)
    legend_below(figure, [Patch(facecolor=colour, label=name) for name, colour in pairs])
  return figure


def by_class(summary: Summary) -> dict[str, dict[str, Any]]:
  """{arm: shares by class of its chosen row at the largest radius}; empty if no class differs."""
  rows = chosen(summary, max(summary["eps"]))
  found = {arm: row["by_class"] for arm, row in rows.items() if row["by_class"]}
  seen = [shares[name] for shares in found.values() for name in _CLASSES if name in shares]
  return found if any(len(set(values)) > 1 for values in seen) else {}


def alive(summary: Summary, eps: float) -> list[Mapping[str, Any]]:
  """The rows at a radius in which some run did not collapse; all rows if there is none."""
  rows = [row for row in summary["rows"] if row["eps"] == eps and row["test"]["natural"]]
  return [row for row in rows if row["collapsed"] < row["test"]["natural"]["n"]] or rows


def shown_eps(summary: Summary) -> list[float]:
  """The radii that get a column: all, or the smallest, the middle and the largest."""
  return _evenly(summary["eps"], MAX_RADII)


def shown_layers(count: int) -> list[int]:
  """Positions of the layers that get a column: all, or `MAX_COLUMNS` from first to last."""
  return _evenly(range(count), MAX_COLUMNS)


def training_of(
  summary: Summary, records: Records, field: str, eps: float, most: int | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{arm: (epochs [T], values [seeds, T, ...])} of the chosen rows at the steps all seeds have.

  Args:
    summary: what `summarize` returned.
    records: its train records are read.
    field: a number or a list; arms without it are left out.
    eps: target radius.
    most: number of arms, None for all.
  """
  found = {}
  for arm, row in chosen(summary, eps).items():
    own = [
      record
      for record in records
      if record.get("event") == "train"
      and all(record[name] == row[name] for name in ("arm", "setting", "learning_rate", "eps"))
    ]
    runs = next(iter(curves(own, "train", field).values()), None)
    if runs:
      steps = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in runs.values())))
      values = np.stack([v[np.isin(s, steps)] for s, v in runs.values()])
      epochs = {record["step"]: record["epoch"] for record in own}
      found[arm] = np.array([epochs[step] for step in steps]), values
  return dict(list(found.items())[:most])


def ramp_ends(summary: Summary, records: Records, arm: str) -> list[float]:
  """Epochs at which the radius of an arm starts to grow and reaches its target; [] without a ramp.

  Args:
    summary: what `summarize` returned.
    records: train records with "epoch" and "eps_now", read at the largest radius.
    arm: name of the arm.
  """
  eps = max(summary["eps"])
  epochs, values = training_of(summary, records, "eps_now", eps).get(arm, ([], np.zeros((1, 0))))
  now = values[0]
  if len(now) < 2 or now[0] == now[-1]:
    return []
  grows, full = now > now[0], now >= 0.999 * now[-1]
  # The last record before the radius grows.
  return [float(epochs[grows.argmax() - 1]), float(epochs[full.argmax()])]


def _evenly(items: Sequence, most: int) -> list:
  if len(items) <= most:
    return list(items)
  return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _width(columns: int) -> float:
  return WIDTH * {1: 0.6, 2: 0.85}.get(columns, 1.0)


def _positive(values: np.ndarray) -> np.ndarray:
  """NaN is not drawn; a logarithmic axis has no place for 0."""
  return np.where(values > 0, values, np.nan)


def _lowest_radius(summary: Summary, records: Records, found) -> float | None:
  """The least radius of the bounds while eps is not 0: bounds of a point need no room."""
  now = training_of(summary, records, "eps_now", max(summary["eps"]))
  least = []
  for arm, (epochs, values) in found.items():
    grown = np.interp(epochs, now[arm][0], now[arm][1][0]) > 0 if arm in now else epochs > 0
    least += [v for v in values.mean(axis=0)[grown].ravel() if v > 0]
  return min(least, default=None)


def _panels(
  figure: "Figure", shown: Mapping[str, Any], xlabel: str, ylabel: str, own: int = 0
) -> Iterable[tuple["Axes", Any]]:
  """(axes, content) of each titled panel, in rows of three; one vertical scale but for `own`."""
  columns, first = min(3, len(shown)), None
  for i, (title, content) in enumerate(shown.items()):
    axes = figure.add_subplot(math.ceil(len(shown) / 3), columns, i + 1, sharey=first)
    first = first or (axes if i >= own else None)
    axes.set_title(textwrap.fill(title, 38, max_lines=2))
    axes.set_xlabel(xlabel if i + columns >= len(shown) else "")
    axes.set_ylabel("" if i % columns else ylabel)
    axes.tick_params(labelleft=i % columns == 0 or i <= own)
    yield axes, content


def _front(axes: "Axes", rows, style: Style) -> None:
  points = []
  for row in rows:
    natural, certified = row["test"]["natural"], row["test"]["certified"]
    if natural is None or certified is None:
      continue
    x, y = 100 * natural["mean"], 100 * certified["mean"]
    look = {"color": style["color"], "marker": style["marker"], "markersize": 5}
    if not row["front"]:
      axes.plot(x, y, **look, alpha=0.4)
      continue
    points.append((x, y))
    bars = [100 * (stat["std"] or 0.0) for stat in (certified, natural)]
    axes.errorbar(x, y, *bars, fmt="none", ecolor=style["color"], elinewidth=0.8)
    axes.plot(x, y, **{**look, "markersize": 9 if row["chosen"] else 5})
  if points:
    axes.plot(*zip(*sorted(points), strict=True), color=style["color"], linewidth=1.0)


def _band(axes: "Axes", x, stats, style: Style) -> None:
  mean = 100 * np.array([stat["mean"] if stat else np.nan for stat in stats])
  spread = 100 * np.array([(stat and stat["std"]) or 0.0 for stat in stats])
  axes.plot(x, mean, **{**style, "markersize": 3.5})
  axes.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0)


def _spread(axes: "Axes", x, values: np.ndarray, style: Style, **changes) -> None:
  """The mean over axis 0 and, of two seeds or more, the standard deviation."""
  mean = values.mean(axis=0)
  axes.plot(x, mean, **{**style, **changes})
  if len(values) > 1:
    spread = values.std(axis=0, ddof=1)
    axes.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0)


def _stack(axes: "Axes", epochs, states: np.ndarray) -> None:
  """States [T, 3] as stacked shares; counts are divided by their sum."""
  total = states.sum(axis=1, keepdims=True)
  shares = 100 * states / np.where(total > 0, total, 1)
  axes.stackplot(epochs, shares.T, colors=list(STATES.values()), linewidth=0)
  axes.set(ylim=(0, 100), yticks=(0, 50, 100))
  axes.set_xlim(epochs[0], epochs[-1] + (epochs[-1] == epochs[0]))
  axes.locator_params(axis="x", nbins=3)
