"""Prepared data sets: a TFDS builder for text sources, and documents by group read back from disk.

tensorflow_datasets is imported when a data set is prepared or read, and needs no TensorFlow, as
records are stored as array_record.
"""

import contextlib
import functools
import hashlib
import io
import os
import re
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from balance_jax import _checks
from balance_jax.data import digests, sources

SPLITS = ("train", "validation", "test")
VERSION = "1.0.0"  # raise it with any change to the records or to the split of a source

_DATASET = "grouped_text"
_CHUNK = 4096
# Redirecting stdout is global: two threads at it could leave it redirected for good.
_PREPARING = threading.Lock()
_INSTALL = "pip install 'balance_jax[data]'"


def load_documents(
  source: str | os.PathLike,
  split: str,
  *,
  languages: Collection[str] | None = None,
  data_dir: str | os.PathLike | None = None,
  group_key: str = "language",
  text_key: str = "text",
) -> dict[str, list[str]]:
  """Texts by language, or by any other group, of a source or of a TFDS data set.

  A source is prepared on first use, in one step that leaves a complete data set or none. Its
  strings are split by a hash of the English source string: 80 % train, 10 % validation, 10 % test,
  so a held-out message occurs in training in no language. Prepared data is kept until the source
  changes and is checked against its digests on every read.

  The documents of a group are sorted by a hash of their text: an order that depends on nothing but
  the documents, and in which neighbours are unrelated.

  Args:
    source: a name in `SOURCES`; "tfds:name[/config][:version]" for a prepared TFDS data set, with
      the highest version by default; or a directory that holds a `dataset_info.json`.
    split: name of a split; array_record data also takes slices, such as "train[:10%]".
    languages: the groups wanted, in the order wanted; None for all, sorted.
    data_dir: where data sets lie. None: $XDG_CACHE_HOME/balance_jax/datasets for sources (by
      default ~/.cache/balance_jax/datasets), $TFDS_DATA_DIR or ~/tensorflow_datasets for "tfds:".
    group_key: feature that names the group of an example.
    text_key: feature with its text, or with a sequence of texts.

  Returns:
    Group -> documents. A language of a source that has no string in this split has an empty list.

  Raises:
    ValueError: an unknown source, split, language or feature; slices of a format without them.
    DatasetNotInstalledError: the package of a source, or tensorflow_datasets, is missing.
    CorruptedDataError: the prepared data is damaged; the message says what to delete.
  """
  groups: dict[str, list[str]] = {}
  if isinstance(source, str) and source in sources.SOURCES:
    directory = _prepare(source, _data_dir(data_dir, _default_data_dir()))
  elif isinstance(source, str) and source.startswith("tfds:"):
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    directory = _find_dataset(source, _data_dir(data_dir, default))
  else:
    directory = _existing_directory(source)
  # A copy may lie anywhere; under the name of ours the digests may not be missing.
  ours = directory.parent.parent.name == _DATASET or (directory / digests.FILE_NAME).exists()
  if ours:
    groups = {name: [] for name in digests.check_digests(directory)["languages"]}
  for group, text in _read(directory, split, group_key, text_key, verified=ours):
    groups.setdefault(group, []).append(text)
  wanted = sources.check_languages(languages, groups)
  return {name: sorted(groups[name], key=_text_order) for name in wanted}


def split_of(key: str) -> str:
  """The split of a source string: a function of the string alone.

  Args:
    key: the English source string.

  Returns:
    "train", "validation" or "test", with shares 80, 10 and 10 %.

  >>> split_of("Save"), split_of("Close")
  ('train', 'validation')
  """
  percent = int.from_bytes(_hash(key)[:8], "big") % 100
  return SPLITS[(percent >= 80) + (percent >= 90)]


def _hash(text: str) -> bytes:
  return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def _text_order(text: str) -> tuple[bytes, str]:
  return _hash(text), text


def _default_data_dir() -> Path:
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return Path(cache) / "balance_jax" / "datasets"


def _data_dir(given: str | os.PathLike | None, default: str | os.PathLike) -> Path:
  return Path(default if given is None else given).expanduser().absolute()


def _tfds():
  try:
    import array_record  # noqa: F401 - TFDS imports it late, with a message of its own
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise sources.DatasetNotInstalledError(
      f"prepared data sets need tensorflow_datasets and array_record; run: {_INSTALL}"
    ) from error
  return tfds


# --- Preparing ---


