"""A mixer of the library inside a training loop of your own: NumPy data, optax, a Python loop.

Nothing else of balance_jax is needed. The loop asks for (p, r), draws its batch by r on the host
and weights each example by p / r, so it optimises p whatever it draws.

  python examples/mixer_in_your_loop.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balance_jax import mixing
from balance_jax.losses import cross_entropy, weighted_mean

SIZES = np.array([2000, 50])


def make_data(rng):
  """Two groups of 3-class problems with different true weights."""
  groups = []
  for size in SIZES:
    x = rng.normal(size=(size, 8)).astype(np.float32)
    scores = x @ rng.normal(size=(8, 3)) + rng.gumbel(size=(size, 3))
    groups.append((x, scores.argmax(axis=1)))
  return groups


def main(steps: int = 300, batch_size: int = 32) -> dict[str, list[float]]:
  """Trains once by upsampling and once by upweighting; returns the losses of both groups."""
  rng = np.random.default_rng(0)
  data = make_data(rng)
  optimizer = optax.sgd(0.1)

  @jax.jit
  def update(params, opt_state, x, y, weights):
    def loss(params):
      return weighted_mean(cross_entropy(x @ params, y), weights).mean()

    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state

  results = {}
  for draw in ("target", "natural"):
    mixer = mixing.cooldown(SIZES, switch_step=steps // 2, draw=draw)
    state = mixer.init(jax.random.key(0))
    params = jnp.zeros((8, 3))
    opt_state = optimizer.init(params)
    for step in range(steps):
      p, r = mixer.weights(state, step)
      counts = rng.multinomial(batch_size, np.asarray(r, np.float64) / float(r.sum()))
      rows = [rng.integers(size, size=count) for size, count in zip(SIZES, counts, strict=True)]
      x = np.concatenate([data[g][0][index] for g, index in enumerate(rows)])
      y = np.concatenate([data[g][1][index] for g, index in enumerate(rows)])
      weights = mixing.importance_weights(p, r)[np.repeat([0, 1], counts)]
      params, opt_state = update(params, opt_state, x, y, weights)
    results[draw] = [float(cross_entropy(x @ params, y).mean()) for x, y in data]
  return results


if __name__ == "__main__":
  for draw, (large, small) in main().items():
    print(f"draw={draw:8} loss of the large group {large:.3f}, of the small group {small:.3f}")
