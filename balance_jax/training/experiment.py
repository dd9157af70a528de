"""An experiment from its config to its report: check, train, measure, resume, write.

Nothing is written before the config has been checked, the data read and the shapes of all runs
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
import numpy as np

from balance_jax import _checks
from balance_jax.data import CorruptedDataError, DatasetNotInstalledError
from balance_jax.training.checkpoint import Checkpointer
from balance_jax.training.language_model import Task, language_model
from balance_jax.training.measure import evaluate, gradient_variance
from balance_jax.training.metric_log import MetricLog, Progress, read_records
from balance_jax.training.mixture_report import (
  console_table,
  summarize,
  verdict,
  write_mixture_report,
)
from balance_jax.training.run import check_finite
from balance_jax.training.workdir import Workdir, flatten, plain

TASKS = {"language_model": language_model}


class BadInputError(ValueError):
  """The config, the data or the folder cannot be used; the message says which and why."""


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
    TrainingDivergedError: a loss became NaN; the last good checkpoint is kept.
    InterruptedRunError: stopped by Ctrl-C or SIGTERM, saved.
  """
  folder = Workdir(path)
  try:
    check_schedule(config)
    _checks.check_choice("task", config["task"], TASKS)
    if folder.check(config) and (results := folder.read("results.json")) is not None:
      print(results["table"])
      print(f"finished before; nothing to do. Report: {folder.report}")
      return
    task = TASKS[config["task"]](config)
    if config["reference"]:
      _checks.check_choice("reference", config["reference"], {x["method"] for x in task.labels})
    shapes = jax.eval_shape(task.runs.init)
    folder.open(config)
  except (ValueError, DatasetNotInstalledError, CorruptedDataError, ImportError) as error:
    raise BadInputError(str(error)) from error
  with contextlib.closing(folder), Checkpointer(folder.checkpoints) as checkpoints:
    seconds = _train(config, task, folder, checkpoints, shapes)
    print(_conclude(config, task, folder, seconds))


def check_schedule(config: Mapping[str, Any]) -> None:
  """Raises ValueError unless the step counts of `config.train` fit together."""
  train = config["train"]
  for name in ("steps", "batch_size", "chunk", "eval_every", "checkpoint_every", "variance_every"):
    _checks.check_number(f"train.{name}", train[name], low=1, integer=True)
  for name in ("steps", "eval_every", "checkpoint_every", "variance_every"):
    if train[name] % train["chunk"]:
      raise ValueError(
        f"train.{name} is {train[name]}; it must be a multiple of train.chunk = {train['chunk']}"
      )


def _train(config, task: Task, folder: Workdir, checkpoints, shapes) -> float:
  """Chunks of steps with records, measurements and checkpoints between them; returns seconds."""
  train = config["train"]
  done, before = checkpoints.latest_step(), 0.0
  if not done:
    states, done = task.runs.init(), 0
    folder.metrics.unlink(missing_ok=True)
  else:
    states, extra = checkpoints.restore(shapes)
    before = extra["seconds"]
    print(f"resuming at step {done} of {train['steps']}", file=sys.stderr)
  began = time.monotonic()
  board = folder.tensorboard if config["tensorboard"] else None
  resume_step = done if folder.metrics.exists() else None
  with (
    _signals() as caught,
    MetricLog(
      folder.metrics, resume_step=resume_step, tensorboard_dir=board, groups=task.groups
    ) as log,
    Progress(train["steps"], task.runs.num_runs, start_step=done) as progress,
  ):

    def elapsed():
      return before + time.monotonic() - began

    def save():
      checkpoints.save(done, states, {"seconds": elapsed()})

    if done == 0:
      log.write(evaluation_records(task, states, "eval", task.validation))
      save()
    while done < train["steps"]:
      states, metrics = task.runs.advance(states, train["chunk"])
      metrics = jax.device_get(metrics)
      _check_runs(task, metrics, done)
      done += train["chunk"]
      log.write(train_records(task, metrics, done))
      if done % train["eval_every"] == 0 or done == train["steps"]:
        log.write(evaluation_records(task, states, "eval", task.validation))
      if done % train["variance_every"] == 0:
        log.write(variance_records(task, states, train))
      progress.update(done, group_means(task, metrics))
      if done == train["steps"]:
        log.write(evaluation_records(task, states, "test", task.test))
      if done % train["checkpoint_every"] == 0 or done == train["steps"] or caught:
        save()
      if caught and done < train["steps"]:
        raise InterruptedRunError(caught[0], done, folder.path)
    return elapsed()


