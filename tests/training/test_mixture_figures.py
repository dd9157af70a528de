"""Tests of the mixture plots: what is drawn, and that its colours can be told apart."""

import itertools

import numpy as np
import pytest

from balance_jax.training import mixture_figures as figures
from balance_jax.training import report
from balance_jax.training.mixture_summary import Groups
from tests.training.synthetic_records import GROUPS, METHODS, SIZES, make_records

SPLIT = Groups(GROUPS, SIZES)


@pytest.fixture(scope="module")
def records():
  return make_records(seeds=2, steps=200)


def _lines(axes, size=2):
  return [line for line in axes.lines if len(line.get_xdata()) >= size]


def test_loss_curves_show_mean_and_spread(records):
  figure = figures.loss_curves(records, SPLIT)
  assert len(figure.axes) == 8
  assert figure.axes[7].get_title(loc="left") == "rm  (low, 1.2 %)"
  lines = _lines(figure.axes[7])
  assert len(lines) == len(METHODS)
  finals = [
    record["group_loss"][7]
    for record in records
    if record["event"] == "eval" and record["method"] == METHODS[0] and record["step"] == 200
  ]
  np.testing.assert_allclose(lines[0].get_ydata()[-1], np.mean(finals))
  band = figure.axes[7].collections[0].get_paths()[0].vertices
  at_end = band[band[:, 0] == 200, 1]
  np.testing.assert_allclose(np.ptp(at_end), 2 * np.std(finals, ddof=1))


def test_loss_axis_keeps_the_lowest_and_drops_the_start():
  steps = np.arange(11)
  records = [
    {"event": "eval", "method": "x", "seed": 0, "step": int(s), "group_loss": [50.0 - s, 1.0]}
    for s in steps
  ]
  records[0]["group_loss"] = [1000.0, 0.5]
  high, low = figures.loss_curves(records, Groups(["a", "b"], [2, 1])).axes
  assert 48 < high.get_ylim()[1] < 60
  assert low.get_ylim()[0] < 0.5


def test_seeds_that_stopped_early_are_averaged_over_common_steps(records):
  cut = [r for r in records if r["seed"] == 0 or r["step"] <= 100]
  figure = figures.loss_curves(cut, SPLIT)
  assert _lines(figure.axes[0])[0].get_xdata()[-1] == 100


