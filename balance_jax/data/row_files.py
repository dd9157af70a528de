"""Rows of text on disk: the rows of `group_table`, cut once and read one by one ever after.

For text larger than memory. A file of rows is an ArrayRecord whose records are pages of rows, so
what is read is checked, and any row takes the same time.
"""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from balance_jax import _checks
from balance_jax.data import builder, digests, prepared, sources, text
from balance_jax.data.documents import Documents, data_directory
from balance_jax.data.reader import GroupReader
from balance_jax.data.table import check_length, windows

# A record is a group of its own: what is read is what was asked for. Short rows do not compress.
_OPTIONS = "group_size:1,uncompressed"
# Bytes of the rows in a record, about: a disk reads no less at once, and every record takes about
# 50 bytes of memory while its file is written, 30 while it is read, and 50 on the disk.
_PAGE = 4096
_FACTS = "rows.json"
_PART = 2**20  # tokens in memory while rows are cut


def load_rows(
  source: str | os.PathLike,
  split: str,
  *,
  window: int,
  languages: Collection[str] | None = None,
  data_dir: str | os.PathLike | None = None,
  group_key: str = "language",
  text_key: str = "text",
  how: str = "threads",
  workers: int = 4,
  max_corrupt: int = 0,
) -> GroupReader:
  """The rows that `group_table` makes of the documents of `load_documents`, read from disk.

  On first use the rows are written below the data directory, in one step that leaves all of them
  or none; another source, split, window or choice of groups has rows of its own. Rows take
  about 1 % more space than their tokens; writing takes about 100 bytes of memory for each document,
  and some times 4 MB for those that are read at once.

  Args:
    source: see `load_documents`. A data set stored as parquet is read whole.
    split: see `load_documents`.
    window: labels in a row, >= 1.
    languages: see `load_documents`.
    data_dir: see `load_documents`; rows of "tfds:" data sets lie there or in the cache, too.
    group_key: see `load_documents`.
    text_key: see `load_documents`.
    how: see `GroupReader`.
    workers: see `GroupReader`.
    max_corrupt: see `GroupReader`.

  Returns:
    Reader of rows {"tokens": uint8 (window + 1,)}.

  Raises:
    ValueError: as `load_documents` and `GroupReader`; a group with fewer than window + 1 tokens.
    DatasetNotInstalledError: see `load_documents`.
    CorruptedDataError: the data set or the rows are damaged; the message says what to delete.
  """
  _checks.check_number("window", window, low=1, integer=True)
  documents = Documents(source, split, data_dir=data_dir, group_key=group_key, text_key=text_key)
  wanted = None if languages is None else list(languages)
  facts = [_fingerprint(documents.directory), split, window, _PAGE, wanted, group_key, text_key]
  name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
  root = data_directory(data_dir)
  final = root / "rows" / name
  directory = prepared.make_once(
    final, root, lambda scratch: _write(documents, window, languages, scratch / name, final)
  )
  files = _open(directory)
  return GroupReader(files, how=how, workers=workers, max_corrupt=max_corrupt)


class RowFile:
  """The rows of one group, by number: a source for a `GroupReader`, in other processes too.

  Args:
    path: of the ArrayRecord.
    count: its number of rows.
    length: tokens of a row.
    per_page: rows in a record.
  """

  def __init__(self, path: Path, count: int, length: int, per_page: int):
    self._path, self._count, self._source = path, count, None
    self._length, self._per_page = length, per_page

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return self.__getitems__([index])[0]

  def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
    if self._source is None:
      from array_record.python import array_record_data_source

      self._source = array_record_data_source.ArrayRecordDataSource(str(self._path))
    page, row = np.divmod(np.asarray(indices), self._per_page)
    pages, where = np.unique(page, return_inverse=True)
    found = [
      np.frombuffer(record, np.uint8).reshape(-1, self._length)
      for record in self._source.__getitems__(pages.tolist())
    ]
    return [{"tokens": found[i][j]} for i, j in zip(where.tolist(), row.tolist(), strict=True)]

  def __getstate__(self) -> dict:
    return self.__dict__ | {"_source": None}


