"""The stability task: arms, traced settings, one program an arm, resume, bad configs."""

import importlib.util
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from balance_jax import data
from balance_jax.training import experiment, loop, stability_task
from balance_jax.training.config import resolve
from balance_jax.training.metric_log import read_records
from balance_jax.training.signals import InterruptedRunError
from balance_jax.training.sweep_runs import run_sweep
from balance_jax.training.timing import without_times
from tests.training.metrics_schema import check, check_order

CONFIG = Path(__file__).parents[2] / "configs" / "lr_sensitivity.py"
SETTINGS = {
  "default": {},
  "no z-loss": {"z_coefficient": 0.0},
  "decay": {"weight_decay": 0.3},
  "warm-up": {"warmup_fraction": 0.5},
  "eps": {"eps": 1e-3},
  "beta2": {"b2": 0.5},
  "clip": {"clip_norm": 0.01},
}


def load_module():
  spec = importlib.util.spec_from_file_location("lr_sensitivity", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def tiny(**changes):
  """The laptop's config at a size of seconds; changes are given as optimizer__eps=..."""
  config = load_module().base()
  config.data.window = 8
  config.data.eval_rows = 8
  config.sizes = ((8, 1, 2), (16, 1, 4))
  config.train.update(steps=8, chunk=4, batch_size=4, eval_every=4, checkpoint_every=4)
  config.learning_rates = (1e-3, 1e-2)
  config.window = (1e-3, 1e-2)
  config.seeds = (0, 1)
  config.parallel = "map"
  for name, value in changes.items():
    *sections, key = name.split("__")
    section = config
    for part in sections:
      section = section[part]
    with section.unlocked():
      section[key] = value
  return resolve(config)


@pytest.fixture(autouse=True)
def documents(monkeypatch):
  """Made-up text in place of the prepared data."""

  def load(source, split, **kwargs):
    words = np.random.default_rng(len(split)).choice(["alpha", "beta", "gamma"], 300)
    return {"en": [" ".join(words)]}

  monkeypatch.setattr(data, "load_documents", load)


def final_losses(config):
  """Training losses (R, steps) of the first arm and its labels."""
  arm = next(iter(experiment.TASKS["stability"](config).arms.values()))()
  _, history = run_sweep(arm.runs, 8, chunk=8, allow_divergence=True)
  return history["loss"], arm.labels


def test_settings_are_what_they_are_in_the_config():
  """All numbers together, traced in a sweep, do what they do as the values of a config."""
  together = {key: value for numbers in SETTINGS.values() for key, value in numbers.items()}
  quick = {"seeds": (3,), "statistics": False, "sizes": ((8, 1, 2),)}
  losses, labels = final_losses(tiny(interventions=SETTINGS | {"all": together}, **quick))
  sections = {"z_coefficient": "loss"}
  changes = {f"{sections.get(key, 'optimizer')}__{key}": x for key, x in together.items()}
  alone, _ = final_losses(tiny(**changes, **quick))
  by_name = {(label["intervention"], label["learning_rate"]): i for i, label in enumerate(labels)}
  assert labels[0]["intervention"] == "default"
  mine = [by_name["all", rate] for rate in (1e-3, 1e-2)]
  np.testing.assert_allclose(losses[mine], alone, rtol=2e-4)
  usual = losses[by_name["default", 1e-2]]
  for name in SETTINGS:
    changed = np.abs(losses[by_name[name, 1e-2]] - usual).max() > 1e-6
    assert changed == (name != "default"), f"{name} changes nothing"


def test_rate_seed_and_setting_share_one_compiled_program(caplog):
  """What the compiler is given for 84 runs of one architecture, in twelve steps and their start."""
  many = {"learning_rates": (1e-3, 3e-3, 1e-2), "seeds": (0, 1, 2, 3), "interventions": SETTINGS}
  quick = {"statistics": False, "sizes": ((8, 1, 2),), "architectures": {"plain": {}}}
  arm = next(iter(experiment.TASKS["stability"](tiny(**many, **quick)).arms.values()))()
  assert len(arm.labels) == 84
  with jax.log_compiles(), caplog.at_level("WARNING"):
    states = arm.runs.init()
    for _ in range(3):
      states, _ = arm.runs.advance(states, 4)
  compiled = [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]
  programs = [message for message in compiled if "sweep_" in message]
  assert len(programs) == 2, compiled
  assert any("sweep_init" in message for message in programs)
  assert any("sweep_advance" in message for message in programs)


def test_an_experiment_of_two_arms_from_config_to_report(tmp_path, capsys):
  path = tmp_path / "run"
  config = tiny(architectures={"plain": {}})
  experiment.run_experiment(config, path)
  printed = capsys.readouterr().out
  assert {p.name for p in (path / "arms").iterdir()} == {"plain-w8-d1", "plain-w16-d1"}
  records = read_records(path / "arms" / "plain-w8-d1" / "metrics.jsonl")
  evals = [r for r in records if r["event"] == "eval"]
  assert [r["step"] for r in evals][::4] == [0, 4, 8]
  assert abs(evals[0]["loss"] - np.log(256)) < 0.7  # near uniform before training
  last = [r for r in records if r["event"] == "train"][-1]
  assert last["parameters"] == 12 * 8**2 + 3 * 8
  assert np.shape(last["max_logit"]) == (1,)
  assert 0 < last["entropy"][0] <= np.log(8)
  assert set(last["grad_rms"]) == {"first_mlp", "embedding", "head"}
  assert last["log_z_square"] >= last["log_z"] ** 2
  results = json.loads((path / "results.json").read_text())
  assert len(results["summary"]["curves"]) == 2
  assert results["table"] in printed
  assert (path / "report.html").stat().st_size > 10_000
  experiment.run_experiment(config, path)
  assert "finished before" in capsys.readouterr().out


def test_a_stop_in_the_second_arm_resumes_exactly(tmp_path, monkeypatch):
  config = tiny(architectures={"plain": {}}, seeds=(0,), statistics=False)
  experiment.run_experiment(config, tmp_path / "whole")
  group_means, calls = loop.group_means, []

  def stop(arm, metrics):
    calls.append(arm)
    if len(calls) == 3:  # the first chunk of the second arm
      os.kill(os.getpid(), signal.SIGTERM)
    return group_means(arm, metrics)

  monkeypatch.setattr(loop, "group_means", stop)
  with pytest.raises(InterruptedRunError, match="at step 4"):
    experiment.run_experiment(config, tmp_path / "parts")
  experiment.run_experiment(config, tmp_path / "parts")
  assert len(calls) == 4  # the first arm was not trained again
  for arm in ("plain-w8-d1", "plain-w16-d1"):
    part, whole = (
      read_records(tmp_path / name / "arms" / arm / "metrics.jsonl") for name in ("parts", "whole")
    )
    assert without_times(part) == without_times(whole)


@pytest.mark.parametrize("statistics", [True, False])
def test_divergence_is_a_result(tmp_path, statistics):
  """With learning rate 1e30 the loss is no number, and the run goes on."""
  config = tiny(
    architectures={"plain": {}}, sizes=((8, 2, 2),), learning_rates=(1e-2, 1e30),
    window=(1e-2, 1e30), seeds=(0,), statistics=statistics,
  )  # fmt: skip
  experiment.run_experiment(config, tmp_path / "run")
  records = read_records(tmp_path / "run" / "arms" / "plain-w8-d2" / "metrics.jsonl")
  finals = [r["loss"] for r in records if r["event"] == "eval" and r["step"] == 8]
  assert finals[0] is not None
  assert finals[1] is None
  options = ["if statistics"] if statistics else []
  check([r for r in records if r.get("learning_rate") != 1e30], "stability", options)
  check(records, "stability", options, diverged=True)
  with pytest.raises(AssertionError):  # null where the table says it means a divergence
    check(records, "stability", options)
  check_order(records, num_runs=2)
  assert {record["event"] for record in records} == {"train", "eval", "time"}
  assert any("log_z" in record for record in records) == statistics


def test_mup_variants_scale_rates_and_start():
  """At the base width every variant but "full" is the standard model, beyond it none is."""
  quick = {"statistics": False, "mup__base_width": 8, "seeds": (0,)}
  narrow, wide = ({**quick, "sizes": (size,)} for size in ((8, 1, 2), (16, 1, 4)))
  usual_narrow, usual_wide = (final_losses(tiny(**size))[0] for size in (narrow, wide))
  for variant in ("simple", "tensor_programs"):
    changed, _ = final_losses(tiny(mup__variant=variant, **narrow))
    np.testing.assert_allclose(changed, usual_narrow, rtol=1e-5, err_msg=variant)
    changed, _ = final_losses(tiny(mup__variant=variant, **wide))
    assert np.abs(changed - usual_wide).max() > 1e-5, variant


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"learning_rates": ()}, r"learning_rates is \(\); a curve takes at least 2"),
    ({"learning_rates": (1e-3,)}, r"learning_rates is \(0\.001,\)"),
    ({"learning_rates": (1e-3, 3e-3)}, "grid not spanning the window"),
    ({"learning_rates": (1e-2, 1e-3)}, "increasing"),
    ({"hold_back_largest": True}, "sizes holds 2 widths"),
    ({"sizes": ((8, 1),)}, r"expected \(width, depth, heads\)"),
    ({"sizes": ()}, "sizes and architectures"),
    ({"sizes": ((8, 1, 2), (8, 1, 4))}, "sizes holds width 8 with depth 1 twice"),
    ({"architectures": {"a/b": {}}}, "architectures holds 'a/b'"),
    ({"seeds": ()}, "seeds"),
    ({"sizes": ((6, 1, 2),)}, "plain-w6-d1: head_dim is 3"),
    ({"interventions": {"a": {"epsilon": 1.0}}}, r"interventions\.a is 'epsilon'.*'eps'"),
    ({"interventions": {"a": {"eps": -1.0}}}, "plain-w8-d1: eps is -1.0"),
    ({"interventions": {"a": {"z_coefficient": -1.0}}}, "z_coefficient is -1.0"),
    (
      {"architectures": {"a": {"model": {"qknorm": "rms"}}}},
      r"architectures\.a\.model is 'qknorm'",
    ),
    ({"architectures": {"a": {"models": {}}}}, r"architectures\.a is 'models'"),
    ({"architectures": {"a": {"train": {"steps": 9}}}}, r"train\.steps is 9"),
    ({"mup__variant": "fulll"}, "mup.variant is 'fulll'"),
    ({"mup__variant": "full", "mup__base_width": 6}, "base_width is 6"),
    ({"optimizer__rule": "adam"}, "rule is 'adam'"),
  ],
)
def test_bad_config_is_one_clear_error_and_writes_nothing(tmp_path, changes, message):
  with pytest.raises(experiment.BadInputError, match=message) as error:
    experiment.run_experiment(tiny(**changes), tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("figure", sorted(load_module().FIGURES))
def test_every_figure_builds_its_arms(figure):
  config = resolve(load_module().get_config(figure))
  assert stability_task.arm_configs(config)
  task = experiment.TASKS["stability"](config)
  assert len(task.facts["parameters"]) == len(task.arms)


def test_an_unknown_figure_names_the_known_ones():
  with pytest.raises(ValueError, match=r"figure is 'qknorm'; allowed: .*qk_norm"):
    load_module().get_config("qknorm")


def test_a_dry_run_gives_parameters_operations_and_memory():
  text = experiment.describe(tiny(sizes=((8, 1, 2),)))
  rows = {line.split()[0]: line.split() for line in text.splitlines() if "-w" in line}
  assert set(rows) == {"plain-w8-d1", "qk_norm-w8-d1"}
  count = 256 * 8 * 2 + 12 * 8**2 + 3 * 8
  assert rows["plain-w8-d1"][2] == f"{count:,}"
  flops = float(rows["plain-w8-d1"][3])
  assert 0.5 < flops / (6 * (count - 256 * 8) * 4 * 8) < 4  # 6 N D, and attention


def test_micro_batches_change_neither_losses_nor_the_operations_of_a_step():
  quick = {"sizes": ((8, 1, 2),), "seeds": (0,), "architectures": {"plain": {}}}
  whole, parts = (tiny(train__micro_batches=count, **quick) for count in (1, 2))
  np.testing.assert_allclose(final_losses(whole)[0], final_losses(parts)[0], rtol=1e-4)

  def flops(config):
    row = next(line for line in experiment.describe(config).splitlines() if "-w8" in line)
    return float(row.split()[3])

  assert 0.9 < flops(parts) / flops(whole) < 1.2
