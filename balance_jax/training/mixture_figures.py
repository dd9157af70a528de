"""Plots of a mixture experiment; every function takes records and returns a matplotlib figure.

A method has the same colour and marker in all of them. The colours keep 3:1 contrast on a light and
on a dark page, and stay apart in simulated colour blindness (both are tested). Black stands for
"ink" and takes the page's text colour, see `report`.
"""

import contextlib
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from balance_jax.training.mixture_summary import Curves, Groups, curves, half_curves

if TYPE_CHECKING:
  from matplotlib.artist import Artist
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

PALETTE = ("#506795", "#d47d25", "#57a2a2", "#9a25d4", "#95505c", "#b079e7", "#6f6325")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("solid", "dashed", "dotted", "dashdot")
# High-resource groups are blue, low-resource groups orange, the smaller the paler.
HIGH_SHADES, LOW_SHADES = ("#33659a", "#a9c4de"), ("#b35a12", "#f3c98b")

# More panels than this would be too small to read: the largest and the smallest groups are shown.
MAX_PANELS = 12
WIDTH = 10.0  # inches; the page shows an inch as 96 pixels

_STYLE = {
  "font.size": 9,
  "axes.titlesize": 9,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.linewidth": 0.6,
  "axes.grid": True,
  "grid.color": "#808890",
  "grid.alpha": 0.25,
  "grid.linewidth": 0.5,
  "xtick.major.width": 0.6,
  "ytick.major.width": 0.6,
  "legend.frameon": False,
  "lines.linewidth": 1.6,
  "lines.markersize": 5,
}


