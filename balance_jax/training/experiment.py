"""An experiment from its config to its report: check, train, measure, resume, write.

Nothing is written before the config has been checked, the data read and the shapes of the runs
computed. The same command on the same folder goes on where it stopped. What is trained is a list
of parts (see `training.parts`), here or on a Ray cluster; whoever finishes the last missing one
writes the results.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from balance_jax import _checks, data
from balance_jax.data import CorruptedDataError, DatasetNotInstalledError
from balance_jax.training import hosts, parts, ray_engine
from balance_jax.training.checkpoint import Checkpointer
from balance_jax.training.coordinate_check import coordinate_check
from balance_jax.training.dry_run import dry_run, without_data
from balance_jax.training.language_model import language_model
from balance_jax.training.loop import Training
from balance_jax.training.parts import Part
from balance_jax.training.profiling import parse_window
from balance_jax.training.robust_task import robust_task
from balance_jax.training.run import TrainingDivergedError
from balance_jax.training.stability_task import stability_task
from balance_jax.training.task import Arm, Task
from balance_jax.training.timing import time_line, without_times
from balance_jax.training.workdir import Workdir, WorkdirError, flatten, identity

TASKS = {
  "coordinate_check": coordinate_check,
  "language_model": language_model,
  "robust": robust_task,
  "stability": stability_task,
}


class BadInputError(ValueError):
  """The config, the data or the folder cannot be used; the message says which and why."""


# What ends a run with one line that says why; CheckpointError is an OSError.
FAILURES = (
  BadInputError,
  TrainingDivergedError,
  hosts.OtherProcessError,
  ray_engine.FailedPartsError,
  OSError,
)


def run_experiment(config: Mapping[str, Any], path) -> None:
  """Runs the experiment of a resolved config in the folder `path`; prints the table at the end.

  With `config.sweep.shard` it trains one part of it only, and writes the results if that was the
  last one missing.

  Raises:
    BadInputError: a wrong value in the config, data that cannot be read, a folder that cannot be
      used or holds damaged files. Nothing has been written then, unless rows that are read while
      training are damaged.
    TrainingDivergedError, InterruptedRunError, CheckpointError: see `Training.run`.
    FailedPartsError: some parts failed on a Ray cluster; the others are kept.
    OSError: the disk is full or refuses; what was saved before is whole.
  """
  folder = Workdir(path)
  with contextlib.ExitStack() as stack:
    with _bad_input():
      config = parts.settled(config)
      spec, on_ray = config["sweep"], config["sweep"]["engine"] == "ray"
      _checks.check_choice("task", config["task"], TASKS)
      own = ray_engine.for_driver(config) if on_ray else config
      if hosts.any_process(bool(hosts.on_main(_finished, config, folder))):
        return
      task = TASKS[config["task"]](own)
      job = parts.cut(task, folder, spec["parts"], config_digest(config))
      mine = parts.of_shard(job, spec["shard"])
      # One at a time, and the first now: most of what a config can get wrong shows in its shapes.
      arms = functools.lru_cache(maxsize=1)(lambda name: task.arms[name]())
      parse_window(config["profile"], arms(mine[0].arm).train["steps"] if mine else 0)
      if mine:
        jax.eval_shape(arms(mine[0].arm).runs.init)
      if on_ray:
        stack.enter_context(ray_engine.connected(spec))
      hosts.on_main(folder.begin, config)
    with _bad_input(WorkdirError, CorruptedDataError):
      trained = ray_engine.train(config, folder, mine) if on_ray else _train(config, arms, mine)
      stack.enter_context(contextlib.closing(trained))
      write = functools.partial(hosts.on_main, _write_results, config, task, folder, job, {})
      new = [write() for _ in trained]
      results = write()
  if hosts.is_main():
    _tell(results, folder, spec["shard"], bool(new))


def _finished(config, folder: Workdir) -> bool:
  """Whether the folder holds the results of this config; then says so."""
  if not folder.check(config):
    return False
  results = folder.read("results.json")
  if results is None or not results["complete"]:
    return False
  print(results["table"])
  print(f"finished before; nothing to do. Report: {folder.report}")
  return True


def _train(config, arms: Callable[[str], Arm], mine: Sequence[Part]) -> Iterator[Part]:
  """Trains parts in this process, one after another; yields each when it is done."""
  with contextlib.ExitStack() as locks:
    for part in mine:
      hosts.on_main(lambda part=part: locks.enter_context(part.folder.held()))
    for number, part in enumerate(mine, 1):
      if hosts.any_process(bool(hosts.on_main(part.finished))):
        continue
      if len(mine) > 1 or part.count > 1:
        hosts.say(f"{part} ({number} of {len(mine)})")
      _train_part(config, arms(part.arm), part)
      yield part


def _train_part(config, arm: Arm, part: Part) -> None:
  with Checkpointer(part.folder.checkpoints) as checkpoints:
    seconds = Training(
      arm.part(part.runs),
      part.folder,
      checkpoints,
      config_digest=part.config_digest,
      tensorboard=config["tensorboard"],
      window=parse_window(config["profile"], math.inf),
    ).run()
  hosts.on_main(parts.finish, part, {"seconds": seconds, "device": _device()})


def train_alone(config: Mapping[str, Any], path, arm: str, index: int, wait: float) -> None:
  """Trains one part in a process of its own, which does nothing else.

  Args:
    config: of the whole job.
    path: its folder.
    arm, index: which part, see `Part`.
    wait: seconds to wait for a process that may be about to die in the folder of the part.

  Raises:
    BadInputError, TrainingDivergedError, InterruptedRunError, OSError: as `run_experiment`.
  """
  with _bad_input():  # a WorkdirError is a ValueError
    task = TASKS[config["task"]](config)
    count, digest = config["sweep"]["parts"], config_digest(config)
    job = parts.cut(task, Workdir(path), count, digest)
    part = next(part for part in job if (part.arm, part.index) == (arm, index))
    built = task.arms[arm]()
    jax.eval_shape(built.runs.init)
  with _bad_input(WorkdirError, CorruptedDataError), part.folder.held(wait):
    if part.finished() is None:
      _train_part(config, built, part)


def describe(config: Mapping[str, Any]) -> str:
  """The text of `dry_run` for a resolved config; trains and writes nothing.

  The data is read where it is on this machine and prepared; else only shapes are given.

  Raises:
    BadInputError: a wrong value in the config, or data that cannot be read.
  """
  with _bad_input():
    config = parts.settled(config)
    _checks.check_choice("task", config["task"], TASKS)
    build, profile = TASKS[config["task"]], config["profile"]
    try:
      with data.only_what_is_there():
        return dry_run(build(config), profile=profile)
    except DatasetNotInstalledError as error:
      return dry_run(build(without_data(config)), missing=str(error), profile=profile)


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


def _write_results(config, task: Task, folder: Workdir, job: Sequence[Part], known: dict) -> dict:
  """Writes results.json: of the whole job, with its report, or of what is finished so far.

  Args:
    known: what finished parts noted; those found are added.

  Returns:
    What results.json holds now.
  """
  with folder.held(wait=math.inf):
    results = folder.read("results.json")
    if results is not None and results["complete"]:  # another process was as fast
      return results
    known.update(
      (part, found) for part in job if part not in known and (found := part.finished()) is not None
    )
    if len(known) < len(job):
      results = parts.so_far(job, known)
    else:
      results = _conclude(config, task, folder, job, list(known.values()))
    folder.write("results.json", results)
    return results


def _conclude(config, task: Task, folder: Workdir, job, notes: Sequence[Mapping]) -> dict:
  """Writes report.html; returns the content of results.json."""
  facts = {
    "config": flatten(identity(config)),
    **task.facts,
    "device": "; ".join(sorted({note["device"] for note in notes} or {_device()})),
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    "seconds": round(sum(note["seconds"] for note in notes), 1),
  }
  with _bad_input():
    records = parts.records_of(task, job)
  if line := time_line(records):
    facts["time"] = line
  text, results = task.conclude(without_times(records), facts, folder.report)
  return {"complete": True, **results, "table": text, **facts}


def _tell(results: Mapping[str, Any], folder: Workdir, shard: str, new: bool) -> None:
  """Prints the table, or what is missing."""
  if results["complete"]:
    print(results["table"])
    if "time" in results:
      print(f"Time: {results['time']}")
    print(f"Report: {folder.report}")
    return
  print(
    f"part {shard} {'is finished' if new else 'was finished before'}; not yet: "
    f"{', '.join(results['missing'])}. Results so far: {folder.path / 'results.json'}"
  )


def _device() -> str:
  device = jax.devices()[0]
  return f"{jax.device_count()} x {device.device_kind} ({device.platform})"
