"""Tests of the numbers, the table and the sentences of a stability experiment."""

import json
import math

import numpy as np
import pytest

from balance_jax.training.mixture_summary import seed_stats
from balance_jax.training.stability_ladders import logit_ladders, median_logit
from balance_jax.training.stability_summary import console_table, summarize, verdict
from tests.training.stability_records import RATES, SIZES, make_records

LABEL = {
  "architecture": "plain",
  "width": 8,
  "depth": 1,
  "parameters": 768,
  "intervention": "default",
  "seed": 0,
}


def _run(rate, final, *, init=5.0, logit=None, steps=8, **label):
  """Evaluations at both ends and two train records; the probe reads `logit`."""
  label = {**LABEL, **label, "learning_rate": rate}
  records = [
    {"event": "eval", **label, "step": 0, "loss": init},
    {"event": "eval", **label, "step": steps, "loss": final},
    {"event": "train", **label, "step": steps // 2, "loss": init},
    {"event": "train", **label, "step": steps, "loss": final},
  ]
  if logit is not None:
    records[2] |= {"max_logit": [3 * logit, 1.0], "max_logit_last": [logit / 2, 1.0]}
    records[3] |= {"max_logit": [2 * logit, 1.0], "max_logit_last": [logit, 1.0]}
  return records


def _runs(finals, **label):
  """One run for each of the rates 0.01, 0.1, 1."""
  return [r for k, loss in enumerate(finals) for r in _run(10.0 ** (k - 2), loss, **label)]


def _only(records, **kwargs):
  (curve,) = summarize(records, **kwargs)["curves"]
  return curve


def test_by_hand():
  # Initial losses 5 and 4. Seed 0: best 1, excesses 1, 0, 4 (diverged). Seed 1: best 2; 9 counts
  # as 4: excesses 0, 0, 2.
  records = _runs([2.0, 1.0, None], logit=10.0) + _runs([2.0, 2.0, 9.0], seed=1, init=4.0)
  curve = _only(records)
  assert curve["sensitivity"] == {
    **seed_stats([5 / 3, 2 / 3]),
    "values": pytest.approx([5 / 3, 2 / 3]),
    "mean": pytest.approx(7 / 6),
    "std": pytest.approx(math.sqrt(0.5)),
    "ci95": pytest.approx(6.3531, rel=1e-4),
  }
  assert curve["init_loss"] == [5.0, 4.0]
  assert curve["final_loss"] == [[2.0, 1.0, None], [2.0, 2.0, 9.0]]
  assert curve["mean"] == [2.0, 1.5, 4.5]
  assert curve["std"] == pytest.approx([0.0, math.sqrt(0.5), math.sqrt(0.5)])
  assert curve["diverged"] == [0, 0, 1]
  assert (curve["best_learning_rate"], curve["best_loss"]) == (0.1, 1.5)
  # The best is 1.5 of an initial 4.5; more than 1.8 is unstable.
  assert curve["first_unstable_learning_rate"] == 1.0
  assert curve["max_logit"] == [[10.0] * 3, [None] * 3]
  assert curve["max_logit_run"] == [[30.0] * 3, [None] * 3]
  assert (curve["steps"], curve["probe_step"], curve["sensitivity_best_window"]) == (8, 8, None)
  for name in ("log_z", "log_z_square", "entropy", "block_rms", "grad_rms", "update_rms"):
    assert curve[name] is None


@pytest.mark.parametrize(
  ("finals", "expected"),
  [
    ([4.0, 1.0, 1.41], 1.0),
    ([4.0, 1.0, 1.39], None),  # of 4 nats gained, a tenth is 0.4
    ([4.0, 3.0, 1.0], None),  # what lies below the best rate is slow, not unstable
    ([1.0, 4.0, 1.1], 0.1),
    ([None, None, None], None),
  ],
)
def test_first_unstable_rate(finals, expected):
  assert _only(_runs(finals))["first_unstable_learning_rate"] == expected


def test_every_run_diverged():
  curve = _only(_runs([None] * 3))
  assert (curve["best_learning_rate"], curve["best_loss"]) == (None, None)
  assert curve["sensitivity"]["mean"] == 0.0
  assert curve["mean"] == [5.0] * 3
  lines = verdict(summarize(_runs([None] * 3)))
  assert "every run diverged" in lines[0]
  assert lines[-1] == "Runs without a finite final loss: 3 of 3 (1 at 0.01, 1 at 0.1, 1 at 1)."


def test_a_run_that_stopped_early_counts_as_its_initial_loss():
  records = _runs([2.0, 1.0]) + _run(1.0, 1.5, steps=4)
  assert _only(records)["final_loss"] == [[2.0, 1.0, None]]
  records[-3]["loss"] = math.nan  # as the trainer's own records have it
  assert _only(records)["diverged"] == [0, 0, 1]


def test_against_a_reference_in_numpy():
  records = make_records()
  summary = summarize(json.loads(json.dumps(records)))
  assert len(summary["curves"]) == 8
  for curve in summary["curves"]:
    mine = [
      r
      for r in records
      if (r["architecture"], r["width"]) == (curve["architecture"], curve["width"])
    ]
    final, first = np.full((2, 3, len(RATES)), np.nan)
    for r in mine:
      if r["event"] == "eval" and r["loss"] is not None:
        at = (r["seed"], RATES.index(r["learning_rate"]))
        (final if r["step"] else first)[at] = r["loss"]
    first = first[:, :1]
    capped = np.where(np.isnan(final), first, np.minimum(final, first))
    values = (capped - capped.min(axis=1, keepdims=True)).mean(axis=1)
    np.testing.assert_allclose(curve["sensitivity"]["values"], values, rtol=1e-5)
    np.testing.assert_allclose(curve["mean"], capped.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(curve["std"], capped.std(axis=0, ddof=1), rtol=1e-9)
    assert curve["best_learning_rate"] == RATES[capped.mean(axis=0).argmin()]
  plain, tame = (summary["curves"][i]["sensitivity"]["mean"] for i in (3, 7))
  assert plain > 1.5 * tame


def test_best_window_beyond_the_window_only():
  losses = [4.0, 1.0, 2.0, 3.0]
  records = [r for k, loss in enumerate(losses) for r in _run(10.0**-k, loss)]
  curve = _only(records, window=3)  # in order of rate: 3, 2, 1, 4
  assert curve["sensitivity"]["values"] == [1.5]
  assert curve["sensitivity_best_window"] == {**seed_stats([1.0]), "values": [1.0]}
  assert _only(records, window=4)["sensitivity_best_window"] is None


def test_probe_step():
  records = _runs([2.0, 1.0, 3.0], logit=8.0)
  curve = _only(records, probe_step=4)
  assert (curve["probe_step"], curve["max_logit"]) == (4, [[4.0] * 3])
  for record in records:
    record.pop("max_logit_last", None)
  assert _only(records, probe_step=4)["max_logit"] == [[24.0] * 3]
  with pytest.raises(ValueError, match=r"probe_step is 5; plain, width 8, depth 1, default has tr"):
    summarize(records, probe_step=5)


def test_statistics_of_the_last_record():
  curve = summarize(make_records(seeds=1, diverge=True))["curves"][3]
  assert (curve["architecture"], curve["width"], curve["depth"]) == ("plain", 96, 3)
  assert curve["diverged"][-1] == 1
  assert curve["max_logit"][0][-1] is None
  assert curve["log_z"] == [[3.0] * 6 + [None]]
  assert curve["block_rms"][0][0] == [1.003] * 3
  assert curve["block_rms"][0][-1] == [None] * 3
  assert set(curve["grad_rms"]) == {"first_mlp", "head"}
  assert curve["grad_rms"]["head"] == [[2e-3] * 6 + [None]]


def test_the_summary_is_json_and_needs_no_statistics():
  summary = summarize(make_records(seeds=1, statistics=False), hold_back_largest=True)
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  assert summary["ladders"] == []
  assert summary["curves"][0]["std"] is None
  text = " ".join(verdict(summary))
  assert "logit" not in text
  assert "one seed: no interval" in text
  json.dumps(summarize(make_records(), hold_back_largest=True), allow_nan=False)


def _ladder_records(table, sizes):
  return [
    record
    for rate, logits in table.items()
    for n, logit in zip(sizes, logits, strict=True)
    for record in _run(rate, 2.0, logit=logit, width=n, parameters=n)
  ]


# Measured attention logits of four sizes at three rates, and what a line through the first three
# says of the fourth.
MEASURED = {
  0.01: [10.1, 14.8, 27.5, 52.4],
  0.03: [22.0, 90.0, 198.6, 521.0],
  0.1: [660.0, 3210.0, 5118.0, 14244.0],
}
MEASURED_SIZES = (12_288, 55_296, 98_304, 331_776)
LINE = {0.01: 40, 0.03: 643, 0.1: 18030}


def test_held_back_size():
  summary = summarize(_ladder_records(MEASURED, MEASURED_SIZES), hold_back_largest=True)
  for ladder in summary["ladders"]:
    held = ladder["held_back"]
    assert ladder["parameters"] == list(MEASURED_SIZES)
    assert ladder["max_logit"] == MEASURED[ladder["learning_rate"]]
    assert ladder["trend"]["fitted"] == list(MEASURED_SIZES[:3])
    assert held["measured"] == MEASURED[ladder["learning_rate"]][3]
    assert held["predicted"] == pytest.approx(LINE[ladder["learning_rate"]], rel=0.02)
    assert held["predicted"] == pytest.approx(ladder["trend"]["predicted"][3])
    broke = ladder["learning_rate"] == 0.1
    assert (held["predicted_unstable"], held["measured_unstable"], held["agree"]) == (
      broke,
      broke,
      True,
    )
    assert ladder["first_unstable"] == (331_776 if broke else None)
  (line,) = (line for line in verdict(summary) if "held back" in line)
  assert "331,776 parameters held back: 3 of 3 rates fall on the predicted side" in line
  assert line.endswith("above it: rate 0.1 predicted 1.8e4, measured 1.4e4.")


def test_ladder_without_a_held_back_size():
  sizes = [10, 100, 1000]
  summary = summarize(_ladder_records({0.1: [10, 100, 1000], 1.0: [1e3, 1e5, 1e7]}, sizes))
  slow, fast = summary["ladders"]
  np.testing.assert_allclose(slow["trend"]["coefficients"], [0, 1], atol=1e-9)
  assert slow["trend"]["crossing"] == pytest.approx(10_000)
  assert (slow["held_back"], slow["first_unstable"]) == (None, None)
  assert (fast["trend"]["crossing"], fast["first_unstable"]) == (None, 100)
  falling = _ladder_records({0.1: [1e6, 1e5, 2e4], 1.0: [1e6, 1e5, 2e4]}, sizes)
  assert summarize(falling)["ladders"][0]["trend"]["crossing"] is None
  (line,) = (line for line in verdict(summary) if "the trend adds" in line)
  assert "1 (from 100) of up to 1,000 parameters; the trend adds 0.1 (at 1e4)" in line


def test_a_wrong_prediction_is_said():
  records = _ladder_records({0.1: [10, 100, 2e4, 3], 1.0: [1, 1, 1, 1]}, [1, 2, 3, 4])
  summary = summarize(records, hold_back_largest=True)
  assert summary["ladders"][0]["held_back"]["agree"] is False
  (line,) = (line for line in verdict(summary) if "held back" in line)
  assert "1 of 2 rates" in line


def test_runs_without_a_logit():
  curve = {"architecture": "x", "intervention": "y", "learning_rates": [1.0]}
  logits = {1: [1.0, 2.0, 4.0], 2: [None, 3.0, 5.0], 3: [None, None, 5.0], 4: [None] * 3}
  curves = [{**curve, "parameters": n, "max_logit": [[v] for v in vs]} for n, vs in logits.items()]
  (ladder,) = logit_ladders(curves, hold_back_largest=True)
  assert ladder["max_logit"] == [2.0, 5.0, None, None]
  assert ladder["trend"]["fitted"] == [1, 2]
  held = ladder["held_back"]
  assert (held["measured"], held["measured_unstable"], held["agree"]) == (None, True, False)
  (ladder,) = logit_ladders(curves[:1] + curves[2:], hold_back_largest=False)
  assert (ladder["trend"], ladder["held_back"]) == (None, None)
  assert logit_ladders(curves[:2], hold_back_largest=False) == []
  assert median_logit([None]) is None


def test_heat():
  records = _runs([2.0, 1.0, 3.0]) + _runs([2.5, None, 3.0], intervention="no decay")
  (heat,) = summarize(records)["heat"]
  assert heat["interventions"] == ["default", "no decay"]
  assert heat["learning_rates"] == [0.01, 0.1, 1.0]
  assert heat["loss"] == [[2.0, 1.0, 3.0], [2.5, 5.0, 3.0]]
  assert heat["diverged"] == [[0, 0, 0], [0, 1, 0]]
  assert summarize(_runs([2.0, 1.0, 3.0]))["heat"] == []
  fewer = [r for r in records if r["learning_rate"] < 1 or r["intervention"] == "default"]
  assert summarize(fewer)["heat"][0]["loss"][1] == [2.5, 5.0, None]


def test_order_of_the_curves():
  records = make_records(seeds=1, settings=("b", "a"), rates=RATES[:2], sizes=SIZES[::-1])
  got = [(c["architecture"], c["intervention"], c["width"]) for c in summarize(records)["curves"]]
  expected = [(a, s, w) for a in ("plain", "qk_norm") for s in "ba" for w in (32, 48, 64, 96)]
  assert got == expected


def test_verdict_pairs_seeds():
  # S: plain 4/3 and 1, other 1 and 1/3; differences 1/3 and 2/3. Means alone say the same, the
  # spread does not.
  records = _runs([2.0, 1.0, 4.0]) + _runs([1.0, 1.0, 4.0], seed=1)
  records += _runs([1.0, 1.0, 4.0], architecture="other")
  records += _runs([1.0, 1.0, 2.0], architecture="other", seed=1)
  assert verdict(summarize(records))[0] == (
    "Sensitivity S at 768 parameters (8×1): lowest is other, 0.667 ± 0.471 (best loss 1.000 at "
    "rate 0.01), highest is plain, 1.167 ± 0.236 (best loss 1.000 at rate 0.1); difference +0.500 "
    "± 0.236 (2 paired seeds, 95 % interval includes 0)."
  )
  for record in records:
    if record["architecture"] == "other":
      record["seed"] += 5
  assert "unknown, no seed in common" in verdict(summarize(records))[0]


def test_verdict_from_three_seeds():
  records = []
  for seed, shift in enumerate([0.0, 0.1, 0.2]):
    records += _runs([2.0, 1.0, 4.0 + shift], seed=seed)
    records += _runs([2.0, 1.0, 2.0 + 1.1 * shift], seed=seed, architecture="other")
  assert "3 paired seeds, 95 % interval excludes 0" in verdict(summarize(records))[0]


def test_verdict_on_settings():
  records = _runs([2.0, 1.0, 4.0]) + _runs([1.5, 1.2, 2.0], intervention="long warm-up")
  lines = verdict(summarize(records))
  assert lines[1] == (
    "S of 2 settings of plain at 8×1: default 1.333 (the highest); lowest long warm-up 0.367, "
    "against default -0.967 (one seed: no interval)."
  )
  assert lines[2] == "Best loss of these: default 1.000 to long warm-up 1.200."


def test_console_table():
  lines = console_table(summarize(make_records(seeds=2))).splitlines()
  assert len(lines) == 11
  assert len({len(line) for line in lines[1:10]}) == 1
  assert "setting" not in lines[0]
  assert lines[2].split()[:3] == ["plain", "32×1", "12,288"]
  assert "mean over 2 seeds" in lines[10]
  two = console_table(summarize(_runs([2.0, 1.0, 3.0]) + _runs([1.0] * 3, intervention="b")))
  assert "setting" in two.splitlines()[0]


def _without(field):
  records = _runs([2.0, 1.0, 3.0])
  del records[5][field]
  return records


@pytest.mark.parametrize(
  ("records", "match"),
  [
    ([], "records must hold eval records of at least one run, got none"),
    (_run(0.1, 2.0), r"default has one learning rate, 0.1; a curve takes two"),
    (_without("learning_rate"), r"records\[5\] must hold .*missing: \['learning_rate'\]"),
    (_without("width"), r"records\[5\] must hold .*missing: \['width'\]"),
    (
      _runs([2.0, 1.0, 3.0]) + _run(0.1, 2.0, seed=7),
      r"lacks 2 of its runs, such as seed 7 at 0.01, seed 7 at 1",
    ),
    (_runs([2.0, 1.0, 3.0], init=None), "seed 0 has no eval record with a finite loss at step 0"),
  ],
)
def test_bad_input(records, match):
  with pytest.raises(ValueError, match=match):
    summarize(records)


def test_other_events_are_ignored():
  records = [*_runs([2.0, 1.0, 3.0]), {"event": "checkpoint", "step": 3}]
  assert len(summarize(records)["curves"]) == 1
