"""Tests of the stability plots: what is drawn, and that its colours can be told apart."""

import itertools

import numpy as np
import pytest

from balance_jax.training import report
from balance_jax.training import stability_figures as figures
from balance_jax.training import stability_styles as styles
from balance_jax.training.stability_summary import summarize
from tests.training.stability_records import RATES, SIZES, make_records
from tests.training.test_mixture_figures import _BLIND, _XYZ, _lab, _linear

SETTINGS = ("default", "no decay", "eps 1e-6")


@pytest.fixture(scope="module")
def summary():
  return summarize(make_records(), hold_back_largest=True)


def _lines(axes, marker=None):
  """Lines of measurements: not the horizontal ones, and of a marker if asked for."""
  long = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
  return [line for line in long if marker is None or line.get_marker() == marker]


def _titles(figure):
  return [axes.get_title(loc="left") for axes in figure.axes]


def legend_below(figure):
  return {text.get_text() for text in figure.legends[0].get_texts()}


def test_loss_curves_show_mean_spread_start_and_divergence(summary):
  figure = figures.loss_curves(summary)
  assert _titles(figure) == ["plain", "qk_norm"]
  plain, tame = figure.axes
  names = ["32×1", "48×2", "64×2", "96×3"]
  assert legend_below(figure) == {*names, "initial loss", "diverged (counts as initial loss)"}
  curve = summary["curves"][3]
  drawn = [line for line in _lines(plain) if line.get_marker() != "x"]
  assert len(drawn) == 4
  np.testing.assert_array_equal(drawn[3].get_xdata(), RATES)
  np.testing.assert_allclose(drawn[3].get_ydata(), curve["mean"])
  band = plain.collections[3].get_paths()[0].vertices
  at_best = band[np.isclose(band[:, 0], 0.01), 1]
  np.testing.assert_allclose(np.ptp(at_best), 2 * curve["std"][3])
  crosses = [line.get_xdata() for line in _lines(plain, "x")]
  assert [len(x) for x in crosses] == [0, 0, 0, 1]
  assert crosses[3][0] == pytest.approx(0.3, rel=0.3)
  start = next(line for line in plain.lines if line.get_linestyle() == "--")
  starts = [loss for c in summary["curves"][:4] for loss in c["init_loss"]]
  np.testing.assert_allclose(start.get_ydata(), np.mean(starts))
  assert plain.get_ylim() == tame.get_ylim()
  assert plain.get_xscale() == "log"


def test_without_divergence_there_is_no_cross():
  figure = figures.loss_curves(summarize(make_records(diverge=False, seeds=1)))
  assert "diverged (counts as initial loss)" not in legend_below(figure)
  assert len(figure.axes[0].collections) == 0  # one seed has no band


@pytest.mark.parametrize(
  ("changes", "titles", "labels"),
  [
    ({}, ["plain", "qk_norm"], ["32×1", "48×2", "64×2", "96×3"]),
    ({"sizes": SIZES[:1]}, ["32×1"], ["plain", "qk_norm"]),
    ({"sizes": SIZES[:1], "settings": SETTINGS}, ["32×1"], ["plain", "qk_norm"]),
    (
      {"sizes": SIZES[:1], "settings": SETTINGS, "architectures": ["x"]},
      ["x, 32×1"],
      list(SETTINGS),
    ),
    ({"architectures": [f"a{i}" for i in range(9)]}, [f"a{i}" for i in range(6)], None),
  ],
)
def test_panels(changes, titles, labels):
  shown, style = figures.panels(summarize(make_records(seeds=1, **changes)))
  assert [title for title, _ in shown] == titles
  assert labels is None or list(style) == labels
  assert all(label in style for _, lines in shown for label in lines)


def test_logits_over_rates(summary):
  figure = figures.logit_curves(summary)
  line = _lines(figure.axes[0])[3]
  expected = [np.median([row[k] for row in summary["curves"][3]["max_logit"]]) for k in range(6)]
  np.testing.assert_allclose(line.get_ydata(), [*expected, np.nan])
  assert "1e4: unstable above" in legend_below(figure)
  assert figure.axes[0].get_yscale() == "log"


