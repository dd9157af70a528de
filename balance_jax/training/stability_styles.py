"""Colours, axes and legend of the stability plots, beyond those of `mixture_figures`.

Sizes and learning rates run from blue over red to gold. Every colour keeps 3:1 contrast on a light
and on a dark page, and neighbours stay apart in simulated colour blindness (both are tested).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from balance_jax.training.mixture_figures import (
  DASHES,
  MARKERS,
  PALETTE,
  legend_below,
  plain_log_axis,
)

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Style = dict[str, Any]

SEQUENCE = ("#4355dc", "#8558aa", "#cb2268", "#a65b34", "#ad9102")
# From the lowest to the highest loss of a map, and the text on it. No black or white: they would
# turn around on a dark page, the cells do not.
HEAT = ("#e9f1f8", "#7fb0d6", "#1c4670")
ON_PALE, ON_DARK = "#05080b", "#fcfdfe"


def sequence(count: int) -> list[str]:
  """`count` colours from one end of `SEQUENCE` to the other."""
  return blend(SEQUENCE, np.linspace(0, 1, count))


def blend(stops: Sequence[str], where: Sequence[float]) -> list[str]:
  """Colours at places in [0, 1] of a line through the stops."""
  from matplotlib.colors import to_hex, to_rgb

  places = np.linspace(0, 1, len(stops))
  channels = np.array([to_rgb(stop) for stop in stops]).T
  return [to_hex([np.interp(x, places, channel) for channel in channels]) for x in where]


def ink_on(colour: str) -> str:
  """The colour of text that is easier to read on `colour`."""
  from matplotlib.colors import to_rgb

  linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)]
  # Where both have the same contrast (WCAG).
  return ON_PALE if np.dot([0.2126, 0.7152, 0.0722], linear) > 0.183 else ON_DARK


def line_styles(labels: Iterable[str], ordered: bool = False) -> dict[str, Style]:
  """Colour, marker and dash of each label; colours of `SEQUENCE` if the labels are `ordered`."""
  labels = list(labels)
  colours = sequence(len(labels)) if ordered else PALETTE
  return {
    label: {
      "color": colours[i % len(colours)],
      # Shifted by one each time the colours start again, so that the pair is new.
      "marker": MARKERS[(i + i // len(PALETTE)) % len(MARKERS)],
      "linestyle": DASHES[0 if ordered else i // len(PALETTE) % len(DASHES)],
    }
    for i, label in enumerate(labels)
  }


def compact(count: float) -> str:
  """A number of parameters in three digits.

  >>> compact(98304), compact(2.36e6)
  ('98.3k', '2.36M')
  """
  for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
    if count >= unit:
      return f"{count / unit:.3g}{name}"
  return f"{count:.3g}"


def log_axis(axes: "Axes", which: str, text: Callable[[float], str]) -> None:
  """A logarithmic axis, "x" or "y", labelled by `text`; to be called after the last line."""
  from matplotlib.ticker import FuncFormatter

  plain_log_axis(axes, which)
  getattr(axes, f"{which}axis").set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def legend(figure: "Figure", styles: Mapping[str, Style]) -> None:
  """One legend above all panels."""
  from matplotlib.lines import Line2D

  legend_below(figure, [Line2D([], [], label=label, **style) for label, style in styles.items()])
