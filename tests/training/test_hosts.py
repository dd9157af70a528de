"""Several processes over gloo equal one device; what they do when one of them fails."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from balance_jax.training import hosts
from balance_jax.training.metric_log import read_records
from tests.training import mesh_runs
from tests.training.test_sharding import TOLERANCE

ROOT = Path(__file__).parents[2]
TIMEOUT = 240  # seconds; nothing may hang


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def start(command, count) -> list[subprocess.Popen]:
  """`count` processes of command(port, index), with their output as pipes."""
  port = free_port()
  return [
    subprocess.Popen(
      [sys.executable, *map(str, command(port, index))],
      cwd=ROOT,
      env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]


def finish(processes) -> list[tuple[int, str, str]]:
  """Exit code, output and error output of each."""
  try:
    return [
      (process.wait(), out, err)
      for process in processes
      for out, err in [process.communicate(timeout=TIMEOUT)]
    ]
  finally:
    for process in processes:
      process.kill()


@pytest.mark.parametrize(("count", "devices"), [(2, 4), (4, 1)])
def test_processes_equal_one_device(count, devices):
  child = "tests.training.mesh_child"
  ended = finish(start(lambda port, index: ["-m", child, port, count, index, devices], count))
  assert [code for code, _, _ in ended] == [0] * count, ended[0][2][-2000:]
  found = json.loads(ended[0][1].splitlines()[-1])  # gloo prints lines of its own before
  for name, make in mesh_runs.RUNS.items():
    np.testing.assert_allclose(found[name], mesh_runs.losses_of(make()), **TOLERANCE)
  assert not any("decoder" in out for _, out, _ in ended[1:])


def experiment(path, port, index, *more):
  flags = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={index}"]
  flags += ["--config=configs/certified_digits.py:tiny", f"--workdir={path}", *more]
  return ["-m", "balance_jax.main", *flags, "--config.parallel=map", "--config.mesh.data=-1"]


def losses_in(path) -> list[float]:
  return [r["loss"] for r in read_records(path / "metrics.jsonl") if r["event"] == "train"]


@pytest.fixture(scope="module")
def digits():
  pytest.importorskip("sklearn", reason="pip install 'balance_jax[data]'")


def test_an_experiment_of_two_processes(digits, tmp_path):
  """One of them writes; stopped by a signal to the other, both save and both go on."""
  together = functools.partial(experiment, tmp_path / "two")
  processes = start(together, 2)
  log = tmp_path / "two" / "arms" / "BN" / "metrics.jsonl"
  wait_for(lambda: log.exists() and '"train"' in log.read_text(), processes)
  processes[1].send_signal(signal.SIGTERM)
  stopped = finish(processes)
  assert [code for code, _, _ in stopped] == [128 + signal.SIGTERM] * 2, stopped[1][2][-2000:]
  ended = finish(start(together, 2))
  assert [code for code, _, _ in ended] == [0, 0], ended[0][2][-2000:]
  assert "resuming at step" in ended[0][2]
  assert ["verified error" in out for _, out, _ in ended] == [True, False]
  alone = [flag for flag in experiment(tmp_path / "one", 0, 0) if "coord" not in flag]
  alone = [flag for flag in alone if "process" not in flag and "mesh" not in flag]
  assert [code for code, _, _ in finish(start(lambda *_: alone, 1))] == [0]
  for arm in ("BN", "all"):
    one, two = (losses_in(tmp_path / name / "arms" / arm) for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_a_process_that_dies_takes_the_other_with_it(digits, tmp_path):
  endless = ("--config.train.epochs=4000", "--config.train.eval_every=4000")
  processes = start(lambda port, index: experiment(tmp_path / "run", port, index, *endless), 2)
  log = tmp_path / "run" / "arms" / "BN" / "metrics.jsonl"
  wait_for(lambda: log.exists() and '"train"' in log.read_text(), processes)
  processes[1].kill()
  code, _, err = finish(processes[:1])[0]
  assert code == 2
  assert "error: another process is gone" in err


def wait_for(condition, processes) -> None:
  """Until the condition holds; fails when a process ends before."""
  end = time.monotonic() + TIMEOUT
  while not condition():
    assert all(process.poll() is None for process in processes), processes[0].communicate()
    assert time.monotonic() < end
    time.sleep(0.1)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("localhost:1", None, None), "--num_processes, --process_id missing; give all of"),
    (("localhost:1", 2, 2), "process_id is 2; allowed: 0 to 1"),
  ],
)
def test_bad_starts(arguments, message):
  with pytest.raises(hosts.StartError, match=message):
    hosts.start(*arguments)