def test_sensitivity_over_size(summary):
  figure = figures.sensitivity_over_size(summary)
  (axes,) = figure.axes
  assert legend_below(figure) == {"plain", "qk_norm"}
  x, y = _lines(axes, "o")[0].get_data()
  assert list(x) == [c["parameters"] for c in summary["curves"][:4]]
  assert list(y) == [c["sensitivity"]["mean"] for c in summary["curves"][:4]]
  bars = axes.collections[0].get_segments()
  np.testing.assert_allclose(np.ptp(bars[3][:, 1]), 2 * summary["curves"][3]["sensitivity"]["std"])
  assert axes.get_ylim()[0] == 0


def test_sensitivity_of_settings_has_a_panel_an_architecture():
  records = make_records(seeds=1, sizes=SIZES[:2], settings=SETTINGS)
  figure = figures.sensitivity_over_size(summarize(records))
  assert _titles(figure) == ["plain", "qk_norm"]
  assert legend_below(figure) == set(SETTINGS)


def test_depth_and_width_are_lines_of_their_own():
  sizes = ((48, 1), (48, 2), (48, 4), (32, 2), (96, 2), (20, 9))
  records = make_records(seeds=1, sizes=sizes, architectures=["x"])
  figure = figures.sensitivity_over_size(summarize(records))
  assert legend_below(figure) == {"x, width 48", "x, depth 2", "x, other"}
  widths = [len(line.get_xdata()) for line in _lines(figure.axes[0], "o")]
  assert widths[0] == 3


def test_one_size_has_a_row_a_curve():
  summary = summarize(make_records(seeds=2, sizes=SIZES[:1], settings=SETTINGS))
  (axes,) = figures.sensitivity_over_size(summary).axes
  labels = [label.get_text() for label in axes.get_yticklabels()]
  assert labels == [f"{a}, {s}" for a in ("plain", "qk_norm") for s in SETTINGS]
  drawn = [line.get_xdata()[0] for line in _lines(axes) if line.get_marker() in ("o", "s")]
  assert drawn == [c["sensitivity"]["mean"] for c in summary["curves"]]


def test_ladders_show_the_held_back_size_and_its_prediction(summary):
  figure = figures.logit_ladders(summary)
  assert _titles(figure) == ["plain", "qk_norm"]
  rates = {f"rate {rate:g}" for rate in RATES}
  assert legend_below(figure) == rates | {"trend", "held back", "1e4: unstable above"}
  axes = figure.axes[0]
  ladder = summary["ladders"][5]
  assert ladder["learning_rate"] == 0.1
  fitted = [line for line in _lines(axes) if line.get_marker() != "*"][5]
  np.testing.assert_allclose(fitted.get_ydata(), ladder["max_logit"][:3])
  stars = [line for line in _lines(axes, "*") if line.get_markerfacecolor() != "none"]
  assert stars[5].get_xydata().tolist() == [[331_776, ladder["held_back"]["measured"]]]
  trends = [line for line in axes.lines if line.get_linestyle() == "--"]
  assert trends[5].get_xdata()[-1] == pytest.approx(331_776)
  assert trends[5].get_ydata()[-1] == pytest.approx(ladder["held_back"]["predicted"])
  # At rate 0.3 two of three seeds had diverged: a hollow star inside the panel.
  assert summary["ladders"][6]["held_back"]["measured"] is None
  (hollow,) = (line for line in _lines(axes, "*") if line.get_markerfacecolor() == "none")
  assert axes.get_ylim()[0] < hollow.get_ydata()[0] < axes.get_ylim()[1]


def test_ladders_look_one_size_ahead_without_a_held_back_one():
  summary = summarize(make_records(seeds=1, diverge=False))
  figure = figures.logit_ladders(summary)
  assert "held back" not in legend_below(figure)
  trend = next(line for line in figure.axes[0].lines if line.get_linestyle() == "--")
  assert trend.get_xdata()[-1] == pytest.approx(331_776**2 / 98_304)
  assert len(_lines(figure.axes[0])[0].get_xdata()) == 4


