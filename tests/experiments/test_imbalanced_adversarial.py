"""The experiment's scripts at a tiny size; its verdicts and its README against its results."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import data
from balance_jax.training.evidence import VERDICTS

FOLDER = Path(__file__).parents[2] / "experiments" / "imbalanced_adversarial"
SCRIPTS = ("claims", "table", "theory", "train")


# --- Theory ---


def test_theory_runs_at_a_tiny_size(scripts, tmp_path):
  theory = scripts["theory"]
  settings = theory.Settings(minority=300, imbalance=10.0, seeds=2, trained_weights=(1.0, 10.0))
  results = theory.main(settings, tmp_path)
  assert json.loads((tmp_path / "theory.json").read_text()) == results
  for case in results["trained"].values():
    errors, expected = np.array(case["errors"]), np.array(case["expected"])
    assert errors.shape == (2, *expected.shape)
    assert np.abs(errors - expected).max() < 0.05  # 300 minority points
  # l_inf of 0.5 takes 0.5 of (1.6, 1.2), the mean at S = 2.
  np.testing.assert_allclose(
    results["trained"]["robust"]["separations"][0], np.hypot(1.1, 0.7), 1e-4
  )


def test_marginal_cost_is_the_slope_of_the_curve(scripts):
  theory = scripts["theory"]
  around = [theory.Settings(weights=(w,), separations=(1.0, 3.0)) for w in (2.99, 3.0, 3.01)]
  low, middle, high = (theory.curves(settings) for settings in around)
  rise = np.array(high["curves"]["majority"])[:, 0] - np.array(low["curves"]["majority"])[:, 0]
  slope = rise / np.log(3.01 / 2.99)
  # float32 curves: the difference of two errors near 1e-4 keeps two digits.
  np.testing.assert_allclose(middle["marginal"][[0, -1], 0], slope, rtol=0.05)


# --- Digits ---


def test_a_seed_is_an_order_of_classes_and_a_subset(scripts):
  train = scripts["train"]
  settings = train.Settings(largest=20, ratio=10.0)
  problem = train.make_problem(settings, (3, 4))
  assert problem.table.group_sizes == settings.counts
  images = np.asarray(problem.table.rows["image"])
  digits = data.load_images("digits", "train")
  known = {
    image.tobytes(): label for image, label in zip(digits.images, digits.labels, strict=True)
  }
  groups = np.repeat(np.arange(10), settings.counts)
  for index in range(2):
    own = np.array([known[image.tobytes()] for image in images[:, index]])
    np.testing.assert_array_equal(problem.place[index][own], groups)
    np.testing.assert_array_equal(np.asarray(problem.table.rows["label"]), groups)
  assert not np.array_equal(*problem.place)
  held_out = {image.tobytes() for split in problem.held_out.values() for image in split[0]}
  assert not held_out & {image.tobytes() for image in images[:, 0]}


def test_network_against_numpy(scripts):
  train = scripts["train"]
  settings = train.Settings(width=6)
  params = jax.jit(train.init_params, static_argnums=0)(settings, jax.random.key(0))
  network = jax.jit(train.network, static_argnums=0)
  x = np.random.default_rng(0).uniform(size=(3, 8, 8, 1)).astype(np.float32)
  dense = params["backbone"]["params"] | params["head"]["params"]
  kernels = {name: np.asarray(layer["kernel"], np.float64) for name, layer in dense.items()}
  head = np.asarray(params["head"]["params"]["head"]["kernel"], np.float64)
  bias = {name: np.asarray(layer["bias"], np.float64) for name, layer in
          params["backbone"]["params"].items()}  # fmt: skip
  hidden = np.maximum(x.reshape(3, -1) @ kernels["dense_0"] + bias["dense_0"], 0)
  z = np.maximum(hidden @ np.asarray(params["backbone"]["params"]["head"]["kernel"], np.float64)
                 + bias["head"], 0)  # fmt: skip
  logits, features = network(settings, params, x, False)
  np.testing.assert_allclose(features, z, rtol=1e-4, atol=1e-6)
  own = np.asarray(params["head"]["params"]["head"]["bias"], np.float64)
  np.testing.assert_allclose(logits, z @ head + own, rtol=1e-4, atol=1e-5)
  cosines = (z / np.linalg.norm(z, axis=1, keepdims=True)) @ (head / np.linalg.norm(head, axis=0))
  np.testing.assert_allclose(network(settings, params, x, True)[0], 30 * cosines, rtol=1e-4)


def test_scatter_ratio_by_hand(scripts):
  train = scripts["train"]
  # Two points of class k, 60 degrees apart, one of them on axis k.
  axes = np.eye(20)
  features = np.concatenate([3 * axes[:10], 0.5 * axes[:10] + np.sqrt(0.75) * axes[10:]])
  labels = np.tile(np.arange(10), 2)
  means = np.stack(
    [(axes[k] + 0.5 * axes[k] + np.sqrt(0.75) * axes[10 + k]) / 2 for k in range(10)]
  )
  between = np.square(means - means.mean(axis=0)).sum()
  # Unit vectors 60 degrees apart are half a unit from their middle.
  got = train.scatter_ratio(jnp.asarray(features, jnp.float32), labels)
  np.testing.assert_allclose(got, between / (10 * 0.25), rtol=1e-5)


def test_arms_differ_where_they_should(scripts):
  train = scripts["train"]
  settings = train.Settings()
  adversarial = train.arms(settings, True)
  srat, control = train.grid(settings, adversarial["SRAT"]), train.grid(
    settings, adversarial["AT + DRW"]
  )  # fmt: skip
  # AT + DRW is SRAT with lambda = 0, at the same rates.
  assert {(c["start"], c["ldam"]) for c in srat + control} == {(settings.deferred, False)}
  assert {c["lam"] for c in control} == {0.0}
  assert min(c["lam"] for c in srat) > 0
  assert {c["rate"] for c in srat} == {c["rate"] for c in control}
  assert not set(settings.tuning_seeds) & set(settings.seeds)


@pytest.mark.slow
def test_digits_run_at_a_tiny_size(scripts):
  train = scripts["train"]
  settings = train.Settings(
    largest=20, ratio=10.0, width=16, attack_steps=2, evaluation_steps=4, batch=32, steps=40,
    rates=(0.001, 0.1), lams=(0.5,), taus=(0.5,), tuning_seeds=(9,), seeds=(0, 1),
  )  # fmt: skip
  tried = train.tune(settings, False)
  for rows in tried.values():
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert rows[0]["rate"] == 0.1  # 40 steps at 0.001 learn nothing
  kinds = train.arms(settings, True)
  tried = {name: train.grid(settings, kinds[name])[1:] for name in ("AT + LDAM-DRW", "SRAT")}
  for name, arm in train.judge(settings, tried, True).items():
    clean, pgd, both = (np.array(arm[key]) for key in ("clean", "pgd", "both"))
    assert clean.shape == (2, 10)
    assert np.all(both <= pgd), name
    assert np.all(pgd <= clean), name
    assert arm["chosen"]["rate"] == 0.1
  assert clean[:, :3].mean() > 0.5  # SRAT on the larger classes; LDAM needs a lower rate


# --- Verdicts ---


def test_verdicts_by_hand(scripts):
  claims = scripts["claims"]
  jitter = np.array([0.0, 0.001, -0.001, 0.0005, -0.0005])[:, None]

  def arm(head, tail, scatter):
    accuracy = np.concatenate([np.full((5, 5), head), np.full((5, 5), tail)], axis=1)
    record = {key: accuracy + jitter * (1 + head) for key in ("clean", "pgd", "both")}
    return record | {key: scatter + jitter[:, 0] for key in ("scatter_clean", "scatter_attacked")}

  arms = {
    "natural": arm(0.9, 0.7, 4.0),
    "natural + weights": arm(0.89, 0.75, 4.0),
    "natural + DRW": arm(0.89, 0.75, 4.0),
    "AT": arm(0.8, 0.5, 2.0),
    "AT + weights": arm(0.7, 0.6, 2.0),
    "AT + DRW": arm(0.795, 0.6, 2.0),
    "AT + LDAM-DRW": arm(0.75, 0.6, 2.0),
    "AT + separation": arm(0.8, 0.5, 3.0),
    "SRAT": arm(0.79, 0.63, 3.0),
  }
  digits = {"arms": arms, "settings": {"eps": 0.1}}
  assert {row.verdict for row in claims.tail_rows(digits)} == {"reproduces"}  # 0.3 - 0.2 > 0.05
  # Weights cost 0.1 and 0.01 of head accuracy, deferred ones 0.005 and 0.01.
  assert [row.verdict for row in claims.weight_rows(digits)] == [
    "reproduces", "reproduces", "does not", "does not"
  ]  # fmt: skip
  assert {row.verdict for row in claims.separation_rows(digits)} == {"reproduces"}
  # (0.79 + 0.63) / 2 = 0.71 against 0.6975: more than a point.
  assert {row.verdict for row in claims.srat_rows(digits)} == {"reproduces"}
  arms["SRAT"] = arm(0.79, 0.615, 3.0)  # half a point
  first, *_ = claims.srat_rows(digits)
  assert first.verdict == "does not"


def test_readme_holds_the_tables_of_the_results(scripts, committed):
  table = scripts["table"]
  readme = table.README.read_text(encoding="utf-8")
  assert table.insert(readme, table.render(committed)) == readme


def test_every_row_has_a_verdict(scripts, committed):
  table = scripts["table"]
  rows = [row for rows in table.all_rows(committed).values() for row in rows]
  assert {row.verdict for row in rows} <= set(VERDICTS)
  printed = re.findall(r"\*\*(reproduces|does not|not established)\*\*", table.render(committed))
  assert printed == [row.verdict for row in rows]


def test_committed_results_are_whole_and_small(scripts, committed):
  for path in (FOLDER / "results").iterdir():
    assert path.stat().st_size < (200_000 if path.suffix == ".png" else 50_000), path.name
  for part in scripts["table"].PARTS:
    found, settings = committed[part], committed[part]["settings"]
    # The results are of the settings that the script would run.
    expected = json.loads(json.dumps(dataclasses.asdict(scripts["train"].PARTS[part])))
    assert settings == expected
    assert not set(settings["tuning_seeds"]) & set(settings["seeds"])
    assert len(settings["seeds"]) >= 5
    for name, arm in found["arms"].items():
      assert np.shape(arm["pgd"]) == (len(settings["seeds"]), 10)
      assert arm["chosen"]["rate"] == found["tried"][name][0]["rate"]
