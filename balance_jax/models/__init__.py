"""Flax networks used by the experiments; methods never import them."""

from balance_jax.models.cnn7 import CNN7
from balance_jax.models.decoder import Decoder, DecoderConfig, count_params
from balance_jax.models.image_layers import Conv
from balance_jax.models.mlp import MLP
from balance_jax.models.resnext import ResNeXt
from balance_jax.models.wide_resnet import WideResNet8

__all__ = [
  "CNN7",
  "Conv",
  "Decoder",
  "DecoderConfig",
  "MLP",
  "ResNeXt",
  "WideResNet8",
  "count_params",
]
