"""The window of steps that is traced: when, where, what is said. Data are synthetic."""

import contextlib
import gzip
import json
import os
import signal

import jax
import pytest

from balance_jax import data
from balance_jax.training import TrainingDivergedError, experiment, loop, signals
from balance_jax.training.metric_log import read_records
from balance_jax.training.profiling import Profile, parse_window
from balance_jax.training.signals import InterruptedRunError
from tests.training import test_coordinate_check_task, test_stability_task
from tests.training.tiny_run import load_documents, tiny

SMALL = {"methods": ("temperature_5",), "seeds": (0,)}


@pytest.fixture(autouse=True)
def documents(monkeypatch):
  monkeypatch.setattr(data, "load_documents", load_documents)


def traces(path) -> list[dict[str, list]]:
  """Of each trace below a folder: names -> arguments of its events."""
  found = []
  for file in sorted(path.rglob("*.trace.json.gz")):
    assert list(file.parent.glob("*.xplane.pb"))
    events = {}
    for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]:
      events.setdefault(event.get("name", ""), []).append(event.get("args", {}))
    found.append(events)
  return found


def chunks_of(trace) -> list[int]:
  return [int(arguments["step_num"]) for arguments in trace["chunk"]]


def test_the_chunks_with_steps_of_the_window_are_traced(tmp_path, capsys):
  experiment.run_experiment(tiny(**SMALL), tmp_path / "without")
  experiment.run_experiment(tiny(**SMALL, profile="5:9"), tmp_path / "with")
  place = tmp_path / "with" / "profile" / "process_0"
  (trace,) = traces(place)
  assert chunks_of(trace) == [4, 8]
  assert any("sweep_advance" in name for name in trace)
  assert f"profile: steps 4 to 11 are traced in {place}\n" in capsys.readouterr().err
  assert not (tmp_path / "without" / "profile").exists()
  one, other = (
    [r for r in read_records(tmp_path / name / "metrics.jsonl") if r["event"] != "time"]
    for name in ("with", "without")
  )
  assert one == other


def stop_after(monkeypatch, number) -> None:
  """SIGTERM after so many chunks."""
  group_means, calls = loop.group_means, []

  def means(*args):
    calls.append(args)
    if len(calls) == number:
      os.kill(os.getpid(), signal.SIGTERM)
    return group_means(*args)

  monkeypatch.setattr(loop, "group_means", means)


def test_an_interrupted_window_and_what_is_left_of_it(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(signals, "GRACE", 0.01)  # writing the trace takes longer
  stop_after(monkeypatch, 2)
  with pytest.raises(InterruptedRunError, match="at step 8"):
    experiment.run_experiment(tiny(**SMALL, profile="4:12"), tmp_path)
  (trace,) = traces(tmp_path)
  assert chunks_of(trace) == [4]
  assert "profile: steps from 4 on, broken off, are traced in" in capsys.readouterr().err
  stop_after(monkeypatch, 0)
  for file in tmp_path.rglob("*.trace.json.gz"):  # else the same second may give the same name
    file.unlink()
  experiment.run_experiment(tiny(**SMALL, profile="4:12"), tmp_path)
  assert [chunks_of(trace) for trace in traces(tmp_path)] == [[8]]
  assert "profile: steps 8 to 11 are traced" in capsys.readouterr().err


def test_a_window_that_has_passed_is_named(tmp_path, monkeypatch, capsys):
  stop_after(monkeypatch, 2)
  with pytest.raises(InterruptedRunError):
    experiment.run_experiment(tiny(**SMALL), tmp_path)
  capsys.readouterr()
  stop_after(monkeypatch, 0)
  experiment.run_experiment(tiny(**SMALL, profile="2:7"), tmp_path)
  said = capsys.readouterr().err
  assert "profile: step 6 has passed before step 8; nothing is traced" in said
  assert not (tmp_path / "profile").exists()


def test_divergence_in_the_window_closes_the_trace(tmp_path):
  with pytest.raises(TrainingDivergedError):
    experiment.run_experiment(tiny(**SMALL, optimizer__learning_rate=1e38, profile="0:4"), tmp_path)
  assert [chunks_of(trace) for trace in traces(tmp_path)] == [[0]]
  with jax.profiler.trace(tmp_path / "another"):  # which would fail in an open one
    pass


def test_every_arm_has_its_trace_as_far_as_it_goes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(data, "load_documents", lambda *_, **__: {"en": ["alpha beta gamma " * 90]})
  short = {"train": {"steps": 4}}
  config = test_stability_task.tiny(
    architectures={"plain": {}, "short": short}, sizes=((8, 1, 2),), seeds=(0,), profile="4:6"
  )
  monkeypatch.setattr(experiment, "_conclude", lambda *_: {"complete": True, "table": ""})
  experiment.run_experiment(config, tmp_path)
  assert len(traces(tmp_path / "arms" / "plain-w8-d1")) == 1
  assert not (tmp_path / "arms" / "short-w8-d1" / "profile").exists()
  said = capsys.readouterr().err
  assert "profile: no step 4 here, the last one is 3; nothing is traced" in said


def test_what_the_profiler_cannot_do_costs_the_trace_only(tmp_path, capsys):
  place = tmp_path / "profile" / "process_0"
  place.mkdir(parents=True)
  (place / "plugins").write_text("in the way")
  try:
    with Profile(range(4), tmp_path, done=0, steps=8, chunk=4) as profile:
      for done in (0, 4):
        with profile.chunk(done):
          pass
  finally:  # JAX 0.10 keeps a trace that it could not write, and would begin no other
    (place / "plugins").unlink()
    with contextlib.suppress(RuntimeError):  # later ones do not
      jax.profiler.stop_trace()
  said = capsys.readouterr().err
  assert said.startswith("profile: ")
  assert said.endswith("; going on without a trace\n")
  assert said.count("\n") == 1


@pytest.mark.parametrize(
  ("window", "message"),
  [
    ("100", r"profile is '100'; expected the form 100:110, or nothing"),
    ("a:b", "profile is 'a:b'; expected the form"),
    ("-1:4", "profile is '-1:4'; expected the form"),
    ("4:4", "profile is '4:4', which holds no step"),
    ("5:4", "profile is '5:4', which holds no step"),
    ("8:13", "profile is '8:13'; allowed: up to 12, the steps of the run"),
  ],
)
def test_bad_windows_are_one_clear_error_and_write_nothing(tmp_path, window, message):
  with pytest.raises(experiment.BadInputError, match=message):
    experiment.run_experiment(tiny(**SMALL, profile=window), tmp_path / "run")
  assert not (tmp_path / "run").exists()
  with pytest.raises(ValueError, match=message):
    parse_window(window, 12)


def test_a_task_without_steps_has_nothing_to_trace(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "load_documents", lambda *_, **__: {"en": ["alpha beta gamma " * 90]})
  with pytest.raises(experiment.BadInputError, match="allowed: up to 0, the steps of the run"):
    experiment.run_experiment(test_coordinate_check_task.tiny(profile="0:1"), tmp_path / "run")
  assert not (tmp_path / "run").exists()
