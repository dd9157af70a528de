"""Prepared data sets: where they lie, and their examples read from the disk.

tensorflow_datasets is imported when a data set is read, and needs no TensorFlow, as records are
stored as array_record or parquet.
"""

import contextlib
import contextvars
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from balance_jax import _checks
from balance_jax.data import digests, sources

CHUNK = 4096  # examples read at once, at most
_CHUNK_BYTES = 2**22  # of them on disk, about
_INSTALL = "pip install 'balance_jax[data]'"
_MAY_MAKE = contextvars.ContextVar("may_make", default=True)


def data_directory(given: str | os.PathLike | None, default: str | os.PathLike) -> Path:
  """Where data sets lie: what the caller gives, or the default."""
  return Path(default if given is None else given).expanduser().absolute()


def import_tfds():
  """tensorflow_datasets, with array_record there to read the files."""
  try:
    import array_record  # noqa: F401 - TFDS imports it late, with a message of its own
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise sources.DatasetNotInstalledError(
      f"prepared data sets need tensorflow_datasets and array_record; run: {_INSTALL}"
    ) from error
  return tfds


# --- Finding ---


@contextlib.contextmanager
def only_what_is_there():
  """Inside of it, data that would first have to be prepared is data that is not installed."""
  token = _MAY_MAKE.set(False)
  try:
    yield
  finally:
    _MAY_MAKE.reset(token)


def make_once(final: Path, root: Path, make: Callable[[Path], Path]) -> Path:
  """The directory `final` below `root`, complete or not there at all.

  Args:
    final: where it lies.
    root: made when missing.
    make: make(scratch) -> the directory, made below the folder it is given; called where there is
      none yet.

  Returns:
    `final`.

  Raises:
    DatasetNotInstalledError: there is none, within `only_what_is_there`.
  """
  if final.exists():
    return final
  if not _MAY_MAKE.get():
    raise sources.DatasetNotFoundError(f"{final} is not prepared yet; a run does it")
  root.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".preparing-", dir=root) as scratch:
    made = make(Path(scratch))
    final.parent.mkdir(parents=True, exist_ok=True)
    # One rename makes it visible.
    try:
      made.rename(final)
    except OSError:
      if not final.exists():  # else another process was first, with the same content
        raise
  return final


def existing_directory(source: str | os.PathLike) -> Path:
  """The directory that a source names itself."""
  if not isinstance(source, str | os.PathLike):
    raise ValueError(f"source must be a name or a path, got {source!r}")
  path = Path(source).expanduser().absolute()
  if (path / "dataset_info.json").is_file():
    return path
  if isinstance(source, os.PathLike) or os.sep in source or path.is_dir():
    raise ValueError(f"source {str(source)!r} is no directory with a dataset_info.json")
  known = sources.SOURCES
  raise ValueError(
    f"source is {source!r}{_checks.nearest(source, known)}; allowed: {', '.join(sorted(known))}, "
    "'tfds:NAME', or a directory with a dataset_info.json"
  )


