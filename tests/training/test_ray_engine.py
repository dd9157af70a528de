"""Parts as tasks of Ray: a cluster of two nodes on loopback, one of which dies; and without one."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import uuid
from pathlib import Path

import pytest

from balance_jax import data
from balance_jax.training import experiment, ray_engine
from balance_jax.training.parts import Part
from balance_jax.training.workdir import Workdir
from tests.training.test_parts import assert_same, results_of
from tests.training.tiny_run import load_documents, tiny

ROOT = Path(__file__).parents[2]
TIMEOUT = 300

CONFIG = """
import runpy

def get_config(rates):
  config = runpy.run_path("configs/quickstart.py")["get_config"]()
  config.data.update(languages=("lv", "rm"), window=8, eval_rows=8)
  config.model.update(width=8, depth=1, heads=2)
  config.train.update(steps=2000, chunk=50, batch_size=4, eval_every=1000, checkpoint_every=100)
  config.train.update(variance_every=4000, variance_examples=2, variance_batches=2)
  config.methods, config.reference, config.seeds = ("temperature_5",), "", (0,)
  config.sweep.axes.learning_rate = tuple(map(float, rates.split(",")))
  config.parallel = "map"
  return config
"""


class Cluster:
  """Two nodes with one CPU each; every process of a node carries a mark in its environment."""

  def __init__(self, folder: Path):
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      self.address = f"127.0.0.1:{probe.getsockname()[1]}"
    mark = uuid.uuid4().hex
    self.marks = {name: f"BALANCE_JAX_NODE={name}-{mark}" for name in ("head", "second", "driver")}
    # Ray listens on all interfaces; the token keeps others out.
    self.environment = {
      **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": mark,
      "RAY_health_check_period_ms": "500", "RAY_health_check_initial_delay_ms": "0",
    }  # fmt: skip
    self.folder = folder

  def spawn(self, name: str, command, **kwargs) -> subprocess.Popen:
    key, _, value = self.marks[name].partition("=")
    return subprocess.Popen(
      [sys.executable, "-m", *command], cwd=ROOT, env={**self.environment, key: value}, **kwargs
    )

  def start(self) -> None:
    common = ["ray.scripts.scripts", "start", "--num-cpus=1", "--node-ip-address=127.0.0.1"]
    port = self.address.partition(":")[2]
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self.folder}"]
    for name, more in (("head", head), ("second", [f"--address={self.address}"])):
      done = self.spawn(
        name, [*common, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
      )
      assert done.wait(timeout=TIMEOUT) == 0, done.stdout.read()

  def processes(self, name: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
      try:
        if self.marks[name].encode() in path.read_bytes().split(b"\0"):
          found.append(int(path.parent.name))
      except OSError:  # it has ended, or is another user's
        pass
    return found

  def kill(self, name: str) -> int:
    """SIGKILL to all of a node, new ones included; returns how many there were."""
    killed = set()
    while alive := [pid for pid in self.processes(name) if not _is_zombie(pid)]:
      for pid in alive:
        killed.add(pid)
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
      time.sleep(0.05)
    return len(killed)


def _is_zombie(pid: int) -> bool:
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
  except OSError:
    return True


@pytest.fixture(scope="module")
def cluster():
  pytest.importorskip("ray", reason="pip install 'balance_jax[ray]'")
  if not importlib.util.find_spec("plone.app.locales"):
    pytest.skip("needs the text of the quickstart: pip install 'balance_jax[data]'")
  # The names of Ray's sockets lie below it, and must not have more than 107 bytes.
  folder = tempfile.TemporaryDirectory(prefix="r")
  nodes = Cluster(Path(folder.name))
  try:
    nodes.start()
    yield nodes
  finally:
    for name in nodes.marks:
      nodes.kill(name)
    folder.cleanup()


@pytest.fixture(scope="module")
def command(cluster, tmp_path_factory):
  """start(workdir, rates) of a job in two parts -> (process, file of all it says)."""
  config = tmp_path_factory.mktemp("config") / "small.py"
  config.write_text(CONFIG)

  def start(path, rates="1e-3,1e-2", **sweep):
    said = path.with_suffix(".err")
    sweep = {"engine": "ray", "parts": 2, "address": cluster.address, **sweep}
    flags = [f"--config.sweep.{name}={value}" for name, value in sweep.items()]
    main = ["balance_jax.main", f"--config={config}:{rates}", f"--workdir={path}", *flags]
    with open(said, "ab") as file:
      return cluster.spawn("driver", main, stdout=file, stderr=file), said

  return start


def wait_for(condition, process, said) -> None:
  end = time.monotonic() + TIMEOUT
  while not condition():
    assert process.poll() is None, said.read_text()
    assert time.monotonic() < end, said.read_text()
    time.sleep(0.05)


def saved(path) -> list[int]:
  """The newest sealed checkpoint of each part."""
  return [
    max((int(seal.parent.name) for seal in part.glob("checkpoints/*/seal.json")), default=0)
    for part in (path / "parts").glob("*")
  ]


def test_a_job_survives_signals_and_the_death_of_a_node(command, cluster, tmp_path):
  """SIGTERM to the driver saves the tasks; a killed node's part resumes on the other one."""
  path = tmp_path / "cut"
  driver, said = command(path)
  wait_for(lambda: len(saved(path)) == 2 and min(saved(path)) > 0, driver, said)
  driver.send_signal(signal.SIGTERM)
  assert driver.wait(timeout=TIMEOUT) == 128 + signal.SIGTERM, said.read_text()
  assert "stopped by SIGTERM, 2 parts not finished" in said.read_text()
  stopped = saved(path)
  assert 0 < min(stopped) <= max(stopped) < 2000

  driver, said = command(path)
  wait_for(lambda: all(a > b for a, b in zip(saved(path), stopped, strict=True)), driver, said)
  assert cluster.kill("second") >= 2  # the raylet and its worker at least
  assert driver.wait(timeout=TIMEOUT) == 0, said.read_text()
  text = said.read_text()
  (lost,) = re.findall(r"part (\d)/2: its process was lost .*; begun again, 1 of 3 times", text)
  # Once after the signal, and once more; both nodes pass on the lines of one log folder.
  found = re.findall(rf"\(part {lost}/2 .* resuming at step (\d+) of 2000", text)
  assert len(resumed := sorted({int(step) for step in found})) == 2
  assert 0 < resumed[0] < resumed[1] < 2000

  whole, said = command(tmp_path / "whole", engine="local", parts=1)
  assert whole.wait(timeout=TIMEOUT) == 0, said.read_text()
  assert_same(path, tmp_path / "whole")
  assert results_of(path)["table"] in text


