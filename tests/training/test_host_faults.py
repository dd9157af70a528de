"""Two processes of one run, of which one meets a fault: none hangs, nothing saved is lost."""

import functools
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from balance_jax import data
from balance_jax.training import hosts, loop
from balance_jax.training.checkpoint import SEAL, Checkpointer
from balance_jax.training.metric_log import read_records
from tests.training import tiny_run
from tests.training.test_hosts import free_port

SMALL = {
  "methods": ("temperature_5",),
  "seeds": (0,),
  "train__checkpoint_every": 4,
  "mesh__data": -1,
}
TIMEOUT = 240  # seconds


def start_two(path, faults=(None, None), **changes):
  """The processes, each with what prepares it."""
  together = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
  return [
    tiny_run.start(
      path,
      functools.partial(prepare, fault),
      flags=[*together, f"--process_id={index}"],
      log=index,
      **SMALL,
      **changes,
    )
    for index, fault in enumerate(faults)
  ]


def prepare(fault) -> None:
  hosts.HEARTBEAT = 20  # long enough for a busy machine
  if fault is not None:
    fault()


def finish(path, processes) -> list[tuple[int, str]]:
  """Exit code and standard error of each."""
  end = time.monotonic() + TIMEOUT
  for process in processes:
    process.join(timeout=max(0.0, end - time.monotonic()))
  codes = [process.exitcode for process in processes]
  for process in processes:
    process.kill()
  errors = [Path(f"{path}{index}.err").read_text() for index in range(len(processes))]
  assert None not in codes, errors
  return list(zip(codes, errors, strict=True))


def losses(path):
  return [r["loss"] for r in read_records(path / "metrics.jsonl") if r["event"] == "train"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The losses of two processes that nothing happens to."""
  path = tmp_path_factory.mktemp("whole") / "run"
  ended = finish(path, start_two(path))
  assert [code for code, _ in ended] == [0, 0], ended
  return losses(path)


def goes_on(path, whole):
  """The same command ends as if nothing had happened; returns what process 0 said."""
  ended = finish(path, start_two(path))
  assert [code for code, _ in ended] == [0, 0], ended
  np.testing.assert_array_equal(losses(path), whole)
  return ended[0][1]


def no_room(owner, method, call) -> None:
  """From one call of a method on, this process can write no file but those of its messages."""
  original, calls = getattr(owner, method), []

  def limited(self, *args, **kwargs):
    calls.append(method)
    if len(calls) < call:
      return original(self, *args, **kwargs)
    if owner is Checkpointer:
      self.finish()  # of the save before; the limit counts for what other threads write as well
    with tiny_run.files_of_at_most(0):
      result = original(self, *args, **kwargs)
      if owner is Checkpointer:
        self.finish()
      return result

  setattr(owner, method, limited)


@pytest.mark.slow  # test_survival has it with one process
@pytest.mark.parametrize("failing", [0, 1])
def test_one_cannot_save(tmp_path, whole, failing):
  path = tmp_path / "run"
  fault = functools.partial(no_room, Checkpointer, "save", 3)
  ended = finish(path, start_two(path, (fault, None) if failing == 0 else (None, fault)))
  code, error = ended[failing]
  assert code == 2
  assert f"error: checkpoint {path}/checkpoints/8 cannot be written: File too large" in error
  assert_other_ended(ended[1 - failing])
  assert "resuming at step 4" in goes_on(path, whole)


def assert_other_ended(ended) -> None:
  code, error = ended
  assert code in (2, -signal.SIGABRT)  # by JAX's own watch where it notices first
  assert "another process is gone" in error or "task" in error


@pytest.mark.slow
def test_one_cannot_log(tmp_path, whole):
  path = tmp_path / "run"
  fault = functools.partial(no_room, loop.MetricLog, "write", 4)
  first, second = finish(path, start_two(path, (fault, None)))
  assert first[0] == 2
  assert f"{path}/metrics.jsonl" in first[1]
  assert_other_ended(second)
  goes_on(path, whole)


def start_endless(path):
  """Two processes that have written records and will not end by themselves."""
  processes = start_two(path, train__steps=10**6)
  while not (path / "metrics.jsonl").exists() or not losses(path):
    assert all(process.is_alive() for process in processes)
    time.sleep(0.1)
  return processes


def test_one_dies(tmp_path):
  path = tmp_path / "run"
  processes = start_endless(path)
  processes[1].kill()
  first, second = finish(path, processes)
  assert second[0] == -signal.SIGKILL
  assert_other_ended(first)


def test_one_is_told_to_stop(tmp_path):
  path = tmp_path / "run"
  processes = start_endless(path)
  os.kill(processes[1].pid, signal.SIGTERM)
  ended = finish(path, processes)
  assert [code for code, _ in ended] == [128 + signal.SIGTERM] * 2, ended
  (step,) = {re.search(r"by SIGTERM at step (\d+); saved", error)[1] for _, error in ended}
  assert (path / "checkpoints" / step / SEAL).exists()


def no_data(original=data.load_documents) -> None:
  def missing(*args, **kwargs):
    raise data.DatasetNotInstalledError("no catalogues on this machine")

  data.load_documents = missing


@pytest.mark.slow
def test_one_has_no_data(tmp_path, whole):
  path = tmp_path / "run"
  first, second = finish(path, start_two(path, (None, no_data)))
  assert second[0] == 2
  assert "error: no catalogues on this machine" in second[1]
  assert_other_ended(first)
  goes_on(path, whole)


def test_a_damaged_checkpoint(tmp_path, whole):
  path = tmp_path / "run"
  kill_at_step_8 = functools.partial(die, 8)
  ended = finish(path, start_two(path, (kill_at_step_8, kill_at_step_8)))
  assert [code for code, _ in ended] == [-signal.SIGKILL] * 2
  newest = path / "checkpoints" / "8"
  victim = max((p for p in newest.rglob("*") if p.name != SEAL), key=lambda p: p.stat().st_size)
  victim.write_bytes(victim.read_bytes()[:-1])
  said = goes_on(path, whole)
  assert f"{newest} cannot be used" in said
  assert "resuming at step 4" in said


def die(step) -> None:
  finish_save = Checkpointer.finish

  def finish_and_die(self):
    finish_save(self)
    if self.finished_step == step:
      os.kill(os.getpid(), signal.SIGKILL)

  Checkpointer.finish = finish_and_die
