"""A job cut into parts: who trains what, and that together they are the job that is not cut."""

import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import data, training
from balance_jax.training import experiment, loop, parts
from balance_jax.training.metric_log import read_records
from balance_jax.training.signals import InterruptedRunError
from balance_jax.training.task import Task
from balance_jax.training.workdir import LOCK, Workdir
from tests.training import test_stability_task, tiny_run
from tests.training.test_reading import TABLE, Recorder
from tests.training.test_reading_sweeps import sweep_of
from tests.training.test_run import assert_same as assert_same_arrays
from tests.training.tiny_run import load_documents, tiny

# Parts of one size share their compiled programs.
FOUR = {"methods": ("temperature_5",), "seeds": (0, 1, 2, 3)}
TWO = {"methods": ("temperature_5",), "seeds": (0, 1)}


@pytest.fixture(autouse=True)
def documents(monkeypatch):
  monkeypatch.setattr(data, "load_documents", load_documents)


def task_of(**runs) -> Task:
  labels = {name: tuple({"seed": i} for i in range(count)) for name, count in runs.items()}
  return Task({}, labels, None, {})


@pytest.mark.parametrize("runs", [{"": 7}, {"a": 1, "b": 5, "c": 2}])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_run_is_in_one_part_and_parts_are_equally_large(tmp_path, runs, count):
  task = task_of(**runs)
  job = parts.cut(task, Workdir(tmp_path), count, "")
  found = sorted((part.arm, run) for part in job for run in part.runs)
  assert found == sorted((arm, run) for arm, number in runs.items() for run in range(number))
  sizes = [
    sum(len(part.runs) for part in parts.of_shard(job, f"{i}/{count}")) for i in range(count)
  ]
  assert max(sizes) - min(sizes) <= 1
  assert len({part.folder.path for part in job}) == len(job)
  assert parts.of_shard(job, "") == job


