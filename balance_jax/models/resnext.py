"""A small ResNeXt for certified training: three blocks of grouped convolutions, no pooling.

Source: Shi et al., "Fast Certified Robust Training with Short Warmup", NeurIPS 2021
(arXiv 2103.17268), after Xie et al., 2017 (arXiv 1611.05431).
"""

from typing import ClassVar

import flax.linen as nn

from balance_jax.models.image_layers import ResidualNetwork


class ResNeXt(ResidualNetwork):
  """Convolution 3x3 to 64 channels, three bottleneck blocks at strides 1, 2, 2, dense, classifier.

  A block is conv 1x1, grouped conv 3x3, conv 1x1 to twice the channels, all with norm and the first
  two with ReLU, plus the input (through a convolution 1x1 and norm where the shape changes), then
  ReLU. See `ImageNetwork` for the call and the other attributes.

  Attributes:
    cardinality: groups of the 3x3 convolutions, >= 1.
    base_width: channels a group in the first block, doubled from block to block, >= 1.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> model = ResNeXt(base_width=4, dense=16)
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  >>> variables["params"]["block_0_conv_1"]["kernel"].shape
  (3, 3, 4, 8)
  """

  cardinality: int = 2
  base_width: int = 32

  entry_channels: ClassVar[int] = 64

  def residual_block(self, x, *, index, stride, name, train, after_sum):
    inner = self.cardinality * self.base_width * 2**index
    point = {"kernel_size": (1, 1), "padding": 0}
    y = nn.relu(self.conv(x, inner, f"{name}_conv_0", train, after_sum=after_sum, **point))
    grouped = {"strides": stride, "groups": self.cardinality}
    y = nn.relu(self.conv(y, inner, f"{name}_conv_1", train, **grouped))
    y = self.conv(y, 2 * inner, f"{name}_conv_2", train, **point)
    if x.shape != y.shape:
      enter = {"strides": stride, "after_sum": after_sum}
      x = self.conv(x, 2 * inner, f"{name}_shortcut", train, **point, **enter)
    return nn.relu(x + y)
