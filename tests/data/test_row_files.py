"""Rows on disk are those of the table in memory; their files are whole, once, and checked."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from balance_jax import data
from balance_jax.data import prepared as prepared_data
from balance_jax.data import row_files
from tests.data.conftest import write_dataset

WINDOW = 9


def all_rows(rows):
  groups = np.repeat(np.arange(len(rows.sizes)), rows.sizes)
  indices = np.concatenate([np.arange(size) for size in rows.sizes])
  return np.asarray(rows.take(groups, indices)["tokens"])


def assert_same_rows(reader, documents, window=WINDOW):
  table = data.group_table(documents, window=window)
  assert (reader.names, reader.group_sizes) == (table.names, table.group_sizes)
  found = all_rows(reader)
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, all_rows(table))


@pytest.fixture
def foreign(tmp_path):
  """A data set with one text in an example, the groups mixed, some texts twice or empty."""
  rng = np.random.default_rng(0)
  records = [
    {"language": "ab"[int(rng.random() < 0.2)], "text": "xy é"[: rng.integers(5)] * rng.integers(9)}
    for _ in range(200)
  ]
  return write_dataset(tmp_path / "tfds", records)


@pytest.mark.parametrize("part", [1, 40, 2**20])
def test_rows_are_those_of_the_table(foreign, tmp_path, monkeypatch, part):
  monkeypatch.setattr(row_files, "_PART", part)
  monkeypatch.setattr(prepared_data, "CHUNK", 7)
  reader = data.load_rows(foreign, "train", window=WINDOW, data_dir=tmp_path / "rows")
  assert_same_rows(reader, data.load_documents(foreign, "train"))


def test_the_size_of_documents_bounds_how_many_are_read_at_once(foreign, tmp_path, monkeypatch):
  monkeypatch.setattr(prepared_data, "_CHUNK_BYTES", 2000)
  read, counts = prepared_data.Examples.read, []

  def counted(self, indices):
    counts.append(len(indices))
    return read(self, indices)

  monkeypatch.setattr(prepared_data.Examples, "read", counted)
  reader = data.load_rows(foreign, "train", window=WINDOW, data_dir=tmp_path / "rows")
  size = sum(path.stat().st_size for path in Path(foreign).glob("*.array_record*"))
  assert 1 < max(counts) == 2000 * 200 // size < 200
  assert_same_rows(reader, data.load_documents(foreign, "train"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_of_a_source_with_many_texts_in_an_example(small, split):
  kwargs = {"languages": ["bb", "aa"], "data_dir": small}
  reader = data.load_rows("small", split, window=WINDOW, **kwargs)
  assert_same_rows(reader, data.load_documents("small", split, **kwargs))


def test_rows_are_written_once_and_anew_when_something_changes(foreign, tmp_path, capsys):
  kwargs = {"data_dir": tmp_path / "rows"}

  def written():
    return sorted(path.name for path in (tmp_path / "rows" / "rows").iterdir())

  first = data.load_rows(foreign, "train", window=WINDOW, **kwargs)
  again = data.load_rows(foreign, "train", window=WINDOW, **kwargs)
  np.testing.assert_array_equal(all_rows(first), all_rows(again))
  assert (len(written()), capsys.readouterr().err.count("writing rows")) == (1, 1)
  data.load_rows(foreign, "train", window=4, **kwargs)
  data.load_rows(foreign, "train", window=WINDOW, languages=["a"], **kwargs)
  data.load_rows(foreign, "train[:50%]", window=WINDOW, **kwargs)
  os.utime(foreign / "features.json", (1, 1))
  data.load_rows(foreign, "train", window=WINDOW, **kwargs)
  assert len(written()) == 5
  assert {path.name for path in (tmp_path / "rows").iterdir()} == {"rows"}  # no scratch is left


def test_other_processes_read_the_same(small):
  kwargs = {"window": WINDOW, "languages": ["aa"], "data_dir": small}
  with data.load_rows("small", "train", how="processes", workers=2, **kwargs) as reader:
    assert_same_rows(
      reader, data.load_documents("small", "train", languages=["aa"], data_dir=small)
    )


def test_too_little_text_and_bad_arguments(small):
  with pytest.raises(ValueError, match=r"group 'cc' has .* tokens, fewer than the 1001 of one row"):
    data.load_rows("small", "train", window=1000, languages=["cc"], data_dir=small)
  assert not (small / "rows").exists() or not list((small / "rows").glob("*/*.tmp"))
  with pytest.raises(ValueError, match="window is 0"):
    data.load_rows("small", "train", window=0, data_dir=small)
  with pytest.raises(ValueError, match="how is 'thread'"):
    data.load_rows("small", "train", window=WINDOW, data_dir=small, how="thread")


def test_damage_is_noticed_in_the_facts_the_sizes_and_every_page(copied, recwarn, monkeypatch):
  monkeypatch.setattr(row_files, "_PAGE", 3 * (WINDOW + 1))
  shutil.rmtree(copied / "rows", ignore_errors=True)  # of other tests
  kwargs = {"window": WINDOW, "languages": ["aa"], "data_dir": copied, "workers": 1}
  clean = all_rows(data.load_rows("small", "train", **kwargs))
  (folder,) = (copied / "rows").iterdir()
  file = folder / "0.array_record"
  content = file.read_bytes()
  where = content.index(clean[5].tobytes())
  file.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
  reader = data.load_rows("small", "train", **kwargs)
  with pytest.raises(data.CorruptedDataError, match="record 3 of group 'aa' cannot be read"):
    all_rows(reader)
  found = all_rows(data.load_rows("small", "train", max_corrupt=3, **kwargs))
  assert np.flatnonzero((found != clean).any(axis=1)).tolist() == [3, 4, 5]
  np.testing.assert_array_equal(found[3:6], clean[[6, 6, 6]])
  file.write_bytes(content[:-1])
  with pytest.raises(data.CorruptedDataError, match=r"0\.array_record has .* bytes, not .*delete"):
    data.load_rows("small", "train", **kwargs)
  (folder / "rows.json").write_text("{")
  with pytest.raises(data.CorruptedDataError, match="delete that directory"):
    data.load_rows("small", "train", **kwargs)
