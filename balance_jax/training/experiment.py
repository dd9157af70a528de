"""An experiment from its config to its report: check, train, measure, resume, write.

Nothing is written before the config has been checked, the data read and the shapes of the runs
computed. The same command on the same folder goes on where it stopped.
"""

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import jax

from balance_jax import _checks
from balance_jax.data import CorruptedDataError, DatasetNotInstalledError
from balance_jax.training import hosts
from balance_jax.training.checkpoint import Checkpointer
from balance_jax.training.coordinate_check import coordinate_check
from balance_jax.training.dry_run import dry_run, without_data
from balance_jax.training.language_model import language_model
from balance_jax.training.loop import Training
from balance_jax.training.metric_log import read_records
from balance_jax.training.robust_task import robust_task
from balance_jax.training.run import TrainingDivergedError
from balance_jax.training.stability_task import stability_task
from balance_jax.training.task import Arm, Task
from balance_jax.training.workdir import Workdir, WorkdirError, flatten, identity, plain

TASKS = {
  "coordinate_check": coordinate_check,
  "language_model": language_model,
  "robust": robust_task,
  "stability": stability_task,
}


# Written into the folder of an arm when it is done.
FINISHED = "finished.json"


class BadInputError(ValueError):
  """The config, the data or the folder cannot be used; the message says which and why."""


# What ends a run with one line that says why; CheckpointError is an OSError.
FAILURES = (BadInputError, TrainingDivergedError, hosts.OtherProcessError, OSError)


def run_experiment(config: Mapping[str, Any], path) -> None:
  """Runs the experiment of a resolved config in the folder `path`; prints the table at the end.

  Raises:
    BadInputError: a wrong value in the config, data that cannot be read, a folder that cannot be
      used or holds damaged files. Nothing has been written then, unless rows that are read while
      training are damaged.
    TrainingDivergedError, InterruptedRunError, CheckpointError: see `Training.run`.
    OSError: the disk is full or refuses; what was saved before is whole.
  """
  folder = Workdir(path)
  with _bad_input():
    _checks.check_choice("task", config["task"], TASKS)
    if hosts.any_process(bool(hosts.on_main(_finished, config, folder))):
      return
    task = TASKS[config["task"]](config)
    # The first arm now: most of what a config can still get wrong shows in its shapes.
    first = next((build() for build in task.arms.values()), None)
    if first is not None:
      jax.eval_shape(first.runs.init)
    hosts.on_main(folder.open, config)
  with contextlib.closing(folder), _bad_input(WorkdirError, CorruptedDataError):
    seconds = _run_arms(config, task, folder, first)
    hosts.on_main(_conclude, config, task, folder, seconds)


def _finished(config, folder: Workdir) -> bool:
  """Whether the folder holds the results of this config; then says so."""
  if not folder.check(config) or (results := folder.read("results.json")) is None:
    return False
  print(results["table"])
  print(f"finished before; nothing to do. Report: {folder.report}")
  return True


def _run_arms(config, task: Task, folder: Workdir, first: Arm | None) -> float:
  """Trains every arm that is not finished; returns the seconds of all."""
  seconds = 0.0
  for index, (name, build) in enumerate(task.arms.items(), 1):
    place = folder.below(name)
    if name and (finished := place.read(FINISHED)) is not None:
      seconds += finished["seconds"]
      continue
    if name:
      hosts.say(f"arm {index} of {len(task.arms)}: {name}")
    arm = first if index == 1 else build()
    with Checkpointer(place.checkpoints) as checkpoints:
      took = Training(
        arm,
        place,
        checkpoints,
        config_digest=config_digest(config),
        tensorboard=config["tensorboard"],
      ).run()
    if name:
      hosts.on_main(place.write, FINISHED, {"seconds": took})
    seconds += took
  return seconds


def describe(config: Mapping[str, Any]) -> str:
  """The table of `dry_run` for a resolved config; trains and writes nothing, reads no data.

  Raises:
    BadInputError: a wrong value in the config.
  """
  with _bad_input():
    _checks.check_choice("task", config["task"], TASKS)
    return dry_run(TASKS[config["task"]](without_data(config)))


def config_digest(config: Mapping[str, Any]) -> str:
  """SHA-256 of what a resolved config trains; every checkpoint carries it."""
  return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _bad_input(*kinds: type[Exception]):
  kinds = kinds or (ValueError, DatasetNotInstalledError, CorruptedDataError, ImportError)
  try:
    yield
  except kinds as error:
    raise BadInputError(str(error)) from error


def _conclude(config, task: Task, folder: Workdir, seconds: float) -> None:
  """Writes report.html, then results.json, which says that all is done; prints the table."""
  device = jax.devices()[0]
  facts = {
    "config": flatten(plain(config)),
    **task.facts,
    "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    "seconds": round(seconds, 1),
  }
  with _bad_input():
    records = [record for name in task.arms for record in read_records(folder.below(name).metrics)]
  text, results = task.conclude(records, facts, folder.report)
  folder.write("results.json", {**results, "table": text, **facts})
  print(f"{text}\nReport: {folder.report}")