def _check_runs(task: Task, metrics, first_step: int) -> None:
  for index, label in enumerate(task.labels):
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


def train_records(task: Task, metrics, step: int) -> list[dict]:
  """One record a run from the metrics of a chunk (R, steps, ...)."""
  records = []
  for index, label in enumerate(task.labels):
    one = jax.tree.map(operator.itemgetter(index), metrics)
    records.append({"event": "train", **label, "step": step, **_chunk_record(one)})
  return records


def _chunk_record(metrics) -> dict:
  group_loss = metrics["group_loss"]
  count = group_loss.den.sum(axis=0)
  with np.errstate(invalid="ignore"):
    losses = group_loss.num.sum(axis=0) / count  # NaN, written as null, without an example
  return {
    "loss": metrics["loss"].mean(),
    "group_loss": losses,
    "p": metrics["mixture"]["p"][-1],
    "r": metrics["mixture"]["r"][-1],
    "epochs": metrics["epochs"][-1],
    "grad_norm": metrics["grad_norm"].mean(),
    "grad_norm_var": metrics["grad_norm"].var(ddof=1) if len(metrics["grad_norm"]) > 1 else None,
  }


def group_means(task: Task, metrics) -> dict[str, float]:
  """Training loss by group over all runs of a chunk, for the progress line."""
  sums = jax.tree.map(lambda x: x.sum(axis=(0, 1)), metrics["group_loss"])
  return {
    name: float(num / den)
    for name, num, den in zip(task.groups, sums.num, sums.den, strict=True)
    if den > 0
  }


def evaluation_records(task: Task, states, event: str, batches) -> list[dict]:
  """One record a run with the mean loss by group on held-out rows."""
  losses = jax.device_get(task.runs.apply(_evaluate, states, batches))
  step = int(states.step[0])
  return [
    {"event": event, **label, "step": step, "group_loss": loss}
    for label, loss in zip(task.labels, losses, strict=True)
  ]


def _evaluate(step, state, batches):
  return evaluate(step, state, batches).mean()


def variance_records(task: Task, states, train) -> list[dict]:
  """One record a run with predicted and observed variance of the batch gradient."""
  measured = jax.device_get(
    task.runs.apply(
      _Variance(train["variance_examples"], train["variance_batches"]), states, task.table
    )
  )
  step = int(states.step[0])
  return [
    {"event": "moments", **label, "step": step, **{k: v[i] for k, v in measured.items()}}
    for i, label in enumerate(task.labels)
  ]


class _Variance:
  """`gradient_variance` with its counts; hashable by them, so that it is compiled once."""

  def __init__(self, examples: int, batches: int):
    self.examples, self.batches = examples, batches

  def __call__(self, step, state, table):
    return gradient_variance(step, state, table, examples=self.examples, batches=self.batches)

  def __hash__(self):
    return hash((self.examples, self.batches))

  def __eq__(self, other):
    return isinstance(other, _Variance) and vars(self) == vars(other)


def _conclude(config, task: Task, folder: Workdir, seconds: float) -> str:
  """Writes results.json and report.html; returns what to print."""
  records = read_records(folder.metrics)
  reference = config["reference"] or None
  summary = summarize(records, task.groups, task.sizes, reference=reference)
  device = jax.devices()[0]
  facts = {
    "config": flatten(plain(config)),
    **task.facts,
    "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    "seconds": round(seconds, 1),
  }
  table = console_table(summary)
  lines = verdict(summary)
  write_mixture_report(
    folder.report,
    records,
    {
      "title": config["title"],
      "groups": task.groups,
      "sizes": task.sizes,
      "reference": reference,
      "verdict": lines,
      **facts,
    },
  )
  text = "\n".join([table, "", *lines])
  test = [record for record in records if record["event"] == "test"]
  folder.write("results.json", {"summary": summary, "test": test, "table": text, **facts})
  return f"{text}\nReport: {folder.report}"
