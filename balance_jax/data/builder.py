"""Text sources as TFDS data sets: a builder, and their preparation on first use."""

import contextlib
import functools
import hashlib
import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from balance_jax.data import digests, prepared, sources

SPLITS = ("train", "validation", "test")
VERSION = "1.0.0"  # raise it with any change to the records or to the split of a source

DATASET = "grouped_text"
# Redirecting stdout is global: two threads at it could leave it redirected for good.
_PREPARING = threading.Lock()


def split_of(key: str) -> str:
  """The split of a source string: a function of the string alone.

  Args:
    key: the English source string.

  Returns:
    "train", "validation" or "test", with shares 80, 10 and 10 %.

  >>> split_of("Save"), split_of("Close")
  ('train', 'validation')
  """
  percent = int.from_bytes(text_hash(key)[:8], "big") % 100
  return SPLITS[(percent >= 80) + (percent >= 90)]


def text_hash(text: str) -> bytes:
  """16 bytes that depend on nothing but the text."""
  return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


@functools.cache
def _builder_class():
  tfds = prepared.import_tfds()

  class GroupedText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A text source as a TFDS data set: an example is all of one language's strings in a split.

    TFDS decodes an example in about 40 us, however small, so one for every string would take
    seconds to read.
    """

    VERSION = tfds.core.Version(VERSION)
    name = DATASET
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


def prepare(name: str, data_dir: Path) -> Path:
  """The directory of a source's data set below `data_dir`, made on first use."""
  source = sources.SOURCES[name]
  # With the fingerprint in the path, a new release of the package is a new data set.
  config = f"{name}-{source.fingerprint()}"
  final = data_dir / DATASET / config / VERSION

  def make(scratch: Path) -> Path:
    prepared.import_tfds()  # so that a missing package is reported first
    print(f"balance_jax: preparing {name} in {final}", file=sys.stderr)
    records = list(source())
    if not records:
      raise ValueError(f"source {name!r} has no translated string")
    built = _build(source, config, records, scratch)
    digests.write_digests(built, {"languages": sorted({record.language for record in records})})
    return built

  return prepared.make_once(final, data_dir, make)


def _build(
  source: sources.Source, config: str, records: list[sources.Record], scratch: Path
) -> Path:
  # TFDS prints its progress, whatever the settings of logging.
  silent = io.StringIO()
  with _PREPARING, contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
    builder = _builder_class()(
      source=source,
      records=records,
      data_dir=scratch,
      config=prepared.import_tfds().core.BuilderConfig(name=config, description=source.description),
      file_format="array_record",
    )
    builder.download_and_prepare()
  return Path(builder.data_dir)
