"""Wide-ResNet-8 for certified training: three basic blocks and no pooling.

Source: Shi et al., "Fast Certified Robust Training with Short Warmup", NeurIPS 2021
(arXiv 2103.17268), after Zagoruyko and Komodakis, 2016 (arXiv 1605.07146).
"""

from typing import ClassVar

import flax.linen as nn

from balance_jax.models.image_layers import ResidualNetwork


class WideResNet8(ResidualNetwork):
  """Convolution 3x3 to 16 channels, three basic blocks at strides 1, 2, 2, dense, classifier.

  A block is conv, norm, ReLU, conv, norm, plus the input (through a convolution 1x1 and norm where
  the shape changes), then ReLU. See `ImageNetwork` for the call and the other attributes.

  Attributes:
    widen: factor on the widths 16, 32, 64 of the blocks, >= 1; 8 for CIFAR-10, 10 for TinyImageNet.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> model = WideResNet8(widen=1, dense=16)
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  >>> variables["params"]["dense"]["kernel"].shape  # 2 x 2 positions, 64 channels
  (256, 16)
  """

  widen: int = 8

  entry_channels: ClassVar[int] = 16

  def residual_block(self, x, *, index, stride, name, train, after_sum):
    features = 16 * 2**index * self.widen
    enter = {"strides": stride, "after_sum": after_sum}
    y = nn.relu(self.conv(x, features, f"{name}_conv_0", train, **enter))
    y = self.conv(y, features, f"{name}_conv_1", train)
    if x.shape != y.shape:
      x = self.conv(x, features, f"{name}_shortcut", train, kernel_size=(1, 1), padding=0, **enter)
    return nn.relu(x + y)
