"""CNN-7, the convolutional network of the literature on certified training, at any size.

Source: Shi et al., "Fast Certified Robust Training with Short Warmup", NeurIPS 2021
(arXiv 2103.17268), after Gowal et al., 2018 (arXiv 1810.12715).
"""

import functools
from collections.abc import Callable

import flax.linen as nn

from balance_jax.models.image_layers import ImageNetwork


class CNN7(ImageNetwork):
  """Convolutions 3x3, each with batch normalisation and ReLU, then dense, ReLU, classifier.

  See `ImageNetwork` for the call and the other attributes. The default is CNN-7 for images of
  28 x 28 or 32 x 32; for 64 x 64 the last convolution has stride 2 as well.

  Attributes:
    width: channels of the first convolution, >= 1; 64 in the paper.
    convs: (multiple of width, stride) of every convolution. ((1, 1), (2, 2), (2, 1)) is the
      shallow network of small experiments.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> model = CNN7(width=4, dense=16, initialization="ibp")
  >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  >>> sorted(variables), model.apply(variables, jnp.zeros((2, 8, 8, 1))).shape
  (['batch_stats', 'params'], (2, 10))
  """

  width: int = 64
  convs: tuple[tuple[int, int], ...] = ((1, 1), (1, 1), (2, 2), (2, 1), (2, 1))

  def blocks(self, train: bool) -> list[Callable]:
    def block(x, i, multiple, stride):
      return nn.relu(self.conv(x, multiple * self.width, f"conv_{i}", train, strides=stride))

    return [
      functools.partial(block, i=i, multiple=m, stride=s) for i, (m, s) in enumerate(self.convs)
    ]
