"""The models that several benchmarks train: two MLPs and the quickstart's decoder."""

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import data, models
from balance_jax.losses import cross_entropy

GROUP_SIZES = (20_000, 5_000, 1_000, 200)


def mlp(hidden: int, features: int = 64, classes: int = 10):
  """(per_example_loss, init_params, groups) of an MLP features-hidden-classes."""
  rng = np.random.default_rng(0)
  groups = {
    f"group{i}": {
      "x": rng.normal(size=(size, features)).astype(np.float32),
      "y": rng.integers(classes, size=size).astype(np.int32),
    }
    for i, size in enumerate(GROUP_SIZES)
  }

  def per_example_loss(params, rows, key):
    del key
    hidden_units = jax.nn.relu(rows["x"] @ params["in"] + params["in_bias"])
    return cross_entropy(hidden_units @ params["out"] + params["out_bias"], rows["y"])

  def init_params(key):
    first, second = jax.random.split(key)
    return {
      "in": jax.random.normal(first, (features, hidden)) / features**0.5,
      "in_bias": jnp.zeros(hidden),
      "out": jax.random.normal(second, (hidden, classes)) / hidden**0.5,
      "out_bias": jnp.zeros(classes),
    }

  return per_example_loss, init_params, groups


def quickstart_decoder(window: int = 64, width: int = 48, depth: int = 2, heads: int = 3):
  """(per_example_loss, init_params, groups) of the quickstart's decoder on random bytes."""
  rng = np.random.default_rng(0)
  groups = {
    f"group{i}": {"tokens": rng.integers(256, size=(size // 10, window + 1), dtype=np.uint8)}
    for i, size in enumerate(GROUP_SIZES)
  }
  decoder = models.Decoder(
    models.DecoderConfig(vocab_size=256, width=width, depth=depth, heads=heads)
  )

  def per_example_loss(params, rows, key):
    del key
    logits = decoder.apply(params, rows["tokens"][:, :-1])
    return cross_entropy(logits, rows["tokens"][:, 1:]).mean(axis=-1)

  def init_params(key):
    return decoder.init(key, jnp.zeros((1, window), jnp.int32))

  return per_example_loss, init_params, groups


WORKLOADS = {
  "mlp_64_32_10_batch_32": (lambda: mlp(32), 32),
  "mlp_64_128_10_batch_128": (lambda: mlp(128), 128),
  "quickstart_decoder": (quickstart_decoder, 32),
}


def table_of(groups) -> data.GroupTable:
  """The device table of a workload's groups."""
  return data.GroupTable.from_rows(groups)
