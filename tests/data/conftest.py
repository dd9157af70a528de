"""Shared by the tests of balance_jax.data: a small text source and ordinary TFDS data sets."""

import shutil

import numpy as np
import pytest

from balance_jax import data
from balance_jax.data import sources

LANGUAGES = {"aa": 150, "bb": 120, "cc": 3}


def write_catalogues(root, prefix=""):
  for language, count in LANGUAGES.items():
    path = root / language / "LC_MESSAGES" / "x.po"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = (f'msgid "key {i}"\nmsgstr "{prefix}{language} ü {i}"\n' for i in range(count))
    path.write_text("\n".join(entries), encoding="utf-8")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A source with three languages and the directory it was prepared in, shared and not changed."""
  pytest.importorskip("tensorflow_datasets", reason="pip install 'balance_jax[data]'")
  root = tmp_path_factory.mktemp("source")
  write_catalogues(root / "locales")
  source = sources.plone_catalogues(root / "locales")
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(data.SOURCES, "small", source)
    data.load_documents("small", "train", data_dir=root / "data")
  return source, root / "data"


@pytest.fixture
def small(prepared, monkeypatch):
  source, directory = prepared
  monkeypatch.setitem(data.SOURCES, "small", source)
  return directory


@pytest.fixture
def copied(small, tmp_path):
  shutil.copytree(small, tmp_path / "data")
  return tmp_path / "data"


def version_dir(data_dir):
  (found,) = data_dir.glob("grouped_text/*/1.0.0")
  return found


def write_dataset(directory, records, file_format="array_record", features=None):
  """An ordinary TFDS data set that this library did not make."""
  tfds = pytest.importorskip("tensorflow_datasets", reason="pip install 'balance_jax[data]'")

  class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("2.1.0")
    name = "foreign"
    url_infos = {}  # noqa: RUF012

    def _info(self):
      texts = dict.fromkeys(records[0], tfds.features.Text())
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features or texts)
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      yield from enumerate(records)

  tfds.disable_progress_bar()
  made = Foreign(data_dir=directory, file_format=file_format)
  made.download_and_prepare()
  return made.data_path


def damage(path):
  """The file cut short, emptied, removed, and with bits flipped at many positions."""
  content = path.read_bytes()
  rng = np.random.default_rng(0)
  for position in {0, len(content) - 1, *rng.integers(0, len(content), 12).tolist()}:
    changed = bytearray(content)
    changed[position] ^= 1 << int(rng.integers(8))
    yield f"bit at {position}", bytes(changed)
    yield f"cut at {position}", content[:position]
  yield "removed", None
