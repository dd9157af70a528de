"""Each image source: its splits, its damage, and what is said where it is missing."""

import gzip
import importlib.metadata
import io
import pickle

import numpy as np
import pytest

from balance_jax import data
from balance_jax.data import builder, image_sources

APT = "apt-get install --no-install-recommends dataset-fashion-mnist"
SPLITS = builder.SPLITS


def splits_of(source, **options):
  return {split: data.load_images(source, split, **options) for split in SPLITS}


def rows_of(parts):
  """Each example as bytes, its label included."""
  return [
    image.tobytes() + bytes([label])
    for part in parts
    for image, label in zip(part.images, part.labels, strict=True)
  ]


# --- digits ---


def require_digits():
  pytest.importorskip("sklearn", reason="pip install 'balance_jax[data]'")


def test_digits_are_those_of_scikit_learn():
  require_digits()
  from sklearn.datasets import load_digits

  parts = splits_of("digits")
  assert [len(part.labels) for part in parts.values()] == [1200, 200, 397]
  bunch = load_digits()
  order = np.random.default_rng(0).permutation(1797)
  images = np.concatenate([part.images for part in parts.values()])
  np.testing.assert_array_equal(images[..., 0], bunch.images[order])
  labels = np.concatenate([part.labels for part in parts.values()])
  np.testing.assert_array_equal(labels, bunch.target[order])
  assert images.shape == (1797, 8, 8, 1)
  assert parts["test"].scale == images.max() == 16
  # Another order of default_rng would be another split: then every published number is void.
  assert labels[:8].tolist() == [6, 6, 6, 2, 5, 6, 6, 2]


class FakeDistribution:
  def __init__(self, root):
    self.root = root

  def locate_file(self, name):
    return self.root / name


def test_digits_missing_or_damaged(monkeypatch, tmp_path):
  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

  command = r"run: pip install 'balance_jax\[data\]'"
  monkeypatch.setattr(importlib.metadata, "distribution", missing)
  with pytest.raises(data.DatasetNotInstalledError, match=command):
    data.load_images("digits", "train")
  monkeypatch.setattr(importlib.metadata, "distribution", lambda name: FakeDistribution(tmp_path))
  with pytest.raises(data.DatasetNotInstalledError, match=command):
    data.load_images("digits", "train")
  path = tmp_path / "sklearn/datasets/data/digits.csv.gz"
  path.parent.mkdir(parents=True)
  rows = ",".join(["17"] * 64 + ["0"]) + "\n"
  for content in (b"", b"no gzip", gzip.compress(b"a,b\n"), gzip.compress(b"1,2\n" * 5)):
    path.write_bytes(content)
    with pytest.raises(data.CorruptedDataError, match=r"digits\.csv\.gz is damaged .*reinstall"):
      data.load_images("digits", "train")
  path.write_bytes(gzip.compress(rows.encode() * 1797))
  with pytest.raises(data.CorruptedDataError, match="not 1797 digits"):
    data.load_images("digits", "train")


# --- Fashion-MNIST ---


