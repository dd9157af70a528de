"""Saving and restoring the whole state of a run with orbax, while the run goes on.

A checkpoint holds the state (typed keys and every dtype included) and a small JSON value. Orbax
writes into a temporary folder and renames it; then a seal is added, the SHA-256 of every file. What
has no seal, or does not agree with it, is no checkpoint: the one before it is used.
"""

import concurrent.futures
import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.training import hosts
from balance_jax.training.metric_log import replace_file

# Lies in the folder of the checkpoint and goes with it.
SEAL = "seal.json"

# Seconds after which Orbax gives a save up. It reads them from the machine's clock, which may be
# set; where a process is lost, JAX's heartbeat ends the others.
_PATIENCE = 7 * 24 * 3600


class CheckpointError(OSError):
  """A checkpoint cannot be written, or none of those there can be used; says why."""


class Checkpointer:
  """Numbered checkpoints of one run; use it as a context manager.

  Args:
    directory: folder of the checkpoints; made when missing.
    max_to_keep: how many of the newest to keep, >= 1. The one with the best score is kept as well,
      and until the next save is over, the one that it replaces.
  """

  def __init__(self, directory, max_to_keep: int = 2):
    import orbax.checkpoint as ocp  # heavy, so only where checkpoints are used

    _checks.check_number("max_to_keep", max_to_keep, low=1, integer=True)
    self._ocp, self._max_to_keep = ocp, max_to_keep
    self._directory = Path(directory).absolute()
    # The step that is being written and when it is done; the newest one that has been.
    self._running: tuple[int, concurrent.futures.Future] | None = None
    self.finished_step: int | None = None
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._log = logging.getLogger("absl")
    self._log.addFilter(_is_not_of_orbax)
    handler = ocp.CompositeCheckpointHandler(handler_registry=_handlers(ocp))
    self._orbax = ocp.AsyncCheckpointer(handler, timeout_secs=_PATIENCE)
    hosts.on_main(self._prepare)

  def _prepare(self) -> None:
    self._directory.mkdir(parents=True, exist_ok=True)
    for folder in self._unfinished("*"):
      shutil.rmtree(folder)

  def save(self, step: int, state: Any, extra: Any = None, score: float | None = None) -> None:
    """Starts to write a checkpoint, when the one before is finished.

    What is given is copied first, the state on its devices: it may be donated or changed at once.

    Args:
      step: its number, larger than those before it; a step already saved is left as it is.
      state: pytree of arrays.
      extra: any JSON value, such as what the host has to remember.
      score: how good the state is, the lower the better; None, or not finite, counts for nothing.

    Raises:
      CheckpointError: as `finish`, of the one before or of this one.
    """
    self.finish()
    if step in self._steps():
      if self._damage(step) is None:
        return
      hosts.on_main(self._remove, step)
    args = self._ocp.args
    # Both are written later, when the caller may have changed them.
    state, extra = _copy(state), copy.deepcopy(extra)
    items = args.Composite(state=args.PyTreeSave(state), extra=args.JsonSave([extra]))
    with self._undone_on_failure(step):
      self._orbax.save(self._directory / str(step), args=items)
    self._running = step, self._thread.submit(self._complete, step, score)

  def finish(self) -> None:
    """Waits until the running save is on the disk, then removes those that need not be kept.

    Raises:
      CheckpointError: the disk refused; nothing of this checkpoint is left, the others are whole.
    """
    if self._running is None:
      return
    (step, written), self._running = self._running, None
    with self._undone_on_failure(step):
      written.result()
    hosts.on_main(self._remove_superseded)

  def latest_step(self) -> int | None:
    """Number of the newest checkpoint, usable or not, or None; waits for the running save."""
    self.finish()
    return max(self._steps(), default=None)

  def best_step(self) -> int | None:
    """Number of the checkpoint with the lowest score, the newest of equals, or None."""
    scores = {step: self._sealed(step).get("score") for step in self._steps()}
    known = [(score, -step) for step, score in scores.items() if score is not None]
    return -min(known)[1] if known else None

  def restore(self, target: Any, step: int | None = None) -> tuple[Any, Any]:
    """Reads a checkpoint back after comparing it with its seal.

    Without a step it is the newest that can be used. Newer ones are named on standard error, with
    what is wrong, and removed once the older one has been read.

    Args:
      target: pytree of arrays or `jax.ShapeDtypeStruct` with the shapes and dtypes to expect; a
        sharding in it decides where the arrays go.
      step: its number.

    Returns:
      (state, extra).

    Raises:
      FileNotFoundError: there is no checkpoint.
      CheckpointError: no checkpoint, or not the one asked for, agrees with its seal.
      ValueError: from orbax, when tree or shapes differ from the target.
    """
    self.finish()
    steps = sorted(self._steps(), reverse=True) if step is None else [step]
    if not steps:
      raise FileNotFoundError(f"no checkpoint in {self._directory}")
    damages = []
    for number in steps:
      damage = self._damage(number)
      if damage is None:
        break
      damages.append(f"checkpoint {self._directory / str(number)} cannot be used: {damage}")
    else:
      raise CheckpointError(
        f"{'; '.join(damages)}; no other is left: restore the folder from a copy, or remove it to "
        "start again"
      )
    args = self._ocp.args
    abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, target)
    restored = self._orbax.restore(
      self._directory / str(number),
      args=args.Composite(state=args.StandardRestore(abstract), extra=args.JsonRestore()),
    )
    for damaged, message in zip(steps, damages, strict=False):
      hosts.say(f"{message}; going back to step {number}")
      hosts.on_main(self._remove, damaged)
    self.finished_step = number
    return restored.state, restored.extra[0]

  @contextlib.contextmanager
  def _undone_on_failure(self, step: int):
    """Removes what a failing save leaves; what the disk complained of becomes one line."""
    try:
      yield
    except Exception as error:
      for path in (*self._directory.glob(str(step)), *self._unfinished(step)):
        shutil.rmtree(path, ignore_errors=True)
      reason = _os_reason(error)
      if reason is None:
        raise
      raise CheckpointError(
        f"checkpoint {self._directory / str(step)} cannot be written: {reason}; the same command "
        f"goes on from {_named(self.latest_step())}"
      ) from error

  def _steps(self) -> list[int]:
    return [int(path.name) for path in self._directory.iterdir() if path.name.isdecimal()]

  def _unfinished(self, step: int | str) -> list[Path]:
    """Where orbax is writing, or was when it was killed."""
    return list(self._directory.glob(f"{step}{self._ocp.utils.TMP_DIR_SUFFIX}*"))

  def _remove(self, step: int) -> None:
    """Without its seal first: what a kill leaves of it does not count."""
    (self._directory / str(step) / SEAL).unlink(missing_ok=True)
    shutil.rmtree(self._directory / str(step))

  def _remove_superseded(self) -> None:
    steps = sorted(self._steps())
    for step in {*steps[: -self._max_to_keep]} - {self.best_step()}:
      self._remove(step)

  def _complete(self, step: int, score: float | None) -> None:
    """In a thread of its own: what follows when all processes have written their parts."""
    self._orbax.wait_until_finished()
    if hosts.is_main():
      self._seal(step, score)
    self.finished_step = step

  def _seal(self, step: int, score: float | None) -> None:
    """Writes the digests of all files, last and whole: from now on the checkpoint counts."""
    folder = self._directory / str(step)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    files = {name: path for name, path in sorted(files.items()) if path.is_file()}
    digests = dict(zip(files, _digests(files.values()), strict=True))
    known = score is not None and math.isfinite(score)
    content = {"files": digests, "score": float(score) if known else None}
    seal = {**content, "seal": _digest_of(content)}
    replace_file(folder / SEAL, json.dumps(seal, indent=2).encode())

  def _sealed(self, step: int) -> dict[str, Any]:
    """What the seal says; empty where it is missing or damaged itself."""
    try:
      content = json.loads((self._directory / str(step) / SEAL).read_bytes())
      return content if content.pop("seal") == _digest_of(content) else {}
    except (OSError, ValueError, KeyError, AttributeError):
      return {}

  def _damage(self, step: int) -> str | None:
    """What is wrong with a checkpoint, or None."""
    folder = self._directory / str(step)
    if not (folder / SEAL).exists():
      return "its save was not finished"
    sealed = self._sealed(step)
    if not sealed:
      return f"{SEAL} is damaged"
    try:
      found = _digests(folder / name for name in sealed["files"])
    except OSError as error:
      return f"{error.filename} cannot be read ({error.strerror})"
    for (name, digest), now in zip(sealed["files"].items(), found, strict=True):
      if digest != now:
        return f"{name} has changed since it was written"
    return None

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, kind, error, trace) -> None:
    try:
      if error is None:
        self.finish()
    finally:
      # After an error too the running save may come to its end. Another process may never hear of
      # that error, so nothing is asked of it.
      self._thread.shutdown()
      with contextlib.suppress(Exception):
        self._orbax.close()
      self._log.removeFilter(_is_not_of_orbax)


