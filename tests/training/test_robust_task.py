"""The robust task: arms, traced settings, evaluation, resume, bad configs."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from balance_jax import robust
from balance_jax.training import experiment, robust_task
from balance_jax.training.config import resolve
from balance_jax.training.metric_log import read_records
from balance_jax.training.sweep_runs import run_sweep
from tests.training.metrics_schema import check, check_order

pytest.importorskip("sklearn", reason="pip install 'balance_jax[data]'")
CONFIGS = Path(__file__).parents[2] / "configs"


def load(name):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def tiny(**changes):
  """The laptop's config at a size of seconds; changes are given as train__epochs=..."""
  config = load("certified_digits").get_config("tiny")
  config.parallel = "map"
  for name, value in changes.items():
    *sections, key = name.split("__")
    section = config
    for part in sections:
      section = section[part]
    with section.unlocked():
      section[key] = value
  return resolve(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A finished run of the tiny config, with its folder and what it printed."""
  path = tmp_path_factory.mktemp("robust") / "run"
  experiment.run_experiment(tiny(), path)
  return path


def test_a_run_writes_records_results_and_a_report(finished):
  results = json.loads((finished / "results.json").read_text())
  assert results["examples"] == {"train": 64, "validation": 20, "test": 20}
  assert [row["arm"] for row in results["summary"]["rows"]] == ["BN", "all"]
  assert results["summary"]["violations"] == 0
  assert "<svg" in (finished / "report.html").read_text()
  arms = [read_records(finished / "arms" / name / "metrics.jsonl") for name in ("BN", "all")]
  for found in arms:
    check(found, "robust", ["if bounded"])
    check_order(found, num_runs=2)
    assert {r["event"] for r in found} == {"train", "eval", "test", "time"}
  records = [record for found in arms for record in found]
  train = [r for r in records if r["event"] == "train" and r["arm"] == "all" and r["seed"] == 0]
  assert [round(r["epoch"], 3) for r in train] == [1.0, 2.0, 3.0]
  # The radius belongs to the step before: at the end of an epoch it is one step short of the ramp.
  assert train[0]["eps_now"] == 0.0
  np.testing.assert_allclose(train[-1]["eps_now"], 0.1, rtol=1e-6)
  assert np.shape(train[0]["relu_states"]) == (3, 3)
  np.testing.assert_allclose(np.sum(train[0]["relu_states"], axis=-1), 1.0, rtol=1e-5)
  for record in records:
    if record["event"] in ("eval", "test"):
      assert record["certified"] <= record["attacked"] <= record["natural"]
      assert sum(record["class_counts"]) == 20
      assert {"certified_ibp", "certified_crown_ibp"} <= record.keys()
  tests = [r for r in records if r["event"] == "test"]
  assert len(tests) == 4
  assert all(sum(r["margin_histogram"]) == 20 for r in tests)


def test_the_same_command_again_has_nothing_to_do(finished, capsys):
  before = (finished / "results.json").stat().st_mtime_ns
  experiment.run_experiment(tiny(), finished)
  assert "finished before" in capsys.readouterr().out
  assert (finished / "results.json").stat().st_mtime_ns == before


def test_settings_are_what_they_are_in_the_config():
  """Numbers traced in a sweep do what they do as the values of a config."""
  changed = {"kappa_end": 0.3, "lambda_0": 0.1, "l1": 1e-3, "learning_rate": 3e-3}
  arm = {"objective": {"method": "ibp"}, "settings": {"usual": {}, "changed": changed}}
  both = final_losses(tiny(arms={"a": arm}, baseline="a", seeds=(3,)))
  fixed = {f"objective__{k}": v for k, v in changed.items() if k != "learning_rate"}
  alone = final_losses(
    tiny(
      arms={"a": {"objective": {"method": "ibp"}}},
      baseline="a",
      seeds=(3,),
      optimizer__learning_rate=3e-3,
      **fixed,
    )
  )
  np.testing.assert_allclose(both[0], alone[0], rtol=1e-4)
  assert np.abs(both[0] / both[1] - 1).max() > 0.01


def final_losses(config):
  """Training losses (R, steps) of the first arm, sorted by the name of the setting."""
  arm = next(iter(robust_task.robust_task(config).arms.values()))()
  _, history = run_sweep(arm.runs, arm.train["steps"], chunk=2, allow_divergence=True)
  order = sorted(range(len(arm.labels)), key=lambda i: arm.labels[i]["setting"])
  return history["loss"][order]


def test_evaluation_agrees_with_certify():
  """Shares of the evaluation against the cascade's verdicts, example by example methods alike."""
  config = tiny(seeds=(0,), train__epochs=4)
  arm = list(robust_task.robust_task(config).arms.values())[1]()
  states, _ = run_sweep(arm.runs, arm.train["steps"], chunk=2)
  found = jax.device_get(arm.runs.apply(arm.evaluate, states, arm.test))
  one = jax.tree.map(lambda x: x[0], states)
  loss = arm.runs._build({key: value[0] for key, value in arm.runs.cells.items()}).per_example_loss
  batches = arm.test["batches"]
  images = np.asarray(batches.rows["image"]).reshape(-1, 8, 8, 1)[:20] / np.float32(16)
  labels = np.asarray(batches.rows["label"]).reshape(-1)[:20]
  result = robust.certify(
    loss.network.apply,
    {"params": one.params, "batch_stats": one.carried},
    (images, labels),
    0.1,
    methods=("ibp", "crown-ibp"),
    attacks=("pgd",),
    attack_steps=2,
    batch_size=20,
  )
  certified = np.mean([outcome.status == "certified" for outcome in result.outcomes])
  np.testing.assert_allclose(found["certified"][0], certified, atol=1e-6)
  clean = np.mean([outcome.by != "clean" for outcome in result.outcomes])
  np.testing.assert_allclose(found["natural"][0], clean, atol=1e-6)


BAD = {
  "an unknown method": ({"objective__method": "ibb"}, "method is 'ibb'"),
  "eps below 0": ({"eps": (-0.1,)}, "eps is -0.1"),
  "no seeds": ({"seeds": ()}, "seeds must hold"),
  "a ramp that is too long": ({"train__ramp_epochs": 9}, "natural_epochs"),
  "an unknown arm as baseline": ({"baseline": "nothing"}, "baseline is 'nothing'"),
  "an unknown number": ({"settings": {"a": {"alpah": 1.0}}}, "alpah"),
  "a number out of range": ({"settings": {"a": {"alpha": 2.0}}}, "alpha is 2.0"),
  "images of another shape": ({"data__image_shape": (9, 8, 1)}, "image_shape"),
  "too many examples": ({"data__test_examples": 5000}, "test_examples is 5000"),
  "an unknown bound": ({"evaluation__methods": ("crwon",)}, "crwon"),
  "an unknown model": ({"model__name": "cnn8"}, "cnn8"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_configs_are_named_and_write_nothing(case, tmp_path):
  changes, message = case
  with pytest.raises(experiment.BadInputError, match=message):
    experiment.run_experiment(tiny(**changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("name", "argument", "steps"),
  [
    ("certified_digits", "ablation", 50 * 38),
    ("certified_digits", "methods", 30 * 19),
    ("certified_digits", "ramp", 50 * 38),
    ("certified_fashion", None, 20 * 32),
    ("certified_cifar10_gpu", "70", 70 * 352),
    ("certified_cifar10_gpu", "160", 160 * 352),
    ("certified_tinyimagenet_gpu", None, 80 * 743),
  ],
)
@pytest.mark.parametrize("parallel", ["map", pytest.param("auto", marks=pytest.mark.slow)])
def test_every_config_builds(name, argument, steps, parallel):
  """Every arm, on stand-in images, and as many steps as the real ones make."""
  module = load(name)
  config = resolve(module.get_config() if argument is None else module.get_config(argument))
  config["data"]["source"] = "stand_in"
  config["seeds"] = config["seeds"][:1]
  config["parallel"] = parallel  # "auto" traces a step of every arm
  task = robust_task.robust_task(config)
  for arm in robust_task.arm_configs(config).values():
    assert arm["settings"]
  assert {make().train["steps"] for make in task.arms.values()} == {steps}
  assert set(task.facts["parameters"].values())
  if name == "certified_cifar10_gpu":
    assert set(task.facts["parameters"].values()) == {17_192_650}
