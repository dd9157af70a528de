"""Documents by group: the texts of a source or of a TFDS data set, read back from the disk."""

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from balance_jax.data import builder, digests, prepared, sources


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
  documents = Documents(source, split, data_dir=data_dir, group_key=group_key, text_key=text_key)
  groups: dict[str, list[str]] = {name: [] for name in documents.known_groups}
  for numbers in documents.chunks():
    for group, texts in documents.read(numbers):
      groups.setdefault(group, []).extend(texts)
  wanted = sources.check_languages(languages, groups)
  return {name: sorted(groups[name], key=_text_order) for name in wanted}


class Documents:
  """The texts of one split, in the order of the disk; see `load_documents` for the arguments.

  Attributes:
    directory: of the prepared data set.
    known_groups: those that a source of ours names, with or without text in this split.
  """

  def __init__(
    self,
    source: str | os.PathLike,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    group_key: str = "language",
    text_key: str = "text",
  ):
    self.directory, verified = _find(source, data_dir)
    self.known_groups: list[str] = []
    if verified:
      self.known_groups = digests.check_digests(self.directory)["languages"]
    self._group_key, self._text_key = group_key, text_key
    dataset = prepared.open_dataset(self.directory, verified)
    self._examples = prepared.Examples(dataset, split, (group_key, text_key), verified)

  @property
  def at_once(self) -> int:
    """How many examples to read at once."""
    return self._examples.at_once

  def chunks(self) -> Iterator[range]:
    """Numbers of all examples, in parts."""
    return self._examples.chunks()

  def read(self, numbers: Sequence[int]) -> list[tuple[str, list[str]]]:
    """(group, texts) of each of the examples; an example may hold several texts."""
    feature = self._examples.info.features[self._group_key]
    found = []
    for example in self._examples.read(numbers):
      group, texts = example[self._group_key], example[self._text_key]
      # A ClassLabel is stored as a number and named by its feature.
      named = hasattr(feature, "int2str")
      name = feature.int2str(int(group)) if named else prepared.string(group, self._group_key)
      several = isinstance(texts, list | np.ndarray)
      texts = [prepared.string(text, self._text_key) for text in (texts if several else [texts])]
      found.append((name, texts))
    return found


def _find(source: str | os.PathLike, data_dir: str | os.PathLike | None) -> tuple[Path, bool]:
  """(directory of the prepared data set, whether digests vouch for it)."""
  if isinstance(source, str) and source in sources.SOURCES:
    directory = builder.prepare(source, data_directory(data_dir))
  elif isinstance(source, str) and source.startswith("tfds:"):
    directory = prepared.find_dataset(source, data_dir)
  else:
    directory = prepared.existing_directory(source)
  # A copy may lie anywhere; under the name of ours the digests may not be missing.
  ours = directory.parent.parent.name == builder.DATASET
  return directory, ours or (directory / digests.FILE_NAME).exists()


def data_directory(given: str | os.PathLike | None) -> Path:
  """Where data prepared here lies."""
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return prepared.data_directory(given, Path(cache) / "balance_jax" / "datasets")


def _text_order(text: str) -> tuple[bytes, str]:
  return builder.text_hash(text), text