@jax.jit
def _copy(state):
  return jax.tree.map(jnp.copy, state)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  """Orbax would log the tracebacks of its threads; ours has them as its cause."""
  return "orbax" not in record.pathname


def _handlers(ocp):
  """Orbax's own, but that the state is written as it is.

  The digits of floats are noise: compressing them saves a tenth and takes most of the time.
  """
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  state, extra = ocp.PyTreeCheckpointHandler(use_compression=False), ocp.JsonCheckpointHandler()
  registry.add("state", ocp.args.PyTreeSave, state)
  registry.add("state", ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
  registry.add("extra", ocp.args.JsonSave, extra)
  registry.add("extra", ocp.args.JsonRestore, extra)
  return registry


def _digest(path: Path) -> str:
  """SHA-256 of a file, which is on the disk itself afterwards."""
  with open(path, "rb") as file:
    os.fsync(file.fileno())
    return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(paths) -> list[str]:
  with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
    return list(pool.map(_digest, paths))


def _digest_of(content: dict) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _os_reason(error: BaseException) -> str | None:
  """What the operating system said; TensorStore has its number in the text of a ValueError."""
  if isinstance(error, OSError):
    return error.strerror or str(error)
  code = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(code[1])) if code else None


def _named(step: int | None) -> str:
  return "the beginning" if step is None else f"step {step}"
