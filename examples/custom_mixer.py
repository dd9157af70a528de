"""A mixing rule of your own in 20 lines: more weight to groups whose loss is above the mean.

`make_mixer` needs the rule for p; every draw, every sweep and the training step come with it.

  python examples/custom_mixer.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balance_jax import data, mixing, training
from balance_jax.losses import cross_entropy


def above_average(sizes, *, strength=1.0, memory=0.9, draw="target") -> mixing.Mixer:
  """p_i ~ exp(strength * (running loss of i - mean running loss))."""
  num_groups = len(sizes)

  def init(key):
    return jnp.zeros(num_groups)  # running losses

  def target(losses, step):
    return jax.nn.softmax(strength * (losses - losses.mean()))

  def update(losses, observation):
    moved = memory * losses + (1 - memory) * observation["group_loss"]
    return jnp.where(observation["group_count"] > 0, moved, losses)  # absent: as it was

  needs = {"group_loss", "group_count"}
  return mixing.make_mixer(target, sizes, draw=draw, init=init, update=update, needs=needs)


def main(steps: int = 400) -> np.ndarray:
  """Trains on two groups, the second with random labels; returns p after every step (steps, 2)."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(600, 8)).astype(np.float32)
  y = (x @ rng.normal(size=(8, 3))).argmax(axis=1)
  table = data.GroupTable.from_rows(
    {
      "easy": {"x": x[:500], "y": y[:500]},
      "hard": {"x": x[500:], "y": rng.integers(3, size=100)},
    }
  )

  def per_example_loss(params, rows, key):
    return cross_entropy(rows["x"] @ params, rows["y"])

  mixer = above_average(table.sizes, draw="natural")
  step = training.make_step(per_example_loss, optax.adam(0.03), mixer, table, batch_size=32)
  state = training.init_state(jax.random.key(0), jnp.zeros((8, 3)), step)
  state, history = training.run(step, state, steps)
  return history["mixture"]["p"]


if __name__ == "__main__":
  p = main()
  print(f"share of the hard group: {p[0, 1]:.2f} at first, {p[-1, 1]:.2f} at the end")
