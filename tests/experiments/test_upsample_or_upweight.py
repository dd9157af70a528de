"""The experiment's scripts at a tiny size; its verdicts and its README against its results."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from balance_jax import data

FOLDER = Path(__file__).parents[2] / "experiments" / "upsample_or_upweight"
SCRIPTS = (
  "claims", "evidence", "gumbel", "memorised", "synthetic", "table", "text", "theory",
)  # fmt: skip


def stats(mean, ci95):
  return {"mean": mean, "std": 1.0, "n": 5, "ci95": ci95}


@pytest.mark.parametrize(
  ("demands", "expected"),
  [
    ([(stats(1.0, 0.5), 0.0)], "reproduces"),
    ([(stats(1.0, 1.5), 0.0)], "not established"),
    ([(stats(-1.0, 0.5), 0.0)], "does not"),
    ([(stats(1.0, 0.5), 0.0), (stats(1.0, 0.5), 0.6)], "not established"),
    ([(stats(1.0, 2.0), 0.0), (stats(-1.0, 0.5), 0.0)], "does not"),
    ([(stats(-0.01, 0.005), -0.02)], "reproduces"),
  ],
)
def test_verdicts(scripts, demands, expected):
  assert scripts["evidence"].verdict(*demands) == expected


def test_paired_differences_by_hand(scripts):
  effect = scripts["evidence"].paired([3.0, 5.0], [1.0, 1.0])
  # Differences 2 and 4; the 95 % quantile of Student's t with one degree of freedom is 12.706.
  assert effect["mean"] == 3.0
  np.testing.assert_allclose(effect["ci95"], 12.706, rtol=1e-4)


def test_speed_and_overfitting_by_hand(scripts):
  evidence = scripts["evidence"]
  # The first arm is at 1.0, the last loss of the second, after 10 steps; the second after 20.
  assert evidence.log2_speedup([0, 10, 20], [[3.0, 1.0, 0.5]], [[3.0, 2.0, 1.0]]) == [1.0]
  assert evidence.log2_speedup([0, 10, 20], [[3.0, 2.0, 1.0]], [[3.0, 1.0, 0.5]]) == [-1.0]
  assert evidence.first_step([0, 10, 20], [3.0, 2.0, 1.0], 1.5) == 15.0
  # Seed 0 is judged at the best step of seed 1, and the other way round.
  curves = np.array([[3.0, 1.0, 2.0], [3.0, 1.5, 1.0]])
  assert evidence.overfit(curves).tolist() == [0.0, -0.5]


def test_results_are_rounded_json(scripts, tmp_path):
  evidence = scripts["evidence"]
  value = {"a": {"b": np.array([1.23456789, np.nan])}, "c": {1: (2,)}}
  evidence.save("x", value, tmp_path)
  assert evidence.load("x", tmp_path) == {"a": {"b": [1.2346, None]}, "c": {"1": [2]}}


def test_losses_of_the_synthetic_problem_against_numpy(scripts):
  gumbel = scripts["gumbel"]
  table = gumbel.tables({"large": 7, "small": 3}, 2, 1)["train"]
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal(gumbel.init_params(2)["kernel"].shape)
  got = gumbel.losses({"kernel": kernel.astype(np.float32)}, table.rows, 1)
  for i in range(10):
    x, k = np.asarray(table.rows["x"], np.float64)[i, 1], int(i >= 7)
    own = kernel[64 * (k + 1) : 64 * (k + 2)]
    logits = x @ (kernel[:64] + own) + kernel[64 * 3 + k]
    label = int(table.rows["label"][i, 1])
    expected = np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]
    np.testing.assert_allclose(got[i], expected, rtol=1e-4)


def test_seeds_are_different_problems_and_splits_different_points(scripts):
  tables = scripts["gumbel"].tables({"large": 50, "small": 5}, 2, 50)
  x = np.asarray(tables["train"].rows["x"])
  assert not np.any(np.isclose(x[:, 0], x[:, 1]).all(axis=1))
  points = np.concatenate([np.asarray(t.rows["x"])[:, 0] for t in tables.values()])
  assert len(np.unique(points, axis=0)) == len(points)


@pytest.mark.slow
def test_synthetic_runs_at_a_tiny_size(scripts, tmp_path):
  synthetic = scripts["synthetic"]
  part = synthetic.Part(
    (400, 40), synthetic.optax.sgd, (0.025, 0.05), steps=16, seeds=2, held_out=10, every=2
  )
  results = synthetic.main({"sgd": part}, tmp_path)["sgd"]
  assert json.loads((tmp_path / "synthetic.json").read_text())["sgd"]["steps"] == 16
  assert (tmp_path / "synthetic.png").stat().st_size < 200_000
  record = results["arms"]["S 5"]
  assert set(record) == {"final", "early", "fixed"}
  assert record["fixed"]["rate"] == 0.05
  assert np.shape(record["final"]["final"]) == (2, 2)
  assert results["curves"]["steps"] == [0, 2, 4, 8, 16]
  losses = np.array(results["curves"]["test"]["TS 1"])
  np.testing.assert_allclose(losses[0], np.log(20), rtol=1e-4)  # zero weights
  assert losses[-1, 0] < losses[0, 0]
  assert all(len(results["speedup"][tau]) == 2 for tau in ("2", "3", "5", "100"))


def test_a_rate_is_chosen_on_validation_and_judged_on_test(scripts):
  synthetic = scripts["synthetic"]
  part = synthetic.Part((400, 40), None, (0.1, 0.2, 0.4), steps=4, seeds=2)
  shape = (1, 3, 2, 3, 2)  # arm, rate, seed, evaluation, domain
  validation = np.broadcast_to(np.array([2.0, 1.0, np.nan])[None, :, None, None, None], shape)
  test = np.broadcast_to(np.array([7.0, 8.0, 9.0])[None, :, None, None, None], shape)
  found = {
    "arms": ["unimax"], "steps": np.array([0, 1, 4]), "validation": validation, "test": test,
    "spread": np.zeros(shape[:3]), "second_moment": np.zeros((*shape[:3], 2, 2)),
  }  # fmt: skip
  record = synthetic._record(part, found, 0, 1)
  assert (record["rate"], record["at_edge"]) == (0.2, False)
  synthetic.TAUS, taus = (), synthetic.TAUS
  try:
    chosen = synthetic.summarize(part, found)["arms"]["unimax"]["final"]
  finally:
    synthetic.TAUS = taus
  assert chosen["rate"] == 0.2
  assert np.all(np.array(chosen["final"]) == 8.0)


def test_theory_runs_at_a_tiny_size(scripts, tmp_path):
  theory = scripts["theory"]
  settings = theory.Settings(sizes=(60, 6), points=(0, 3), batches=500)
  results = theory.main(settings, tmp_path)
  for errors in results["full_gradients"].values():
    assert errors["S"] < 1e-10 < 1e-2 < errors["wrong"]
  assert results["counter_example"]["unequal"] == {"S": 3.0278, "TS": 5.05}
  assert all(found["wrong_way"] < 1e-9 for found in results["inflation"].values())
  assert len(results["variances"]) == 12
  assert all(abs(row["z"]) < 5 for row in results["variances"])


@pytest.mark.slow
def test_memorised_runs_at_a_tiny_size(scripts, tmp_path):
  memorised = scripts["memorised"]
  rng = np.random.default_rng(0)
  table = data.group_table(
    {"fr": rng.integers(97, 110, 800), "ca": rng.integers(97, 110, 90)}, window=8
  )
  case = memorised.Settings(
    ("fr", "ca"), width=4, depth=1, heads=1, window=8, steps=4, batch=4, seeds=2, every=2,
    examples=4, batches=4,
  )  # fmt: skip
  tables = {"train": table, "validation": table}
  results = memorised.main({"Catalan": case}, lambda settings: tables, tmp_path)["Catalan"]
  assert json.loads((tmp_path / "memorised.json").read_text())["Catalan"] == results
  assert results["steps"] == [0, 2, 4]
  assert np.shape(results["observed"]) == np.shape(results["predicted"]) == (2, 3)
  assert np.shape(results["second_moment"]) == (2, 3, 2)
  assert np.min(results["observed"]) > 0
  assert results["train"] == results["validation"]  # the same rows here
  # By hand: p ~ n^(1/5), w = p / q; V_S - V_TS = sum p (w - 1) G vanishes at the threshold.
  sizes = np.array(results["sizes"])
  p = sizes**0.2 / np.sum(sizes**0.2)
  gain = p * (p / (sizes / sizes.sum()) - 1)
  np.testing.assert_allclose(gain @ [1.0, results["threshold"]], 0.0, atol=1e-4)


def text_run():
  """Records and results of a run with two methods, two rates and two seeds."""
  records = []
  for method in ("temperature_5", "scalarization_5"):
    for rate in (0.005, 0.01):
      for seed in (0, 1):
        label = {"method": f"{method} learning_rate={rate:g}", "seed": seed}
        base = rate * 100 + seed + (method == "scalarization_5")
        for step, drop in ((0, 0.0), (2, 1.0), (4, 2.0), (8, 1.5)):
          loss = [10.0 + base - drop, 10.0 + base - 2 * drop]
          records.append({"event": "eval", **label, "step": step, "group_loss": loss})
        records.append({"event": "test", **label, "step": 8, "group_loss": [base, 2 * base]})
        records.append({"event": "train", **label, "step": 8, "epochs": [1.0, 5.0]})
        records.append(
          {"event": "moments", **label, "step": 8, "second_moment": [1.0, 2.0],
           "predicted_variance": 2.0, "observed_variance": 4.0}
        )  # fmt: skip
  config = {
    "methods": ["temperature_5", "scalarization_5"], "sweep.learning_rate": [0.005, 0.01],
    "train.steps": 8,
  }  # fmt: skip
  facts = {"model": {}, "device": "cpu", "versions": {}, "seconds": 1.0}
  return records, {"config": config, "rows": {"fr": 90, "ca": 10}, **facts}


def test_text_run_is_summarized(scripts):
  summary = scripts["text"].summarize(*text_run())
  record = summary["methods"]["temperature_5"]["final"]
  assert record["rate"] == 0.005  # its validation losses are lower
  np.testing.assert_allclose(record["final"], [[0.5, 1.0], [1.5, 3.0]])
  np.testing.assert_allclose(record["quarter"], [[9.5, 8.5], [10.5, 9.5]])
  np.testing.assert_allclose(record["overfit"], [[0.5, 1.0], [0.5, 1.0]])
  # Goal: S at step 2. TS starts one lower and gets there sooner.
  assert min(summary["speedup"]) > 0


def test_readme_holds_the_tables_of_the_results(scripts, committed):
  table = scripts["table"]
  readme = table.README.read_text()
  assert table.insert(readme, table.render(committed)) == readme


def test_every_row_has_a_verdict(scripts, committed):
  table = scripts["table"]
  rows = [row for rows in table.all_rows(committed).values() for row in rows]
  assert {row.verdict for row in rows} <= set(scripts["evidence"].VERDICTS)
  printed = re.findall(r"\*\*(reproduces|does not|not established)\*\*", table.render(committed))
  assert printed == [row.verdict for row in rows]


def test_verdicts_follow_the_results(scripts, committed):
  """Swapping Cooldown and the increasing schedule must turn the verdicts on their order around."""
  claims = scripts["claims"]
  swapped = json.loads(json.dumps(committed))
  arms = swapped["synthetic"]["three"]["arms"]
  arms["cooldown"], arms["increasing"] = arms["increasing"], arms["cooldown"]

  def verdict(found):
    rows = claims.cooldown_rows(found)
    return next(r.verdict for r in rows if "Decreasing" in r.claim and "three" in r.setting)

  opposite = {"reproduces": "does not", "does not": "reproduces"}
  before = verdict(committed)
  assert verdict(swapped) == opposite.get(before, before)


def test_committed_files_are_small(scripts, committed):
  for path in (FOLDER / "results").iterdir():
    assert path.stat().st_size < 200_000, path.name
  assert set(committed["memorised"]) == set(scripts["memorised"].CASES)
  assert {part["seeds"] for part in committed["synthetic"].values()} == {5}
