"""Several processes over gloo equal one device; what they do when one of them fails."""

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


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  ("name", "count", "devices"),
  [
    ("decoder", 4, 1),  # test_sharding has the certified one on one process with eight devices
    slow("decoder", 2, 4),
    slow("certified", 2, 4),
    slow("certified", 4, 1),
  ],
)
def test_processes_equal_one_device(name, count, devices):
  child = "tests.training.mesh_child"
  ended = finish(start(lambda port, index: ["-m", child, port, count, index, devices, name], count))
  assert [code for code, _, _ in ended] == [0] * count, ended[0][2][-2000:]
  found = json.loads(ended[0][1].splitlines()[-1])  # gloo prints lines of its own before
  np.testing.assert_allclose(found, mesh_runs.losses_of(mesh_runs.RUNS[name]()), **TOLERANCE)
  assert not any("[[" in out for _, out, _ in ended[1:])


CONFIG = """
import runpy

def get_config():
  config = runpy.run_path("configs/certified_digits.py")["get_config"]("tiny")
  with config.unlocked():
    del config.arms["BN"]
  config.update(baseline="all", seeds=(0,), parallel="map")
  return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """A config file of one certified run, of seconds."""
  pytest.importorskip("sklearn", reason="pip install 'balance_jax[data]'")
  path = tmp_path_factory.mktemp("config") / "one.py"
  path.write_text(CONFIG)
  return path


def alone(config, path):
  return ["-m", "balance_jax.main", f"--config={config}", f"--workdir={path}"]


def experiment(config, path, port, index, *more):
  together = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={index}"]
  return [*alone(config, path), *together, "--config.mesh.data=-1", *more]


def train_records(path) -> list[dict]:
  return [r for r in read_records(path / "metrics.jsonl") if r["event"] == "train"]


@pytest.mark.slow  # test_host_faults has the same in small, without the second half
def test_an_experiment_of_two_processes(config, tmp_path):
  """One of them writes; stopped by a signal to the other, both save and both go on."""
  path = tmp_path / "two"

  def together(port, index):
    # The last chunk: traced in one of the two invocations, wherever the first one stops.
    return experiment(config, path, port, index, "--config.profile=5:6")

  processes = start(together, 2)
  wait_for(lambda: (path / "metrics.jsonl").exists() and train_records(path), processes)
  processes[1].send_signal(signal.SIGTERM)
  stopped = finish(processes)
  assert [code for code, _, _ in stopped] == [128 + signal.SIGTERM] * 2, stopped[1][2][-2000:]
  ended = finish(start(together, 2))
  assert [code for code, _, _ in ended] == [0, 0], ended[0][2][-2000:]
  assert "resuming at step" in ended[0][2]
  assert ["verified error" in out for _, out, _ in ended] == [True, False]
  for index in range(2):
    assert len(list((path / "profile" / f"process_{index}").rglob("*.xplane.pb"))) == 1
  (single,) = finish(start(lambda *_: alone(config, tmp_path / "one"), 1))
  assert single[0] == 0
  one, two = ([r["loss"] for r in train_records(tmp_path / name)] for name in ("one", "two"))
  np.testing.assert_allclose(two, one, rtol=1e-4)


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