def find_dataset(source: str, data_dir: str | os.PathLike | None) -> Path:
  """The directory of "tfds:name[/config][:version]", looked up as TFDS lays it out and by default
  where it does: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
  data_dir = data_directory(data_dir, os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
  match = re.fullmatch(r"tfds:(\w+)(?:/([\w.\-]+))?(?::(\d+\.\d+\.\d+))?", source)
  if match is None:
    raise ValueError(f"source must look like 'tfds:name[/config][:version]', got {source!r}")
  name, config, version = match.groups()
  root = data_dir / name
  found = [p.parent for p in root.glob("*/dataset_info.json") if config is None]
  found += [p.parent for p in root.glob(f"{config or '*'}/*/dataset_info.json")]
  found = [p for p in found if re.fullmatch(version or r"\d+\.\d+\.\d+", p.name)]
  if not found:
    present = sorted(p.name for p in data_dir.glob("*") if p.is_dir())
    raise sources.DatasetNotFoundError(
      f"no prepared data set {source!r} in {data_dir}{_checks.nearest(name, present)}; that "
      f"directory holds: {', '.join(present) or 'nothing'}"
    )
  if len({p.parent for p in found}) > 1:
    configs = sorted({p.parent.name for p in found})
    raise ValueError(f"source {source!r} must name a config, one of: {', '.join(configs)}")
  return max(found, key=lambda p: tuple(map(int, p.name.split("."))))


# --- Reading ---


def check_request(info: Any, split: str, group_key: str, text_key: str) -> None:
  """ValueError for a split or a feature that is not there, or a format that takes TensorFlow."""
  file_format = info.file_format.value
  if file_format not in ("array_record", "parquet"):
    raise ValueError(
      f"the data set is stored as {file_format}, which takes TensorFlow to read; prepare it with "
      "file_format='array_record'"
    )
  name, bracket, _ = str(split).partition("[")
  _checks.check_choice("split", name, list(info.splits))
  if bracket and file_format == "parquet":
    # TFDS reads all rows of a parquet split, whatever the slice.
    raise ValueError(f"split {split!r}: a data set stored as parquet has no slices; use {name!r}")
  try:
    info.splits[split]
  except Exception as error:  # TFDS raises several types here
    raise ValueError(f"split {split!r} is no slice of {name!r} that TFDS can read") from error
  for argument, key in (("group_key", group_key), ("text_key", text_key)):
    _checks.check_choice(argument, key, list(info.features))


@contextlib.contextmanager
def damage(directory: Path, verified: bool) -> Iterator[None]:
  """Takes any failure to read files that no digest vouches for as damage.

  TFDS and array_record raise many types for it, from KeyError to RuntimeError.
  """
  try:
    yield
  except (digests.CorruptedDataError, sources.DatasetNotInstalledError, ImportError):
    raise
  except Exception as error:
    if verified:
      raise
    reason = str(error).strip().split("\n")[0]
    raise digests.corrupted(directory, f"{type(error).__name__}: {reason:.200}") from error


def open_dataset(directory: Path, verified: bool = False) -> Any:
  """The TFDS builder of a prepared data set.

  Args:
    directory: of the data set.
    verified: whether digests vouch for the files.
  """
  with damage(directory, verified):
    dataset = import_tfds().builder_from_directory(str(directory))
    _ = dataset.info  # is read now
    return dataset


class Examples:
  """The examples of one split, read by number; only the features asked for.

  Args:
    dataset: see `open_dataset`.
    split: name of a split, or a slice of one.
    keys: the features.
    verified: whether digests vouch for the files.

  Attributes:
    at_once: how many examples to read at once, so that their size bounds the memory.

  Raises:
    ValueError: see `check_request`.
    CorruptedDataError: the files are not what `dataset_info.json` says.
  """

  def __init__(self, dataset: Any, split: str, keys: tuple[str, str], verified: bool = False):
    self.info, self._keys, self._verified = dataset.info, keys, verified
    self._directory = Path(dataset.data_dir)
    check_request(self.info, split, *keys)
    with damage(self._directory, verified):
      self._data = self._open(dataset, split)

  def _open(self, dataset: Any, split: str) -> Any:
    name = split.partition("[")[0]
    info = self.info.splits[name]
    stored = sum(_stored_records(path) for path in info.filepaths)
    if stored != info.num_examples:
      raise digests.corrupted(
        self._directory,
        f"split {name!r} has {stored} records, dataset_info.json says {info.num_examples}",
      )
    size = sum(Path(path).stat().st_size for path in info.filepaths)
    self.at_once = min(CHUNK, max(1, _CHUNK_BYTES * stored // max(size, 1)))
    if self.info.splits[split].num_examples == 0:
      return []
    return dataset.as_data_source(split, decoders=_skip_others(self.info.features, self._keys))

  def __len__(self) -> int:
    return len(self._data)

  def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    """The examples with these numbers; at once, as one by one takes twice the time."""
    with damage(self._directory, self._verified):
      return [_select(example, self._keys) for example in self._data.__getitems__(list(indices))]

  def chunks(self) -> Iterator[range]:
    """All numbers in parts: at once, each record would be held twice, raw and decoded."""
    starts = range(0, len(self), self.at_once)
    return (range(start, min(start + self.at_once, len(self))) for start in starts)


def _select(example: dict[str, Any], keys: tuple[str, str]) -> dict[str, Any]:
  return {key: example[key] for key in keys}


def _skip_others(features: Any, keys: tuple[str, str]) -> dict[str, Any] | None:
  """Leaves images and the like encoded: they are large, and some take TensorFlow to decode."""
  tfds = import_tfds()
  heavy = [
    key
    for key, feature in features.items()
    if key not in keys and not isinstance(feature, tfds.features.Text | tfds.features.Sequence)
  ]
  # None, not {}: with decoders TFDS takes six times as long for an example.
  return {key: tfds.decode.SkipDecoding() for key in heavy} or None


def _stored_records(path: os.PathLike) -> int:
  if str(path).rpartition(".")[2].startswith("parquet"):
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path).num_rows
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(str(path))
  count = reader.num_records()
  reader.close()
  return count


def string(value: Any, key: str) -> str:
  """A value of the feature `key`, which must hold text."""
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"feature {key!r} must hold UTF-8 text, got {value!r:.60}") from error
  if isinstance(value, str):
    return value
  raise ValueError(f"feature {key!r} must hold text, got {type(value).__name__}")
