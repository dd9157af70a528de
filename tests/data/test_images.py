"""Subsets, tables and scaling of image data, and what every source has in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import data
from balance_jax.data import images as images_module


def make_data(counts=(5, 3, 4), seed=0, **changes):
  """Examples in random order; every pixel of example i is i."""
  labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
  labels = np.random.default_rng(seed).permutation(labels)
  pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
  fields = {
    "images": np.broadcast_to(pixels, (len(labels), 2, 3, 1)),
    "labels": labels,
    "class_names": tuple("abcdefgh"[: len(counts)]),
  }
  return data.ImageData(**(fields | changes))


def test_image_data_counts_its_classes():
  made = make_data(class_names=("a", "b", "c", "unseen"))
  assert made.num_classes == 4
  assert made.class_counts.tolist() == [5, 3, 4, 0]
  assert made.scale == 255


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"images": np.zeros((12, 2, 2), np.uint8)}, r"images has shape \(12, 2, 2\)"),
    ({"images": np.zeros((12, 2, 2, 1))}, "images are float64; expected uint8"),
    ({"labels": np.zeros(12, np.int64)}, "labels are int64; expected int32"),
    ({"labels": np.zeros(3, np.int32)}, r"labels has shape \(3,\); expected \(12\)"),
    ({"labels": np.full(12, 3, np.int32)}, r"labels lie in \[3, 3\]; allowed: \[0, 3\)"),
    ({"labels": np.full(12, -1, np.int32)}, r"labels lie in \[-1, -1\]"),
    ({"class_names": ("a", "b", "a")}, r"class_names must differ, got \('a', 'b', 'a'\)"),
    ({"scale": 10}, r"scale is 10; allowed: \[11, 255\]"),
    (
      {"images": np.zeros((0, 2, 2, 1), np.uint8), "labels": np.zeros(0, np.int32)},
      "images must hold at least one example",
    ),
  ],
)
def test_image_data_rejects(changes, message):
  with pytest.raises(ValueError, match=message):
    make_data(**changes)


@pytest.mark.parametrize(
  ("arguments", "options", "message"),
  [
    (("digit", "train"), {}, r"source is 'digit' \(did you mean 'digits'.*; allowed: digits, fash"),
    ((3, "train"), {}, "source is 3; allowed: digits, fashion_mnist, npz_jpeg, tfds:NAME"),
    (("digits", "valid"), {}, r"split is 'valid' .*allowed: test, train, validation"),
    (("digits", "train"), {"data_dir": "x"}, "data_dir is 'x', but source 'digits' does not read"),
    (("tfds:x", "train"), {"path": "y"}, "path is 'y', but source 'tfds:x' does not read it"),
    (("npz_jpeg", "train"), {}, "path is None; source 'npz_jpeg' needs the path"),
  ],
)
def test_load_images_rejects(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    data.load_images(*arguments, **options)


@pytest.mark.parametrize("scale", [16, 255])
def test_to_float_covers_the_unit_interval(scale):
  pixels = np.arange(scale + 1, dtype=np.uint8)
  expected = pixels / np.float64(scale)
  for convert in (images_module.to_float, jax.jit(images_module.to_float, static_argnums=1)):
    floats = convert(pixels, scale)
    assert floats.dtype == jnp.float32
    # XLA multiplies by the reciprocal of a constant: 1 unit in the last place.
    np.testing.assert_allclose(floats, expected, rtol=2**-23)
    # Both ends are exact, so no pixel lies outside of the box that bounds and attacks clip to.
    assert (floats[0], floats[-1]) == (0.0, 1.0)
  with pytest.raises(ValueError, match="scale is 0; allowed"):
    data.to_float(pixels, 0)


def counts_reference(n_max, num_classes, ratio):
  """The largest n with n^(C-1) * ratio^c <= n_max^(C-1), in exact integers."""
  counts = []
  for c in range(num_classes):
    n = n_max
    while n ** (num_classes - 1) * ratio**c > n_max ** (num_classes - 1):
      n -= 1
    counts.append(n)
  return tuple(counts)


# The last ones have exact powers, which a plain floor misses: 49 * (1/49) < 1, 512^(1/9) > 2.
@pytest.mark.parametrize(
  ("n_max", "num_classes", "ratio"),
  [(5000, 10, 100), (97, 7, 13), (600, 52, 50), (49, 2, 49), (512, 10, 512), (729, 7, 729)],
)
def test_exponential_counts_are_the_exact_floor(n_max, num_classes, ratio):
  counts = data.imbalanced_counts(n_max, num_classes, ratio)
  assert counts == counts_reference(n_max, num_classes, ratio)


def test_counts_of_the_other_kinds():
  assert sum(data.imbalanced_counts(5000, 10, 100)) == 12_406
  assert data.imbalanced_counts(100, 5, 8, "step") == (100, 100, 100, 12, 12)
  assert data.imbalanced_counts(7, 4, 1) == data.imbalanced_counts(7, 4, 1, "step") == (7,) * 4
  for kind in ("exp", "step"):
    assert data.imbalanced_counts(7, 1, 5, kind) == (7,)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((0, 3, 1), "n_max is 0"),
    ((5.0, 3, 1), "n_max is 5.0; expected an integer"),
    ((5, 0, 1), "num_classes is 0"),
    ((5, 3, 6), r"ratio is 6; allowed: \[1, 5\]"),
    ((5, 3, 0.5), r"ratio is 0.5; allowed: \[1, 5\]"),
    ((5, 3, 2, "stepp"), r"kind is 'stepp' \(did you mean 'step'.*; allowed: exp, step"),
  ],
)
def test_counts_reject(arguments, message):
  with pytest.raises(ValueError, match=message):
    data.imbalanced_counts(*arguments)


def test_take_classes_takes_what_was_asked_for():
  full = make_data((20, 20, 20))
  taken = data.take_classes(full, (10, 0, 3))
  assert taken.class_counts.tolist() == [10, 0, 3]
  assert taken.class_names == full.class_names
  positions = taken.images[:, 0, 0, 0]
  # In the order of the full data, with the labels that belong to the images.
  assert np.all(np.diff(positions.astype(int)) > 0)
  np.testing.assert_array_equal(taken.labels, full.labels[positions])


def test_take_classes_is_seeded_nested_and_by_class():
  full = make_data((20, 20, 20))

  def chosen(counts, label, seed=0):
    taken = data.take_classes(full, counts, seed=seed)
    return set(taken.images[taken.labels == label, 0, 0, 0].tolist())

  small = chosen((4, 1, 1), 0)
  assert small < chosen((9, 20, 7), 0)
  members = np.flatnonzero(full.labels == 2)
  order = np.random.default_rng((3, 2)).permutation(20)
  assert chosen((1, 1, 4), 2, seed=3) == set(members[order[:4]].tolist())
  assert small != chosen((4, 1, 1), 0, seed=1)
  assert chosen((20, 20, 20), 2) == set(np.flatnonzero(full.labels == 2).tolist())


@pytest.mark.parametrize(
  ("counts", "options", "message"),
  [
    ((1, 2), {}, r"counts has shape \(2,\); expected \(3\)"),
    ((1.0, 2.0, 3.0), {}, "counts must be integers, got float64"),
    ((1, 4, 1), {}, r"counts\[1\] is 4; class 'b' has 3 examples"),
    ((1, -1, 1), {}, r"counts\[1\] is -1"),
    ((0, 0, 0), {}, "counts must hold at least one above zero"),
    ((1, 1, 1), {"seed": -1}, "seed is -1"),
  ],
)
def test_take_classes_rejects(counts, options, message):
  with pytest.raises(ValueError, match=message):
    data.take_classes(make_data(), counts, **options)


def test_table_by_class():
  made = make_data()
  table = data.image_table(made)
  assert (table.names, table.group_sizes) == (("a", "b", "c"), (5, 3, 4))
  assert table.rows["image"].dtype == jnp.uint8
  assert table.rows["label"].dtype == jnp.int32
  batch = table.take(np.array([0, 1, 1, 2]), np.array([4, 0, 2, 1]))
  assert batch["label"].tolist() == [0, 1, 1, 2]
  positions = [np.flatnonzero(made.labels == c) for c in range(3)]
  expected = [positions[0][4], positions[1][0], positions[1][2], positions[2][1]]
  assert batch["image"][:, 1, 2, 0].tolist() == expected


def test_table_of_all():
  made = make_data()
  table = data.image_table(made, group_by="all")
  assert (table.names, table.group_sizes) == (("all",), (12,))
  np.testing.assert_array_equal(table.rows["image"], made.images)
  np.testing.assert_array_equal(table.rows["label"], made.labels)


def test_table_rejects():
  sparse = data.take_classes(make_data(), (5, 0, 1))
  with pytest.raises(ValueError, match="group_by is 'class', but no example has class b"):
    data.image_table(sparse)
  assert data.image_table(sparse, "all").group_sizes == (6,)
  with pytest.raises(ValueError, match=r"group_by is 'label'.*; allowed: all, class"):
    data.image_table(sparse, "label")
