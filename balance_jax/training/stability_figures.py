"""Plots of a stability experiment; every function takes `summarize`'s result, returns a figure.

What has an order (sizes, learning rates) is coloured from blue to gold, see `stability_styles`;
what has none (architectures, settings) as methods are in `mixture_figures`. Every line has a marker
as well. Black takes the page's text colour, see `report`.
"""

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from balance_jax.stability.trends import UNSTABLE_MAX_LOGIT
from balance_jax.training.mixture_figures import WIDTH, new_figure
from balance_jax.training.stability_ladders import median_logit
from balance_jax.training.stability_styles import (
  HEAT,
  Style,
  blend,
  compact,
  ink_on,
  legend,
  line_styles,
  log_axis,
)
from balance_jax.training.stability_summary import short_number, size_name

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Summary = Mapping[str, Any]

MAX_PANELS = 6
_SIZE = "parameters without embeddings"


def loss_curves(summary: Summary) -> "Figure":
  """Final loss over learning rate, mean and spread over seeds; see `panels` for what a line is.

  Args:
    summary: every curve is drawn that `panels` takes.
  """
  shown, styles = panels(summary)
  with new_figure(3.8 * _rows(shown) + 0.8) as figure:
    for axes, lines in _axes_of(figure, shown, "learning rate", "final loss (nats/token)"):
      for i, (label, curve) in enumerate(lines.items()):
        _loss_line(axes, curve, styles[label], shift=i - (len(lines) - 1) / 2)
      start = np.mean([loss for curve in lines.values() for loss in curve["init_loss"]])
      axes.axhline(start, color="#000000", linewidth=0.8, linestyle="dashed")
      log_axis(axes, "x", "{:g}".format)
    extra = {"initial loss": _ink("dashed"), "diverged (counts as initial loss)": _ink("", "x")}
    lost = any(sum(curve["diverged"]) for _, lines in shown for curve in lines.values())
    legend(figure, {**styles, **dict(itertools.islice(extra.items(), 2 if lost else 1))})
  return figure


def logit_curves(summary: Summary) -> "Figure":
  """Largest attention logit of block 0 at the probe step over learning rate, median over seeds.

  Args:
    summary: as `loss_curves`; curves without attention logits are left out.
  """
  shown, styles = panels(summary)
  with new_figure(3.0 * _rows(shown) + 0.8) as figure:
    for axes, lines in _axes_of(figure, shown, "learning rate", "largest attention logit"):
      for label, curve in lines.items():
        if curve["max_logit"]:
          axes.plot(curve["learning_rates"], _medians(curve["max_logit"]), **styles[label])
      _limit(axes)
      log_axis(axes, "x", "{:g}".format)
      log_axis(axes, "y", short_number)
    legend(figure, {**styles, **_LIMIT_KEY})
  return figure


def sensitivity_over_size(summary: Summary) -> "Figure":
  """Sensitivity over parameters, mean and standard deviation over seeds.

  A line is an architecture or, where there are several settings, a setting in its architecture's
  panel. Sizes that grow in width or in depth only are lines of their own. With one size, a row.

  Args:
    summary: all curves are drawn.
  """
  curves = summary["curves"]
  if len(_sizes(curves)) == 1:
    return _sensitivity_rows(curves)
  by_setting = len(_unique(curves, "intervention")) > 1
  groups = _by(curves, "architecture") if by_setting else {"": curves}
  groups = {
    title: {
      label + suffix: line
      for label, found in _by(members, "intervention" if by_setting else "architecture").items()
      for suffix, line in _series(found).items()
    }
    for title, members in itertools.islice(groups.items(), MAX_PANELS)
  }
  styles = line_styles(dict.fromkeys(label for lines in groups.values() for label in lines))
  with new_figure(3.2 * _rows(groups) + 0.9) as figure:
    for axes, lines in _axes_of(figure, groups.items(), _SIZE, "learning-rate sensitivity S"):
      for label, line in lines.items():
        _error_line(axes, [curve["parameters"] for curve in line], line, styles[label])
      axes.set_ylim(bottom=0)
      log_axis(axes, "x", compact)
    legend(figure, styles)
  return figure


