"""The training of one arm, from its last checkpoint to its last step.

Between two chunks the host writes records, measures, saves, and looks for signals and for numbers
that are not finite. Going back after a divergence is the same thing as resuming after a crash, but
for the keys of the runs that diverged.
"""

import dataclasses
import operator
import signal

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax.training import hosts
from balance_jax.training.checkpoint import Checkpointer
from balance_jax.training.metric_log import MetricLog, Progress
from balance_jax.training.profiling import Profile
from balance_jax.training.run import TrainingDivergedError, check_finite
from balance_jax.training.signals import InterruptedRunError, stop_signals
from balance_jax.training.task import Arm
from balance_jax.training.timing import StopWatch
from balance_jax.training.workdir import Workdir, WorkdirError


class Training:
  """One arm in its folder; `run` trains it to the end.

  Args:
    arm: what to train.
    folder: where its metrics and checkpoints lie.
    checkpoints: those of this folder.
    config_digest: of the config; a checkpoint of another one is refused.
    tensorboard: whether to write event files too.
    window: the steps to trace, see `profiling`, or None.
  """

  def __init__(
    self,
    arm: Arm,
    folder: Workdir,
    checkpoints: Checkpointer,
    *,
    config_digest: str,
    tensorboard: bool,
    window: range | None,
  ):
    self._arm, self._folder, self._checkpoints = arm, folder, checkpoints
    self._config_digest, self._window = config_digest, window
    self._board = folder.tensorboard if tensorboard else None
    self._watch = StopWatch(arm.runs.seconds)
    # Every return to a checkpoint so far: the step that diverged, the metric, the runs (indices).
    self._rollbacks: list[dict] | None = None
    self._score, self._done = None, 0

  def run(self) -> float:
    """Trains to the last step.

    Returns:
      Seconds of all processes that worked on it.

    Raises:
      TrainingDivergedError: not finite where that is an error, and `arm.max_rollbacks` returns to
        a checkpoint were in vain; the last good checkpoint is kept.
      InterruptedRunError: stopped by a signal, saved.
      CheckpointError: a checkpoint cannot be written, or none of those there can be used.
    """
    with stop_signals(self._is_saved if jax.process_count() == 1 else None) as self._stop:
      while True:
        with self._watch.part("other"):
          redone = self._resume()
        try:
          return self._to_the_end(redone)
        except TrainingDivergedError as error:
          if len(self._rollbacks) == self._arm.max_rollbacks:
            raise
          hosts.say(f"{error}; going back to the last checkpoint")
          self._rollbacks.append(
            {"diverged": error.step, "metric": error.metric, "runs": self._diverged}
          )

  def _resume(self) -> list[dict]:
    """Takes up the last checkpoint, or begins; returns the records of returns it does not know."""
    if not self._checkpoints.latest_step():  # the state before step 0 is soon made again
      self._states, self._done = self._arm.runs.init(), 0
      extra = {"seconds": 0.0, "rollbacks": [], "skipped": [0] * self._arm.runs.num_runs}
      hosts.on_main(lambda: self._folder.metrics.unlink(missing_ok=True))
      self._watch.go_back(None)
    else:
      self._states, extra = self._checkpoints.restore(self._arm.runs.shapes())
      if extra["config"] != self._config_digest:
        raise WorkdirError(f"the checkpoints in {self._folder.path} are those of another config")
      self._done = int(self._states.step[0])
      hosts.say(f"resuming at step {self._done} of {self._arm.train['steps']}")
      self._watch.go_back(self._done)
    self._skipped = extra["skipped"]  # steps of each run that were left out
    if self._rollbacks is None:
      self._rollbacks, self._before = extra["rollbacks"], extra["seconds"]
    known = len(extra["rollbacks"])
    return [
      record
      for number, rollback in enumerate(self._rollbacks[known:], known + 1)
      for record in self._go_another_way(number, rollback)
    ]

  def _go_another_way(self, number: int, rollback: dict) -> list[dict]:
    """Gives the runs that diverged another key; one record for each of them.

    The records belong to the first step that is done again, so that a resumed run that has to go
    the same way once more drops them like all others of that step.
    """
    self._states = _with_other_keys(self._states, rollback["runs"], number)
    told = {"rollback": number, "diverged": rollback["diverged"], "metric": rollback["metric"]}
    labels = [self._arm.labels[index] for index in rollback["runs"]]
    return [{"event": "rollback", **label, "step": self._done + 1, **told} for label in labels]

  def _to_the_end(self, redone: list[dict]) -> float:
    """Chunks of steps with records, measurements and checkpoints between them."""
    arm, steps = self._arm, self._arm.train["steps"]
    with (
      self._open_log() as self._log,
      self._open_progress() as progress,
      self._open_profile() as profile,
    ):
      if self._done == 0 and hosts.any_process(self._log.is_empty()):
        with self._watch.part("measure"):
          self._evaluate("eval", arm.validation)
        with self._watch.part("save"):
          self._save()
        self._log.write([self._watch.record(0)])
      self._log.write(redone)
      while self._done < steps:
        with profile.chunk(self._done):
          metrics = self._chunk()
        progress.update(self._done, group_means(arm, metrics))
        self._look_around(last=self._done == steps)
      return self._elapsed()

  def _open_progress(self):
    if not hosts.is_main():
      return hosts.Silent()
    steps = self._arm.train["steps"]
    return Progress(steps, self._arm.runs.num_runs, start_step=self._done)

  def _open_profile(self) -> Profile:
    train = self._arm.train
    sizes = {"done": self._done, "steps": train["steps"], "chunk": train["chunk"]}
    return Profile(self._window, self._folder.path, **sizes)

  def _open_log(self):
    if not hosts.is_main():
      return hosts.Silent()
    path = self._folder.metrics
    try:
      return MetricLog(
        path,
        resume_step=self._done if path.exists() else None,
        tensorboard_dir=self._board,
        groups=self._arm.groups,
      )
    except ValueError as error:  # a line in the middle is no JSON, or of a later schema
      raise WorkdirError(f"{error}; to start again, remove the workdir") from error

  def _chunk(self) -> dict:
    """Takes the steps of one chunk; returns its metrics as NumPy arrays."""
    chunk = self._arm.train["chunk"]
    following = chunk if self._done + chunk < self._arm.train["steps"] else 0
    with self._watch.part("compute"):
      self._states, metrics = self._arm.runs.advance(self._states, chunk, following)
      metrics = self._arm.runs.collect(metrics)
      if not self._arm.allow_divergence:
        self._check(metrics)
    self._done += chunk
    self._log.write(train_records(self._arm, metrics, self._done))
    return metrics

  def _look_around(self, last: bool) -> None:
    """What is due after a chunk: evaluation, measurement, checkpoint, stop."""
    arm, done = self._arm, self._done
    with self._watch.part("measure"):
      if done % arm.train["eval_every"] == 0 or last:
        self._evaluate("eval", arm.validation)
      if arm.measure is not None and done % arm.train["variance_every"] == 0:
        self._record("moments", arm.runs.apply_to_rows(*arm.measure, self._states))
      if last and arm.test is not None:
        self._evaluate("test", arm.test)
    # A signal may reach one process only; all stop after the same chunk.
    stop = hosts.any_process(bool(self._stop.caught))
    if stop:
      self._stop.heed()
    save = done % arm.train["checkpoint_every"] == 0 or last or stop
    if save:
      with self._watch.part("save"):
        self._save()
        if last or stop:
          self._checkpoints.finish()
    if save or done % arm.train["eval_every"] == 0:
      self._log.write([self._watch.record(done)])
    if stop:  # after the last step too: a next arm must not start
      signum = self._stop.caught[0] if self._stop.caught else signal.SIGTERM
      raise InterruptedRunError(signum, done, self._folder.path)

  def _check(self, metrics: dict) -> None:
    """Raises TrainingDivergedError for the first run that is not finite; notes them all."""
    last_step = self._done + self._arm.train["chunk"] - 1
    healthy = jax.device_get(self._arm.runs.apply(_has_finite_params, self._states))
    found = {}
    for index, label in enumerate(self._arm.labels):
      name = f"{label['method']} with seed {label['seed']}"
      one = {key: metrics[key][index] for key in ("loss", "grad_norm")}
      try:
        self._skip(index, one, name)
        if not healthy[index]:  # the last step's: the next loss would show it, but not the save
          raise TrainingDivergedError(last_step, "a parameter", name)
      except TrainingDivergedError as error:
        found[index] = error
    if found:
      self._diverged = list(found)
      raise next(iter(found.values()))

  def _skip(self, index: int, metrics: dict, name: str) -> None:
    """Counts the steps of a run that were left out; raises at the first that is one too many."""
    bad = np.flatnonzero(~np.logical_and(*map(np.isfinite, metrics.values())))
    left = self._arm.max_skips - self._skipped[index]
    if len(bad) > left:
      first = int(bad[left])
      check_finite(jax.tree.map(lambda x: x[first:], metrics), self._done + first, name)
    self._skipped[index] += len(bad)

  def _evaluate(self, event: str, batches) -> None:
    arm = self._arm
    records = self._record(event, arm.runs.apply(arm.evaluate, self._states, batches))
    if event == "eval" and arm.score is not None:
      self._score = (self._done, float(np.mean([record[arm.score] for record in records])))

  def _record(self, event: str, measured: dict) -> list[dict]:
    """Writes one record a run with what was measured of all (R, ...)."""
    measured = jax.device_get(measured)
    records = [
      {"event": event, **label, "step": self._done, **{k: v[i] for k, v in measured.items()}}
      for i, label in enumerate(self._arm.labels)
    ]
    self._log.write(records)
    return records

  def _save(self) -> None:
    self._log.sync()  # a checkpoint must not outlive the records before it
    step, score = self._score or (None, None)
    self._checkpoints.save(
      self._done,
      self._states,
      {
        "seconds": self._elapsed(),
        "rollbacks": self._rollbacks,
        "skipped": self._skipped,
        "config": self._config_digest,
      },
      score=score if step == self._done else None,
    )

  def _is_saved(self) -> bool:
    """Whether the steps that are done have reached the disk."""
    return self._checkpoints.finished_step == self._done

  def _elapsed(self) -> float:
    return self._before + self._watch.elapsed()


def _has_finite_params(step, state, inputs) -> jax.Array:
  del step, inputs
  finite = [
    jnp.isfinite(leaf).all()
    for leaf in jax.tree.leaves(state.params)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]
  return jnp.array(True) if not finite else jnp.stack(finite).all()


def _with_other_keys(states, runs: list[int], number: int):
  """The states (R, ...) with the keys of some runs replaced: other batches, other noise."""
  # The step numbers are folded into the key of a run; this is none of them.
  no_step = np.uint32(2**32 - 1)

  def other(key):
    return jax.random.fold_in(jax.random.fold_in(key, no_step), number)

  chosen = np.isin(np.arange(len(states.key)), runs)
  return dataclasses.replace(states, key=jnp.where(chosen, jax.vmap(other)(states.key), states.key))


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
