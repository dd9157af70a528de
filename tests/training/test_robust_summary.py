"""Tests of the numbers, the table and the sentences of a robust training experiment."""

import json

import numpy as np
import pytest

from balance_jax.training.mixture_summary import seed_stats
from balance_jax.training.robust_summary import (
  chosen,
  console_table,
  eps_name,
  settings_rows,
  summarize,
  table_rows,
  verdict,
)
from tests.training.robust_records import make_records


def _run(arm, *, validation, test=None, setting="default", eps=0.1, seed=0, rate=1e-3, **fields):
  """Two evaluations and, with `test`, a test record; (natural, certified) of each."""
  label = {
    "method": f"{arm}, {setting}",
    "arm": arm,
    "setting": setting,
    "learning_rate": rate,
    "eps": eps,
    "seed": seed,
  }
  pairs = [("eval", 5, (0.3, 0.99)), ("eval", 9, validation)]
  pairs += [("test", 9, test, fields)] if test else []
  return [
    {
      "event": event,
      **label,
      "step": step,
      "natural": pair[0],
      "certified": pair[1],
      **dict(*more),
    }
    for event, step, pair, *more in pairs
  ]


def _two_arms():
  """Two seeds; the second arm's verified errors are 6 and 2 points lower, natural 1 higher."""
  return [
    *_run("ibp", validation=(0.9, 0.5), test=(0.9, 0.5)),
    *_run("ibp", validation=(0.9, 0.5), test=(0.88, 0.52), seed=1),
    *_run("sabr", validation=(0.9, 0.6), test=(0.89, 0.56)),
    *_run("sabr", validation=(0.9, 0.6), test=(0.87, 0.54), seed=1),
  ]


def test_by_hand():
  summary = summarize(_two_arms())
  assert (summary["arms"], summary["baseline"]) == (["ibp", "sabr"], "ibp")
  assert (summary["eps"], summary["seeds"], summary["steps"]) == ([0.1], [0, 1], 9)
  ibp, sabr = summary["rows"]
  assert ibp["test"]["natural"] == seed_stats([0.9, 0.88])
  assert ibp["validation"]["certified"]["mean"] == 0.5  # the last evaluation, not the best
  assert sabr["test"]["attacked"] is None
  assert sabr["difference"]["certified"]["mean"] == pytest.approx(-4)
  assert sabr["difference"]["certified"]["std"] == pytest.approx(np.sqrt(8))
  assert sabr["difference"]["certified"]["ci95"] == pytest.approx(12.7062 * 2, rel=1e-4)
  assert sabr["difference"]["natural"]["mean"] == pytest.approx(1)
  assert ibp["difference"]["certified"]["mean"] == 0
  assert verdict(summary) == [
    "eps 0.1: the lowest verified error of 2 arms is that of sabr, 45.00 ± 1.41 % (setting "
    "default; natural 12.00 ± 1.41 %); against ibp -4.00 ± 25.41 points (2 paired seeds, 95 % "
    "interval includes 0).",
    "Collapsed runs (natural accuracy at most a point above the share of the largest class): none.",
    "No certified example was ever broken by an attack.",
  ]


def test_pairs_by_seed_and_not_by_order():
  records = _two_arms()
  # Test records of the second arm in the other order, and a third seed of one arm only.
  records = records[:6] + records[9:] + records[6:9]
  records += _run("sabr", validation=(0.9, 0.6), test=(0.1, 0.1), seed=7)
  sabr = summarize(records)["rows"][1]
  assert sabr["difference"]["certified"]["n"] == 2
  assert sabr["difference"]["certified"]["mean"] == pytest.approx(-4)