def logit_ladders(summary: Summary) -> "Figure":
  """Largest attention logit over parameters, a line a learning rate, with its trend.

  A panel is an architecture and setting, the first `MAX_PANELS` of them.

  Args:
    summary: its ladders are drawn; there must be one.
  """
  ladders = summary["ladders"]
  several = len(_unique(ladders, "intervention")) > 1
  groups = {}
  for ladder in ladders:
    title = f"{ladder['architecture']}, {ladder['intervention']}" if several else None
    groups.setdefault(title or ladder["architecture"], []).append(ladder)
  groups = dict(itertools.islice(groups.items(), MAX_PANELS))
  styles = _rate_styles(ladder["learning_rate"] for ladder in ladders)
  held = any(ladder["held_back"] for ladder in ladders)
  values = [v for ladder in ladders for v in ladder["max_logit"] if v is not None and v > 0]
  with new_figure(3.4 * _rows(groups) + 0.9) as figure:
    for axes, found in _axes_of(figure, groups.items(), _SIZE, "largest attention logit"):
      # A steep trend must not press the measurements together.
      axes.set_ylim(min(values, default=1) / 2, 5 * max([*values, UNSTABLE_MAX_LOGIT]))
      for ladder in found:
        _ladder_line(axes, ladder, styles[_rate_label(ladder["learning_rate"])])
      _limit(axes)
      log_axis(axes, "x", compact)
      log_axis(axes, "y", short_number)
    extra = {"trend": {**_ink("dashed"), "linewidth": 1.0}}
    extra |= {"held back": {**_ink("", "*"), "markersize": 10}} if held else {}
    legend(figure, {**styles, **extra, **_LIMIT_KEY})
  return figure


def setting_map(summary: Summary) -> "Figure":
  """Mean final loss by setting and learning rate; a panel an architecture and size.

  Args:
    summary: its heat maps are drawn, the last `MAX_PANELS`; there must be one.
  """
  maps = summary["heat"][-MAX_PANELS:]
  known = [loss for heat in maps for row in heat["loss"] for loss in row if loss is not None]
  rows = max(len(heat["interventions"]) for heat in maps)
  columns = min(2, len(maps))
  with new_figure((0.27 * rows + 0.85) * math.ceil(len(maps) / columns)) as figure:
    for i, heat in enumerate(maps):
      axes = figure.add_subplot(math.ceil(len(maps) / columns), columns, i + 1)
      _cells(axes, heat, min(known), max(known))
      axes.set_title(f"{heat['architecture']}, {size_name(heat)}")
      if i % columns and heat["interventions"] == maps[i - 1]["interventions"]:
        axes.tick_params(labelleft=False)
      if i + columns >= len(maps):
        axes.set_xlabel("learning rate")
  return figure


def gradient_ladders(summary: Summary, eps: float = 1e-8) -> "Figure":
  """Root mean square of one tensor's gradient over parameters, a line a learning rate.

  Args:
    summary: curves of the first setting whose grad_rms is known, the first tensor in it.
    eps: of Adam, drawn as a line: gradients of that size no longer move the weights.
  """
  curves = [c for c in _usual(summary) if c["grad_rms"]]
  tensor = next(iter(curves[0]["grad_rms"]))
  groups = dict(itertools.islice(_by(curves, "architecture").items(), MAX_PANELS))
  styles = _rate_styles(rate for curve in curves for rate in curve["learning_rates"])
  with new_figure(3.2 * _rows(groups) + 0.9) as figure:
    for axes, found in _axes_of(figure, groups.items(), _SIZE, f"gradient RMS of {tensor}"):
      points = {}
      for curve in found:
        sizes = _medians(curve["grad_rms"].get(tensor) or [[None] * len(curve["learning_rates"])])
        for rate, size in zip(curve["learning_rates"], sizes, strict=True):
          points.setdefault(_rate_label(rate), []).append((curve["parameters"], size))
      for label, line in points.items():
        axes.plot(*zip(*line, strict=True), **styles[label])
      axes.axhline(eps, color="#000000", linewidth=0.8)
      log_axis(axes, "x", compact)
      log_axis(axes, "y", short_number)
    legend(figure, {**styles, f"eps of Adam, {short_number(eps)}": _ink("solid")})
  return figure


def has_gradient_ladder(summary: Summary) -> bool:
  """Whether `gradient_ladders` has two sizes to draw."""
  return len(_sizes(curve for curve in _usual(summary) if curve["grad_rms"])) > 1


