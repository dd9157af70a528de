"""load_documents on TFDS data sets that this library did not make."""

import shutil

import numpy as np
import pytest

from balance_jax import data
from balance_jax.data import digests, prepared
from tests.data.conftest import damage, version_dir, write_dataset

tfds = pytest.importorskip("tensorflow_datasets", reason="pip install 'balance_jax[data]'")

FOREIGN = [{"domain": f"d{i % 3}", "body": f"text {i * i}"} for i in range(60)]


def foreign_documents(keep=lambda record: True):
  groups = {}
  for record in filter(keep, FOREIGN):
    groups.setdefault(record["domain"], set()).add(record["body"])
  return groups


def test_damage_without_digests_never_changes_text(small, tmp_path):
  directory = tmp_path / "foreign"
  shutil.copytree(version_dir(small), directory)
  (directory / digests.FILE_NAME).unlink()
  expected = data.load_documents(directory, "train")
  seen = 0
  for path in sorted(directory.glob("*train*")):
    content = path.read_bytes()
    for _, damaged in damage(path):
      path.unlink() if damaged is None else path.write_bytes(damaged)
      try:
        assert data.load_documents(directory, "train") == expected
      except data.CorruptedDataError:
        seen += 1
      path.write_bytes(content)
  assert seen > 10


def test_a_wrong_record_count_is_damage(tmp_path):
  path = write_dataset(tmp_path, FOREIGN)
  info = path / "dataset_info.json"
  text = info.read_text(encoding="utf-8")
  assert '"60"' in text
  for count in ("59", "61"):
    info.write_text(text.replace('"60"', f'"{count}"'), encoding="utf-8")
    with pytest.raises(data.CorruptedDataError, match=f"has 60 records, .* says {count}"):
      data.load_documents(path, "train", group_key="domain", text_key="body")


def test_foreign_data_set_by_name_and_by_path(tmp_path, monkeypatch):
  path = write_dataset(tmp_path, FOREIGN)
  keys = {"group_key": "domain", "text_key": "body"}
  expected = foreign_documents()
  for source in ("tfds:foreign", "tfds:foreign:2.1.0", path, str(path)):
    documents = data.load_documents(source, "train", data_dir=tmp_path, **keys)
    assert {name: set(texts) for name, texts in documents.items()} == expected
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  assert data.load_documents("tfds:foreign", "train", **keys) == documents
  with pytest.raises(ValueError, match=r"no prepared data set 'tfds:foriegn' .*mean 'foreign'"):
    data.load_documents("tfds:foriegn", "train", data_dir=tmp_path, **keys)
  with pytest.raises(ValueError, match=r"no prepared data set 'tfds:foreign:3\.0\.0'"):
    data.load_documents("tfds:foreign:3.0.0", "train", data_dir=tmp_path, **keys)


def test_configs_and_versions_are_found(copied):
  config = version_dir(copied).parent
  expected = data.load_documents("small", "train", data_dir=copied)
  assert data.load_documents("tfds:grouped_text", "train", data_dir=copied) == expected
  shutil.copytree(config, config.with_name("other"))
  with pytest.raises(ValueError, match=f"must name a config, one of: other, {config.name}"):
    data.load_documents("tfds:grouped_text", "train", data_dir=copied)
  name = f"tfds:grouped_text/{config.name}"
  assert data.load_documents(name, "train", data_dir=copied) == expected
  # Versions are numbers: 1.0.0 < 1.9.0 < 1.10.0.
  for version in ("1.9.0", "1.10.0"):
    shutil.copytree(config / "1.0.0", config / version)
  assert prepared.find_dataset(name, copied).name == "1.10.0"


def test_slices(tmp_path):
  keys = {"group_key": "domain", "text_key": "body"}
  path = write_dataset(tmp_path / "a", FOREIGN)
  parts = [data.load_documents(path, f"train[{s}]", **keys) for s in (":25%", "25%:")]
  assert [sum(map(len, part.values())) for part in parts] == [15, 45]
  joined = {name: {*parts[0].get(name, ()), *parts[1].get(name, ())} for name in parts[1]}
  assert joined == foreign_documents()
  pytest.importorskip("pyarrow")
  path = write_dataset(tmp_path / "p", FOREIGN, file_format="parquet")
  documents = data.load_documents(path, "train", **keys)
  assert {name: set(texts) for name, texts in documents.items()} == foreign_documents()
  with pytest.raises(ValueError, match=r"'train\[:25%\]': .*parquet has no slices; use 'train'"):
    data.load_documents(path, "train[:25%]", **keys)


def test_labels_name_the_group_and_other_features_are_left_alone(tmp_path):
  features = {
    "label": tfds.features.ClassLabel(names=["neg", "pos"]),
    "image": tfds.features.Tensor(shape=(2, 2), dtype=np.uint8),
    "text": tfds.features.Text(),
    "score": np.float32,
  }
  records = [
    {"label": i % 2, "image": np.zeros((2, 2), np.uint8), "text": f"t{i}", "score": 0.5}
    for i in range(10)
  ]
  path = write_dataset(tmp_path, records, features=features)
  documents = data.load_documents(path, "train", group_key="label")
  assert {name: sorted(texts) for name, texts in documents.items()} == {
    "neg": ["t0", "t2", "t4", "t6", "t8"],
    "pos": ["t1", "t3", "t5", "t7", "t9"],
  }
  with pytest.raises(ValueError, match="feature 'score' must hold text, got float"):
    data.load_documents(path, "train", group_key="label", text_key="score")


def test_tfrecord_is_refused(tmp_path):
  path = write_dataset(tmp_path, FOREIGN)
  info = path / "dataset_info.json"
  info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'), encoding="utf-8")
  with pytest.raises(ValueError, match="stored as tfrecord, which takes TensorFlow"):
    data.load_documents(path, "train", group_key="domain", text_key="body")