def idx(array):
  sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
  return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_fashion(root, train=36, test=7):
  rng = np.random.default_rng(1)
  stored = {}
  for stem, count in (("train", train), ("t10k", test)):
    images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, count, dtype=np.uint8)
    stored[stem] = images, labels
    for array, name in ((images, "images-idx3"), (labels, "labels-idx1")):
      (root / f"{stem}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
  return stored


def test_fashion_mnist_reads_idx_files(tmp_path):
  stored = write_fashion(tmp_path)
  parts = splits_of("fashion_mnist", data_dir=tmp_path)
  assert [part.images.shape for part in parts.values()] == [(n, 28, 28, 1) for n in (33, 3, 7)]
  for names, stem in ((("train", "validation"), "train"), (("test",), "t10k")):
    images, labels = stored[stem]
    order = np.random.default_rng(0).permutation(len(labels))
    read = [parts[name] for name in names]
    np.testing.assert_array_equal(np.concatenate([p.images for p in read])[..., 0], images[order])
    np.testing.assert_array_equal(np.concatenate([p.labels for p in read]), labels[order])


def test_fashion_mnist_of_the_package():
  if not image_sources.FASHION_ROOT.is_dir():
    pytest.skip(f"Fashion-MNIST is not installed; run: {APT}")
  test = data.load_images("fashion_mnist", "test")
  assert test.images.shape == (10_000, 28, 28, 1)
  assert test.class_counts.tolist() == [1000] * 10
  train = data.load_images("fashion_mnist", "train")
  validation = data.load_images("fashion_mnist", "validation")
  assert (len(train.labels), len(validation.labels)) == (55_000, 5_000)
  assert (train.class_counts + validation.class_counts).tolist() == [6000] * 10
  # The published mean of the training pixels, 0.2860.
  total = train.images.sum(dtype=np.int64) + validation.images.sum(dtype=np.int64)
  assert round(total / (60_000 * 784 * 255), 4) == 0.2860
  assert train.class_names[9] == "ankle boot"


def test_fashion_mnist_missing_or_damaged(tmp_path):
  with pytest.raises(data.DatasetNotInstalledError, match=f"run: {APT}"):
    data.load_images("fashion_mnist", "train", data_dir=tmp_path)
  write_fashion(tmp_path)
  path = tmp_path / "t10k-labels-idx1-ubyte.gz"
  good = path.read_bytes()
  plain = gzip.decompress(good)
  flipped = bytes([*good[:20], good[20] ^ 4, *good[21:]])
  cases = {
    "empty": b"",
    "cut short": good[:-9],
    "a flipped bit": flipped,
    "no dimensions": gzip.compress(plain[:5]),
    "a type other than bytes": gzip.compress(bytes([0, 0, 9, 1]) + plain[4:]),
    "a value too few": gzip.compress(plain[:-1]),
    "a label too many": gzip.compress(idx(np.zeros(8, np.uint8))),
    "a label too large": gzip.compress(idx(np.full(7, 10, np.uint8))),
  }
  for content in cases.values():
    path.write_bytes(content)
    with pytest.raises(data.CorruptedDataError, match=f"idx1-ubyte.gz is damaged .*{APT}"):
      data.load_images("fashion_mnist", "test", data_dir=tmp_path)


# --- archives of JPEG images ---


def write_npz(path, count=30, size=(6, 8), mode="RGB", **changes):
  """Flat colours, which JPEG keeps to within a step or two."""
  image = pytest.importorskip("PIL.Image")
  rng = np.random.default_rng(2)
  channels = len(mode)
  colours = rng.integers(0, 256, (count, channels), dtype=np.uint8)
  streams = []
  for colour in colours:
    pixels = np.broadcast_to(colour, (*size, channels)).copy()
    file = io.BytesIO()
    image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).save(file, "JPEG", quality=95)
    streams.append(np.frombuffer(file.getvalue(), np.uint8))
  arrays = {
    "jpeg": np.concatenate(streams),
    "offsets": np.cumsum([0, *map(len, streams)]),
    "labels": rng.integers(0, 3, count).astype(np.uint8),
    "is_train": np.arange(count) % 3 > 0,
    "names": np.array(["x", "y", "z"]),
  } | changes
  np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
  return colours, arrays


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_npz_jpeg_splits(tmp_path, mode, channels):
  path = tmp_path / "a.npz"
  colours, arrays = write_npz(path, mode=mode)
  parts = splits_of("npz_jpeg", path=path)
  assert [part.images.shape for part in parts.values()] == [
    (n, 6, 8, channels) for n in (18, 2, 10)
  ]
  assert parts["train"].class_names == ("x", "y", "z")
  order = np.random.default_rng(0).permutation(20)
  training, testing = np.flatnonzero(arrays["is_train"]), np.flatnonzero(~arrays["is_train"])
  index = np.concatenate([training[order], testing[np.random.default_rng(0).permutation(10)]])
  images = np.concatenate([part.images for part in parts.values()]).astype(int)
  assert np.abs(images - colours[index, None, None].astype(int)).max() <= 4
  labels = np.concatenate([part.labels for part in parts.values()])
  np.testing.assert_array_equal(labels, arrays["labels"][index])


def test_npz_jpeg_without_names(tmp_path):
  write_npz(tmp_path / "a.npz", names=None)
  part = data.load_images("npz_jpeg", "test", path=str(tmp_path / "a.npz"))
  assert part.class_names == ("0", "1", "2")