def panels(summary: Summary) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Style]]:
  """What the plots over learning rate show, so that a line always answers one question.

  With several sizes a panel is an architecture and a line a size; with one size there is one
  panel, with a line an architecture; with one architecture a line a setting. Settings other than
  the first are left out unless they are the lines.

  Returns:
    [(title, {label: curve})], at most `MAX_PANELS`, and the style of each label.
  """
  usual = _usual(summary)
  sizes = {size_name(curve): None for curve in sorted(usual, key=lambda c: c["parameters"])}
  if len(sizes) > 1:
    shown = [
      (architecture, {size_name(curve): curve for curve in found})
      for architecture, found in _by(usual, "architecture").items()
    ]
    return shown[:MAX_PANELS], line_styles(sizes, ordered=True)
  lines = summary["curves"] if len(usual) == 1 else usual
  field = "intervention" if len(usual) == 1 else "architecture"
  lines = {curve[field]: curve for curve in lines}
  title = usual[0]["architecture"] + ", " if len(usual) == 1 else ""
  return [(title + size_name(usual[0]), lines)], line_styles(lines)


def _rate_styles(rates: Iterable[float]) -> dict[str, Style]:
  return line_styles([_rate_label(rate) for rate in sorted(set(rates))], ordered=True)


_LIMIT_KEY = {
  f"{short_number(UNSTABLE_MAX_LOGIT)}: unstable above": {
    "color": "#000000",
    "linestyle": "dashdot",
    "linewidth": 0.8,
  }
}


def _ink(linestyle: str, marker: str = "") -> Style:
  return {"color": "#000000", "linestyle": linestyle, "marker": marker, "linewidth": 0.8}


def _rate_label(rate: float) -> str:
  return f"rate {rate:g}"


def _unique(entries, field: str) -> list:
  return list(dict.fromkeys(entry[field] for entry in entries))


def _by(entries, field: str) -> dict[str, list]:
  return {name: [e for e in entries if e[field] == name] for name in _unique(entries, field)}


def _usual(summary: Summary) -> list:
  """The curves of the first setting."""
  return next(iter(_by(summary["curves"], "intervention").values()))


def _sizes(curves) -> set:
  return {(curve["width"], curve["depth"]) for curve in curves}


def _medians(rows) -> list[float]:
  """[S][K] -> [K]; NaN is not drawn, nor is what a logarithmic axis cannot show."""
  medians = [median_logit(column) for column in zip(*rows, strict=True)]
  return [median if median and median > 0 else math.nan for median in medians]


def _series(curves) -> dict[str, list]:
  """{suffix of the label: curves}: one line if sizes grow together, else by width and by depth."""
  curves = sorted(curves, key=lambda curve: curve["parameters"])
  pairs = [(curve["width"], curve["depth"]) for curve in curves]
  if all(a <= b and c <= d for (a, c), (b, d) in itertools.pairwise(pairs)):
    return {"": curves}
  lines = {
    f", {field} {value}": found
    for field in ("width", "depth")
    for value, found in _by(curves, field).items()
    if len(found) > 1
  }
  drawn = [curve for found in lines.values() for curve in found]
  single = [curve for curve in curves if curve not in drawn]
  return lines | ({", other": single} if single else {})


def _rows(shown) -> int:
  return math.ceil(len(shown) / 3)


def _axes_of(figure: "Figure", shown, xlabel: str, ylabel: str):
  """(axes, content) for each (title, content), in rows of three with one vertical scale."""
  columns = min(3, len(shown))
  if columns == 1:
    figure.set_figwidth(0.72 * WIDTH)
  first = None
  for i, (title, content) in enumerate(shown):
    axes = figure.add_subplot(_rows(shown), columns, i + 1, sharey=first)
    first = first or axes
    axes.set_title(textwrap.fill(title, 38, max_lines=2))
    axes.set_xlabel(xlabel)
    if i % columns:
      axes.tick_params(labelleft=False)
    else:
      axes.set_ylabel(ylabel)
    yield axes, content


def _limit(axes: "Axes") -> None:
  axes.axhline(UNSTABLE_MAX_LOGIT, zorder=1, **next(iter(_LIMIT_KEY.values())))