def _fingerprint(directory: Path) -> list:
  """What changes when a data set does: its descriptions, and the sizes and times of its files."""
  files = sorted(path for path in directory.iterdir() if path.is_file())
  described = hashlib.sha256(b"".join(p.read_bytes() for p in files if p.suffix == ".json"))
  stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
  return [str(directory), described.hexdigest(), stats]


def _open(directory: Path) -> dict[str, RowFile]:
  """Group -> its rows; none is read yet."""
  try:
    facts = json.loads((directory / _FACTS).read_bytes())
    for number, expected in enumerate(facts["bytes"]):
      if (found := _path(directory, number).stat().st_size) != expected:
        raise ValueError(f"{_path(directory, number).name} has {found} bytes, not {expected}")
    return {
      name: RowFile(_path(directory, number), count, facts["length"], facts["per_page"])
      for number, (name, count) in enumerate(facts["groups"].items())
    }
  except (OSError, ValueError, KeyError) as error:
    raise digests.corrupted(directory, str(error)) from error


def _path(directory: Path, number: int) -> Path:
  return directory / f"{number}.array_record"  # the name of a group may be no name of a file


def _write(documents: Documents, window: int, languages, directory: Path, final: Path) -> Path:
  """Writes the rows of every group and, last, the facts about them."""
  from array_record.python import array_record_module

  print(f"balance_jax: writing rows of {documents.directory} to {final}", file=sys.stderr)
  places = _index(documents)
  directory.mkdir()
  counts, length = {}, window + 1
  per_page = max(1, _PAGE // length)
  for number, name in enumerate(sources.check_languages(languages, places)):
    writer = array_record_module.ArrayRecordWriter(str(_path(directory, number)), _OPTIONS)
    counts[name] = 0
    rows = _rows(name, _texts(documents, places[name]), window)
    while page := list(itertools.islice(rows, per_page)):
      writer.write(np.concatenate(page).tobytes())
      counts[name] += len(page)
    writer.close()
  sizes = [_path(directory, number).stat().st_size for number in range(len(counts))]
  facts = {"groups": counts, "length": length, "per_page": per_page, "bytes": sizes}
  (directory / _FACTS).write_text(json.dumps(facts))
  return directory


def _index(documents: Documents) -> dict[str, np.ndarray]:
  """Group -> (example, text in it) of its texts (n, 2), in the order of `load_documents`."""
  found: dict[str, list] = {name: [] for name in documents.known_groups}
  for numbers in documents.chunks():
    parts: dict[str, list] = {}
    for number, (group, texts) in zip(numbers, documents.read(numbers), strict=True):
      for inner, one in enumerate(texts):
        code = builder.text_hash(one)
        key = int.from_bytes(code[:8], "big"), int.from_bytes(code[8:], "big")
        parts.setdefault(group, []).append((*key, number, inner))
    for group, rows in parts.items():
      found.setdefault(group, []).append(np.array(rows, np.uint64))
  places = {}
  for group, rows in found.items():
    table = np.concatenate(rows) if rows else np.zeros((0, 4), np.uint64)
    order = np.lexsort((table[:, 1], table[:, 0]))
    places[group] = table[order, 2:].astype(np.int64)
  return places


def _texts(documents: Documents, places: np.ndarray) -> Iterator[str]:
  for start in range(0, len(places), documents.at_once):
    part = places[start : start + documents.at_once]
    numbers, position = np.unique(part[:, 0], return_inverse=True)
    examples = documents.read(numbers.tolist())
    for where, inner in zip(position.tolist(), part[:, 1].tolist(), strict=True):
      yield examples[where][1][inner]


def _rows(name: str, texts: Iterator[str], window: int) -> Iterator[np.ndarray]:
  """The windows of the documents with an end between two of them, cut part by part."""
  separator = np.array([text.END_OF_DOCUMENT], np.uint8)
  waiting: list[np.ndarray] = []
  length = total = 0
  for number, one in enumerate(texts):
    parts = [separator, text.encode(one)] if number else [text.encode(one)]
    waiting += parts
    added = sum(map(len, parts))
    length, total = length + added, total + added
    if length > max(window, _PART):
      stream = np.concatenate(waiting)
      rows = windows(stream, window)
      yield from rows
      waiting = [stream[len(rows) * window :]]
      length = len(waiting[0])
  check_length(name, total, window)
  if length > window:
    yield from windows(np.concatenate(waiting), window)
