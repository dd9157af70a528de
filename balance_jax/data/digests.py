"""Digests of the files of a prepared data set, written when it is made and checked on each read.

The checksums inside of the record files cover their payload only; a digest of each whole file
leaves no byte whose change could go unseen.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

FILE_NAME = "balance_jax_digests.json"


class CorruptedDataError(RuntimeError):
  """Data is not what was written; the message names what to delete, or the record."""


def corrupted(directory: Path, reason: str) -> CorruptedDataError:
  """The error for a damaged data set, with what to do about it."""
  return CorruptedDataError(
    f"prepared data in {directory} is damaged ({reason}); delete that directory to build it anew"
  )


def write_digests(directory: Path, facts: dict[str, Any]) -> None:
  """Writes `FILE_NAME`: its own digest in line 1, then those of all other files and the facts.

  Args:
    directory: a finished data set.
    facts: JSON values to keep with the digests.
  """
  files = {
    path.relative_to(directory).as_posix(): _digest(path.read_bytes())
    for path in sorted(directory.rglob("*"))
    if path.is_file()
  }
  content = json.dumps({"files": files, "facts": facts}, sort_keys=True) + "\n"
  text = f"{_digest(content.encode())}\n{content}"
  (directory / FILE_NAME).write_text(text, encoding="utf-8", newline="\n")


def check_digests(directory: Path) -> dict[str, Any]:
  """Compares each file with its digest.

  Args:
    directory: a data set for which `write_digests` ran. Files that came later do not matter.

  Returns:
    The facts given to `write_digests`.

  Raises:
    CorruptedDataError: a missing or changed file, `FILE_NAME` included.
  """
  try:
    own, _, content = (directory / FILE_NAME).read_bytes().partition(b"\n")
  except OSError as error:
    raise corrupted(directory, f"{FILE_NAME} cannot be read: {error.strerror}") from error
  if own != _digest(content).encode():
    raise corrupted(directory, f"{FILE_NAME} has changed")
  listed = json.loads(content)
  for name, digest in listed["files"].items():
    try:
      found = _digest((directory / name).read_bytes())
    except OSError as error:
      raise corrupted(directory, f"{name} cannot be read: {error.strerror}") from error
    if found != digest:
      raise corrupted(directory, f"{name} has changed")
  return listed["facts"]


def _digest(content: bytes) -> str:
  return hashlib.blake2b(content, digest_size=32).hexdigest()
