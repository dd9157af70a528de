"""Readers of image sources: scikit-learn's digits, Fashion-MNIST, archives of JPEG images, TFDS.

A reader returns (images, labels, class names, scale) of one split; `images.load_images` is the way
in. Nothing is downloaded and no carrying package is imported.

Every split is in the order of a seeded permutation, so a prefix of it is a random sample, also of
files that are sorted by class. Validation examples are the end of the permutation of the training
examples; they are the same in every run.
"""

import gzip
import importlib.metadata
import io
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from balance_jax.data import digests, prepared, sources

FASHION_ROOT = Path("/usr/share/datasets/fashion-mnist")

_DIGITS_FILE = "sklearn/datasets/data/digits.csv.gz"
_DIGITS_INSTALL = "pip install 'balance_jax[data]'"
_DIGITS_TRAINING = 1400  # of 1797; the last 200 of them are validation
_FASHION_INSTALL = "apt-get install --no-install-recommends dataset-fashion-mnist"
_FASHION_NAMES = (
  *("t-shirt/top", "trouser", "pullover", "dress", "coat"),
  *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_NPZ_KEYS = ("jpeg", "offsets", "labels", "is_train")


class Images(NamedTuple):
  """What a reader returns; see `images.ImageData` for the fields."""

  images: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  scale: float


def read_digits(split: str) -> Images:
  """Handwritten digits, 8x8x1 with values 0 ... 16 (PyPI scikit-learn, `load_digits`).

  Of the permutation of all 1797 examples, 1200 are train, then 200 validation, then 397 test.
  """
  name = "digits"
  try:
    distribution = importlib.metadata.distribution("scikit-learn")
  except importlib.metadata.PackageNotFoundError:
    raise _not_installed(name, "no scikit-learn", _DIGITS_INSTALL) from None
  path = Path(distribution.locate_file(_DIGITS_FILE))
  content = _gunzip(name, path, _DIGITS_INSTALL)
  try:
    rows = np.loadtxt(io.BytesIO(content), dtype=np.uint8, delimiter=",", ndmin=2)
  except ValueError as error:
    raise _damaged(path, str(error), _DIGITS_INSTALL) from error
  if rows.shape != (1797, 65) or rows[:, :-1].max() > 16 or rows[:, -1].max() > 9:
    reason = f"{rows.shape} numbers that are not 1797 digits"
    raise _damaged(path, reason, _DIGITS_INSTALL)
  training, test = np.split(_permutation(len(rows)), [_DIGITS_TRAINING])
  index = test if split == "test" else _hold_out(training, split, 200)
  images = rows[index, :-1].reshape(-1, 8, 8, 1)
  return Images(images, rows[index, -1].astype(np.int32), tuple("0123456789"), 16.0)


def read_fashion_mnist(split: str, data_dir: str | os.PathLike | None = None) -> Images:
  """Articles of clothing, 28x28x1 (Debian dataset-fashion-mnist; Xiao et al., arXiv 1708.07747).

  55,000 train, 5,000 validation (1 in 12 of the training file), 10,000 test.

  Args:
    split: "train", "validation" or "test".
    data_dir: directory with the four idx files, gzipped; None for the Debian package's.

  Returns:
    The split.
  """
  root = FASHION_ROOT if data_dir is None else Path(data_dir).expanduser()
  stem = "t10k" if split == "test" else "train"
  images = _read_idx(root / f"{stem}-images-idx3-ubyte.gz", 3)
  path = root / f"{stem}-labels-idx1-ubyte.gz"
  labels = _read_idx(path, 1)
  if len(labels) != len(images) or labels.max(initial=0) > 9:
    reason = f"{len(labels)} labels up to {labels.max(initial=0)} for {len(images)} images"
    raise _damaged(path, reason, _FASHION_INSTALL)
  index = _permutation(len(labels))
  if split != "test":
    index = _hold_out(index, split, len(index) // 12)
  return Images(images[index, ..., None], labels[index].astype(np.int32), _FASHION_NAMES, 255.0)


def read_npz_jpeg(split: str, path: str | os.PathLike | None) -> Images:
  """Images of an `.npz` archive that holds them as one stream of JPEG files.

  The archive's arrays: `jpeg` uint8 (bytes,); `offsets` integers (N + 1,), image i being the bytes
  [offsets[i], offsets[i + 1]); `labels` integers (N,); `is_train` bool (N,); and, if the classes
  have names, `names` strings (K,). 1 in 10 of the training images is validation. Only the images of
  the split are decoded.

  Args:
    split: "train", "validation" or "test".
    path: the archive.

  Returns:
    The split; all of its images must have one size.
  """
  if path is None:
    raise sources.DatasetNotFoundError(
      "path is None; source 'npz_jpeg' needs the path of an .npz archive"
    )
  path = Path(path).expanduser()
  arrays = _load_npz(path)
  labels, is_train = arrays["labels"], arrays["is_train"]
  index = np.flatnonzero(is_train != (split == "test"))
  index = index[_permutation(len(index))]
  if split != "test":
    index = _hold_out(index, split, len(index) // 10)
  names = arrays.get("names", range(int(labels.max()) + 1))
  return Images(
    _decode_all(arrays["jpeg"], arrays["offsets"], index, path),
    labels[index].astype(np.int32),
    tuple(map(str, names)),
    255.0,
  )


def read_tfds(split: str, source: str, data_dir: str | os.PathLike | None = None) -> Images:
  """A prepared TFDS data set with an `image` (uint8) and a `label` (ClassLabel), no TensorFlow.

  Args:
    split: "train", "validation" or "test"; a data set without validation holds out 1 in 10 of
      its training examples for it.
    source: "tfds:name[/config][:version]".
    data_dir: where data sets lie; None for $TFDS_DATA_DIR or ~/tensorflow_datasets.

  Returns:
    The split.
  """
  directory = prepared.find_dataset(source, data_dir)
  dataset = prepared.open_dataset(directory)
  info = dataset.info
  for feature in ("image", "label"):
    if feature not in info.features:
      raise ValueError(
        f"source {source!r} has no feature {feature!r}, only: {', '.join(sorted(info.features))}"
      )
  names = getattr(info.features["label"], "names", None)
  if not names:
    raise ValueError(f"source {source!r}: feature 'label' must be a ClassLabel with classes")
  carved = split != "test" and "validation" not in info.splits
  stored = "train" if carved else split
  found = prepared.Examples(dataset, stored, ("label", "image"))
  examples = [example for numbers in found.chunks() for example in found.read(numbers)]
  index = _permutation(len(examples))
  if carved:
    index = _hold_out(index, split, len(index) // 10)
  images = [_with_channels(np.asarray(examples[i]["image"])) for i in index]
  found = {f"{image.dtype}{list(image.shape)}" for image in images}
  if len(found) != 1 or images[0].dtype != np.uint8:
    got = ", ".join(sorted(found)[:4]) or "none"
    raise ValueError(f"images of {source!r} must be uint8 of one size, got {got}")
  labels = np.array([examples[i]["label"] for i in index], np.int32)
  return Images(np.stack(images), labels, tuple(names), 255.0)


def _permutation(count: int) -> np.ndarray:
  return np.random.default_rng(0).permutation(count)


def _hold_out(index: np.ndarray, split: str, held_out: int) -> np.ndarray:
  train, validation = np.split(index, [len(index) - held_out])
  return validation if split == "validation" else train


def _not_installed(source: str, reason: str, command: str) -> sources.DatasetNotInstalledError:
  return sources.DatasetNotInstalledError(
    f"the data of {source!r} is not installed ({reason}); run: {command}"
  )


def _damaged(path: Path, reason: str, command: str | None = None) -> digests.CorruptedDataError:
  advice = f"reinstall its package: {command}" if command else "get the file anew"
  return digests.CorruptedDataError(f"{path} is damaged ({reason}); {advice}")


def _gunzip(source: str, path: Path, command: str) -> bytes:
  try:
    content = gzip.decompress(path.read_bytes())
  except FileNotFoundError:
    raise _not_installed(source, f"no {path}", command) from None
  except (OSError, EOFError, zlib.error) as error:
    raise _damaged(path, str(error), command) from error
  if not content:
    raise _damaged(path, "empty", command)
  return content


def _read_idx(path: Path, ndim: int) -> np.ndarray:
  """A gzipped idx file of bytes: 0, 0, 8, ndim, then big-endian sizes, then the values."""
  content = _gunzip("fashion_mnist", path, _FASHION_INSTALL)
  start = 4 + 4 * ndim
  if content[:4] != bytes([0, 0, 8, ndim]) or len(content) < start:
    raise _damaged(path, f"no idx file of bytes in {ndim} dimensions", _FASHION_INSTALL)
  shape = np.frombuffer(content, ">u4", ndim, offset=4).tolist()
  if math.prod(shape) != len(content) - start:
    reason = f"{len(content) - start} values for shape {tuple(shape)}"
    raise _damaged(path, reason, _FASHION_INSTALL)
  return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _load_npz(path: Path) -> dict[str, np.ndarray]:
  """The arrays of a JPEG archive, found consistent."""
  if not path.is_file():
    raise sources.DatasetNotFoundError(f"path: there is no file {str(path)!r}")
  try:
    # Archives may come from anywhere, and unpickling runs code.
    with np.load(path, allow_pickle=False) as archive:
      present = list(archive.files)
      arrays = {key: archive[key] for key in (*_NPZ_KEYS, "names") if key in present}
  except Exception as error:  # zipfile and NumPy raise many types, from KeyError to MemoryError
    raise _damaged(path, f"{type(error).__name__}: {error!s:.200}") from error
  missing = [key for key in _NPZ_KEYS if key not in arrays]
  if missing:
    raise ValueError(
      f"path: {str(path)!r} has no array {', '.join(missing)}; an archive of JPEG images holds "
      f"{', '.join(_NPZ_KEYS)}, this one: {', '.join(present) or 'nothing'}"
    )
  reason = _inconsistency(**arrays)
  if reason:
    raise _damaged(path, reason)
  return arrays


def _inconsistency(jpeg, offsets, labels, is_train, names=None) -> str | None:
  count = labels.size
  if jpeg.dtype != np.uint8 or jpeg.ndim != 1:
    return f"jpeg is {jpeg.dtype}{list(jpeg.shape)}, not uint8 bytes"
  if labels.dtype.kind not in "iu" or labels.ndim != 1 or not count:
    return f"labels are {labels.dtype}{list(labels.shape)}, not N >= 1 integers"
  if is_train.dtype != bool or is_train.shape != (count,):
    return f"is_train is {is_train.dtype}{list(is_train.shape)}, not {count} bools"
  if offsets.dtype.kind not in "iu" or offsets.shape != (count + 1,):
    return f"offsets are {offsets.dtype}{list(offsets.shape)}, not {count + 1} integers"
  if offsets[0] < 0 or offsets[-1] > jpeg.size or np.any(offsets[1:] < offsets[:-1]):
    return f"offsets do not grow within the {jpeg.size} bytes of jpeg"
  if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
    return f"names are {names.dtype}{list(names.shape)}, not K strings"
  classes = count if names is None else names.size
  if labels.min() < 0 or labels.max() >= classes:
    return f"labels lie in [{labels.min()}, {labels.max()}] with {classes} classes at most"
  return None


def _decode_all(jpeg: np.ndarray, offsets: np.ndarray, index: np.ndarray, path: Path) -> np.ndarray:
  from PIL import Image

  images = None
  for row, i in enumerate(index):
    stream = io.BytesIO(jpeg[offsets[i] : offsets[i + 1]])
    try:
      with Image.open(stream, formats=("JPEG",)) as file:
        image = _with_channels(np.asarray(file))
    except Exception as error:  # Pillow raises many types, from OSError to IndexError
      raise _damaged(path, f"image {i} is no JPEG file: {error}") from error
    if images is None:
      images = np.empty((len(index), *image.shape), np.uint8)
    if image.shape != images.shape[1:]:
      raise ValueError(
        f"images of {str(path)!r} must have one size, got {list(image.shape)} at {i} and "
        f"{list(images.shape[1:])}"
      )
    images[row] = image
  return np.empty((0, 1, 1, 1), np.uint8) if images is None else images


def _with_channels(image: np.ndarray) -> np.ndarray:
  return image[..., None] if image.ndim == 2 else image


# Name -> (reader, the argument of `load_images` that says where the data lies, if any).
IMAGE_SOURCES = {
  "digits": (read_digits, None),
  "fashion_mnist": (read_fashion_mnist, "data_dir"),
  "npz_jpeg": (read_npz_jpeg, "path"),
}
