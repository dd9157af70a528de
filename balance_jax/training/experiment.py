"""An experiment from its config to its report: check, train, measure, resume, write.

Nothing is written before the config has been checked, the data read and the shapes of the runs
computed. The same command on the same folder goes on where it stopped.
"""

import contextlib
import importlib.metadata
import operator
import signal
import sys
import time
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
from balance_jax.training.metric_log import MetricLog, Progress, read_records
from balance_jax.training.robust_task import robust_task
from balance_jax.training.run import TrainingDivergedError, check_finite
from balance_jax.training.stability_task import stability_task
from balance_jax.training.task import Arm, Task
from balance_jax.training.workdir import Workdir, flatten, plain

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


# What ends a run with one line that says why.
FAILURES = (BadInputError, TrainingDivergedError, hosts.OtherProcessError, OSError)


class InterruptedRunError(RuntimeError):
  """A signal stopped the run after its state was saved; `signum` is the signal."""

  def __init__(self, signum: int, step: int, path):
    self.signum = signum
    super().__init__(
      f"stopped by {signal.Signals(signum).name} at step {step}; saved in {path}: "
      "the same command goes on from here"
    )


def run_experiment(config: Mapping[str, Any], path) -> None:
  """Runs the experiment of a resolved config in the folder `path`; prints the table at the end.

  Raises:
    BadInputError: a wrong value in the config, data that cannot be read, a folder that cannot be
      used. Nothing has been written then.
    TrainingDivergedError: a loss became NaN where that is an error; the last good checkpoint is
      kept.
    InterruptedRunError: stopped by Ctrl-C or SIGTERM, saved.
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
  with contextlib.closing(folder):
    seconds = _run_arms(config, task, folder, first)
    hosts.on_main(lambda: print(_conclude(config, task, folder, seconds)))


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
      _say(f"arm {index} of {len(task.arms)}: {name}")
    arm = first if index == 1 else build()
    with Checkpointer(place.checkpoints) as checkpoints:
      took = _train(arm, place, checkpoints, config["tensorboard"])
    if name:
      hosts.on_main(place.write, FINISHED, {"seconds": took})
    seconds += took
  return seconds


def _say(text: str) -> None:
  if hosts.is_main():
    print(text, file=sys.stderr)


def describe(config: Mapping[str, Any]) -> str:
  """The table of `dry_run` for a resolved config; trains and writes nothing, reads no data.

  Raises:
    BadInputError: a wrong value in the config.
  """
  with _bad_input():
    _checks.check_choice("task", config["task"], TASKS)
    return dry_run(TASKS[config["task"]](without_data(config)))


@contextlib.contextmanager
def _bad_input():
  try:
    yield
  except (ValueError, DatasetNotInstalledError, CorruptedDataError, ImportError) as error:
    raise BadInputError(str(error)) from error


def _train(arm: Arm, folder: Workdir, checkpoints, tensorboard: bool) -> float:
  """Chunks of steps with records, measurements and checkpoints between them; returns seconds."""
  train = arm.train
  done, before = checkpoints.latest_step(), 0.0
  if not done:
    states, done = arm.runs.init(), 0
    hosts.on_main(lambda: folder.metrics.unlink(missing_ok=True))
  else:
    states, extra = checkpoints.restore(arm.runs.shapes())
    before = extra["seconds"]
    _say(f"resuming at step {done} of {train['steps']}")
  began = time.monotonic()
  with (
    _signals() as caught,
    _log(arm, folder, done, tensorboard) as log,
    _progress(arm, done) as progress,
  ):

    def elapsed():
      return before + time.monotonic() - began

    def save():
      checkpoints.save(done, states, {"seconds": elapsed()})

    if done == 0:
      log.write(measured_records(arm, states, "eval", arm.evaluate, arm.validation))
      save()
    while done < train["steps"]:
      states, metrics = arm.runs.advance(states, train["chunk"])
      metrics = jax.device_get(metrics)
      if not arm.allow_divergence:
        _check_runs(arm, metrics, done)
      done += train["chunk"]
      log.write(train_records(arm, metrics, done))
      last = done == train["steps"]
      if done % train["eval_every"] == 0 or last:
        log.write(measured_records(arm, states, "eval", arm.evaluate, arm.validation))
      if arm.measure is not None and done % train["variance_every"] == 0:
        log.write(measured_records(arm, states, "moments", arm.measure, arm.runs.table))
      progress.update(done, group_means(arm, metrics))
      if last and arm.test is not None:
        log.write(measured_records(arm, states, "test", arm.evaluate, arm.test))
      # A signal may reach one process only; all stop after the same chunk.
      stop = hosts.any_process(bool(caught))
      if done % train["checkpoint_every"] == 0 or last or stop:
        save()
      if stop:  # after the last step too: a next arm must not start
        raise InterruptedRunError(caught[0] if caught else signal.SIGTERM, done, folder.path)
    return elapsed()


def _log(arm: Arm, folder: Workdir, done: int, tensorboard: bool):
  if not hosts.is_main():
    return hosts.Silent()
  board = folder.tensorboard if tensorboard else None
  resume_step = done if folder.metrics.exists() else None
  return MetricLog(
    folder.metrics, resume_step=resume_step, tensorboard_dir=board, groups=arm.groups
  )


def _progress(arm: Arm, done: int):
  if not hosts.is_main():
    return hosts.Silent()
  return Progress(arm.train["steps"], arm.runs.num_runs, start_step=done)


def _check_runs(arm: Arm, metrics, first_step: int) -> None:
  for index, label in enumerate(arm.labels):
    one = {name: metrics[name][index] for name in ("loss", "grad_norm")}
    check_finite(one, first_step, f"{label['method']} with seed {label['seed']}")


@contextlib.contextmanager
def _signals():
  """Collects Ctrl-C and SIGTERM instead of dying; a second Ctrl-C interrupts at once."""
  caught: list[int] = []

  def handler(signum, frame):
    if caught and signum == signal.SIGINT:
      raise KeyboardInterrupt
    caught.append(signum)
    print(f"{signal.Signals(signum).name}: saving after this chunk", file=sys.stderr)

  old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield caught
  finally:
    for number, previous in old.items():
      signal.signal(number, previous)


def train_records(arm: Arm, metrics, step: int) -> list[dict]:
  """One record a run from the metrics of a chunk (R, steps, ...)."""
  records = []
  for index, label in enumerate(arm.labels):
    one = jax.tree.map(operator.itemgetter(index), metrics)
    records.append({"event": "train", **label, "step": step, **arm.chunk_record(one)})
  return records


def group_means(arm: Arm, metrics) -> dict[str, float]:
  """Training loss by group over all runs of a chunk, for the progress line."""
  sums = jax.tree.map(lambda x: x.sum(axis=(0, 1)), metrics["group_loss"])
  return {
    name: float(num / den)
    for name, num, den in zip(arm.groups, sums.num, sums.den, strict=True)
    if den > 0
  }


def measured_records(arm: Arm, states, event: str, measure, inputs) -> list[dict]:
  """One record a run with what `measure` gives of its state and of `inputs`."""
  measured = jax.device_get(arm.runs.apply(measure, states, inputs))
  step = int(states.step[0])
  return [
    {"event": event, **label, "step": step, **{k: v[i] for k, v in measured.items()}}
    for i, label in enumerate(arm.labels)
  ]


def _conclude(config, task: Task, folder: Workdir, seconds: float) -> str:
  """Writes report.html, then results.json, which says that all is done; returns what to print."""
  device = jax.devices()[0]
  facts = {
    "config": flatten(plain(config)),
    **task.facts,
    "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    "seconds": round(seconds, 1),
  }
  records = [record for name in task.arms for record in read_records(folder.below(name).metrics)]
  text, results = task.conclude(records, facts, folder.report)
  folder.write("results.json", {**results, "table": text, **facts})
  return f"{text}\nReport: {folder.report}"