@functools.cache
def _builder_class():
  tfds = _tfds()

  class GroupedText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A text source as a TFDS data set: an example is all of one language's strings in a split.

    TFDS decodes an example in about 40 us, however small, so one for every string would take
    seconds to read.
    """

    VERSION = tfds.core.Version(VERSION)
    name = _DATASET
    # Nothing is downloaded. TFDS would look for a file of checksums, through a package
    # (importlib_resources) that it does not install.
    url_infos = {}  # noqa: RUF012

    def __init__(self, *, source: sources.Source, records: list[sources.Record], **kwargs):
      self._source = source
      self._records = records
      super().__init__(**kwargs)

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        description=f"{self._source.description} Split by the English source string.",
        features=tfds.features.FeaturesDict(
          {
            "language": tfds.features.Text(),
            "key": tfds.features.Sequence(tfds.features.Text()),
            "text": tfds.features.Sequence(tfds.features.Text()),
          }
        ),
        homepage=self._source.homepage,
        citation=self._source.citation,
        license=self._source.licence,
      )

    def _split_generators(self, dl_manager):
      del dl_manager  # everything is on this machine
      records: dict[str, dict[str, list]] = {split: {} for split in SPLITS}
      for record in self._records:
        records[split_of(record.key)].setdefault(record.language, []).append(record)
      return {split: self._generate_examples(records[split]) for split in SPLITS}

    def _generate_examples(self, records: dict[str, list]) -> Iterator[tuple[str, dict]]:
      for language, strings in records.items():
        keys, texts = [record.key for record in strings], [record.text for record in strings]
        yield language, {"language": language, "key": keys, "text": texts}

  return GroupedText


def _prepare(name: str, data_dir: Path) -> Path:
  """The directory of a source's data set, made on first use."""
  source = sources.SOURCES[name]
  # With the fingerprint in the path, a new release of the package is a new data set.
  config = f"{name}-{source.fingerprint()}"
  final = data_dir / _DATASET / config / VERSION
  if final.exists():
    return final
  _tfds()  # so that a missing package is reported first
  print(f"balance_jax: preparing {name} in {final}", file=sys.stderr)
  records = list(source())
  if not records:
    raise ValueError(f"source {name!r} has no translated string")
  data_dir.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".preparing-", dir=data_dir) as scratch:
    built = _build(source, config, records, scratch)
    digests.write_digests(built, {"languages": sorted({record.language for record in records})})
    final.parent.mkdir(parents=True, exist_ok=True)
    # One rename makes the data set visible, complete with its digests.
    try:
      built.rename(final)
    except OSError:
      if not final.exists():  # else another process was first, with the same content
        raise
  return final


def _build(
  source: sources.Source, config: str, records: list[sources.Record], scratch: str
) -> Path:
  # TFDS prints its progress, whatever the settings of logging.
  silent = io.StringIO()
  with _PREPARING, contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
    builder = _builder_class()(
      source=source,
      records=records,
      data_dir=scratch,
      config=_tfds().core.BuilderConfig(name=config, description=source.description),
      file_format="array_record",
    )
    builder.download_and_prepare()
  return Path(builder.data_dir)


# --- Finding ---


def _existing_directory(source: str | os.PathLike) -> Path:
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


def _find_dataset(source: str, data_dir: Path) -> Path:
  """The directory of "tfds:name[/config][:version]", looked up as TFDS lays it out."""
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
    raise ValueError(
      f"no prepared data set {source!r} in {data_dir}{_checks.nearest(name, present)}; that "
      f"directory holds: {', '.join(present) or 'nothing'}"
    )
  if len({p.parent for p in found}) > 1:
    configs = sorted({p.parent.name for p in found})
    raise ValueError(f"source {source!r} must name a config, one of: {', '.join(configs)}")
  return max(found, key=lambda p: tuple(map(int, p.name.split("."))))


# --- Reading ---


def _read(
  directory: Path, split: str, group_key: str, text_key: str, verified: bool
) -> Iterator[tuple[str, str]]:
  """(group, text) of each string, in the order of the disk; an example may hold several."""
  with _damage(directory, verified):
    builder = _tfds().builder_from_directory(str(directory))
    info = builder.info
  _check_request(info, split, group_key, text_key)
  with _damage(directory, verified):
    examples = _examples(builder, split, (group_key, text_key))
  feature = info.features[group_key]
  for example in examples:
    group = example[group_key]
    # A ClassLabel is stored as a number and named by its feature.
    name = feature.int2str(int(group)) if hasattr(feature, "int2str") else _string(group, group_key)
    texts = example[text_key]
    for text in texts if isinstance(texts, list | np.ndarray) else [texts]:
      yield name, _string(text, text_key)


def _check_request(info: Any, split: str, group_key: str, text_key: str) -> None:
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
def _damage(directory: Path, verified: bool) -> Iterator[None]:
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


def _examples(builder: Any, split: str, keys: tuple[str, str]) -> list[dict[str, Any]]:
  name = split.partition("[")[0]
  info = builder.info.splits[name]
  stored = sum(_stored_records(path) for path in info.filepaths)
  if stored != info.num_examples:
    raise digests.corrupted(
      Path(builder.data_dir),
      f"split {name!r} has {stored} records, dataset_info.json says {info.num_examples}",
    )
  if builder.info.splits[split].num_examples == 0:
    return []
  data = builder.as_data_source(split, decoders=_skip_others(builder.info.features, keys))
  indices = range(len(data))
  # One by one takes twice the time; all at once would hold each record twice, raw and decoded.
  chunks = (indices[start : start + _CHUNK] for start in range(0, len(data), _CHUNK))
  return [_select(example, keys) for chunk in chunks for example in data.__getitems__(list(chunk))]


def _select(example: dict[str, Any], keys: tuple[str, str]) -> dict[str, Any]:
  return {key: example[key] for key in keys}


def _skip_others(features: Any, keys: tuple[str, str]) -> dict[str, Any] | None:
  """Leaves images and the like encoded: they are large, and some take TensorFlow to decode."""
  tfds = _tfds()
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


def _string(value: Any, key: str) -> str:
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"feature {key!r} must hold UTF-8 text, got {value!r:.60}") from error
  if isinstance(value, str):
    return value
  raise ValueError(f"feature {key!r} must hold text, got {type(value).__name__}")
