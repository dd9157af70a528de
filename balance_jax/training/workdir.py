"""The folder of one run: its config, checkpoints, metrics, results and report.

A folder belongs to one config. The same command again goes on where it stopped; another config is
refused with the keys that differ. Several processes, on several hosts, may share a folder as long
as each trains another part; locks see to that, so the file system must know `flock` among hosts.
"""

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balance_jax.training.metric_log import replace_file

LOCK = ".lock"

# Keys of a config that say how its runs are made, not what they are: they may be others when the
# same runs go on.
HOW = (
  "profile",
  "sweep.address",
  "sweep.engine",
  "sweep.resources",
  "sweep.retries",
  "sweep.shard",
)


class WorkdirError(ValueError):
  """The folder cannot be used: not writable, or it holds another run."""


class WorkdirInUseError(WorkdirError):
  """Another process is working in the folder."""


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
  """Nested mapping -> {"a.b": value}; an empty mapping stays as a value."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = dict(value) if isinstance(value, Mapping) else value
  return flat


class Workdir:
  """Paths in a run's folder and the JSON files in it.

  Args:
    path: the folder; `begin` makes it, `held` keeps other processes out.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = Path(path).absolute()
    self.checkpoints = self.path / "checkpoints"
    self.metrics = self.path / "metrics.jsonl"
    self.report = self.path / "report.html"
    self.tensorboard = self.path / "tensorboard"
    self._lock = None

  def below(self, name: str) -> "Workdir":
    """The folder of an arm; the folder itself for the empty name."""
    return Workdir(self.path / "arms" / name) if name else self

  def part(self, index: int, count: int) -> "Workdir":
    """The folder of one of `count` parts of an arm; that of the arm itself for a single one."""
    return Workdir(self.path / "parts" / str(index)) if count > 1 else self

  def check(self, config: Mapping) -> bool:
    """Whether this config has begun here; writes nothing.

    Raises:
      WorkdirError: the folder cannot be written, or holds another config's run (names the keys).
    """
    existing = next(parent for parent in (self.path, *self.path.parents) if parent.exists())
    if not existing.is_dir():
      raise WorkdirError(f"workdir {self.path}: {existing} is not a folder")
    # A trial file: for the superuser of a read-only file system os.access says yes.
    try:
      tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
      raise WorkdirError(
        f"workdir {self.path} cannot be written ({error.strerror}); choose another --workdir"
      ) from error
    old = self.read("config.json")
    if old is None:
      if self.path.exists() and set(self.path.iterdir()) - {
        self.path / LOCK,
        *self._half_written(),
      }:
        raise WorkdirError(
          f"workdir {self.path} is not empty and holds no config.json; choose another --workdir"
        )
      return False
    self._check_same(flatten(old), flatten(identity(config)))
    return True

  def _check_same(self, old: dict, new: dict) -> None:
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if keys:
      changes = [f"{k} was {old.get(k, 'absent')}, is {new.get(k, 'absent')}" for k in keys[:8]]
      more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
      raise WorkdirError(
        f"workdir {self.path} holds another config's run: {'; '.join(changes)}{more}; "
        "choose another --workdir or remove it"
      )

  def begin(self, config: Mapping) -> None:
    """Makes the folder and writes config.json where there is none.

    Raises:
      WorkdirError: as `check`; also where another config began here at the same moment.
    """
    while not self.check(config):
      # Not waiting for long: whoever has the lock writes the config, then may keep it for days.
      with contextlib.suppress(WorkdirInUseError), self.held(wait=0.1):
        if self.read("config.json") is None:
          self.write("config.json", identity(config))

  @contextlib.contextmanager
  def held(self, wait: float = 0.0):
    """Keeps the folder for this process, until the end of the context or of the process.

    It may be entered again while it is held. What a process that was killed in the middle of
    writing a file has left is removed.

    Args:
      wait: seconds to wait for another process, may be infinite.

    Raises:
      WorkdirInUseError: another process has it for longer.
    """
    if self._lock is not None:
      yield
      return
    self.path.mkdir(parents=True, exist_ok=True)
    with open(self.path / LOCK, "w") as self._lock:
      try:
        self._lock_within(wait)
        for path in self._half_written():
          path.unlink()
        yield
      finally:
        self._lock = None

  def _lock_within(self, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
      try:
        return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        if time.monotonic() >= end:
          raise WorkdirInUseError(
            f"workdir {self.path} is in use by another process; wait for it or choose another "
            "--workdir"
          ) from error
      time.sleep(0.1)

  def _half_written(self) -> list[Path]:
    """What `replace_file` of a process that was killed has left."""
    return [*self.path.glob(".*.tmp")]

  def write(self, name: str, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(self.path / name, text.encode())

  def read(self, name: str) -> Any:
    """The content of a JSON file, or None where it does not exist.

    Raises:
      WorkdirError: the file is not JSON.
    """
    path = self.path / name
    if not path.exists():
      return None
    try:
      return json.loads(path.read_text())
    except ValueError as error:
      raise WorkdirError(f"{path} is damaged ({error}); remove the workdir {self.path}") from error


def identity(config: Mapping) -> dict[str, Any]:
  """What says which runs these are: the config as `plain`, without the keys in `HOW`."""

  def without(section: Mapping, prefix: str) -> dict[str, Any]:
    return {
      key: without(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
      for key, value in section.items()
      if f"{prefix}{key}" not in HOW
    }

  return without(plain(config), "")


def plain(config: Mapping) -> Any:
  """The config as JSON gives it back: tuples are lists, infinities are strings."""

  def convert(value):
    if isinstance(value, Mapping):
      return {str(key): convert(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
      return [convert(item) for item in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
      return str(value)
    return value

  return convert(config)