def test_mixture_stacks_to_one(records):
  figure = figures.mixture_over_time(records, SPLIT)
  assert len(figure.axes) == 2 * len(METHODS)
  assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == list(METHODS)
  for axes in figure.axes:
    assert len(axes.collections) == 8
    top = axes.collections[-1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(1)
  # scalarization: the lower panel (drawn) is the data's shares, the upper is not
  upper, lower = figure.axes[4:6]
  shares = [a.collections[0].get_paths()[0].vertices[:, 1].max() for a in (upper, lower)]
  assert shares[1] == pytest.approx(SIZES[0] / sum(SIZES))
  assert shares[0] < shares[1]


def test_epochs_are_the_last(records):
  axes = figures.epochs_seen(records, SPLIT).axes[0]
  drawn = next(line for line in axes.lines if len(line.get_xdata()) == 8)
  last = [
    r["epochs"]
    for r in records
    if r["event"] == "train" and r["method"] == METHODS[0] and r["step"] == 200
  ]
  np.testing.assert_allclose(drawn.get_xdata(), np.mean(last, axis=0))
  assert axes.get_xscale() == "log"


def test_epochs_of_a_group_never_drawn():
  train = {"event": "train", "method": "x", "seed": 0, "step": 1, "epochs": [2.0, 0.0]}
  axes = figures.epochs_seen([train], Groups(["a", "b"], [2, 1])).axes[0]
  assert axes.get_xscale() == "symlog"


def test_gradient_variance_has_a_diagonal_and_one_mark_a_record(records):
  axes = figures.gradient_variance(records).axes[0]
  *marks, diagonal = axes.lines
  np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
  moments = [r for r in records if r["event"] == "moments"]
  assert sum(len(line.get_xdata()) for line in marks) == len(moments)
  first = [r for r in moments if r["method"] == METHODS[0]]
  np.testing.assert_allclose(marks[0].get_xdata(), [r["observed_variance"] for r in first])
  np.testing.assert_allclose(marks[0].get_ydata(), [r["predicted_variance"] for r in first])


def test_log_axes_have_plain_labels_also_when_short():
  moments = {"event": "moments", "method": "x", "seed": 0, "step": 1, "predicted_variance": 1.1}
  figure = figures.gradient_variance([{**moments, "observed_variance": 1.0}])
  figure.canvas.draw()
  labels = figure.axes[0].get_xticklabels(which="both")
  assert {"1", ""} >= {label.get_text() for label in labels if 0.6 < label.get_position()[0] < 1.7}


def test_trade_off_by_hand():
  losses = [(9, 9), (3, 2), (2, 5)]
  records = [
    {"event": "eval", "method": "x", "seed": 0, "step": i, "group_loss": list(pair)}
    for i, pair in enumerate(losses)
  ]
  link, best, final = figures.trade_off(records, Groups(["a", "b"], [2, 1])).axes[0].lines
  assert (best.get_xdata()[0], best.get_ydata()[0]) == (3, 2)
  assert (final.get_xdata()[0], final.get_ydata()[0]) == (2, 5)
  assert (list(link.get_xdata()), list(link.get_ydata())) == ([3, 2], [2, 5])


def test_a_method_looks_the_same_everywhere(records):
  styles = figures.method_styles(records)
  assert list(styles) == list(METHODS)
  drawn = [
    figures.loss_curves(records, SPLIT),
    figures.epochs_seen(records, SPLIT),
    figures.gradient_variance(records),
    figures.trade_off(records, SPLIT),
  ]
  for figure in drawn:
    (legend,) = figure.legends
    seen = {
      text.get_text(): handle.get_color()
      for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    assert seen == {method: style["color"] for method, style in styles.items()}


def test_methods_beyond_the_palette_differ():
  styles = figures.method_styles([{"method": f"m{i}"} for i in range(20)])
  assert len({(s["color"], s["linestyle"]) for s in styles.values()}) == 20
  assert len({(s["color"], s["marker"]) for s in styles.values()}) == 20


def test_many_groups_show_both_ends():
  split = Groups([f"g{i}" for i in range(60)], list(range(60, 0, -1)))
  assert figures.shown_groups(split) == [*range(6), *range(54, 60)]
  records = make_records(groups=split.names, sizes=split.sizes, methods=["x"], seeds=1, steps=50)
  assert len(figures.loss_curves(records, split).axes) == figures.MAX_PANELS
  axes = figures.mixture_over_time(records, split).axes[0]
  assert len(axes.collections) == 8  # 3 largest, others high, others low, 3 smallest
  assert axes.collections[-1].get_paths()[0].vertices[:, 1].max() == pytest.approx(1)


def test_a_run_that_diverged_is_drawn_up_to_there():
  records = [
    {"event": "eval", "method": "x", "seed": 0, "step": i, "group_loss": [value, value]}
    for i, value in enumerate([3.0, 2.0, None])
  ]
  split = Groups(["a", "b"], [2, 1])
  assert np.isfinite(figures.loss_curves(records, split).axes[0].get_ylim()).all()
  lost = [{**record, "group_loss": [None, None]} for record in records]
  figures.loss_curves(lost, split).canvas.draw()
  figures.trade_off(lost, split).canvas.draw()


# Colours: sRGB, WCAG contrast, and the dichromacy matrices of Machado et al. (2009), severity 1.
_BLIND = {
  "none": np.eye(3),
  "protan": [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  "deutan": [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ],
  "tritan": [
    [1.255528, -0.076749, -0.178779],
    [-0.078411, 0.930809, 0.147602],
    [0.004733, 0.691367, 0.303900],
  ],
}
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def _linear(colour):
  values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _lab(linear):
  x, y, z = np.cbrt(np.clip(_XYZ @ linear / (0.9505, 1.0, 1.089), 1e-6, None))
  return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("page", [report.LIGHT, report.DARK])
def test_contrast(page):
  for name, least in (*((c, 3.0) for c in figures.PALETTE), (page["soft"], 4.5)):
    a, b = sorted((_XYZ[1] @ _linear(c) for c in (name, page["paper"])), reverse=True)
    assert (a + 0.05) / (b + 0.05) >= 0.98 * least, name


@pytest.mark.parametrize("blind", _BLIND)
def test_colours_stay_apart(blind):
  seen = [_lab(np.clip(_BLIND[blind] @ _linear(c), 0, 1)) for c in figures.PALETTE]
  assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20
