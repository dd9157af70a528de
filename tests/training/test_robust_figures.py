"""Tests of the plots of a robust training experiment: what is drawn where."""

import numpy as np
import pytest

from balance_jax.training import robust_figures as figures
from balance_jax.training.robust_summary import chosen, summarize
from tests.training.robust_records import ARMS, make_records

SETTINGS = ("default", "alpha 0.2", "alpha 0.5")


@pytest.fixture(scope="module")
def records():
  return make_records(settings=SETTINGS, attacks_only=["no BN"])


@pytest.fixture(scope="module")
def summary(records):
  return summarize(records)


def _labels(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


def _titles(figure):
  return [axes.get_title(loc="left") for axes in figure.axes]


def _marked(axes):
  return [line for line in axes.lines if line.get_marker() not in ("None", "", None)]


def test_pareto_shows_test_values_of_fronts_made_in_validation(summary):
  figure = figures.pareto(summary)
  assert _titles(figure) == ["eps 0.1", "eps 0.2"]
  assert _labels(figure) == list(ARMS)
  left, right = figure.axes
  # Three settings of three arms; at the second radius an arm that always collapses is left out.
  assert len(_marked(left)) == 9
  assert len(_marked(right)) == 6
  rows = [row for row in summary["rows"] if (row["arm"], row["eps"]) == ("all", 0.1)]
  marks = _marked(left)[6:]
  for row, mark in zip(rows, marks, strict=True):
    assert mark.get_xdata() == [pytest.approx(100 * row["test"]["natural"]["mean"])]
    assert mark.get_ydata() == [pytest.approx(100 * row["test"]["certified"]["mean"])]
    assert mark.get_alpha() == (None if row["front"] else 0.4)
    assert mark.get_markersize() == (9 if row["chosen"] else 5)
  assert [row["front"] for row in rows] == [True, False, True]
  joined = [line for line in left.lines if len(line.get_xdata()) == 2]
  assert len(joined) == 3
  assert list(joined[2].get_xdata()) == sorted(marks[i].get_xdata()[0] for i in (0, 2))
  # Vertical bars, the first collection after the horizontal one: two standard deviations long.
  bars = [np.ptp(c.get_segments()[0], axis=0) for c in left.collections[-2:]]
  last = rows[2]["test"]
  expected = [200 * last[name]["std"] for name in ("natural", "certified")]
  np.testing.assert_allclose(np.sum(bars, axis=0), expected)


def test_a_panel_where_all_collapsed_is_not_empty():
  summary = summarize(make_records(arms=["no BN"], seeds=1))
  assert [len(_marked(axes)) for axes in figures.pareto(summary).axes] == [1, 1]


def test_curves_start_at_the_natural_accuracy(summary):
  figure = figures.curves_over_eps(summary)
  certified = figure.axes[0]
  row = chosen(summary, 0.1)["baseline"]
  line = _marked(certified)[0]
  np.testing.assert_allclose(line.get_xdata(), [0, *row["curve"]["eps"]])
  stats = [row["test"]["natural"], *row["curve"]["certified"]]
  np.testing.assert_allclose(line.get_ydata(), [100 * stat["mean"] for stat in stats])
  attacked = _marked(figure.axes[2])[0].get_ydata()
  np.testing.assert_allclose(attacked[1:], [100 * s["mean"] for s in row["curve"]["attacked"]])
  vertical = next(line for line in figure.axes[1].lines if line.get_linestyle() == "--")
  assert vertical.get_xdata()[0] == 0.2


def test_margin_histogram(summary):
  figure = figures.margin_histogram(summary)
  assert _titles(figure) == list(ARMS)
  assert _labels(figure) == ["eps 0.1", "eps 0.2", "certified to the right"]
  values, edges, _ = figure.axes[2].patches[0].get_data()
  margin = chosen(summary, 0.1)["all"]["margin"]
  np.testing.assert_allclose(values, 100 * np.array(margin["share"]))
  assert values.sum() == pytest.approx(100)
  assert list(edges) == margin["edges"]


def test_relu_states(summary, records):
  figure = figures.relu_states_over_training(summary, records)
  # The arm trained by an attack alone has no states.
  assert len(figure.axes) == 2 * 3
  assert _titles(figure)[:3] == ["layer 1", "layer 2", "layer 3"]
  assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["baseline", "all"]
  top = figure.axes[2].collections[1].get_paths()[0].vertices[:, 1].max()
  own = [r for r in records if r["event"] == "train" and r["arm"] == "baseline"]
  decided = max(1 - r["relu_states"][2][2] for r in own if r["eps"] == 0.2)
  assert top == pytest.approx(100 * decided)
  ramp = [line.get_xdata()[0] for line in figure.axes[0].lines]
  # The radius grows after a quarter of 20 epochs and is reached after three quarters.
  assert ramp == [5.0, 15.0] == figures.ramp_ends(summary, records, "baseline")
  assert _labels(figure) == ["active", "inactive", "undecided", "eps starts, is reached"]


def test_counts_of_states_are_drawn_as_shares(records):
  few = [r for r in records if r["seed"] == 0 and r["setting"] == "default"]
  scaled = [
    {**r, "relu_states": [[64 * x for x in states] for states in r["relu_states"]]}
    if "relu_states" in r
    else r
    for r in few
  ]
  tops = []
  for found in (few, scaled):
    figure = figures.relu_states_over_training(summarize(found), found)
    tops.append(figure.axes[0].collections[0].get_paths()[0].vertices)
  np.testing.assert_allclose(*tops)


def test_without_a_ramp_no_epoch_is_marked(records):
  flat = [{**r, "eps_now": r["eps"]} if r["event"] == "train" else r for r in records]
  assert figures.ramp_ends(summarize(flat), flat, "baseline") == []


def test_radius_by_layer(summary, records):
  figure = figures.radius_by_layer(summary, records)
  assert _titles(figure) == ["at the first record", "baseline", "all"]
  assert all(axes.get_yscale() == "log" for axes in figure.axes)
  start, baseline, other = figure.axes
  np.testing.assert_allclose(start.lines[0].get_ydata(), 1e-6 * 1.8 ** np.arange(3))
  np.testing.assert_allclose(start.lines[1].get_ydata(), 1e-6 * 1.3 ** np.arange(3))
  np.testing.assert_allclose(baseline.lines[2].get_ydata()[-1], 0.2 * 1.8**2)
  assert baseline.get_ylim() == other.get_ylim()
  assert 1e-3 < baseline.get_ylim()[0] < 0.05  # what is below has eps 0
  assert _labels(figure) == ["baseline", "all", "layer 1", "layer 2", "layer 3"]


def test_training_curves(summary, records):
  figure = figures.training_curves(summary, records)
  assert [axes.get_ylabel() for axes in figure.axes[::2]] == [
    "training loss",
    "verified (%)",
    "eps",
  ]
  loss, verified, eps = figure.axes[::2]
  assert [len(axes.lines) for axes in (loss, verified, eps)] == [3, 2, 3]
  own = [
    r["loss"]
    for r in records
    if r["event"] == "train" and r["step"] == 80 and r["arm"] == "all" and r["eps"] == 0.1
    if r["setting"] == chosen(summary, 0.1)["all"]["setting"]
  ]
  assert len(own) == 3
  assert loss.lines[2].get_ydata()[-1] == pytest.approx(np.mean(own))
  band = loss.collections[2].get_paths()[0].vertices
  at_end = band[band[:, 0] == 20.0, 1]
  assert np.ptp(at_end) == pytest.approx(2 * np.std(own, ddof=1))
  without = [{k: v for k, v in r.items() if k != "verified"} for r in records]
  assert len(figures.training_curves(summary, without).axes) == 4


def test_bars_by_class(summary):
  figure = figures.class_shares(summary)
  assert _titles(figure) == list(ARMS)
  heights = [bar.get_height() for bar in figure.axes[2].patches]
  shares = chosen(summary, 0.2)["all"]["by_class"]
  expected = [100 * x for name in ("natural", "attacked", "certified") for x in shares[name]]
  np.testing.assert_allclose(heights, expected)


def test_equal_classes_have_no_bars():
  summary = summarize(make_records(arms=["no BN"], eps=(0.1,), seeds=1))
  assert figures.by_class(summary) == {}


def test_what_is_shown_of_many(records):
  summary = summarize(make_records(seeds=1, eps=(0.1, 0.2, 0.3, 0.4, 0.5), points=2))
  assert figures.shown_eps(summary) == [0.1, 0.3, 0.5]
  assert figures.shown_layers(3) == [0, 1, 2]
  assert figures.shown_layers(11) == [0, 2, 4, 6, 8, 10]


def test_a_run_that_diverged_can_be_drawn():
  records = make_records(seeds=1)
  for record in records:
    if record["event"] == "train" and record["step"] > 40:
      record |= {"loss": None, "verified": None}
      record |= {"radius": [None] * 3, "relu_states": [[0, 0, 0]] * 3}
  summary = summarize(records)
  for draw in (
    figures.training_curves,
    figures.relu_states_over_training,
    figures.radius_by_layer,
  ):
    figure = draw(summary, records)
    figure.canvas.draw()
    assert figure.axes