def method_styles(records: Records) -> dict[str, dict[str, Any]]:
  """Colour, marker and dash of each method, by the order of the methods' first records.

  Args:
    records: all records of the experiment.

  Returns:
    {method: {"color", "marker", "linestyle"}}.
  """
  methods = dict.fromkeys(record["method"] for record in records)
  return {
    method: {
      "color": PALETTE[i % len(PALETTE)],
      # Shifted by one each time the colours start again, so that the pair is new.
      "marker": MARKERS[(i + i // len(PALETTE)) % len(MARKERS)],
      "linestyle": DASHES[i // len(PALETTE) % len(DASHES)],
    }
    for i, method in enumerate(methods)
  }


def shown_groups(split: Groups) -> list[int]:
  """Positions of the groups that get a panel, by falling size: all, or both ends of the order."""
  order = split.by_size
  if len(order) <= MAX_PANELS:
    return order
  return order[: MAX_PANELS // 2] + order[-MAX_PANELS // 2 :]


def loss_curves(records: Records, split: Groups) -> "Figure":
  """Validation loss over steps: a panel a group, a line a method, mean and spread over seeds.

  Args:
    records: the eval records are drawn.
    split: the groups.
  """
  evals = curves(records, "eval", "group_loss")
  styles, shown = method_styles(records), shown_groups(split)
  with new_figure(_rows(len(shown), 4) * 1.9 + 0.6) as figure:
    for i, k in enumerate(shown):
      axes = figure.add_subplot(_rows(len(shown), 4), min(4, len(shown)), i + 1)
      lines = [
        _line_with_band(axes, runs, styles[method], lambda values, k=k: values[:, k])
        for method, runs in evals.items()
      ]
      _fit_losses(axes, lines)
      half = "high" if k in split.half("high") else "low"
      title = f"{split.names[k]}  ({half}, {_share(split, k)})"
      axes.set_title(textwrap.fill(title, 30, max_lines=2))
      if i % 4 == 0:
        axes.set_ylabel("loss (nats/byte)")
      if i + 4 >= len(shown):
        axes.set_xlabel("step")
    _method_legend(figure, {method: styles[method] for method in evals}, marker=False)
  return figure


def mixture_over_time(records: Records, split: Groups) -> "Figure":
  """Shares of the groups over steps: a column a method, p (optimised) above r (drawn).

  Args:
    records: the train records of each method's first seed are drawn.
    split: the groups.
  """
  from matplotlib.patches import Patch

  shares = {name: curves(records, "train", name) for name in ("p", "r")}
  methods = list(shares["p"])
  bands = _bands(split)
  # A column is as wide as its title.
  columns = max(1, min(6, len(methods), int(105 / (max(map(len, methods), default=0) + 2))))
  blocks = math.ceil(len(methods) / columns)
  with new_figure(2 * blocks * 1.55 + 0.7) as figure:
    for i, method in enumerate(methods):
      for below, name in enumerate(("p", "r")):
        row = 2 * (i // columns) + below
        axes = figure.add_subplot(2 * blocks, columns, row * columns + i % columns + 1)
        if method in shares[name]:
          _, (steps, values) = next(iter(shares[name][method].items()))
          stack = [values[:, members].sum(axis=1) for _, members, _ in bands]
          axes.stackplot(steps, stack, colors=[colour for _, _, colour in bands], linewidth=0)
          axes.set_xlim(steps[0], steps[-1] + (steps[-1] == steps[0]))
        axes.set(ylim=(0, 1), yticks=(0, 0.5, 1))
        axes.locator_params(axis="x", nbins=3)
        axes.tick_params(labelbottom=below == 1, labelleft=i % columns == 0)
        axes.set_title(method if below == 0 else "")
        if i % columns == 0:
          axes.set_ylabel(f"{name}: share {'optimised' if name == 'p' else 'drawn'}")
        if below:
          axes.set_xlabel("step")
    legend_below(figure, [Patch(facecolor=colour, label=label) for label, _, colour in bands])
  return figure


def epochs_seen(records: Records, split: Groups) -> "Figure":
  """How often each group's data was seen at the end of training, one mark a method.

  Args:
    records: the last train record of each run is drawn, mean over seeds.
    split: the groups.
  """
  train = curves(records, "train", "epochs")
  styles, shown = method_styles(records), shown_groups(split)
  final = {
    method: np.nanmean([values[-1] for _, values in runs.values()], axis=0)
    for method, runs in train.items()
  }
  with new_figure(0.26 * len(shown) + 1.5, WIDTH * 0.8) as figure:
    axes = figure.add_subplot()
    rows = np.arange(len(shown))
    for i, (method, epochs) in enumerate(final.items()):
      # Marks of methods with equal epochs lie side by side, not on top of each other.
      offset = 0.6 * ((i + 0.5) / len(final) - 0.5)
      axes.plot(epochs[shown], rows + offset, **{**styles[method], "linestyle": "none"})
    axes.axvline(1, color="#000000", linewidth=0.8)
    if any((epochs[shown] == 0).any() for epochs in final.values()):
      smallest = min((v for epochs in final.values() for v in epochs if v > 0), default=1.0)
      axes.set_xscale("symlog", linthresh=smallest)
    else:
      plain_log_axis(axes, "x")
    axes.set_yticks(rows, [f"{split.names[k]} ({_share(split, k)})" for k in shown])
    axes.set(ylim=(len(shown) - 0.4, -0.6), xlabel="epochs seen (passes over the group's data)")
    _method_legend(figure, {method: styles[method] for method in final}, line=False)
  return figure


def gradient_variance(records: Records) -> "Figure":
  """Variance of a mini-batch gradient: predicted from the groups' moments against observed.

  Args:
    records: the moments records are drawn, one mark each; both axes are logarithmic.
  """
  styles = method_styles(records)
  points = {}
  for record in records:
    if record.get("event") == "moments":
      pair = (record.get("observed_variance"), record.get("predicted_variance"))
      if all(value is not None and value > 0 for value in pair):
        points.setdefault(record["method"], []).append(pair)
  with new_figure(5.2, 6.4) as figure:
    axes = figure.add_subplot()
    for method, pairs in points.items():
      axes.plot(*zip(*pairs, strict=True), **{**styles[method], "linestyle": "none"}, alpha=0.8)
    values = [value for pairs in points.values() for pair in pairs for value in pair] or [1.0]
    ends = (min(values) / 1.5, max(values) * 1.5)
    axes.plot(ends, ends, color="#000000", linewidth=0.8, zorder=1)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    for which in ("x", "y"):
      plain_log_axis(axes, which)
    axes.set(
      xlabel="observed variance (squared gradient norm)", ylabel="predicted variance (same unit)"
    )
    _method_legend(figure, {method: styles[method] for method in points}, line=False)
  return figure


def trade_off(records: Records, split: Groups) -> "Figure":
  """Loss of the high-resource against the low-resource half: at the best step and at the end.

  The best step of a run is the evaluation with the lowest mean loss over both halves.

  Args:
    records: the eval records are drawn, mean over seeds, bars of one standard deviation.
    split: the groups.
  """
  evals = curves(records, "eval", "group_loss")
  halves = half_curves(evals, split)
  styles = method_styles(records)
  with new_figure(5.2, 6.8) as figure:
    axes = figure.add_subplot()
    for method in evals:
      best, final = _trade_off_points(halves, method)
      style = {**styles[method], "linestyle": "none"}
      (x0, y0), (x1, y1) = best.mean(axis=0), final.mean(axis=0)
      axes.plot([x0, x1], [y0, y1], color=style["color"], linewidth=0.8)
      axes.plot(x0, y0, **style, markerfacecolor="none", markersize=8)
      if len(final) > 1:
        x_err, y_err = final.std(axis=0, ddof=1)
        axes.errorbar(x1, y1, y_err, x_err, ecolor=style["color"], elinewidth=0.8, fmt="none")
      axes.plot(x1, y1, **style, markersize=8)
    axes.margins(0.08)
    axes.set_xlabel("high-resource loss (nats/byte)")
    axes.set_ylabel("low-resource loss (nats/byte)")
    _method_legend(figure, {method: styles[method] for method in evals}, line=False)
  return figure


def _trade_off_points(halves: Mapping[str, Curves], method: str) -> tuple[np.ndarray, np.ndarray]:
  """(best, final), each [seeds, 2]: high-resource and low-resource loss."""
  best, final = [], []
  for seed, (_, high) in halves["high"][method].items():
    pairs = np.stack([high, halves["low"][method][seed][1]], axis=1)
    total = np.where(np.isnan(pairs).any(axis=1), np.inf, pairs.sum(axis=1))
    best.append(pairs[total.argmin()])
    final.append(pairs[-1])
  return np.array(best), np.array(final)


@contextlib.contextmanager
def new_figure(height: float, width: float = WIDTH):
  """An empty figure in the common style; drawn without pyplot, so no window and no global state."""
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context({"axes.prop_cycle": matplotlib.cycler(color=PALETTE), **_STYLE}):
    yield Figure(figsize=(width, height), layout="constrained")


def plain_log_axis(axes: "Axes", which: str) -> None:
  """A logarithmic axis labelled 0.5, 1, 2 instead of with powers, or 0.1, 1, 10 if it is long."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  axes.set(**{f"{which}scale": "log"})
  axis = getattr(axes, f"{which}axis")
  low, high = sorted(axis.get_view_interval())
  axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
  axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
  axis.set_minor_formatter(NullFormatter())


def _rows(panels: int, columns: int) -> int:
  return math.ceil(panels / columns)


def _share(split: Groups, k: int) -> str:
  percent = 100 * split.sizes[k] / sum(split.sizes)
  return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _line_with_band(axes: "Axes", runs, style, select) -> tuple[np.ndarray, np.ndarray]:
  """Draws mean and standard deviation over the seeds at the steps that all of them have."""
  steps = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in runs.values())))
  values = np.stack([select(v)[np.isin(s, steps)] for s, v in runs.values()])
  mean = values.mean(axis=0)
  axes.plot(steps, mean, color=style["color"], linestyle=style["linestyle"])
  if len(values) > 1:
    spread = values.std(axis=0, ddof=1)
    axes.fill_between(
      steps, mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0
    )
  return np.array(steps), mean


def _fit_losses(axes: "Axes", lines: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
  """Cuts the loss axis at the top of the last four fifths; an untrained model's loss is far above.

  Args:
    axes: the panel.
    lines: (steps, mean losses) of each line in it.
  """
  values = [mean[np.isfinite(mean)] for _, mean in lines]
  late = [mean[(steps >= steps[-1:] / 5) & np.isfinite(mean)] for steps, mean in lines]
  values, late = np.concatenate(values), np.concatenate(late)
  if late.size:
    low, high = values.min(), late.max()
    margin = 0.06 * (high - low) + 1e-3 * abs(high) + 1e-9
    axes.set_ylim(low - margin, high + margin)


def _bands(split: Groups) -> list[tuple[str, list[int], str]]:
  """(label, positions, colour) of the layers of a mixture plot, largest group first.

  Of many groups the three largest and the three smallest have their own layer; the others of each
  half share one.
  """
  high = [(split.names[k], [k]) for k in split.half("high")]
  low = [(split.names[k], [k]) for k in split.half("low")]
  if len(split.names) > MAX_PANELS:
    rest_high, rest_low = split.half("high")[3:], split.half("low")[:-3]
    high = [*high[:3], (f"{len(rest_high)} more high", rest_high)]
    low = [(f"{len(rest_low)} more low", rest_low), *low[-3:]]
  shades = _shades(*HIGH_SHADES, len(high)) + _shades(*LOW_SHADES, len(low))
  return [(*layer, shade) for layer, shade in zip(high + low, shades, strict=True)]


def _shades(start: str, end: str, count: int) -> list[str]:
  """`count` colours from `start` to `end`."""
  from matplotlib.colors import to_hex, to_rgb

  mixes = np.linspace(0, 1, count)[:, np.newaxis]
  return [to_hex(c) for c in (1 - mixes) * np.array([to_rgb(start)]) + mixes * to_rgb(end)]


def _method_legend(figure: "Figure", styles, *, line=True, marker=True) -> None:
  from matplotlib.lines import Line2D

  handles = []
  for method, style in styles.items():
    shape = {
      "linestyle": style["linestyle"] if line else "none",
      "marker": style["marker"] if marker else "none",
    }
    handles.append(Line2D([], [], color=style["color"], label=method, **shape))
  legend_below(figure, handles)


def legend_below(figure: "Figure", handles: Sequence["Artist"]) -> None:
  """One legend for all panels, outside of them, so that it hides nothing."""
  if not handles:
    return
  longest = max(len(handle.get_label()) for handle in handles)
  # Inches: a character of 9 points is about 0.07 wide, handle and gaps take 0.5.
  columns = int(figure.get_figwidth() / (0.07 * longest + 0.5))
  columns = max(1, min(columns, len(handles)))
  # Matplotlib fills a legend column by column; readers expect the order of the table in rows.
  handles = list(itertools.chain(*(handles[c::columns] for c in range(columns))))
  figure.legend(handles=handles, loc="outside upper left", ncols=columns)