def _loss_line(axes: "Axes", curve, style: Style, shift: float) -> None:
  rates, mean = np.array(curve["learning_rates"]), np.array(curve["mean"])
  axes.plot(rates, mean, **style)
  if curve["std"]:
    spread = np.array(curve["std"])
    colour = style["color"]
    axes.fill_between(rates, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
  lost = np.array(curve["diverged"]) > 0
  # Beside each other, because the initial losses of all sizes are nearly the same.
  start = np.full(lost.sum(), np.mean(curve["init_loss"]))
  axes.plot(
    rates[lost] * 1.12**shift, start, color=style["color"], linestyle="", marker="x", markersize=7
  )


def _error_line(axes: "Axes", x, curves, style: Style) -> None:
  stats = [curve["sensitivity"] for curve in curves]
  spread = [stat["std"] or 0.0 for stat in stats]
  axes.errorbar(x, [stat["mean"] for stat in stats], spread, **style, elinewidth=1.0, capsize=2)


def _sensitivity_rows(curves) -> "Figure":
  several = len(_unique(curves, "intervention")) > 1
  names = _unique(curves, "architecture")
  with new_figure(0.28 * len(curves) + 1.1, WIDTH * 0.8) as figure:
    axes = figure.add_subplot()
    for row, curve in enumerate(curves):
      style = line_styles(names)[curve["architecture"]]
      stat = curve["sensitivity"]
      style = {"color": style["color"], "marker": style["marker"], "linestyle": ""}
      axes.errorbar(stat["mean"], row, xerr=stat["std"] or 0.0, **style, elinewidth=1.0, capsize=2)
    labels = [
      f"{c['architecture']}, {c['intervention']}" if several else c["architecture"] for c in curves
    ]
    axes.set_yticks(range(len(curves)), labels)
    axes.set(ylim=(len(curves) - 0.4, -0.6), xlabel="learning-rate sensitivity S")
    axes.set_xlim(left=0)
  return figure


def _ladder_line(axes: "Axes", ladder, style: Style) -> None:
  sizes, trend = np.array(ladder["parameters"], np.float64), ladder["trend"]
  values = np.array([value or np.nan for value in ladder["max_logit"]], np.float64)
  kept = len(sizes) - bool(ladder["held_back"])
  axes.plot(sizes[:kept], values[:kept], **{**style, "linestyle": ""})
  star = {"color": style["color"], "marker": "*", "markersize": 11, "linestyle": ""}
  if kept < len(sizes) and np.isnan(values[-1]):
    # Unstable without a number: hollow, at the upper edge.
    axes.plot(sizes[-1], axes.get_ylim()[1] / 1.5, **star, markerfacecolor="none")
  axes.plot(sizes[kept:], values[kept:], **star)
  if trend:
    # Up to the held-back size, or as far beyond the last one as that is from the one before.
    end = sizes[-1] if ladder["held_back"] else sizes[-1] ** 2 / sizes[-2]
    x = np.geomspace(sizes[0], end)
    logs = np.polynomial.polynomial.polyval(np.log10(x), trend["coefficients"])
    # Far outside the panel there is nothing to see, and no float for it either.
    axes.plot(x, 10.0 ** np.clip(logs, -30, 30), color=style["color"], linewidth=1.0, ls="dashed")


def _cells(axes: "Axes", heat, low: float, high: float) -> None:
  losses = np.array(heat["loss"], np.float64)
  # The square root spreads the good losses; those that diverged are far above.
  depth = np.sqrt((losses - low) / max(high - low, 1e-9))
  for r, c in np.ndindex(losses.shape):
    if np.isnan(losses[r, c]):
      continue
    (colour,) = blend(HEAT, [depth[r, c]])
    axes.fill_between([c - 0.5, c + 0.5], r - 0.5, r + 0.5, color=colour, linewidth=0)
    text = f"{losses[r, c]:.2f}" + ("×" if heat["diverged"][r][c] else "")
    axes.text(c, r, text, color=ink_on(colour), ha="center", va="center", fontsize=7.5)
  axes.set_xticks(range(losses.shape[1]), [f"{rate:g}" for rate in heat["learning_rates"]])
  axes.set_yticks(range(len(losses)), heat["interventions"])
  axes.set(xlim=(-0.5, losses.shape[1] - 0.5), ylim=(len(losses) - 0.5, -0.5))
  axes.tick_params(length=0, labelsize=8)
  axes.grid(False)
  axes.spines[:].set_visible(False)