def test_npz_jpeg_that_is_another_file(tmp_path):
  with pytest.raises(ValueError, match=r"path: there is no file '.*none\.npz'"):
    data.load_images("npz_jpeg", "train", path=tmp_path / "none.npz")
  write_npz(tmp_path / "a.npz", offsets=None, labels=None)
  message = "no array offsets, labels; .* holds jpeg, offsets, labels, is_train, this one: jpeg"
  with pytest.raises(ValueError, match=message):
    data.load_images("npz_jpeg", "train", path=tmp_path / "a.npz")
  write_npz(tmp_path / "a.npz", is_train=np.ones(30, bool))
  with pytest.raises(ValueError, match="at least one example"):
    data.load_images("npz_jpeg", "test", path=tmp_path / "a.npz")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"jpeg": np.zeros(9)}, r"jpeg is float64\[9\]"),
    ({"labels": np.zeros(30)}, "labels are float64"),
    ({"labels": np.zeros(0, int)}, "not N >= 1 integers"),
    ({"labels": np.full(30, 3)}, r"labels lie in \[3, 3\] with 3 classes"),
    ({"labels": np.full(30, 2**40), "names": None}, "labels lie in .* with 30 classes"),
    ({"is_train": np.ones(29, bool)}, "not 30 bools"),
    ({"offsets": np.arange(30)}, "not 31 integers"),
    ({"offsets": np.arange(31)[::-1].copy()}, "offsets do not grow within"),
    ({"offsets": np.arange(31) * 10**6}, "offsets do not grow within"),
    ({"offsets": np.arange(31) - 1}, "offsets do not grow within"),
    ({"names": np.arange(3)}, r"names are int64\[3\], not K strings"),
    ({"offsets": np.arange(31) * 100}, "image [0-9]+ is no JPEG file"),
    ({"names": np.array([{}, 1, 2], object)}, "ValueError: Object arrays cannot be loaded"),
  ],
)
def test_npz_jpeg_that_is_inconsistent(tmp_path, changes, message):
  write_npz(tmp_path / "a.npz", **changes)
  with pytest.raises(data.CorruptedDataError, match=f"is damaged .*{message}.*get the file anew"):
    data.load_images("npz_jpeg", "train", path=tmp_path / "a.npz")


def test_npz_jpeg_with_two_sizes(tmp_path):
  _, small = write_npz(tmp_path / "a.npz", count=1)
  _, large = write_npz(tmp_path / "a.npz", count=1, size=(6, 9))
  streams = [small["jpeg"], *[large["jpeg"]] * 19]
  offsets = np.cumsum([0, *map(len, streams)])
  changes = {"is_train": np.ones(20, bool), "jpeg": np.concatenate(streams), "offsets": offsets}
  write_npz(tmp_path / "a.npz", count=20, **changes)
  with pytest.raises(ValueError, match=r"must have one size, got \[6, [89], 3\] at [0-9]+ and"):
    data.load_images("npz_jpeg", "train", path=tmp_path / "a.npz")