@pytest.mark.parametrize(
  ("selection", "expected"), [("certified", ["b"]), ("mean", ["a"])], ids=["certified", "mean"]
)
def test_the_setting_is_chosen_in_validation(selection, expected):
  points = {"a": (0.9, 0.5), "b": (0.7, 0.6), "c": (0.69, 0.6), "d": (0.8, 0.5), "e": (0.7, 0.6)}
  records = []
  for name, pair in points.items():
    # In the test split "d" would win.
    test = (1.0, 1.0) if name == "d" else (0.5, 0.2)
    records += _run("x", validation=pair, test=test, setting=name)
  summary = summarize(records, selection)
  assert [row["setting"] for row in summary["rows"] if row["chosen"]] == expected
  # "c" and "d" are dominated; "b" and "e" are equal, so neither dominates.
  assert [row["setting"] for row in summary["rows"] if row["front"]] == ["a", "b", "e"]
  header, rows = settings_rows(summary)
  assert [row[header.index("role")] for row in rows].count("chosen") == 1
  assert rows[3] == ["x", "0.1", "d", "20.00", "50.00", "0.00", "0.00", None]


def test_choice_is_by_arm_and_radius():
  records = []
  for eps, best in ((0.1, "a"), (0.2, "b")):
    for setting in "ab":
      pair = (0.9, 0.6 if setting == best else 0.5)
      records += _run("x", validation=pair, test=pair, setting=setting, eps=eps)
  summary = summarize(records)
  assert [chosen(summary, eps)["x"]["setting"] for eps in (0.1, 0.2)] == ["a", "b"]
  assert chosen(summary, 0.3) == {}


def test_learning_rates_are_settings():
  records = _run("x", validation=(0.9, 0.5), rate=0.1) + _run("x", validation=(0.9, 0.6), rate=0.2)
  summary = summarize(records)
  assert [row["chosen"] for row in summary["rows"]] == [False, True]
  assert [row[2] for row in settings_rows(summary)[1]] == ["default, rate 0.1", "default, rate 0.2"]


def test_collapse_and_violations():
  counts = {"class_counts": [60, 40]}
  records = _run("ibp", validation=(0.6, 0.6), test=(0.61, 0.61), violations=2, **counts)
  records += _run("ibp", validation=(0.6, 0.6), test=(0.611, 0.5), seed=1, **counts)
  records += _run("sabr", validation=(0.6, 0.6), test=(None, 0.5), **counts)
  summary = summarize(records)
  assert [row["collapsed"] for row in summary["rows"]] == [1, 1]
  assert summary["violations"] == 2
  *_, collapsed, violations = verdict(summary)
  assert collapsed.endswith("ibp at eps 0.1 (1 of 2 seeds), sabr at eps 0.1 (1 of 1 seeds).")
  assert violations.startswith(
    "INVALID: 2 certified examples were broken by an attack (ibp, default"
  )
  records[1]["violations"] = 3  # in validation
  assert summarize(records)["violations"] == 5


def test_curves_margins_and_classes_are_means_over_seeds():
  more = [
    {
      "curve_eps": [0.1, 0.2],
      "curve_certified": [0.5, certified],
      "curve_attacked": [0.6, 0.4],
      "margin_edges": [-1, 0, 1],
      "margin_histogram": [1, 3 + 4 * seed],
      "class_counts": [2, 2, 0],
      "natural_by_class": [0.5, 1.0, None],
      "certified_by_class": [0.0, certified, None],
    }
    for seed, certified in enumerate((0.2, 0.4))
  ]
  records = [
    record
    for seed in (0, 1)
    for record in _run("x", validation=(0.9, 0.5), test=(0.75, 0.5), seed=seed, **more[seed])
  ]
  (row,) = summarize(records)["rows"]
  assert row["curve"]["eps"] == [0.1, 0.2]
  assert row["curve"]["certified"][1] == seed_stats([0.2, 0.4])
  assert row["margin"] == {"edges": [-1, 0, 1], "share": pytest.approx([2 / 12, 10 / 12])}
  assert row["by_class"] == {
    "counts": [2, 2, 0],
    "natural": [0.5, 1.0, None],
    "certified": [0.0, pytest.approx(0.3), None],
  }
  records[-1]["margin_edges"] = [-1, 0, 2]
  with pytest.raises(ValueError, match="margin_edges must be the same in all runs of x"):
    summarize(records)
  del records[-1]["margin_histogram"], records[-1]["curve_attacked"]
  (row,) = summarize(records)["rows"]
  assert (row["margin"], row["curve"]) == (None, None)


