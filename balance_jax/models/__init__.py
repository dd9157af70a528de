"""Flax networks used by the experiments; methods never import them."""

from balance_jax.models.decoder import Decoder, DecoderConfig, count_params

__all__ = ["Decoder", "DecoderConfig", "count_params"]
