"""Image data sets: loading by name, balanced and imbalanced subsets, and the grouped device table.

Images stay uint8 in memory and on the device; `to_float` makes a batch of them float in [0, 1].
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax.data import builder, image_sources
from balance_jax.data.table import GroupTable

_KINDS = ("exp", "step")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
  """Labelled images of one size, on the host.

  Attributes:
    images: uint8 (N, H, W, C) with N >= 1.
    labels: int32 (N,), each in [0, num_classes).
    class_names: the names of the classes, no two alike.
    scale: the largest value a pixel can have, so that images / scale lies in [0, 1].

  Raises:
    ValueError: arrays of another dtype or shape, a label out of range, a name that comes twice.
  """

  images: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  scale: float = 255.0

  def __post_init__(self):
    _checks.check_shape("images", self.images, (None, None, None, None))
    _checks.check_shape("labels", self.labels, (len(self.images),))
    for name, dtype in (("images", np.uint8), ("labels", np.int32)):
      if getattr(self, name).dtype != dtype:
        raise ValueError(f"{name} are {getattr(self, name).dtype}; expected {np.dtype(dtype)}")
    if not len(self.images):
      raise ValueError("images must hold at least one example, got none")
    if len(set(self.class_names)) != self.num_classes:
      raise ValueError(f"class_names must differ, got {self.class_names!r}")
    low, high = self.labels.min(), self.labels.max()
    if low < 0 or high >= self.num_classes:
      raise ValueError(f"labels lie in [{low}, {high}]; allowed: [0, {self.num_classes})")
    _checks.check_number("scale", self.scale, low=max(1, self.images.max()), high=255.0)

  @property
  def num_classes(self) -> int:
    """Number of classes, of which some may have no example."""
    return len(self.class_names)

  @property
  def class_counts(self) -> np.ndarray:
    """int64 (num_classes,): examples by class."""
    return np.bincount(self.labels, minlength=self.num_classes)


def load_images(
  source: str,
  split: str,
  *,
  path: str | os.PathLike | None = None,
  data_dir: str | os.PathLike | None = None,
) -> ImageData:
  """One split of an image source, in an order in which each prefix is a random sample.

  | source | train / validation / test | where it comes from |
  | --- | --- | --- |
  | "digits" | 1200 / 200 / 397, 8x8x1, scale 16 | scikit-learn |
  | "fashion_mnist" | 55,000 / 5,000 / 10,000, 28x28x1 | Debian dataset-fashion-mnist |
  | "npz_jpeg" | 90 % / 10 % of its training images / the others | `path`, an archive |
  | "tfds:NAME" | as stored; without validation, 10 % of train | a prepared TFDS data set |

  Splits and order are the same in every run. The readers in `image_sources` describe the formats.

  Args:
    source: a name in `IMAGE_SOURCES`, or "tfds:name[/config][:version]".
    split: "train", "validation" or "test".
    path: the archive of "npz_jpeg".
    data_dir: directory of the files of "fashion_mnist" (None: where the package puts them), or of
      TFDS data sets (None: $TFDS_DATA_DIR or ~/tensorflow_datasets).

  Returns:
    The split.

  Raises:
    ValueError: an unknown source or split, a place that the source does not read, a missing or
      foreign archive, a data set without the features or the split, images of several sizes.
    DatasetNotInstalledError: a package is missing; the message has the command to install it.
    CorruptedDataError: a file is damaged.
  """
  _checks.check_choice("split", split, builder.SPLITS)
  arguments: dict[str, Any] = {}
  if isinstance(source, str) and source.startswith("tfds:"):
    read, place = image_sources.read_tfds, "data_dir"
    arguments["source"] = source
  else:
    known = image_sources.IMAGE_SOURCES
    _checks.check_choice("source", source, (*known, "tfds:NAME"))
    read, place = known[source]
  for name, value in (("path", path), ("data_dir", data_dir)):
    if name == place:
      arguments[name] = value
    elif value is not None:
      raise ValueError(f"{name} is {str(value)!r}, but source {source!r} does not read it")
  return ImageData(*read(split, **arguments))


def to_float(images: jax.Array, scale: float) -> jax.Array:
  """Pixels as float32 in [0, 1]; for a batch, inside the jitted step.

  Args:
    images: uint8 (..., H, W, C).
    scale: the largest value a pixel can have, > 0, as in `ImageData.scale`.

  Returns:
    float32 (..., H, W, C), images / scale.

  >>> to_float(np.array([0, 4, 16], np.uint8), 16).tolist()
  [0.0, 0.25, 1.0]
  """
  _checks.check_number("scale", scale, low=0.0, open_low=True)
  return jnp.asarray(images).astype(jnp.float32) / scale


def imbalanced_counts(
  n_max: int, num_classes: int, ratio: float, kind: str = "exp"
) -> tuple[int, ...]:
  """Examples by class of a long-tailed training set.

  "exp" (Cui et al., 2019, arXiv 1901.05555): n_c = floor(n_max * ratio^(-c / (C - 1))). "step"
  (Buda et al., 2018, arXiv 1710.05381): n_max in the first half of the classes, which has the
  middle one if C is odd, and floor(n_max / ratio) in the second.

  Args:
    n_max: examples of the largest class, >= 1.
    num_classes: C >= 1; a single class has n_max.
    ratio: largest over smallest count, in [1, n_max].
    kind: "exp" or "step".

  Returns:
    C counts, each >= 1, not growing with c.

  >>> imbalanced_counts(5000, 10, 100)
  (5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50)
  >>> imbalanced_counts(5000, 4, 100, "step")
  (5000, 5000, 50, 50)
  """
  _checks.check_number("n_max", n_max, low=1, integer=True)
  _checks.check_number("num_classes", num_classes, low=1, integer=True)
  _checks.check_number("ratio", ratio, low=1, high=n_max)
  _checks.check_choice("kind", kind, _KINDS)
  rank = np.arange(num_classes)
  if kind == "exp":
    share = rank / max(num_classes - 1, 1)
  else:
    share = np.where(rank < (num_classes + 1) // 2, 0.0, 1.0)
  counts = n_max / float(ratio) ** share
  # Where the formula gives an integer, rounding may leave the power a little above it.
  return tuple(np.floor(counts * (1 + 1e-12)).astype(int).tolist())


def take_classes(data: ImageData, counts: Sequence[int], *, seed: int = 0) -> ImageData:
  """A subset with the given number of examples of each class.

  Of class c it holds the first counts[c] of a permutation seeded by (seed, c): a larger subset of a
  class contains a smaller one, and what is taken of one class does not depend on the others.

  Args:
    data: examples.
    counts: integers (num_classes,), counts[c] in [0, examples of class c], not all 0; see
      `imbalanced_counts`.
    seed: >= 0.

  Returns:
    The subset, in the order of `data`.

  Raises:
    ValueError: counts of another length or type, more than a class has, or none at all.
  """
  counts = np.asarray(counts)
  _checks.check_shape("counts", counts, (data.num_classes,))
  if counts.dtype.kind not in "iu":
    raise ValueError(f"counts must be integers, got {counts.dtype}")
  _checks.check_number("seed", seed, low=0, integer=True)
  for c, (count, available) in enumerate(zip(counts, data.class_counts, strict=True)):
    if not 0 <= count <= available:
      raise ValueError(
        f"counts[{c}] is {count}; class {data.class_names[c]!r} has {available} examples"
      )
  taken = []
  for c, count in enumerate(counts):
    members = np.flatnonzero(data.labels == c)
    order = np.random.default_rng((seed, c)).permutation(len(members))
    taken.append(members[order[:count]])
  index = np.sort(np.concatenate(taken))
  if not index.size:
    raise ValueError("counts must hold at least one above zero")
  return dataclasses.replace(data, images=data.images[index], labels=data.labels[index])


def image_table(data: ImageData, group_by: str = "class") -> GroupTable:
  """Moves the examples to the device, as a table whose groups are the classes.

  Args:
    data: examples.
    group_by: "class", each of which needs an example; or "all" for one group of that name.

  Returns:
    A table with rows {"image": uint8 (N, H, W, C), "label": int32 (N,)}.

  Raises:
    ValueError: a class without an example, or another `group_by`.
  """
  _checks.check_choice("group_by", group_by, ("class", "all"))
  if group_by == "all":
    return GroupTable.from_rows({"all": {"image": data.images, "label": data.labels}})
  empty = [name for name, n in zip(data.class_names, data.class_counts, strict=True) if not n]
  if empty:
    raise ValueError(f"group_by is 'class', but no example has class {', '.join(empty[:5])}")
  members = [data.labels == c for c in range(data.num_classes)]
  return GroupTable.from_rows(
    {
      name: {"image": data.images[of_class], "label": data.labels[of_class]}
      for name, of_class in zip(data.class_names, members, strict=True)
    }
  )
