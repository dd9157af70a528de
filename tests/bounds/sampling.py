"""Points of a box: random ones, corners, and those that a gradient ascent finds."""

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax.bounds import Interval


def points(box: Interval, count: int, seed: int = 0) -> np.ndarray:
  """(count, ...): a third uniform, a third corners, a third with each entry at an end or inside."""
  rng = np.random.default_rng(seed)
  low, high = np.asarray(box.lower), np.asarray(box.upper)
  share = rng.uniform(size=(count, *low.shape))
  share[: count // 3] = rng.integers(0, 2, (count // 3, *low.shape))
  mixed = share[count // 3 : 2 * count // 3]
  share[count // 3 : 2 * count // 3] = np.where(
    rng.uniform(size=mixed.shape) < 0.5, np.round(mixed), mixed
  )
  found = low + (high - low) * share
  # The rounding of that sum may leave the box.
  return np.clip(found.astype(low.dtype), low, high)


def ascend(fn, box: Interval, starts, steps: int = 8):
  """Signed gradient ascent of random linear forms of all outputs, from every start."""
  radius = box.radius

  def total(x, weights):
    leaves = jax.tree.leaves(fn(x))
    return sum(jnp.sum(weights * jnp.sin(jnp.arange(leaf.size) + 1.0)[0] * leaf) for leaf in leaves)

  def walk(x, sign):
    def step(x, i):
      grad = jax.grad(total)(x, sign)
      moved = x + radius * jnp.sign(grad) * jnp.where(i < steps // 2, 0.5, 0.1)
      return jnp.clip(moved, box.lower, box.upper), None

    return jax.lax.scan(step, x, jnp.arange(steps))[0]

  signs = jnp.where(jnp.arange(len(starts)) % 2 == 0, 1.0, -1.0).astype(starts.dtype)
  return jax.vmap(walk)(starts, signs)


def extremes(fn, box: Interval, xs, adversarial: int = 0):
  """(least, largest) of every output over points xs and ascended ones; traceable."""
  if adversarial:
    xs = jnp.concatenate([xs, ascend(fn, box, xs[:adversarial])])
  values = jax.vmap(fn)(xs)
  return (
    jax.tree.map(lambda v: v.min(0), values),
    jax.tree.map(lambda v: v.max(0), values),
  )


def assert_contains(bound, low, high, tolerance: float) -> None:
  """Every output's interval holds the extremes, up to tolerance * (1 + size)."""
  is_interval = lambda v: isinstance(v, Interval)  # noqa: E731
  bounds = jax.tree.leaves(bound, is_leaf=is_interval)
  lows, highs = jax.tree.leaves(low), jax.tree.leaves(high)
  assert len(bounds) == len(lows)
  for interval, least, most in zip(bounds, lows, highs, strict=True):
    assert interval.shape == least.shape
    assert interval.dtype == least.dtype
    lower, upper = np.asarray(interval.lower), np.asarray(interval.upper)
    assert np.all(np.isfinite(np.asarray(lower, float)))
    assert np.all(np.isfinite(np.asarray(upper, float)))
    slack = tolerance * (1 + np.maximum(np.abs(least), np.abs(most))) if tolerance else 0
    least, most = np.asarray(least, float), np.asarray(most, float)
    assert np.all(lower <= least + slack), (lower - least).max()
    assert np.all(upper >= most - slack), (most - upper).max()
