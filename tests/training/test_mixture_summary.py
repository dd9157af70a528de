"""Tests of the numbers behind the mixture table."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from balance_jax.training.mixture_summary import Groups, curves, seed_stats, summarize
from tests.training.synthetic_records import GROUPS, METHODS, SIZES, make_records


def _eval(method, seed, step, *losses):
  return {
    "event": "eval",
    "method": method,
    "seed": seed,
    "step": step,
    "group_loss": list(losses),
  }


def _train(method, seed, step, variance):
  return {
    "event": "train",
    "method": method,
    "seed": seed,
    "step": step,
    "grad_norm_var": variance,
  }


def test_by_hand():
  # Sizes out of order: "b" is the largest. K = 3: one high-resource group, two low-resource.
  records = [
    _eval("proportional", 0, 0, 9, 9, 9),
    _eval("proportional", 0, 10, 5, 1, 3),
    _eval("proportional", 1, 0, 9, 9, 9),
    _eval("proportional", 1, 10, 7, 2, 3),
    _eval("temperature_5", 0, 0, 9, 9, 9),
    _eval("temperature_5", 0, 5, 2, 2, 4),
    _eval("temperature_5", 0, 10, 4, 2, 4),
    _eval("temperature_5", 1, 0, 9, 9, 9),
    _eval("temperature_5", 1, 10, 5, 2, 6),
    _train("proportional", 0, 7, 100.0),
    _train("proportional", 0, 8, 2.0),
    _train("proportional", 0, 10, 4.0),
    _train("temperature_5", 0, 7, 1.0),
    _train("temperature_5", 0, 8, 1.0),
    _train("temperature_5", 0, 9, 1000.0),
    _train("temperature_5", 0, 10, 2.0),
  ]
  summary = summarize(records, ["a", "b", "c"], [20, 30, 10])
  assert summary["high_groups"] == ["b"]
  assert summary["low_groups"] == ["a", "c"]
  assert summary["reference"] == "temperature_5"
  assert (summary["seeds"], summary["steps"]) == ([0, 1], 10)
  assert summary["target"] == {
    "high": {"method": "proportional", "loss": 1.5},
    "low": {"method": "proportional", "loss": 4.5},
  }
  flat, hot = summary["methods"]["proportional"], summary["methods"]["temperature_5"]
  assert hot["low"]["final"]["mean"] == (4 + 5.5) / 2
  assert hot["low"]["best"]["mean"] == (3 + 5.5) / 2
  assert hot["low"]["overfit"]["mean"] == 0.5
  assert hot["groups"][0]["best"] == seed_stats([2.0, 5.0])
  # Seed 0 needs 4 and gets 3 at step 5; seed 1 needs 5 and ends at 5.5.
  assert hot["low"]["steps_to_target"] == seed_stats([5.0])
  assert hot["high"]["steps_to_target"] == seed_stats([10.0])
  assert flat["low"]["versus_reference"] == seed_stats([4 - 4, 5 - 5.5])
  assert flat["high"]["versus_reference"] == seed_stats([-1.0, 0.0])
  # Steps 8 and 10: later than 7.5, and measured for both.
  assert flat["grad_variance"] == seed_stats([2.0])
  assert hot["grad_variance"]["mean"] == 1.0


def test_against_a_reference_in_numpy():
  records = make_records()
  summary = summarize(json.loads(json.dumps(records)), GROUPS, SIZES, reference="uniform")
  losses = np.full((len(METHODS), 3, 13, 8), np.nan)
  for record in records:
    if record["event"] == "eval":
      at = METHODS.index(record["method"]), record["seed"], record["step"] // 50
      losses[at] = record["group_loss"]
  low = losses[..., 4:].mean(-1)
  difference = low[..., -1] - low[METHODS.index("uniform"), :, -1][np.newaxis]
  for m, method in enumerate(METHODS):
    row = summary["methods"][method]
    np.testing.assert_allclose(row["low"]["final"]["mean"], low[m, :, -1].mean(), rtol=1e-12)
    np.testing.assert_allclose(row["low"]["final"]["std"], low[m, :, -1].std(ddof=1), rtol=1e-9)
    np.testing.assert_allclose(row["low"]["best"]["mean"], low[m].min(1).mean(), rtol=1e-12)
    np.testing.assert_allclose(
      row["low"]["versus_reference"]["mean"], difference[m].mean(), rtol=1e-9
    )
    finals = [group["final"]["mean"] for group in row["groups"]]
    np.testing.assert_allclose(finals, losses[m, :, -1].mean(0), rtol=1e-12)
    first = [np.flatnonzero(low[m, s] <= low[0, s, -1]) * 50 for s in range(3)]
    first = [steps[0] for steps in first if steps.size]
    got = row["low"]["steps_to_target"]
    assert (got and got["mean"]) == (float(np.mean(first)) if first else None)


def test_seed_stats():
  values = [1.0, 2.0, 4.0]
  expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
  got = seed_stats([*values, math.nan])
  assert (got["mean"], got["n"]) == (pytest.approx(7 / 3), 3)
  assert got["std"] == pytest.approx(np.std(values, ddof=1))
  assert got["mean"] - got["ci95"] == pytest.approx(expected.low)
  assert seed_stats([5]) == {"mean": 5.0, "std": None, "n": 1, "ci95": None}
  assert seed_stats([math.nan]) is None


def test_the_summary_is_json_and_needs_no_train_records():
  records = [r for r in make_records(seeds=1) if r["event"] == "eval"]
  summary = json.loads(json.dumps(summarize(records, GROUPS, SIZES), allow_nan=False))
  row = summary["methods"]["uniform"]
  assert row["grad_variance"] is None
  assert row["variance_prediction"] is None
  assert row["low"]["final"]["std"] is None


def test_without_proportional_the_worst_method_sets_the_target():
  records = [_eval("x", 0, 0, 9, 9), _eval("x", 0, 5, 1, 4)]
  records += [_eval("y", 0, 0, 9, 9), _eval("y", 0, 5, 2, 3)]
  summary = summarize(records, ["a", "b"], [2, 1])
  assert summary["target"]["high"] == {"method": "y", "loss": 2.0}
  assert summary["target"]["low"] == {"method": "x", "loss": 4.0}
  assert summary["reference"] == "x"


def test_divergence_is_not_averaged_away():
  records = [_eval("x", s, t, 1, 2, 3, 4) for s in (0, 1) for t in (0, 5)]
  records.append(_eval("x", 1, 9, None, None, None, None))
  row = summarize(records, list("abcd"), [4, 3, 2, 1])["methods"]["x"]
  assert row["low"]["final"] == seed_stats([3.5])
  assert row["low"]["best"]["n"] == 2
  # One group of the half is enough.
  records[-1] = _eval("x", 1, 9, 1, 2, 3, None)
  row = summarize(records, list("abcd"), [4, 3, 2, 1])["methods"]["x"]
  assert row["low"]["final"]["n"] == 1
  assert row["high"]["final"]["n"] == 2


def test_a_group_never_evaluated_is_left_out():
  records = [_eval("x", 0, 0, 1, 2, 3, None)]
  row = summarize(records, list("abcd"), [4, 3, 2, 1])["methods"]["x"]
  assert row["low"]["final"]["mean"] == 3.0
  assert row["groups"][3]["final"] is None


def test_seeds_without_a_partner():
  records = [_eval("temperature_2", 0, 0, 1, 2), _eval("x", 1, 0, 3, 4)]
  row = summarize(records, ["a", "b"], [2, 1])["methods"]["x"]
  assert row["low"]["versus_reference"] is None
  assert row["grad_variance"] is None


def test_variance_prediction():
  base = {"event": "moments", "method": "x", "seed": 0}
  pairs = [(2.0, 1.0), (1.0, 2.0), (3.0, 3.0), (1.0, None), (1.0, 0.0)]
  records = [
    {**base, "step": i, "predicted_variance": p, "observed_variance": o}
    for i, (p, o) in enumerate(pairs)
  ]
  summary = summarize([_eval("x", 0, 0, 1, 2), *records], ["a", "b"], [2, 1])
  assert summary["methods"]["x"]["variance_prediction"] == {"n": 3, "median_ratio": 1.0}


def test_curves_sort_and_keep_the_last_record_of_a_step():
  records = [_eval("x", 0, 5, 1, 2), _eval("x", 0, 0, 9, None), _eval("x", 0, 5, 3, 4)]
  steps, values = curves(records, "eval", "group_loss")["x"][0]
  assert steps.tolist() == [0, 5]
  np.testing.assert_array_equal(values, [[9, np.nan], [3, 4]])


GOOD = [_eval("x", 0, 0, 1, 2)]


@pytest.mark.parametrize(
  ("records", "groups", "sizes", "reference", "match"),
  [
    ([], "ab", [2, 1], None, "at least one eval record"),
    (GOOD, "a", [1], None, "two or more different names"),
    (GOOD, "aa", [2, 1], None, "two or more different names"),
    (GOOD, "ab", [2], None, "one positive number for each of 2 groups"),
    (GOOD, "ab", [2, 0], None, "one positive number for each of 2 groups"),
    (GOOD, "ab", [2, math.nan], None, "one positive number for each of 2 groups"),
    (GOOD, "abc", [3, 2, 1], None, "must hold 3 numbers, one a group"),
    (GOOD, "ab", [2, 1], "y", r"reference must be one of \['x'\], got 'y'"),
    ([*GOOD, _eval("x", 0, 1, 1)], "ab", [2, 1], None, "must always have the same length"),
  ],
)
def test_bad_input(records, groups, sizes, reference, match):
  with pytest.raises(ValueError, match=match):
    summarize(records, list(groups), sizes, reference=reference)


def test_groups_by_size():
  split = Groups(["a", "b", "c", "d", "e"], [1, 5, 3, 3, 4])
  assert split.by_size == [1, 4, 2, 3, 0]
  assert (split.half("high"), split.half("low")) == ([1, 4], [2, 3, 0])
