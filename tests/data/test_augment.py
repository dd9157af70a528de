"""Crops and flips against NumPy, which replays the corners and the flips that were drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.data import augment as augment_function
from balance_jax.data.augment import augment, random_crop, random_flip


def make_images(batch=6, height=5, width=7, channels=2):
  rng = np.random.default_rng(0)
  return rng.normal(size=(batch, height, width, channels)).astype(np.float32)


def crop_reference(images, corners, padding, mode):
  """Pixel by pixel: row r of the window is row corner + r - padding of the image."""
  batch, height, width, _ = images.shape
  out = np.zeros_like(images)
  for b in range(batch):
    for r in range(height):
      for c in range(width):
        y, x = corners[b, 0] + r - padding, corners[b, 1] + c - padding
        if mode == "edge":
          y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        if 0 <= y < height and 0 <= x < width:
          out[b, r, c] = images[b, y, x]
  return out


def drawn_corners(key, batch, padding):
  return np.asarray(jax.random.randint(key, (batch, 2), 0, 2 * padding + 1))


@pytest.mark.parametrize("mode", ["edge", "constant"])
@pytest.mark.parametrize("padding", [1, 9])  # 9: a window may lie outside of the image
def test_crop_matches_numpy(mode, padding):
  images, key = make_images(), jax.random.key(3)
  corners = drawn_corners(key, len(images), padding)
  assert len({tuple(corner) for corner in corners.tolist()}) > 3
  expected = crop_reference(images, corners, padding, mode)
  np.testing.assert_array_equal(random_crop(key, images, padding, mode), expected)


def test_flip_matches_numpy():
  images, key = make_images(batch=40), jax.random.key(1)
  flipped = np.asarray(random_flip(key, images))
  drawn = np.asarray(jax.random.bernoulli(key, shape=(40, 1, 1, 1))).ravel()
  assert 10 < drawn.sum() < 30
  for image, result, mirrored in zip(images, flipped, drawn, strict=True):
    np.testing.assert_array_equal(result, image[:, ::-1] if mirrored else image)


def test_all_corners_are_equally_likely():
  batch, padding = 9000, 1
  # The pixel in the middle says where the window lay.
  positions = np.broadcast_to(np.arange(9, dtype=np.float32).reshape(3, 3, 1), (batch, 3, 3, 1))
  middle = np.asarray(random_crop(jax.random.key(0), positions, padding))[:, 1, 1, 0]
  counts = np.bincount(middle.astype(int), minlength=9)
  # 1000 expected with a standard deviation of 30.
  assert counts.min() > 880
  assert counts.max() < 1120


def test_augment_crops_and_flips_with_independent_keys():
  images, key = make_images(), jax.random.key(5)
  crop_key, flip_key = jax.random.split(key)
  cropped = random_crop(crop_key, images, 2, "constant")
  options = {"crop_padding": 2, "mode": "constant"}
  np.testing.assert_array_equal(augment(key, images, flip=False, **options), cropped)
  np.testing.assert_array_equal(
    augment(key, images, flip=True, **options), random_flip(flip_key, cropped)
  )
  assert augment_function is augment


def test_nothing_asked_for_returns_the_images():
  images = make_images()
  np.testing.assert_array_equal(
    augment(jax.random.key(0), images, flip=False, crop_padding=0), images
  )


def test_jit_and_vmap_equal_the_plain_call():
  images = make_images(batch=6).reshape(2, 3, 5, 7, 2)
  keys = jax.random.split(jax.random.key(2), 2)
  run = functools.partial(augment, flip=True, crop_padding=2)
  expected = np.stack([run(key, batch) for key, batch in zip(keys, images, strict=True)])
  np.testing.assert_array_equal(jax.jit(run)(keys[0], images[0]), expected[0])
  np.testing.assert_array_equal(jax.jit(jax.vmap(run))(keys, images), expected)


def test_gradient_goes_to_the_pixels_that_were_kept():
  images, key = make_images(batch=2), jax.random.key(0)
  run = functools.partial(augment, key, flip=True, crop_padding=1, mode="constant")
  gradient = jax.grad(lambda x: run(x).sum())(jnp.asarray(images))
  # Each pixel is copied once or not at all: the sum over kept pixels is the sum of the output.
  assert set(np.unique(gradient).tolist()) == {0.0, 1.0}
  np.testing.assert_allclose((gradient * images).sum(), run(images).sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
def test_dtype_is_kept(dtype):
  images = jnp.asarray(np.arange(2 * 3 * 3).reshape(2, 3, 3, 1), dtype)
  result = augment(jax.random.key(0), images, flip=True, crop_padding=1)
  assert result.dtype == dtype
  assert set(np.unique(result[1].astype(jnp.float32)).tolist()) <= set(range(9, 18))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"images": np.zeros((3, 3, 1))}, r"images has shape \(3, 3, 1\); expected \(any, any, any"),
    ({"padding": -1}, r"padding is -1; allowed: \[0, inf\]"),
    ({"padding": 1.5}, "padding is 1.5; expected an integer"),
    ({"mode": "egde"}, r"mode is 'egde' \(did you mean 'edge'\?\); allowed: constant, edge"),
  ],
)
def test_bad_input(arguments, message):
  arguments = {"images": make_images(), "padding": 2, "mode": "edge", **arguments}
  with pytest.raises(ValueError, match=message):
    random_crop(jax.random.key(0), **arguments)


def test_bad_input_that_only_shows_when_traced():
  with pytest.raises(ValueError, match="padding must be known when the function is traced"):
    jax.jit(random_crop)(jax.random.key(0), make_images(), 2)
  with pytest.raises(ValueError, match=r"images has shape \(2, 2\)"):
    random_flip(jax.random.key(0), np.zeros((2, 2)))
