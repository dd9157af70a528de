"""Metrics of a run: a file of JSON lines, TensorBoard events, and a progress line.

One record is one JSON object on one line. Every record has a `step`, so that a resumed run can
drop what it is about to compute again. Numbers without a value (NaN, infinity, a group without an
example) are null: the file is strict JSON and any reader can load it. The first line is no record
but a header with the version of the schema; docs/metrics.md has all fields.
"""

import collections
import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

# Of the events and fields in docs/metrics.md. One more for every change that a reader must know of;
# a new event or field is none.
SCHEMA = 1
_HEADER = json.dumps({"schema": SCHEMA}).encode() + b"\n"

TENSORBOARD_INSTALL = "pip install 'balance_jax[tensorboard]'"


def replace_file(path: str | os.PathLike, data: bytes) -> None:
  """Writes `data` to `path` so that a reader sees the old file or the new one, never half of it.

  Args:
    path: file to write; missing folders are made.
    data: the whole content.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # In the same folder, because os.replace is atomic only within one file system.
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file, _named_in_errors(path):
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named_in_errors(path: str | os.PathLike):
  """A full disk does not say which file it could not hold."""
  try:
    yield
  except OSError as error:
    if error.errno is not None and error.filename is None:
      error.filename = str(path)
    raise


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads a file of JSON lines; the torn last line that a crash leaves is dropped.

  Args:
    path: file written by `MetricLog`; one without a header counts as written in schema 1.

  Returns:
    One dict a line, in file order, without the header; null reads as None. Blank lines are skipped.

  Raises:
    ValueError: a line other than an unfinished last one is not a JSON object; names the line. Or
      the header names a schema that this version does not know.
  """
  # Bytes, since a torn line may end inside a character.
  *lines, tail = Path(path).read_bytes().split(b"\n")
  records = [_parse(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
  with contextlib.suppress(ValueError):
    records.append(_parse(tail, str(path)))
  return [record for record in records if not _is_header(record, path)]


def _is_header(record: dict[str, Any], path) -> bool:
  """Whether a line is a header, of this schema or an older one; files put together have several."""
  if "schema" not in record or "step" in record:
    return False
  schema = record["schema"]
  if not _is_step(schema) or not 1 <= schema <= SCHEMA:
    raise ValueError(
      f"{path} is written in schema {schema!r}, this version of balance_jax reads 1 to {SCHEMA}: "
      "a newer balance_jax is needed"
    )
  return True


def _parse(line: bytes, where: str) -> dict[str, Any]:
  """One JSON object; NaN and Infinity, which Python would accept, are refused."""

  def refuse(constant):
    raise ValueError(f"{constant} is not JSON")

  try:
    record = json.loads(line.decode("utf-8"), parse_constant=refuse)
  except ValueError as error:
    raise ValueError(f"{where}: not a JSON object ({error}); got {line[:80]!r}") from error
  if not isinstance(record, dict):
    raise ValueError(f"{where}: a record must be a JSON object, got {line[:80]!r}")
  return record


def _to_json(value: Any, name: str) -> Any:
  """Python, NumPy and JAX values as JSON values; a number that is not finite becomes None."""
  if value is None or isinstance(value, str | bool | int):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, Mapping):
    return {str(key): _to_json(item, f"{name}.{key}") for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_to_json(item, name) for item in value]
  if hasattr(value, "tolist") and not isinstance(plain := value.tolist(), type(value)):
    return _to_json(plain, name)
  raise ValueError(
    f"record field {name} must hold numbers, strings, None, lists, dicts or arrays, "
    f"got {type(value).__name__}"
  )


class MetricLog:
  """Appends records to a file of JSON lines, and optionally to TensorBoard event files.

  A new file begins with the header, as does one that is continued, whether it had it or not.

  Args:
    path: the file, usually `metrics.jsonl`; missing folders are made.
    resume_step: None starts a new file, which must not exist yet. An int >= 0 continues an
      existing one: records with a larger step, and a torn last line, are removed first.
    tensorboard_dir: folder of event files, one sub-folder `method/seed` a run so that TensorBoard
      overlays them, with the tags `event/field` and `event/field/group`. Needs tensorboardX.
    groups: names of the entries of list-valued fields in TensorBoard tags; None uses positions.

  Raises:
    ValueError: `path` holds records and `resume_step` is None, `resume_step` is not an int >= 0, or
      as `read_records`.
    ImportError: `tensorboard_dir` is given and tensorboardX is not installed.

  >>> import tempfile
  >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
  >>> with MetricLog(path) as log:
  ...   log.write([{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("nan")}])
  >>> with MetricLog(path, resume_step=1) as log:
  ...   log.write([{"step": 2, "loss": 2.25}])
  >>> read_records(path)
  [{'step': 1, 'loss': 2.5}, {'step': 2, 'loss': 2.25}]
  """

  def __init__(
    self,
    path: str | os.PathLike,
    *,
    resume_step: int | None = None,
    tensorboard_dir: str | os.PathLike | None = None,
    groups: Sequence[str] | None = None,
  ):
    path = Path(path)
    if resume_step is not None and (isinstance(resume_step, bool) or not _is_step(resume_step)):
      raise ValueError(f"resume_step must be None or an int >= 0, got {resume_step!r}")
    # Before the file is touched: a missing package must not cost the records.
    self._tensorboard = None
    if tensorboard_dir is not None:
      self._tensorboard = _TensorBoard(Path(tensorboard_dir), resume_step, groups)
    if path.exists() and path.stat().st_size:
      if resume_step is None:
        raise ValueError(
          f"path {path} already holds records: pass resume_step to continue it, or remove the file"
        )
      _cut(path, int(resume_step))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a buffer, which would keep what the disk refused and try it again.
    self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
    if not self._size():
      self._append(_HEADER)

  def write(self, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends one line a record at once, so that a crash loses at most the line in flight.

    Args:
      records: dicts with an int `step` >= 0; values are numbers, strings, None, lists, dicts or
        arrays. NaN and infinities are written as null.

    Raises:
      ValueError: a record has no valid `step` or holds another type; nothing is written then.
      OSError: the disk is full or refuses; none of the records is left in the file.
    """
    plain = [_to_json(record, "record") for record in records]
    for record in plain:
      if not _is_step(record.get("step")):
        raise ValueError(f"every record needs an int step >= 0, got step={record.get('step')!r}")
    lines = [json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n" for record in plain]
    self._append("".join(lines).encode("utf-8"))
    if self._tensorboard is not None:
      self._tensorboard.write(plain)

  def _size(self) -> int:
    return self._file.seek(0, os.SEEK_END)

  def _append(self, data: bytes) -> None:
    size = self._size()
    rest = memoryview(data)
    try:
      with _named_in_errors(self._file.name):
        while rest:
          rest = rest[self._file.write(rest) :]
    except OSError:
      self._file.truncate(size)
      raise

  def is_empty(self) -> bool:
    """Whether no record has been written yet, by this or an earlier process."""
    return self._size() == len(_HEADER)

  def sync(self) -> None:
    """Waits until all records are on the disk itself."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the files; closing twice is harmless."""
    self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()

  def __enter__(self) -> "MetricLog":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()


def _is_step(value: Any) -> bool:
  return hasattr(value, "__index__") and not isinstance(value, bool) and int(value) >= 0


def _cut(path: Path, last_step: int) -> None:
  """Removes the records after `last_step`; those without a step belong to no step and stay."""
  kept = [r for r in read_records(path) if r.get("step") is None or r["step"] <= last_step]
  lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in kept]
  replace_file(path, _HEADER + "".join(lines).encode("utf-8"))


class _TensorBoard:
  """One event writer a run (method, seed), opened at its first record."""

  def __init__(self, folder: Path, resume_step: int | None, groups: Sequence[str] | None):
    try:
      import tensorboardX
    except ImportError as error:
      raise ImportError(
        f"tensorboard_dir needs the package tensorboardX: {TENSORBOARD_INSTALL}"
      ) from error
    self._open = tensorboardX.SummaryWriter
    self._folder = folder
    # TensorBoard hides the events at and after the purge step.
    self._purge_step = None if resume_step is None else int(resume_step) + 1
    self._groups = groups
    self._writers = {}

  def write(self, records: Sequence[Mapping[str, Any]]) -> None:
    for record in records:
      folder = self._folder / str(record.get("method", "run")) / f"seed{record.get('seed', 0)}"
      if folder not in self._writers:
        self._writers[folder] = self._open(str(folder), purge_step=self._purge_step)
      for tag, value in self._scalars(record):
        self._writers[folder].add_scalar(tag, value, record["step"])
    for writer in self._writers.values():
      writer.flush()

  def _scalars(self, record):
    """(tag, float) of every number in the record; null has no point."""
    for field, value in record.items():
      if field in ("step", "seed"):
        continue
      tag = f"{record.get('event', 'train')}/{field}"
      items = value if isinstance(value, list) else [value]
      for i, item in enumerate(items):
        if isinstance(item, int | float):
          yield (f"{tag}/{self._group(i)}" if isinstance(value, list) else tag), item

  def _group(self, i: int) -> str:
    return self._groups[i] if self._groups is not None and i < len(self._groups) else str(i)

  def close(self) -> None:
    for writer in self._writers.values():
      writer.close()


class Progress:
  """A console line: steps done, speed, time left, losses by group.

  On a terminal one line is rewritten; elsewhere (a log file) a plain line is written at the first
  update, about every 10 % and at the end.

  Args:
    total_steps: steps of the whole training, > 0.
    runs: runs trained together by each step, > 0 (a vectorised sweep).
    stream: text stream; None is standard error.
    start_step: first step of this process; a resumed run starts after 0.

  >>> with Progress(100, runs=3, stream=sys.stdout) as progress:  # doctest: +ELLIPSIS
  ...   progress.update(100, {"fr": 1.25, "rm": 2.5})
  step 100/100 (100%) | 3 runs | ... steps/s | took 0:00 | loss fr 1.250, rm 2.500
  """

  def __init__(
    self, total_steps: int, runs: int = 1, stream: TextIO | None = None, *, start_step: int = 0
  ):
    for name, value in (("total_steps", total_steps), ("runs", runs)):
      if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    self._total, self._runs = total_steps, runs
    self._stream = sys.stderr if stream is None else stream
    self._rewrite = self._stream.isatty()
    self._began = time.monotonic()
    # A short history, so that the speed is the present one; its first entry is the start.
    self._history = collections.deque([(self._began, start_step)], maxlen=20)
    self._updates = 0
    self._next_percent = 0
    self._open_line = False

  def update(self, step: int, losses: Mapping[str, float | None] | None = None) -> None:
    """Shows that `step` steps are done.

    Args:
      step: steps done so far, at most `total_steps`.
      losses: group name -> loss (mean over runs); None values are left out. With more than four
        groups the best and the worst are shown.
    """
    self._history.append((time.monotonic(), step))
    self._updates += 1
    if self._updates == 2:
      # The start is forgotten as soon as possible: the first chunk includes compilation.
      self._history.popleft()
    line = self._line(step, losses or {})
    if self._rewrite:
      width = shutil.get_terminal_size().columns - 1
      self._stream.write(f"\r{line[:width]}\x1b[K")
      self._open_line = True
    elif 100 * step >= self._next_percent * self._total or step >= self._total:
      self._next_percent = 10 * (10 * step // self._total + 1)
      self._stream.write(line + "\n")
    self._stream.flush()

  def _line(self, step: int, losses: Mapping[str, float | None]) -> str:
    (time_0, step_0), (time_1, step_1) = self._history[0], self._history[-1]
    speed = (step_1 - step_0) / max(time_1 - time_0, 1e-9)
    if step >= self._total:
      left = f"took {_clock(time_1 - self._began)}"
    else:
      left = f"ETA {_clock((self._total - step) / speed)}" if speed > 0 else "ETA unknown"
    parts = [f"step {step}/{self._total} ({100 * step // self._total}%)"]
    parts += [f"{self._runs} runs"] if self._runs > 1 else []
    parts += [f"{speed:.3g} steps/s" if speed < 1000 else f"{speed:.0f} steps/s", left]
    return " | ".join(parts + _losses(losses))

  def close(self) -> None:
    """Ends the line on a terminal."""
    if self._open_line:
      self._stream.write("\n")
      self._stream.flush()
      self._open_line = False

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _losses(losses: Mapping[str, float | None]) -> list[str]:
  """The part of the line about losses: all of up to four groups, or the best and the worst."""
  known = {group: float(loss) for group, loss in losses.items() if loss is not None}
  if not known:
    return []
  if len(known) <= 4:
    return ["loss " + ", ".join(f"{group} {loss:.3f}" for group, loss in known.items())]
  # NaN sorts as the worst: that is the group to look at.
  order = sorted(known, key=lambda g: math.inf if math.isnan(known[g]) else known[g])
  best, worst = order[0], order[-1]
  return [f"loss best {best} {known[best]:.3f}, worst {worst} {known[worst]:.3f}"]