def test_classes_must_agree():
  fields = [{"class_counts": [1] * n, "natural_by_class": [0.5] * n} for n in (2, 3)]
  records = [
    record
    for seed in (0, 1)
    for record in _run("x", validation=(0.9, 0.5), test=(0.7, 0.5), seed=seed, **fields[seed])
  ]
  with pytest.raises(ValueError, match="lengths of class_counts must be the same in all runs of x"):
    summarize(records)


def test_table():
  records = make_records(settings=("default", "alpha 0.2", "alpha 0.5"))
  summary = summarize(records)
  json.dumps(summary, allow_nan=False)
  header, rows = table_rows(summary)
  assert header[:6] == [
    "arm", "eps", "setting", "natural error", "attacked error", "verified error",
  ]  # fmt: skip
  assert [row[:2] for row in rows] == [
    [arm, eps] for eps in ("0.1", "0.2") for arm in ("baseline", "no BN", "all")
  ]
  best = chosen(summary, 0.2)["all"]["test"]["certified"]
  assert rows[5][5] == f"{100 - 100 * best['mean']:.2f} ± {100 * best['std']:.2f}"
  assert (rows[0][-1], rows[3][-1]) == (None, None)
  assert rows[4][-1].startswith("+")
  lines = console_table(summary).splitlines()
  assert len(lines) == 9
  assert "mean over 3 seeds" in lines[-1]
  assert "best certified share in validation" in lines[-1]
  # What every row would repeat, or none has, is left out.
  header, _ = table_rows(summarize(_run("ibp", validation=(0.9, 0.5), test=(0.9, 0.5))))
  assert header == ["arm", "natural error", "verified error"]


def test_verdict_sorts_arms_by_their_intervals():
  lines = verdict(summarize(make_records(seeds=4)))
  assert (
    "eps 0.2, verified error against baseline by 95 % intervals: lower: all; higher: no BN."
    in lines
  )
  assert "no BN at eps 0.2 (4 of 4 seeds)." in lines[-2]
  one = verdict(summarize(make_records(seeds=1, eps=(8 / 255,))))
  assert "points (one seed: no interval)" in one[0]
  assert not any("by 95 % intervals" in line for line in one)


def test_the_baseline_may_win_and_tests_may_be_missing():
  records = _run("ibp", validation=(0.9, 0.5), test=(0.9, 0.5))
  records += _run("sabr", validation=(0.9, 0.6), test=(0.9, 0.4))
  assert verdict(summarize(records))[0].endswith("natural 10.00 %), the baseline.")
  summary = summarize(_run("ibp", validation=(0.9, 0.5)))
  assert verdict(summary)[0] == "eps 0.1: no test records."
  assert table_rows(summary)[1] == [["ibp", None, None]]


def test_later_records_replace_earlier_ones():
  records = _run("x", validation=(0.9, 0.5)) + _run("x", validation=(0.8, 0.4))
  assert summarize(records)["rows"][0]["validation"]["natural"] == seed_stats([0.8])
  assert summarize(records[::-1])["rows"][0]["validation"]["natural"] == seed_stats([0.9])


def test_eps_names():
  assert [eps_name(e) for e in (0.2, 2 / 255, 0.0313726, 1 / 3, 0.0)] == [
    "0.2", "2/255", "8/255", "85/255", "0",
  ]  # fmt: skip


def _without(name):
  records = _two_arms()
  del records[4][name]
  return records


@pytest.mark.parametrize(
  ("records", "selection", "match"),
  [
    ([], "certified", "records must hold at least one eval record, got none"),
    (_two_arms(), "loss", r"selection must be one of \['certified', 'mean'\], got 'loss'"),
    (_without("setting"), "mean", r"records\[4\] must hold .*; missing: \['setting'\]"),
    (_without("certified"), "mean", r"records\[4\] must hold .*; missing: \['certified'\]"),
    (_two_arms()[2:3], "mean", r"records\[0\] is a test of ibp, default, which has no eval record"),
  ],
)
def test_bad_input(records, selection, match):
  with pytest.raises(ValueError, match=match):
    summarize(records, selection)


def test_other_events_are_ignored():
  records = [*_two_arms(), {"event": "checkpoint", "step": 3}]
  assert len(summarize(records)["rows"]) == 2
