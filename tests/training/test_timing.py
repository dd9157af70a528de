"""Where time goes: the stop-watch by hand, and in runs whose clock jumps. Data are synthetic."""

import contextlib
import json
import time

import pytest

from balance_jax import data
from balance_jax.training import experiment, loop, timing
from balance_jax.training.checkpoint import Checkpointer
from balance_jax.training.metric_log import read_records
from balance_jax.training.sweep_runs import SweepRuns
from balance_jax.training.timing import PARTS, StopWatch, time_line, without_times
from tests.training.test_divergence import poison
from tests.training.tiny_run import load_documents, tiny

SMALL = {"methods": ("temperature_5",)}


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test moves by hand."""
  now = [100.0]
  monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
  return now


@pytest.fixture
def documents(monkeypatch):
  monkeypatch.setattr(data, "load_documents", load_documents)


def test_the_parts_and_what_is_inside_of_them(clock):
  inner = {"compile": 7.0, "data": 0.0}
  watch = StopWatch(inner)
  with watch.part("other"):
    clock[0] += 2
    inner["compile"] += 1.5
  with watch.part("compute"):
    clock[0] += 10
    inner["compile"] += 3
    inner["data"] += 4
  clock[0] += 0.25
  assert watch.elapsed() == 12.25
  zero = dict.fromkeys(PARTS, 0.0)
  first = {"data": 4.0, "compile": 4.5, "compute": 3.0, "other": 0.75}
  assert watch.record(4) == {"event": "time", "step": 4, "seconds": 12.25, **zero, **first}
  with contextlib.suppress(KeyError), watch.part("save"):
    clock[0] += 1
    raise KeyError
  assert watch.record(8) == {"event": "time", "step": 8, "seconds": 1.0, **zero, "save": 1.0}
  # Back at step 4, the record of step 8 is gone from the file, but not its time.
  watch.go_back(4)
  clock[0] += 2
  again = {"seconds": 3.0, **zero, "save": 1.0, "other": 2.0}
  assert watch.record(8) == {"event": "time", "step": 8, **again}
  watch.go_back(None)
  assert watch.record(4)["seconds"] == 15.25


def test_waiting_seen_by_another_clock_is_never_more_than_there_was(clock):
  inner = {"data": 0.0}
  watch = StopWatch(inner)
  with watch.part("compute"):
    clock[0] += 1
    inner["data"] += 1.5
  assert watch.record(1) == {
    "event": "time", "step": 1, "seconds": 1.0, **dict.fromkeys(PARTS, 0.0), "data": 1.0
  }  # fmt: skip


def test_the_line_leaves_out_what_is_nothing():
  assert time_line([{"event": "train", "step": 1}]) is None
  record = {"event": "time", "step": 1, **dict.fromkeys(PARTS, 0.0)}
  assert time_line([{**record, "compute": 90.0, "measure": 9.7}, {**record, "save": 0.3}]) == (
    "compute 90 %, measure 10 %"
  )


def times_of(path) -> list[dict]:
  return [r for r in read_records(path / "metrics.jsonl") if r["event"] == "time"]


def test_a_run_tells_where_its_time_went(tmp_path, documents, monkeypatch, capsys):
  advance = SweepRuns.advance

  def waits_for_rows(runs, *args):
    time.sleep(0.05)
    runs.seconds["data"] += 0.05
    return advance(runs, *args)

  monkeypatch.setattr(SweepRuns, "advance", waits_for_rows)
  began = time.monotonic()
  experiment.run_experiment(tiny(**SMALL), tmp_path / "run")
  wall = time.monotonic() - began
  times = times_of(tmp_path / "run")
  assert [record["step"] for record in times] == [0, 4, 8, 12]
  for record in times:
    assert sum(record[name] for name in PARTS) == pytest.approx(record["seconds"], abs=1e-5)
    assert min(record[name] for name in PARTS) >= 0
  assert [record["data"] for record in times] == pytest.approx([0, 0.05, 0.05, 0.05])
  assert [record["save"] > 0 for record in times] == [True, False, True, True]
  # Two programs are new in the record of step 0 and one in the next; then none before the test.
  assert [record["compile"] > 0 for record in times[:3]] == [True, True, False]
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  assert sum(record["seconds"] for record in times) == pytest.approx(results["seconds"], abs=0.1)
  assert results["seconds"] <= wall
  printed = capsys.readouterr().out
  assert f"\nTime: {results['time']}\n" in printed
  assert f"\n{results['time']}\n" in (tmp_path / "run" / "report.html").read_text().replace(
    "<dd>", "\n"
  ).replace("</dd>", "\n")


def test_after_a_return_the_next_record_has_what_was_thrown_away(tmp_path, documents, monkeypatch):
  poison(monkeypatch, 0.06)
  config = tiny(**SMALL, seeds=(0, 1, 2), train__checkpoint_every=12, train__max_rollbacks=9)
  experiment.run_experiment(config, tmp_path)
  assert any(r["event"] == "rollback" for r in read_records(tmp_path / "metrics.jsonl"))
  results = json.loads((tmp_path / "results.json").read_text())
  whole = sum(record["seconds"] for record in times_of(tmp_path))
  assert whole == pytest.approx(results["seconds"], abs=0.1)


def test_a_clock_that_jumps_by_hours_changes_nothing(tmp_path, documents, monkeypatch):
  experiment.run_experiment(tiny(**SMALL), tmp_path / "usual")
  hours, now, now_ns = [0], time.time, time.time_ns
  monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours[-1])
  monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 3600 * 10**9 * hours[-1])

  def jumps(fn):
    def then_jumps(*args, **kwargs):
      result = fn(*args, **kwargs)
      hours.append((len(hours) % 3 - 1) * 5 * len(hours))
      return result

    return then_jumps

  for owner, name in ((loop, "group_means"), (SweepRuns, "advance"), (SweepRuns, "apply")):
    monkeypatch.setattr(owner, name, jumps(getattr(owner, name)))
  monkeypatch.setattr(Checkpointer, "save", jumps(Checkpointer.save))  # while it is being written
  began = time.monotonic()
  experiment.run_experiment(tiny(**SMALL), tmp_path / "jumps")
  wall = time.monotonic() - began
  usual, jumping = (
    without_times(read_records(tmp_path / name / "metrics.jsonl")) for name in ("usual", "jumps")
  )
  assert usual == jumping
  assert min(hours) < -40
  assert max(hours) > 40
  for record in times_of(tmp_path / "jumps"):
    assert all(0 <= value <= wall for name, value in record.items() if name in (*PARTS, "seconds"))
  results = json.loads((tmp_path / "jumps" / "results.json").read_text())
  assert 0 <= results["seconds"] <= wall + 0.1