def test_a_steep_trend_does_not_squeeze_the_measurements():
  records = make_records(seeds=1, diverge=False, architectures=["x"])
  for record in records:
    if record["event"] == "train":
      record["max_logit_last"] = [1e4 * (record["parameters"] / 331_776) ** 3]
  axes = figures.logit_ladders(summarize(records)).axes[0]
  trend = next(line for line in axes.lines if line.get_linestyle() == "--")
  assert trend.get_ydata()[-1] > 3e5
  assert axes.get_ylim()[1] == pytest.approx(5e4)


def test_setting_map_writes_the_losses():
  records = make_records(sizes=SIZES[-2:], settings=SETTINGS)
  summary = summarize(records)
  figure = figures.setting_map(summary)
  assert _titles(figure) == ["plain, 64×2", "plain, 96×3", "qk_norm, 64×2", "qk_norm, 96×3"]
  axes = figure.axes[1]
  texts = [text.get_text() for text in axes.texts]
  heat = summary["heat"][1]
  expected = [
    f"{loss:.2f}" + "×" * (count > 0)
    for losses, counts in zip(heat["loss"], heat["diverged"], strict=True)
    for loss, count in zip(losses, counts, strict=True)
  ]
  assert texts == expected
  assert sum("×" in text for text in texts) == 3
  assert [label.get_text() for label in axes.get_xticklabels()] == [f"{r:g}" for r in RATES]
  fills = [c.get_facecolor()[0] for c in axes.collections]
  light = {text: fill.sum() for text, fill in zip(texts, fills, strict=True)}
  assert light[min(texts)] > light[max(texts)]


def test_gradient_ladders(summary):
  assert figures.has_gradient_ladder(summary)
  figure = figures.gradient_ladders(summary, eps=1e-6)
  assert "eps of Adam, 1e-6" in legend_below(figure)
  axes = figure.axes[0]
  line = _lines(axes)[2]
  assert line.get_label().startswith("_")
  expected = [np.median([r[2] for r in c["grad_rms"]["first_mlp"]]) for c in summary["curves"][:4]]
  np.testing.assert_allclose(line.get_ydata(), expected)
  assert axes.get_ylim()[0] < 1e-6
  for changes in ({"statistics": False}, {"sizes": SIZES[:1]}):
    assert not figures.has_gradient_ladder(summarize(make_records(seeds=1, **changes)))


def test_every_plot_survives_runs_that_all_diverged():
  records = make_records(seeds=1, settings=SETTINGS[:2])
  for record in records:
    if record["step"]:
      record |= {"loss": None, "max_logit_last": [None], "grad_rms": {"first_mlp": None}}
  summary = summarize(records, hold_back_largest=True)
  figures.loss_curves(summary).canvas.draw()
  figures.sensitivity_over_size(summary).canvas.draw()
  figures.setting_map(summary).canvas.draw()
  assert not figures.has_gradient_ladder(summary)
  assert summary["ladders"] == []


@pytest.mark.parametrize("count", [1, 2, 4, 7, 9])
@pytest.mark.parametrize("page", [report.LIGHT, report.DARK])
def test_contrast_of_ordered_colours(count, page):
  for name in styles.sequence(count):
    a, b = sorted((_XYZ[1] @ _linear(c) for c in (name, page["paper"])), reverse=True)
    assert (a + 0.05) / (b + 0.05) >= 3, name


@pytest.mark.parametrize(("count", "least"), [(3, 40), (4, 25), (7, 16)])
@pytest.mark.parametrize("blind", _BLIND)
def test_ordered_colours_stay_apart(blind, count, least):
  seen = [_lab(np.clip(_BLIND[blind] @ _linear(c), 0, 1)) for c in styles.sequence(count)]
  assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > least


def test_text_on_the_map_can_be_read():
  for colour in styles.blend(styles.HEAT, np.linspace(0, 1, 101)):
    pair = (_XYZ[1] @ _linear(c) for c in (colour, styles.ink_on(colour)))
    a, b = sorted(pair, reverse=True)
    assert (a + 0.05) / (b + 0.05) >= 4.4, colour


def test_labels_beyond_the_palette_differ():
  many = styles.line_styles(map(str, range(20)))
  assert len({(s["color"], s["marker"], s["linestyle"]) for s in many.values()}) == 20
