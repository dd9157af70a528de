"""The file of a certification: a header, then one line of JSON for each finished example.

Lines are appended and synchronised with the disk a batch at a time, so that a crash loses what was
in flight and at most tears the last line, which is dropped and done again. One process a file.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STATUSES = ("certified", "attacked", "unknown", "error")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What is known about one example.

  Attributes:
    index: its position in the data, from 0.
    status: "certified" (robust: proven), "attacked" (not robust: a counterexample was found; a
      misclassified example is its own), "unknown" (every stage ran, none decided), or "error" (none
      decided, and some stage failed, so that no verdict was reached at all).
    by: the method or attack that decided; "clean" if misclassified; None if undecided.
    margin: the largest of the lower bounds of its smallest margin, None if no method gave a finite
      one.
    errors: stage -> message of its failure; also of an example that another stage decided.
    digest: CRC-32 of image and label.
  """

  index: int
  status: str
  by: str | None
  margin: float | None
  errors: Mapping[str, str]
  digest: int


class CertificationLog:
  """Appends outcomes to a file, and reads those of an earlier, unfinished call.

  Args:
    path: the file; missing folders are made. A torn last line is cut off.
    header: JSON values that say what was asked for; an existing file must have the same.

  Attributes:
    finished: index -> `Outcome` found in the file. Those with status "error" are left out: they
      are to be tried again, and the later line counts.

  Raises:
    ValueError: the file has another header (names what differs), or is no such log.
    OSError: the file cannot be read or written.
  """

  def __init__(self, path: str | os.PathLike, header: Mapping[str, Any]):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    first = _line(header)
    content = path.read_bytes() if path.exists() else b""
    *lines, torn = content.split(b"\n")
    if not lines and not first.startswith(torn):
      raise ValueError(f"log {path} exists and is no log of a certification; give another path")
    self.finished = _read(path, lines, json.loads(first)) if lines else {}
    self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
    self._file.truncate(len(content) - len(torn))
    if not lines:
      self._write(first)

  def append(self, outcomes: Sequence[Outcome]) -> None:
    """Writes one line each; when it returns, they are on the disk."""
    self._write(b"".join(_line(dataclasses.asdict(outcome)) for outcome in outcomes))

  def _write(self, data: bytes) -> None:
    self._file.write(data)
    self._file.flush()
    os.fsync(self._file.fileno())

  def __enter__(self) -> "CertificationLog":
    return self

  def __exit__(self, *exc_info) -> None:
    self._file.close()


def _line(record: Mapping[str, Any]) -> bytes:
  return json.dumps(record, allow_nan=False).encode() + b"\n"


def _read(path: Path, lines: Sequence[bytes], header: Mapping[str, Any]) -> dict[int, Outcome]:
  """index -> Outcome of the whole lines, the header compared."""
  found = _parse(lines[0], f"log {path}, line 1")
  if "certify" not in found:
    raise ValueError(f"log {path} exists and is no log of a certification; give another path")
  different = [name for name in {**found, **header} if found.get(name) != header.get(name)]
  if different:
    facts = (f"{name} was {found.get(name)!r}, now {header.get(name)!r}" for name in different)
    raise ValueError(f"log {path} is of another call: {'; '.join(facts)}; give another path")
  finished = {}
  for number, line in enumerate(lines[1:], 2):
    where = f"log {path}, line {number}"
    record = _parse(line, where)
    try:
      outcome = Outcome(**record)
    except TypeError as error:
      raise ValueError(f"{where} is no outcome: {error}") from error
    if outcome.status not in STATUSES:
      raise ValueError(f"{where} has status {outcome.status!r}; allowed: {', '.join(STATUSES)}")
    if outcome.status != "error":
      finished[outcome.index] = outcome
  return finished


def _parse(line: bytes, where: str) -> dict[str, Any]:
  try:
    record = json.loads(line)
  except ValueError as error:
    raise ValueError(f"{where} is damaged ({error}); got {line[:80]!r}") from error
  if not isinstance(record, dict):
    raise ValueError(f"{where} is no JSON object; got {line[:80]!r}")
  return record
