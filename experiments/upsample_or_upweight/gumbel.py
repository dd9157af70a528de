"""The synthetic problem: classification in domains of very different size, with noisy labels.

Inputs x ~ N(0, I_d). The label of domain k is argmax(4 x W_k / sqrt(d) + standard Gumbel noise),
W_k = sqrt(.5) W_shared + sqrt(.5) W_own, so domains help each other and none can be learned without
error. The model is the linear softmax on [x, x in the block of its domain, domain one-hot].

Every seed is a problem of its own, with its own W and its own points. To train all seeds in one
program, a row of the table holds one point of every seed; a run reads its own.
"""

import jax.numpy as jnp
import numpy as np

from balance_jax import data
from balance_jax.losses import cross_entropy

DIM = 64
CLASSES = 20
SHARPNESS = 4.0


def tables(sizes: dict[str, int], seeds: int, held_out: int) -> dict[str, data.GroupTable]:
  """Training, validation and test points; the held-out ones are fresh draws.

  Args:
    sizes: domain -> number of training points.
    seeds: S, number of independent problems.
    held_out: points of each domain in "validation", and again in "test".

  Returns:
    {"train", "validation", "test"}: rows {"x": float32 (N, S, d), "label": uint8 (N, S), "group":
    int32 (N,)}.
  """
  problems = [_problem(len(sizes), np.random.default_rng(seed)) for seed in range(seeds)]
  counts = {"train": sizes, "validation": dict.fromkeys(sizes, held_out)}
  counts["test"] = counts["validation"]
  return {split: _table(problems, count) for split, count in counts.items()}


def _problem(domains: int, rng):
  shared = rng.standard_normal((DIM, CLASSES))
  own = rng.standard_normal((domains, DIM, CLASSES))
  return rng, np.sqrt(0.5) * (shared + own)


def _table(problems, counts) -> data.GroupTable:
  groups = {}
  for group, (name, count) in enumerate(counts.items()):
    points = [_points(rng, weights[group], count) for rng, weights in problems]
    x, label = (np.stack(part, axis=1) for part in zip(*points, strict=True))
    groups[name] = {"x": x, "label": label, "group": np.full(count, group, np.int32)}
  return data.GroupTable.from_rows(groups)


def _points(rng, weights, count):
  x = rng.standard_normal((count, DIM))
  label = np.argmax(SHARPNESS * x @ weights / np.sqrt(DIM) + rng.gumbel(size=(count, CLASSES)), 1)
  return x.astype(np.float32), label.astype(np.uint8)


def init_params(domains: int):
  """Zeros: [d (K + 1) + K, C]."""
  return {"kernel": jnp.zeros((DIM * (domains + 1) + domains, CLASSES))}


def losses(params, rows, seed) -> jnp.ndarray:
  """Cross entropy of each point, float (B,); `seed` may be traced."""
  kernel = params["kernel"]
  domains = kernel.shape[0] // (DIM + 1)  # d (K + 1) + K = K (d + 1) + d
  x, label = jnp.take(rows["x"], seed, axis=1), jnp.take(rows["label"], seed, axis=1)
  member = (rows["group"][:, None] == jnp.arange(domains)[None, :]).astype(kernel.dtype)
  x = x.astype(kernel.dtype)
  block = (member[:, :, None] * x[:, None, :]).reshape(x.shape[0], -1)
  features = jnp.concatenate([x, block, member], axis=1)
  return cross_entropy(features @ kernel, label.astype(jnp.int32))
