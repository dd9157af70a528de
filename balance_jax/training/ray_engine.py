"""The parts of a job as tasks of a Ray cluster.

This process, the driver, trains nothing. A task trains one part in a process of its own, in a
folder that driver and nodes share; what goes back and forth through Ray is one JSON text. A part
whose process is lost, with its node or alone, goes on from its last checkpoint on another node.
"""

import collections
import contextlib
import json
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from balance_jax.training import hosts
from balance_jax.training.parts import Part
from balance_jax.training.signals import (
  InterruptedPartsError,
  InterruptedRunError,
  stop_signals,
)
from balance_jax.training.workdir import Workdir

INSTALL = "pip install 'balance_jax[ray]'"
# Seconds that a task gets to save when the driver is stopped.
STOP = 60.0
# Seconds until the process of a lost task has let go of its folder: Ray ends it, or the file
# server notices that its node has died.
LET_GO = 120.0
# Resources that Ray has arguments for.
ARGUMENTS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}


class FailedPartsError(RuntimeError):
  """Parts that trying again would not help; says which and why."""


def for_driver(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config as the driver builds its task: it has no accelerator, those are for the tasks.

  Raises:
    ImportError: Ray is not installed.
    ValueError: this is one of several processes of one job.
  """
  _ray()
  jax.config.update("jax_platforms", "cpu")
  if jax.process_count() > 1:
    raise ValueError("sweep.engine is 'ray'; start it as one process, without --distributed")
  mesh = {"mesh": {"data": 1, "model": 1, "shard_parameters": False}} if "mesh" in config else {}
  return {**config, **mesh}


def _ray():
  # No reports to its makers; the lines of the tasks as they are, after the name of the part.
  for setting in ("USAGE_STATS_ENABLED", "DEDUP_LOGS", "COLOR_PREFIX"):
    os.environ.setdefault(f"RAY_{setting}", "0")
  try:
    import ray
  except ImportError as error:
    raise ImportError(f"sweep.engine is 'ray', which is not installed: {INSTALL}") from error
  return ray


@contextlib.contextmanager
def connected(spec: Mapping[str, Any]):
  """A cluster, for as long as the context lasts.

  Args:
    spec: `config.sweep`. Its address, or RAY_ADDRESS, names a cluster; without both one is started
      on this machine, on loopback, and ended.

  Raises:
    ValueError: no cluster answers, or none of its nodes can ever have the resources of a part.
  """
  ray = _ray()
  address = spec["address"] or os.environ.get("RAY_ADDRESS") or "local"
  own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address == "local" else {}
  try:
    _knock(address)
    with warnings.catch_warnings():
      # JAX warns of forks, which here only start other programs.
      warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
      ray.init(address, logging_level=logging.ERROR, **own)
  except (OSError, RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise ValueError(
      f"sweep.address is {address!r}; no Ray cluster answers: {reason} (one with tokens also wants "
      "RAY_AUTH_MODE=token)"
    ) from error
  try:
    _check_resources(ray.nodes(), spec["resources"], may_grow=address != "local")
    yield
  finally:
    ray.shutdown()


def _knock(address: str) -> None:
  """Raises OSError where nobody listens at a host:port; Ray would try it for minutes."""
  host, colon, port = address.removeprefix("ray://").rpartition(":")
  if colon and port.isdigit():
    socket.create_connection((host, int(port)), timeout=10).close()


def _check_resources(nodes: Sequence[Mapping], wanted: Mapping[str, float], may_grow: bool) -> None:
  totals = [node["Resources"] for node in nodes if node["Alive"]]
  if any(all(node.get(k, 0) >= n for k, n in wanted.items() if n) for node in totals):
    return
  have = "; ".join(str({k: node.get(k, 0) for k in wanted}) for node in totals)
  message = f"sweep.resources is {dict(wanted)}; no node has as much: {have}"
  if not may_grow:
    raise ValueError(message)
  hosts.say(f"{message}; waiting for one that has")


def train(config: Mapping[str, Any], folder: Workdir, parts: Sequence[Part]) -> Iterator[Part]:
  """Trains the parts that are not finished as tasks of the cluster; yields each when it is done.

  Args:
    config: of the job, as resolved.
    folder: of the job; all nodes see it under this path.
    parts: of the job.

  Raises:
    FailedPartsError: some failed; raised after the others have ended.
    InterruptedPartsError: by a signal, after the tasks had time to save.
  """
  tasks = _Tasks(config, folder)
  for part in parts:
    if part.finished() is None:
      tasks.begin(part)
  # The driver has nothing to save, but must not leave its tasks behind.
  with stop_signals() as stop:
    while tasks.running:
      yield from tasks.wait(seconds=1.0)
      if stop.caught:
        tasks.stop()
        raise InterruptedPartsError(stop.caught[0], len(tasks.running))
  if tasks.failed:
    raise FailedPartsError("; ".join(f"{part}: {why}" for part, why in tasks.failed.items()))


class _Tasks:
  """The tasks of one job.

  Attributes:
    running: task -> its part; Ray keeps those waiting that it has no room for.
    failed: part -> why it failed for good.
  """

  def __init__(self, config: Mapping[str, Any], folder: Workdir):
    self._ray, spec = _ray(), config["sweep"]
    self._retries = spec["retries"]
    self._order = {"config": config, "path": str(folder.path), "cpus": spec["resources"]["CPU"]}
    amounts = {name: amount for name, amount in spec["resources"].items() if amount}
    options = {ARGUMENTS[name]: amounts.pop(name) for name in ARGUMENTS if name in amounts}
    # Tried again from here, so that it can be told and counted. A process for every part: JAX
    # cannot be set up twice, nor give back the memory of an accelerator.
    self._work = self._ray.remote(
      **{"num_cpus": 0, **options}, resources=amounts, max_retries=0, max_calls=1
    )(work)
    self.running: dict[Any, Part] = {}
    self.failed: dict[Part, str] = {}
    self._losses = collections.Counter()

  def begin(self, part: Part) -> None:
    text = json.dumps({**self._order, "arm": part.arm, "index": part.index})
    self.running[self._work.options(name=str(part)).remote(text)] = part

  def wait(self, seconds: float) -> list[Part]:
    """Those that are finished after at most so many seconds; lost ones are begun again."""
    done, _ = self._ray.wait(list(self.running), timeout=seconds)
    return [part for task in done if (part := self._end(task)) is not None]

  def _end(self, task) -> Part | None:
    part = self.running.pop(task)
    lost, failed = self._outcome(task)
    if lost and self._losses[part] < self._retries:
      self._losses[part] += 1
      hosts.say(f"{part}: {lost}; begun again, {self._losses[part]} of {self._retries} times")
      self.begin(part)
    elif lost or failed:
      self.failed[part] = failed or f"{lost}, and sweep.retries = {self._retries} tries more failed"
      hosts.say(f"{part} failed: {self.failed[part]}")
    else:
      hosts.say(f"{part} is finished, {len(self.running)} are not")
      return part
    return None

  def _outcome(self, task) -> tuple[str, str]:
    """(why it was lost, why it failed), empty where it was not."""
    try:
      return tuple(json.loads(self._ray.get(task)))
    except self._ray.exceptions.RayTaskError as error:  # something that nobody foresaw
      hosts.say(str(error))
      return "", f"{type(error.cause).__name__}: {error.cause}"
    except self._ray.exceptions.RayError as error:
      return f"its process was lost ({str(error).strip().splitlines()[0]})", ""

  def stop(self) -> None:
    """Interrupts all tasks and waits until they have saved."""
    tasks = list(self.running)
    for task in tasks:
      self._ray.cancel(task)
    self._ray.wait(tasks, num_returns=len(tasks), timeout=STOP)


def work(text: str) -> str:
  """A task: trains the part that the JSON text describes; returns JSON of (lost, failed).

  Ray runs it in the main thread of its process, where signals are heard: a cancelled task gets a
  SIGINT, one whose node is shut down a SIGTERM, and both save first.
  """
  from balance_jax.training import experiment  # which imports this module

  order = json.loads(text)
  hosts.set_up(max(1, int(order["cpus"])))
  where = order["arm"], order["index"]
  try:
    experiment.train_alone(_tuples(order["config"]), order["path"], *where, wait=LET_GO)
  except InterruptedRunError as stop:
    return json.dumps((str(stop), ""))
  except experiment.FAILURES as error:
    return json.dumps(("", str(error)))
  return json.dumps(("", ""))


def _tuples(value: Any) -> Any:
  """A config from JSON as `training.config.resolve` gives it."""
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