def test_npz_jpeg_damaged_on_disk(tmp_path):
  path = tmp_path / "a.npz"
  write_npz(path)
  good = path.read_bytes()
  expected = rows_of([data.load_images("npz_jpeg", "test", path=path)])
  seen = 0
  cases = [b"", b"no archive", pickle.dumps({"jpeg": 1}), good[: len(good) // 2]]
  for position in np.random.default_rng(0).integers(0, len(good), 25).tolist():
    cases.append(good[:position] + bytes([good[position] ^ 16]) + good[position + 1 :])
  for content in cases:
    path.write_bytes(content)
    try:
      assert rows_of([data.load_images("npz_jpeg", "test", path=path)]) == expected
    except data.CorruptedDataError:
      seen += 1
  assert seen > 15


# --- TFDS ---


def write_tfds(directory, splits, image=None, label=None, **more):
  """A TFDS data set named foreign: split -> (images, labels)."""
  tfds = pytest.importorskip("tensorflow_datasets", reason="pip install 'balance_jax[data]'")
  features = {
    "image": image or tfds.features.Tensor(shape=(4, 5, 3), dtype=np.uint8),
    "label": label or tfds.features.ClassLabel(names=["cat", "dog"]),
    "file_name": tfds.features.Text(),
  } | more

  class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    name = "foreign"
    url_infos = {}  # noqa: RUF012

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {name: self._generate_examples(*arrays) for name, arrays in splits.items()}

    def _generate_examples(self, images, labels):
      for i, (pixels, number) in enumerate(zip(images, labels, strict=True)):
        yield i, {"image": pixels, "label": int(number), "file_name": f"{i}.png"}

  tfds.disable_progress_bar()
  Foreign(data_dir=directory, file_format="array_record").download_and_prepare()
  return tfds


def make_examples(count, seed, shape=(4, 5, 3)):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, 2, count)


def raw_rows(images, labels):
  return [
    image.tobytes() + bytes([label]) for image, label in zip(images, labels.tolist(), strict=True)
  ]


def test_tfds_without_validation_holds_out_a_tenth(tmp_path, monkeypatch):
  stored = {"train": make_examples(30, 0), "test": make_examples(8, 1)}
  write_tfds(tmp_path, stored)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  parts = splits_of("tfds:foreign")
  assert [len(part.labels) for part in parts.values()] == [27, 3, 8]
  training = rows_of([parts["train"], parts["validation"]])
  assert sorted(training) == sorted(raw_rows(*stored["train"]))
  assert sorted(rows_of([parts["test"]])) == sorted(raw_rows(*stored["test"]))
  assert parts["test"].class_names == ("cat", "dog")
  assert parts["test"].scale == 255


def test_tfds_with_validation_keeps_its_splits(tmp_path):
  stored = {"train": make_examples(20, 0), "validation": make_examples(4, 1)}
  write_tfds(tmp_path, stored)
  for split, arrays in stored.items():
    part = data.load_images("tfds:foreign:1.0.0", split, data_dir=tmp_path)
    assert sorted(rows_of([part])) == sorted(raw_rows(*arrays))
  with pytest.raises(ValueError, match="split is 'test'; allowed: train, validation"):
    data.load_images("tfds:foreign", "test", data_dir=tmp_path)


def test_tfds_encoded_grey_images(tmp_path):
  image = pytest.importorskip("PIL.Image")
  tfds = pytest.importorskip("tensorflow_datasets", reason="pip install 'balance_jax[data]'")
  images, labels = make_examples(10, 0, (4, 5))
  encoded = [image.fromarray(pixels) for pixels in images]  # TFDS stores them as PNG
  feature = tfds.features.Image(shape=(4, 5, 1))
  write_tfds(tmp_path, {"test": (encoded, labels)}, image=feature)
  part = data.load_images("tfds:foreign", "test", data_dir=tmp_path)
  assert part.images.shape == (10, 4, 5, 1)
  assert sorted(rows_of([part])) == sorted(raw_rows(images, labels))


def test_tfds_rejects(tmp_path):
  with pytest.raises(ValueError, match="no prepared data set 'tfds:foreign'"):
    data.load_images("tfds:foreign", "train", data_dir=tmp_path)
  images, labels = make_examples(4, 0)
  tfds = write_tfds(tmp_path / "a", {"test": (images, labels)}, label=np.int64)
  with pytest.raises(ValueError, match="feature 'label' must be a ClassLabel"):
    data.load_images("tfds:foreign", "test", data_dir=tmp_path / "a")
  feature = tfds.features.Tensor(shape=(4, 5, 3), dtype=np.float32)
  write_tfds(tmp_path / "b", {"test": (images.astype(np.float32), labels)}, image=feature)
  with pytest.raises(ValueError, match=r"must be uint8 of one size, got float32\[4, 5, 3\]"):
    data.load_images("tfds:foreign", "test", data_dir=tmp_path / "b")


def test_tfds_without_the_features(tmp_path):
  from tests.data.conftest import write_dataset

  write_dataset(tmp_path, [{"image": "a", "text": "b"}])
  with pytest.raises(ValueError, match="has no feature 'label', only: image, text"):
    data.load_images("tfds:foreign", "train", data_dir=tmp_path)


def test_tfds_damaged(tmp_path):
  write_tfds(tmp_path, {"test": make_examples(10, 0)})
  for path in tmp_path.glob("foreign/1.0.0/*array_record*"):
    path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(data.CorruptedDataError, match="is damaged"):
    data.load_images("tfds:foreign", "test", data_dir=tmp_path)