def test_more_parts_than_runs(tmp_path):
  with pytest.raises(ValueError, match=r"sweep\.parts is 4; allowed: 1 to 3"):
    parts.cut(task_of(a=1, b=2), Workdir(tmp_path), 4, "")
  assert parts.cut(task_of(), Workdir(tmp_path), 1, "") == []


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"shard": "2/2"}, r"sweep\.shard is '2/2'; expected i/n with i from 0 to n - 1"),
    ({"shard": "0/0"}, "expected i/n"),
    ({"shard": "-1/2"}, "expected i/n"),
    ({"shard": "1"}, "expected i/n"),
    ({"shard": "a/b"}, "expected i/n"),
    ({"shard": "0/2", "parts": 3}, r"sweep\.shard is '0/2' and sweep\.parts is 3"),
    ({"shard": "0/2", "engine": "ray"}, r"give --config\.sweep\.parts=2 instead"),
    ({"shard": "0/7"}, r"sweep\.parts is 7; allowed: 1 to 6"),
    ({"parts": 0}, r"sweep\.parts is 0"),
    ({"engine": "rye"}, "did you mean 'ray'"),
    ({"retries": -1}, r"sweep\.retries is -1"),
    ({"resources__CPU": -1.0}, r"sweep\.resources\.CPU is -1\.0"),
  ],
)
def test_bad_sections_are_one_clear_error_and_write_nothing(tmp_path, changes, message):
  config = tiny(**{f"sweep__{name}": value for name, value in changes.items()})
  with pytest.raises(experiment.BadInputError, match=message):
    experiment.run_experiment(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def differences(one, other, where="") -> list[str]:
  """Where two JSON values do not agree up to the rounding of floats, or in their order."""
  if isinstance(one, list) and isinstance(other, list):
    one, other = dict(enumerate(one)), dict(enumerate(other))
  if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
    return [text for key in one for text in differences(one[key], other[key], f"{where}/{key}")]
  if isinstance(one, float) and isinstance(other, float):
    same = np.isclose(one, other, rtol=2e-4, atol=1e-6)
  else:
    same = one == other
  return [] if same else [f"{where}: {one} and {other}"]


def results_of(path) -> dict:
  return json.loads((path / "results.json").read_text())


def assert_same(path, whole):
  """Results, table and page but for the number of parts, the devices and the time it took."""
  one, other = results_of(path), results_of(whole)
  count = one["config"].pop("sweep.parts")
  assert (count > 1, other["config"].pop("sweep.parts")) == (True, 1)
  for results in (one, other):
    assert results.pop("seconds") > 0
    assert " %" in results.pop("time")
    assert "cpu" in results.pop("device")
  assert differences(one, other) == []
  page, expected = ((p / "report.html").read_text() for p in (path, whole))
  assert re.findall(r"<(h2|figure|td)", page) == re.findall(r"<(h2|figure|td)", expected)


def test_shards_at_different_times_are_the_job_that_is_not_cut(tmp_path, monkeypatch, capsys):
  """The second first; the first of them stopped by a signal and resumed."""
  experiment.run_experiment(tiny(**FOUR), tmp_path / "whole")
  table = results_of(tmp_path / "whole")["table"]
  path, first, second = tmp_path / "cut", *(tiny(sweep__shard=f"{i}/2", **FOUR) for i in (0, 1))
  capsys.readouterr()
  experiment.run_experiment(second, path)
  assert "part 1/2 is finished; not yet: part 0/2" in capsys.readouterr().out
  so_far = results_of(path)
  assert (so_far["complete"], so_far["missing"]) == (False, ["part 0/2"])
  evaluations = so_far["finished"]["part 1/2"]
  assert [(r["seed"], r["step"]) for r in evaluations] == [(1, 12), (3, 12)]
  before = {p: p.stat().st_mtime_ns for p in (path / "parts").rglob("*") if p.name != LOCK}
  experiment.run_experiment(second, path)
  assert "part 1/2 was finished before; not yet: part 0/2" in capsys.readouterr().out

  group_means = loop.group_means

  def stop(arm, metrics):
    os.kill(os.getpid(), signal.SIGTERM)
    return group_means(arm, metrics)

  with monkeypatch.context() as patch:
    patch.setattr(loop, "group_means", stop)
    with pytest.raises(InterruptedRunError, match=r"at step 4; saved in .*/parts/0"):
      experiment.run_experiment(first, path)
  assert not results_of(path)["complete"]
  experiment.run_experiment(first, path)
  captured = capsys.readouterr()
  assert "resuming at step 4 of 12" in captured.err
  assert table in captured.out
  assert before == {p: p.stat().st_mtime_ns for p in before}
  assert_same(path, tmp_path / "whole")
  experiment.run_experiment(second, path)
  assert "finished before; nothing to do" in capsys.readouterr().out


def test_another_number_of_parts_is_refused(tmp_path):
  config = tiny(sweep__shard="0/2", **TWO)
  experiment.run_experiment(config, tmp_path)
  for changes, now in (({"shard": "0/3"}, 3), ({"parts": 1}, 1)):
    other = tiny(**{f"sweep__{name}": value for name, value in changes.items()}, **TWO)
    with pytest.raises(experiment.BadInputError, match=rf"sweep\.parts was 2, is {now}"):
      experiment.run_experiment(other, tmp_path)
  # How they are trained may change: the rest in one process.
  experiment.run_experiment(tiny(sweep__parts=2, **TWO), tmp_path)
  assert results_of(tmp_path)["complete"]


def test_arms_and_parts_cross(tmp_path, monkeypatch):
  """Two arms of two runs in three parts: none has all of an arm, and one has some of both."""
  monkeypatch.setattr(
    data, "load_documents", lambda *args, **kwargs: {"en": ["alpha beta gamma " * 99]}
  )
  small = {"architectures": {"plain": {}}, "seeds": (0,), "statistics": False}
  make = test_stability_task.tiny
  experiment.run_experiment(make(**small), tmp_path / "whole")
  experiment.run_experiment(make(sweep__parts=3, **small), tmp_path / "cut")
  found = {p.relative_to(tmp_path / "cut" / "arms") for p in tmp_path.glob("cut/arms/*/parts/*")}
  first, second = "plain-w8-d1", "plain-w16-d1"
  where = [(first, 0), (first, 1), (second, 2), (second, 0)]
  assert sorted(map(str, found)) == sorted(f"{arm}/parts/{index}" for arm, index in where)
  assert_same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(("make_table", "how"), [(lambda: TABLE, "shard"), (Recorder, "map")])
def test_a_part_of_a_sweep_is_some_of_its_runs(make_table, how):
  devices = {"devices": jax.devices()[:3]} if how == "shard" else {}
  runs, chosen = sweep_of(make_table(), how, **devices), [1, 4]
  whole, history = training.run_sweep(runs, 8, chunk=4)
  after, part_history = training.run_sweep(runs.part(chosen), 8, chunk=4)
  expected = jax.tree.map(lambda x: x[jnp.array(chosen)], (whole, history))
  assert_same_arrays((after, part_history), expected, rtol=1e-4, atol=1e-5)


def test_records_of_parts_are_in_the_order_of_the_runs(tmp_path):
  task = task_of(a=3)
  job = parts.cut(task, Workdir(tmp_path), 2, "")
  for part in job:
    lines = [
      {"step": step, "event": event, "seed": seed}
      for step in (0, 4)
      for event in ("train", "eval")
      for seed in part.runs
    ]
    lines.insert(3, {"step": 0, "event": "time"})
    part.folder.path.mkdir(parents=True)
    part.folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
  found = parts.records_of(task, job)
  for event in ("train", "eval"):
    order = [(r["step"], r["seed"]) for r in found if r["event"] == event]
    assert order == [(step, seed) for step in (0, 4) for seed in range(3)]
  assert [r["event"] for r in found[:2]] == ["time", "time"]


def test_shards_at_once_and_a_part_in_use(tmp_path):
  """Three processes: two of one shard, of which one is refused, and one of the other."""
  changes = {**TWO, "train__steps": 400}
  path = tmp_path / "run"
  first = tiny_run.start(path, sweep__shard="0/2", **changes)
  while not (path / "parts" / "0" / "metrics.jsonl").exists():
    assert first.exitcode is None
    first.join(timeout=0.05)
  # Their messages must not go to the file of the first.
  for name in ("again", "other"):
    (tmp_path / name).symlink_to(path)
  code, error = tiny_run.finish(tmp_path / "again", sweep__shard="0/2", **changes)
  assert (code, error.count("\n")) == (2, 1)
  assert "/parts/0 is in use by another process" in error
  assert tiny_run.finish(tmp_path / "other", sweep__shard="1/2", **changes)[0] == 0
  first.join(timeout=120)
  assert first.exitcode == 0
  assert results_of(path)["complete"]
  printed = [(tmp_path / f"{name}.out").read_text() for name in ("run", "other")]
  assert any("Report: " in text for text in printed)
  assert len(read_records(path / "parts" / "1" / "metrics.jsonl")) > 200