@pytest.mark.slow  # in small, without a cluster, below
def test_a_part_that_diverges_is_not_tried_again_and_the_other_is_kept(command, tmp_path):
  path = tmp_path / "run"
  driver, said = command(path, rates="1e-2,1e38")
  assert driver.wait(timeout=TIMEOUT) == 2, said.read_text()
  assert "begun again" not in said.read_text()
  *_, line = said.read_text().splitlines()
  assert re.match(r"error: part 1/2: .*temperature_5 learning_rate=1e\+38 with seed 0", line)
  results = results_of(path)
  assert (results["complete"], results["missing"]) == (False, ["part 1/2"])
  assert results["finished"]["part 0/2"][-1]["step"] == 2000


class LostError(Exception):
  """In place of what Ray raises for a process that is gone."""


def fake_ray(outcomes):
  """In place of Ray: task k of a part ends as outcomes[index of the part][k] says."""
  counts = dict.fromkeys(outcomes, 0)

  def remote(text):
    index = json.loads(text)["index"]
    counts[index] += 1
    return index, counts[index] - 1

  def get(task):
    outcome = outcomes[task[0]][task[1]]
    if outcome == "lost":
      raise LostError("the worker died\nand more")
    return json.dumps(("", outcome))

  return types.SimpleNamespace(
    remote=lambda **kwargs: (
      lambda fn: types.SimpleNamespace(options=lambda name: types.SimpleNamespace(remote=remote))
    ),
    wait=lambda tasks, timeout: (tasks[:1], tasks[1:]),
    get=get,
    exceptions=types.SimpleNamespace(RayError=LostError, RayTaskError=KeyError),
    counts=counts,
  )


def test_lost_tasks_are_begun_again_and_failed_ones_are_not(tmp_path, monkeypatch, capsys):
  ray = fake_ray({0: ["lost", ""], 1: ["lost"] * 3, 2: ["no such file"], 3: [""]})
  monkeypatch.setattr(ray_engine, "_ray", lambda: ray)
  job = [Part("", i, 4, (i,), Workdir(tmp_path / str(i)), "") for i in range(4)]
  config = {"sweep": {"retries": 2, "resources": {"CPU": 1.0, "GPU": 0.0}}}
  done, tasks = [], ray_engine.train(config, Workdir(tmp_path), job)
  with pytest.raises(ray_engine.FailedPartsError) as error:
    done.extend(iter(tasks))  # keeps what came before the error
  assert sorted(part.index for part in done) == [0, 3]
  assert ray.counts == {0: 2, 1: 3, 2: 1, 3: 1}
  lost = "its process was lost (the worker died), and sweep.retries = 2 tries more failed"
  assert set(str(error.value).split("; ")) == {f"part 1/4: {lost}", "part 2/4: no such file"}
  said = capsys.readouterr().err
  assert "part 0/4: its process was lost (the worker died); begun again, 1 of 2 times" in said


def test_resources_that_no_node_has(capsys):
  nodes = [
    {"Alive": True, "Resources": {"CPU": 2.0}},
    {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 1.0}},
  ]
  check = ray_engine._check_resources
  check(nodes, {"CPU": 2.0, "GPU": 0.0}, may_grow=False)
  with pytest.raises(ValueError, match=r"'GPU': 1\.0.*; no node has as much: .*'CPU': 2\.0"):
    check(nodes, {"CPU": 1.0, "GPU": 1.0}, may_grow=False)
  check(nodes, {"CPU": 4.0, "GPU": 0.0}, may_grow=True)
  assert "waiting for one that has" in capsys.readouterr().err


def test_without_ray_one_line_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "load_documents", load_documents)
  monkeypatch.setitem(sys.modules, "ray", None)
  with pytest.raises(experiment.BadInputError, match=r"pip install 'balance_jax\[ray\]'") as error:
    experiment.run_experiment(tiny(sweep__engine="ray"), tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variable", [False, True])
def test_no_cluster_at_the_address(tmp_path, monkeypatch, variable):
  pytest.importorskip("ray", reason="pip install 'balance_jax[ray]'")
  monkeypatch.setattr(data, "load_documents", load_documents)
  where = "127.0.0.1:1"
  if variable:
    monkeypatch.setenv("RAY_ADDRESS", where)
  config = tiny(sweep__engine="ray", sweep__address="" if variable else where)
  with pytest.raises(experiment.BadInputError, match=r"'127\.0\.0\.1:1'; no Ray cluster answers"):
    experiment.run_experiment(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_config_arrives_as_it_was():
  config = {"a": (1, (2.5, float("inf"))), "b": {"c": ((), "x")}}
  assert ray_engine._tuples(json.loads(json.dumps(config))) == config
