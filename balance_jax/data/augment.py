"""Random crops and flips of image batches on the device: pure functions, one draw an example.

A crop pads by `padding` on every side and cuts a window of the original size, so certified training
of CIFAR-10 (Shi et al., 2021, arXiv 2103.17268) is padding 2 with mode "edge", and the usual
augmentation of CIFAR-10 is padding 4 with mode "constant".
"""

import jax
import jax.numpy as jnp

from balance_jax import _checks

MODES = ("edge", "constant")


def augment(
  key: jax.Array, images: jax.Array, *, flip: bool, crop_padding: int, mode: str = "edge"
) -> jax.Array:
  """Crops, then flips, with independent draws for each example.

  Args:
    key: a PRNG key.
    images: (B, H, W, C), floats or integers.
    flip: whether to mirror each image with probability 1/2.
    crop_padding: pixels >= 0 by which a window may lie off the image; 0 for no crop.
    mode: "edge" repeats the border outside of the image, "constant" has zeros there.

  Returns:
    Shape and dtype of `images`.
  """
  crop_key, flip_key = jax.random.split(key)
  images = random_crop(crop_key, images, crop_padding, mode)
  return random_flip(flip_key, images) if flip else images


def random_crop(key: jax.Array, images: jax.Array, padding: int, mode: str = "edge") -> jax.Array:
  """Cuts a window of the original size out of each padded image.

  The corner of the window is uniform over the (2 * padding + 1)^2 possible ones.

  Args:
    key: a PRNG key.
    images: (B, H, W, C), floats or integers.
    padding: pixels on each side, >= 0, static; 0 returns the images.
    mode: "edge" or "constant"; see `augment`.

  Returns:
    Shape and dtype of `images`.

  Raises:
    ValueError: images without four dimensions, a negative or traced padding, another mode.
  """
  _checks.check_shape("images", images, (None, None, None, None))
  _checks.check_known("padding", padding)
  _checks.check_number("padding", padding, low=0, integer=True)
  _checks.check_choice("mode", mode, MODES)
  if padding == 0:
    return images
  size = images.shape[1:]
  padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode=mode)
  corners = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)
  return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), size))(
    padded, corners
  )


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors each image from left to right with probability 1/2.

  Args:
    key: a PRNG key.
    images: (B, H, W, C), floats or integers.

  Returns:
    Shape and dtype of `images`.

  Raises:
    ValueError: images without four dimensions.
  """
  _checks.check_shape("images", images, (None, None, None, None))
  flipped = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
  return jnp.where(flipped, images[:, :, ::-1], images)
