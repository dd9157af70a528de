"""Difference gain at initialisation: how much wider bounds get from layer to layer.

  python experiments/fast_certified/gain.py

Mean radius of every pre-activation over that of the input, CNN-7 with 32 channels, 128 digits,
radius 0.01, before any training, with both initialisations, with and without batch normalisation
(statistics of the batch). Five seeds. Writes results/gain.json; seconds.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import data, models, robust
from balance_jax.bounds import Interval
from balance_jax.training import evidence
from balance_jax.training.robust_runs import network_of

SEEDS, EPS, EXAMPLES = range(5), 0.01, 128


def gains(norm: str, initialization: str, images) -> list[list[float]]:
  """(seeds, layers)."""
  model = models.CNN7(width=32, dense=512, batch_norm=norm, initialization=initialization)
  network = network_of(model, has_parts=False)
  box = Interval.from_linf(images, EPS)

  @jax.jit
  def one(key):
    variables = model.init(key, images)
    stats = variables.get("batch_stats", {})
    clean = robust.clean_pass(network.apply, variables["params"], stats, images)
    fixed = {"params": variables["params"], "batch_stats": clean.moments}
    labels = jnp.zeros(len(images), jnp.int32)
    bounds = robust.bound_margins(lambda x: network.apply(fixed, x), box, labels)
    return jnp.stack([layer.radius.mean() for layer in bounds.preacts]) / box.radius.mean()

  return [np.asarray(one(jax.random.key(seed))).tolist() for seed in SEEDS]


def main() -> None:
  """Measures all four."""
  digits = data.load_images("digits", "train")
  images = data.to_float(digits.images[:EXAMPLES], digits.scale)
  found = {
    f"{'BN' if norm == 'all' else 'no BN'}, {initialization}": gains(norm, initialization, images)
    for norm in ("none", "all")
    for initialization in ("default", "ibp")
  }
  evidence.save(Path(__file__).parent / "results" / "gain.json", found)


if __name__ == "__main__":
  main()
