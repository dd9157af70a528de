"""Kills, full disks, signals: the same command goes on to the same bits. Data are synthetic."""

import functools
import hashlib
import json
import os
import random
import signal
import time

import jax
import numpy as np
import pytest

from balance_jax import data
from balance_jax.training import experiment
from balance_jax.training.checkpoint import SEAL, Checkpointer
from balance_jax.training.metric_log import MetricLog, read_records
from balance_jax.training.sweep_runs import SweepRuns
from balance_jax.training.timing import without_times
from balance_jax.training.workdir import LOCK
from tests.training import tiny_run

SMALL = {"methods": ("temperature_5",), "train__checkpoint_every": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run: (folder, seconds with compiled programs, file events)."""
  path = tmp_path_factory.mktemp("whole")
  assert tiny_run.finish(path / "first", **SMALL) == (0, (path / "first.err").read_text())
  count = functools.partial(tiny_run.on_file_events, path / "run", tiny_run.note, path / "events")
  began = time.monotonic()
  assert tiny_run.finish(path / "run", count, **SMALL)[0] == 0
  return path / "run", time.monotonic() - began, int((path / "events").read_text())


@pytest.fixture(scope="module")
def target():
  """Shapes of the states."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(data, "load_documents", tiny_run.load_documents)
    task = experiment.TASKS["language_model"](tiny_run.tiny(**SMALL))
    return jax.eval_shape(task.arms[""]().runs.init)


def assert_same(path, expected, target):
  """Records but for times byte for byte, final states bit for bit, results, and no other file."""
  assert {p.name for p in path.iterdir()} == {p.name for p in expected.iterdir()}
  assert lines_without_times(path) == lines_without_times(expected)
  one, other = (json.loads((p / "results.json").read_text()) for p in (path, expected))
  assert one["summary"] == other["summary"]
  states = []
  for folder in (path, expected):
    with Checkpointer(folder / "checkpoints") as checkpoints:
      assert checkpoints.latest_step() == 12
      states.append(checkpoints.restore(target)[0])
  # An older one may be left where the kill fell between a save and the removal.
  kept = {p.name for p in (path / "checkpoints").iterdir()}
  assert {"8", "12"} <= kept <= {"4", "8", "12"}
  for a, b in zip(*map(jax.tree.leaves, states), strict=True):
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


def lines_without_times(path) -> list[bytes]:
  """The lines of the metrics, but for those that say how long it took: sane, but never the same."""
  lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
  times = [line for line in lines if line.startswith(b'{"event": "time", ')]
  assert times
  for record in map(json.loads, times):
    assert all(value >= 0 for key, value in record.items() if key != "event")
  return [line for line in lines if line not in times]


def kill_somewhere(path, seconds, events, rng) -> bool:
  """Starts the command and kills it, half of the time between two file operations."""
  if rng.random() < 0.5:
    point = rng.randint(1, events)
    hook = functools.partial(tiny_run.on_file_events, path, tiny_run.kill_at, point)
    return tiny_run.finish(path, hook, **SMALL)[0] == -signal.SIGKILL
  process = tiny_run.start(path, **SMALL)
  process.join(timeout=rng.uniform(0, seconds))
  process.kill()
  process.join()
  return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("points", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_points_the_result_is_the_same(tmp_path, whole, target, points):
  expected, seconds, events = whole
  rng, killed = random.Random(points), 0
  while killed < points:
    path = tmp_path / f"run{killed}"
    killed += kill_somewhere(path, seconds, events, rng)
    if rng.random() < 0.3:  # and once more, while it is resuming
      killed += kill_somewhere(path, seconds, events, rng)
    code, error = tiny_run.finish(path, **SMALL)
    assert code == 0, error
    assert_same(path, expected, target)


def save_now(self, *args, original=Checkpointer.save, **kwargs) -> None:
  original(self, *args, **kwargs)
  self.finish()


def fill_the_disk(owner, method, call) -> None:
  """In one call of a method no file can grow as large as a leaf of the state, or the metrics."""
  Checkpointer.save = save_now  # the limit counts for what other threads write as well
  original, calls = getattr(owner, method), []

  def limited(self, *args, **kwargs):
    calls.append(method)
    if len(calls) != call:
      return original(self, *args, **kwargs)
    room = self._file.seek(0, os.SEEK_END) + 100 if owner is MetricLog else 10_000
    with tiny_run.files_of_at_most(room):
      return original(self, *args, **kwargs)

  setattr(owner, method, limited)


@pytest.mark.parametrize(
  ("owner", "method", "call", "step", "file"),
  [(Checkpointer, "save", 3, 8, "checkpoints/8"), (MetricLog, "write", 5, 4, "metrics.jsonl")],
)
def test_a_full_disk_stops_with_one_line_and_nothing_half_written(
  tmp_path, whole, target, owner, method, call, step, file
):
  path = tmp_path / "run"
  code, error = tiny_run.finish(
    path, functools.partial(fill_the_disk, owner, method, call), **SMALL
  )
  assert code == 2
  *_, line = error.splitlines()
  assert line.startswith("error: ")
  assert f"{path}/{file}" in line
  assert "File too large" in line
  assert (path / "metrics.jsonl").read_bytes().endswith(b"}\n")
  # All records up to the last whole group of one run each are there.
  assert len(without_times(read_records(path / "metrics.jsonl"))) % 2 == 0
  assert max(r["step"] for r in read_records(path / "metrics.jsonl")) == step
  assert {p.name for p in (path / "checkpoints").iterdir()} == ({"0", "4"} if step == 8 else {"0"})
  assert tiny_run.finish(path, **SMALL)[0] == 0
  assert_same(path, whole[0], target)


def compile_for_hours(marker) -> None:
  """In place of training: like XLA, it leaves the interpreter and heeds no signal."""

  def advance(*args):
    marker.touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

  SweepRuns.advance = advance


def test_sigterm_during_compilation_ends_at_once(tmp_path, whole, target):
  path, marker = tmp_path / "run", tmp_path / "compiling"
  process = tiny_run.start(path, functools.partial(compile_for_hours, marker), **SMALL)
  while not marker.exists():
    assert process.exitcode is None
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGTERM)
  process.join(timeout=30)
  ended = process.exitcode
  process.kill()
  assert ended == 128 + signal.SIGTERM
  assert "stopped by SIGTERM, nothing to save" in (tmp_path / "run.err").read_text()
  assert tiny_run.finish(path, **SMALL)[0] == 0
  assert_same(path, whole[0], target)


def test_a_second_process_and_a_folder_that_cannot_be_written(tmp_path):
  path, marker = tmp_path / "run", tmp_path / "compiling"
  first = tiny_run.start(path, functools.partial(compile_for_hours, marker), **SMALL)
  while not marker.exists() or not (path / "checkpoints" / "0" / SEAL).exists():
    assert first.exitcode is None
    time.sleep(0.05)

  def times():
    return {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.name != LOCK}

  before = times()
  # Its messages must not go to the file of the first.
  (tmp_path / "again").symlink_to(path)
  code, error = tiny_run.finish(tmp_path / "again", **SMALL)
  assert before == times()
  first.kill()
  first.join()
  assert (code, error.count("\n")) == (2, 1)
  assert "is in use by another process" in error
