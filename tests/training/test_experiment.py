"""An experiment from config to report: stop, resume, refuse, diverge. Data are synthetic."""

import json
import os
import signal

import jax
import pytest

from balance_jax import data
from balance_jax.training import TrainingDivergedError, experiment, loop
from balance_jax.training.checkpoint import Checkpointer
from balance_jax.training.config import resolve
from balance_jax.training.dry_run import without_data
from balance_jax.training.metric_log import read_records
from balance_jax.training.signals import InterruptedRunError
from balance_jax.training.timing import without_times
from tests.training.tiny_run import CONFIGS, load_config, load_documents, tiny

ONE_GROUP = {"coordinate_check", "stability"}


@pytest.fixture(autouse=True)
def documents(monkeypatch):
  monkeypatch.setattr(data, "load_documents", load_documents)


def records_of(path):
  return without_times(read_records(path / "metrics.jsonl"))


def test_run_writes_everything_and_knows_when_it_is_done(tmp_path, capsys):
  path, config = tmp_path / "run", tiny(train__variance_every=12)
  experiment.run_experiment(config, path)
  first = capsys.readouterr().out
  assert {p.name for p in path.iterdir()} == {
    ".lock", "checkpoints", "config.json", "finished.json", "metrics.jsonl", "report.html",
    "results.json",
  }  # fmt: skip
  results = json.loads((path / "results.json").read_text())
  assert set(results["summary"]["methods"]) == {"temperature_5", "optimal_5", "cooldown"}
  assert len(results["test"]) == 6
  assert results["model"]["parameters"] > 0
  records = records_of(path)
  assert [r["step"] for r in records if r["event"] == "eval"][::6] == [0, 4, 8, 12]
  moments = [r for r in records if r["event"] == "moments"]
  assert {(r["step"], r["observed_variance"] > 0) for r in moments} == {(12, True)}
  cooldown = [r for r in records if r["method"] == "cooldown" and r["event"] == "train"]
  early, late = cooldown[0]["p"][1], cooldown[-1]["p"][1]
  assert late < early  # the switch at half of the steps lowers the small language's share
  before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
  experiment.run_experiment(config, path)
  again = capsys.readouterr().out
  assert "finished before; nothing to do" in again
  assert results["table"] in first
  assert results["table"] in again
  assert before == {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
  with pytest.raises(experiment.BadInputError, match=r"train\.batch_size was 4, is 8"):
    experiment.run_experiment(tiny(train__variance_every=12, train__batch_size=8), path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_by_a_signal_and_resuming_is_exact(tmp_path, monkeypatch, number):
  experiment.run_experiment(tiny(), tmp_path / "whole")
  group_means = loop.group_means

  def stop_at_eight(task, metrics):
    os.kill(os.getpid(), number)
    return group_means(task, metrics)

  monkeypatch.setattr(loop, "group_means", stop_at_eight)
  with pytest.raises(InterruptedRunError, match="at step 4; saved in") as stop:
    experiment.run_experiment(tiny(), tmp_path / "parts")
  assert stop.value.signum == number
  assert not (tmp_path / "parts" / "results.json").exists()
  monkeypatch.setattr(loop, "group_means", group_means)
  experiment.run_experiment(tiny(), tmp_path / "parts")
  assert records_of(tmp_path / "parts") == records_of(tmp_path / "whole")
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # our handlers are gone


def test_nan_stops_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
  path = tmp_path / "run"
  config = tiny(optimizer__learning_rate=1e38, methods=("temperature_5",), seeds=(7,))
  with pytest.raises(TrainingDivergedError, match="temperature_5 with seed 7") as error:
    experiment.run_experiment(config, path)
  assert 0 < error.value.step < 4
  with Checkpointer(path / "checkpoints") as checkpoints:
    assert checkpoints.latest_step() == 0
  assert not (path / "results.json").exists()
  assert records_of(path)  # what was measured before is kept


def test_a_sweep_over_learning_rates_is_one_program(tmp_path):
  config = tiny(
    sweep__axes__learning_rate=(1e-3, 1e-2), methods=("temperature_5",), reference="", seeds=(0,)
  )
  experiment.run_experiment(config, tmp_path / "run")
  records = [r for r in records_of(tmp_path / "run") if r["event"] == "eval" and r["step"] == 12]
  assert [r["method"] for r in records] == [
    "temperature_5 learning_rate=0.001", "temperature_5 learning_rate=0.01",
  ]  # fmt: skip
  assert records[0]["learning_rate"] == 1e-3
  assert records[0]["group_loss"] != records[1]["group_loss"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ("cooldwn",)}, r"methods is 'cooldwn' \(did you mean 'cooldown'"),
    ({"methods": ()}, "methods is empty"),
    ({"mixers__temperature_5__mixer": "temprature"}, "did you mean 'temperature'"),
    ({"mixers__temperature_5__tau": 0.0}, r"mixers\.temperature_5: tau is 0\.0"),
    ({"mixers__temperature_5__draw": "naturel"}, "did you mean 'natural'"),
    ({"seeds": ()}, "seeds is empty"),
    ({"train__batch_size": 0}, r"train\.batch_size is 0"),
    ({"train__steps": 10}, r"train\.steps is 10; it must be a multiple of train\.chunk = 4"),
    ({"train__micro_batches": 3}, "micro_batches is 3"),
    ({"model__heads": 3}, "heads"),
    ({"optimizer__eps": -1.0}, "eps is -1.0"),
    ({"sweep__axes__steps": (1, 2)}, r"sweep\.axes is 'steps'"),
    ({"sweep__axes__learning_rate": (1e-3, -1.0)}, "learning_rate is -1.0"),
    ({"sweep__axes__learning_rate": ()}, r"sweep\.axes\.learning_rate is \(\)"),
    ({"data__window": 2000}, "window = 2000"),
    ({"data__languages": ("big",)}, "data holds one group, 'big'"),
    ({"parallel": "vmapp"}, "did you mean 'vmap'"),
    ({"task": "langauge_model"}, "did you mean 'language_model'"),
    ({"reference": "uniform"}, "reference is 'uniform'"),
  ],
)
def test_bad_config_is_one_clear_error_and_writes_nothing(tmp_path, changes, message):
  config = tiny(**changes)
  with pytest.raises(experiment.BadInputError, match=message) as error:
    experiment.run_experiment(config, tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


def test_missing_and_damaged_data_are_bad_input(tmp_path, monkeypatch):
  for kind in (data.DatasetNotInstalledError, data.CorruptedDataError):

    def load(*args, kind=kind, **kwargs):
      raise kind("what to do")

    monkeypatch.setattr(data, "load_documents", load)
    with pytest.raises(experiment.BadInputError, match="what to do"):
      experiment.run_experiment(tiny(), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_builds_its_runs(path, monkeypatch):
  """Shapes of all runs and of one step of each, without computing anything."""
  groups = ("aa",) if load_config(path).task in ONE_GROUP else ("aa", "bb")

  def load(source, split, *, languages, **kwargs):
    return {name: ["text of a language " * 60] for name in languages or groups}

  monkeypatch.setattr(data, "load_documents", load)
  config = resolve(load_config(path))
  if config["task"] == "robust":  # images of packages, archives and prepared sets
    config = without_data(config)
  task = experiment.TASKS[config["task"]](config)
  for build in list(task.arms.values())[:1]:
    arm = build()
    states = jax.eval_shape(arm.runs.init)
    after, metrics = jax.eval_shape(lambda states, arm=arm: arm.runs.advance(states, 1), states)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, states)
    assert metrics["loss"].shape == (len(arm.labels), 1)
