"""Layers of the image networks: convolution, batch normalisation and initialisation in one place.

Source of the architectures: Shi et al., "Fast Certified Robust Training with Short Warmup",
NeurIPS 2021 (arXiv 2103.17268), and the authors' code.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax._convolution import conv2d
from balance_jax.robust.initialization import fan_in_uniform, ibp_normal

BATCH_NORMS = ("all", "conv", "none")
HOW = ("auto", "lax")
PARTS = ("all", "prefix", "suffix")
INITIALIZATIONS = {"default": lambda scale: fan_in_uniform(), "ibp": ibp_normal}


class Conv(nn.Module):
  """2-d convolution with a bias; parameters are named and shaped as those of `flax.linen.Conv`.

  Called with x, float (B, H, W, C); returns (B, H', W', features) in the dtype of x.

  Attributes:
    features: output channels, a multiple of groups.
    kernel_size: (height, width).
    strides: of both axes, >= 1.
    padding: zeros on every side, >= 0, or "SAME" or "VALID".
    groups: input channels are divided into that many groups, each convolved on its own.
    kernel_init: initializer of the kernel; biases are U(-1/sqrt(n), 1/sqrt(n)), n its fan-in.
    how: "auto", on CPUs gradients in a form that is fast inside of `lax.scan`, where the usual one
      takes 20 to 70 times as long; "lax", the usual one, to compare with.

  Raises:
    ValueError: x not of rank 4, a kernel larger than the padded image, channels not divisible by
      groups, an unknown `how` or padding.

  >>> x = jnp.ones((1, 8, 8, 3))
  >>> Conv(4, strides=2).init_with_output(jax.random.key(0), x)[0].shape
  (1, 4, 4, 4)
  """

  features: int
  kernel_size: tuple[int, int] = (3, 3)
  strides: int = 1
  padding: int | str = 1
  groups: int = 1
  kernel_init: Callable = fan_in_uniform()
  how: str = "auto"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    _checks.check_choice("how", self.how, HOW)
    _checks.check_shape("x", x, (None, None, None, None))
    channels = x.shape[-1]
    for name, number in (("features", self.features), ("the channels of x", channels)):
      if number % self.groups:
        raise ValueError(f"{name} are {number}; expected a multiple of groups ({self.groups})")
    shape = (*self.kernel_size, channels // self.groups, self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    bias_init = fan_in_uniform(fan_in=math.prod(shape[:-1]))
    bias = self.param("bias", bias_init, (self.features,), jnp.float32)
    strides = (self.strides, self.strides)
    padding = _pads(self.padding, x.shape[1:3], self.kernel_size, strides)
    kernel, bias = (array.astype(x.dtype) for array in (kernel, bias))
    return self._convolve(x, kernel, strides, padding) + bias.reshape(1, 1, 1, -1)

  def _convolve(self, x, kernel, strides, padding):
    if self.how == "auto":
      return conv2d(x, kernel, strides=strides, padding=padding, groups=self.groups)
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      strides,
      padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=self.groups,
    )


class ImageNetwork(nn.Module):
  """What the image networks share: normalised pixels, blocks, a dense layer, the classifier.

  Called with x, float (B, H, W, C), pixels in [0, 1], and train; returns logits, float (B, K).
  Every layer but the last is followed by batch normalisation and ReLU. Training mode normalises by
  the batch and updates "batch_stats" (make it mutable); inference mode by "batch_stats". A subclass
  defines `blocks`. With part="prefix" the feature maps behind all blocks but the last
  `suffix_blocks` are returned, and part="suffix" takes those in place of x: the two halves.

  Attributes:
    num_classes: K, >= 1.
    dense: units of the hidden dense layer, >= 1.
    batch_norm: "all", behind every layer but the last; "conv", behind convolutions only; "none".
    initialization: "default", U(-1/sqrt(n), 1/sqrt(n)), n the fan-in; "ibp", kernels of all layers
      but the last by `robust.ibp_normal`, at half the scale behind a residual sum.
    mean: what is subtracted from pixels, one number or one a channel; inside of the network, so
      that boxes are boxes of pixels.
    std: what they are divided by, likewise, each > 0.
    how: see `Conv`.
    suffix_blocks: blocks that belong to the suffix, >= 0 and fewer than there are.

  Raises:
    ValueError: x not of rank 4, an unknown variant, mean or std of another length than C, too many
      blocks for the suffix.
  """

  num_classes: int = 10
  dense: int = 512
  batch_norm: str = "all"
  initialization: str = "default"
  mean: tuple[float, ...] = (0.0,)
  std: tuple[float, ...] = (1.0,)
  how: str = "auto"
  suffix_blocks: int = 0

  # Whether the last block ends in relu(a + b).
  ends_in_sum: ClassVar[bool] = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False, part: str = "all") -> jax.Array:
    _checks.check_choice("batch_norm", self.batch_norm, BATCH_NORMS)
    _checks.check_choice("initialization", self.initialization, INITIALIZATIONS)
    _checks.check_choice("part", part, PARTS)
    _checks.check_shape("x", x, (None, None, None, None))
    blocks = self.blocks(train)
    _checks.check_number(
      "suffix_blocks", self.suffix_blocks, low=0, high=len(blocks) - 1, integer=True
    )
    split = len(blocks) - self.suffix_blocks
    x = x if part == "suffix" else normalize_pixels(x, self.mean, self.std)
    chosen = {"all": blocks, "prefix": blocks[:split], "suffix": blocks[split:]}[part]
    for block in chosen:
      x = block(x)
    if part == "prefix":
      return x
    x = dense_layer(x.reshape(len(x), -1), self.dense, "dense", self.kernel_init(self.ends_in_sum))
    x = norm_layer(x, "dense_norm", train) if self.batch_norm == "all" else x
    return dense_layer(nn.relu(x), self.num_classes, "head")

  def blocks(self, train: bool) -> list[Callable]:
    """Functions of feature maps, float (B, H, W, C), one after the other; each ends in a ReLU."""
    raise NotImplementedError

  def conv(
    self, x, features: int, name: str, train: bool, *, after_sum: bool = False, **options: Any
  ) -> jax.Array:
    """Convolution and batch normalisation, before the ReLU; `options` are those of `Conv`."""
    kernel_init = self.kernel_init(after_sum)
    x = Conv(features, kernel_init=kernel_init, how=self.how, name=name, **options)(x)
    return x if self.batch_norm == "none" else norm_layer(x, f"{name}_norm", train)

  def kernel_init(self, after_sum: bool) -> Callable:
    """Initializer of a layer that is not the last one."""
    return INITIALIZATIONS[self.initialization](0.5 if after_sum else 1.0)


class ResidualNetwork(ImageNetwork):
  """An `ImageNetwork` of a convolution 3x3 and three residual blocks at strides 1, 2, 2.

  A subclass defines `entry_channels`, those of the convolution, and `residual_block`.
  """

  ends_in_sum: ClassVar[bool] = True
  entry_channels: ClassVar[int]

  def blocks(self, train: bool) -> list[Callable]:
    rest = [
      functools.partial(
        self.residual_block, index=i, stride=stride, name=f"block_{i}", train=train, after_sum=i > 0
      )
      for i, stride in enumerate((1, 2, 2))
    ]
    return [lambda x: nn.relu(self.conv(x, self.entry_channels, "conv", train)), *rest]

  def residual_block(self, x, *, index: int, stride: int, name: str, train: bool, after_sum: bool):
    """relu(a + b) of feature maps; `after_sum` says that x is such a sum itself."""
    raise NotImplementedError


def normalize_pixels(x: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
  """(x - mean) / std by channel, the last axis; nothing where that is the identity."""
  for name, values in (("mean", mean), ("std", std)):
    if len(values) not in (1, x.shape[-1]):
      raise ValueError(f"{name} is {values}; expected one number or {x.shape[-1]}, one a channel")
  for value in std:
    _checks.check_number("std", value, low=0.0, open_low=True)
  if not any(mean) and set(std) == {1.0}:
    return x
  mean, std = (
    jnp.array(values, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,)) for values in (mean, std)
  )
  return (x - mean) / std


def norm_layer(x: jax.Array, name: str, train: bool) -> jax.Array:
  """Batch normalisation of the last axis, eps 1e-5 and momentum 0.9; for compact methods."""
  # The variance from centred values: small kernels make it as small as eps beside the mean, where
  # a difference of squares has no digits left.
  norm = nn.BatchNorm(
    use_running_average=not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, name=name
  )
  return norm(x)


def dense_layer(
  x: jax.Array, features: int, name: str, kernel_init: Callable | None = None
) -> jax.Array:
  """A dense layer (B, n) to (B, features), U(-1/sqrt(n), 1/sqrt(n)); for compact methods."""
  uniform = fan_in_uniform(fan_in=x.shape[-1])
  return nn.Dense(features, kernel_init=kernel_init or uniform, bias_init=uniform, name=name)(x)


def _pads(padding, shape, kernel_size, strides):
  if isinstance(padding, str):
    _checks.check_choice("padding", padding, ("SAME", "VALID"))
    pads = tuple(jax.lax.padtype_to_pads(shape, kernel_size, strides, padding))
  else:
    _checks.check_number("padding", padding, low=0, integer=True)
    pads = ((padding, padding), (padding, padding))
  if any(sum(pad) + size < k for pad, size, k in zip(pads, shape, kernel_size, strict=True)):
    raise ValueError(f"x is {shape}, padded by {pads}; expected at least the kernel {kernel_size}")
  return pads
