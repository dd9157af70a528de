"""TAPS: bounds through the first layers, an attack through the rest.

IBP carries the box to a hidden layer; there, for every other class, the margin is attacked inside
the latent box. The gradient of the attacked point is given to the ends of that box by a rectified
line, so that both halves are trained together. STAPS is TAPS on the small box of `sabr_box`.

Source: Mao et al., "Connecting Certified and Adversarial Training", NeurIPS 2023 (arXiv
2305.04574), sections 3.1 to 3.3.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.bounds import Interval, ibp
from balance_jax.robust.attacks import detach, step_sizes
from balance_jax.robust.margin_bounds import bound_margins
from balance_jax.robust.margins import margin_cross_entropy, margin_matrix


class TapsLoss(NamedTuple):
  """Losses float (B,), the product; IBP margins (B, K - 1), the only bounds among these; preacts,
  the `Interval` of every ReLU's input; attacked margins (B, K - 1)."""

  losses: jax.Array
  margins: jax.Array
  preacts: list[Interval]
  attacked_margins: jax.Array


def taps_loss(
  prefix_fn: Callable,
  suffix_fn: Callable,
  key,
  box: Interval,
  labels,
  *,
  steps: int = 8,
  step_size=None,
  weight=1.0,
  precision: str | None = "highest",
) -> TapsLoss:
  """Cross entropy of attacked latent margins times that of IBP's margins.

  Args:
    prefix_fn: x (B, ...) -> latent (B, ...), bounded by IBP. Let it end in a nonlinearity: of an
      affine tail, only what lies in the suffix is elided.
    suffix_fn: latent (B, ...) -> logits (B, K), attacked.
    key: of the random starts.
    box: `Interval` (B, ...).
    labels: int (B,), each in [0, K).
    steps: of the latent attack, >= 1.
    step_size: relative to the half-width; see `pgd`.
    weight: factor on the gradient of the attacked half, > 0; the value does not change.
    precision: of the bounds; see `bounds.ibp`.

  Returns:
    `TapsLoss`.
  """
  _checks.check_number("weight", weight, low=0.0, open_low=True)
  # One example at a time, as `bound_margins` does, so that all preacts are of one form.
  prefix = ibp(lambda x: prefix_fn(x[None])[0], record_relus=True, precision=precision)
  latent, preacts = jax.vmap(prefix)(box)
  # What is known of the prefix is its box, so the bounds of the whole are those of the suffix.
  bounds = bound_margins(suffix_fn, latent, labels, precision=precision)
  rows = margin_matrix(labels, bounds.lower.shape[-1] + 1).astype(latent.dtype)
  points = _attack(suffix_fn, key, latent, labels, rows, step_sizes(steps, step_size))

  def margin(point, row):
    return jnp.einsum("bk,bk->b", suffix_fn(connect(point, latent)), row)

  attacked = jax.vmap(margin, in_axes=(0, 1), out_axes=1)(points, rows)
  losses = margin_cross_entropy(attacked)
  held = jax.lax.stop_gradient(losses)
  losses = held + weight * (losses - held)
  product = losses * margin_cross_entropy(bounds.lower)
  return TapsLoss(product, bounds.lower, [*preacts, *bounds.preacts], attacked)


def connect(point, box: Interval) -> jax.Array:
  """`point`, whose gradient goes to the ends of the box: the nearer an end, the more of it.

  With s half the width, d point / d upper = clip((point - (upper - s)) / s, 0, 1), and likewise for
  the lower end.

  Args:
    point: float (...), in the box.
    box: `Interval` (...).

  Returns:
    The values of `point`.
  """
  point, low, high = map(jax.lax.stop_gradient, (point, box.lower, box.upper))
  half = 0.5 * (high - low)
  narrow = half <= 0
  safe = jnp.where(narrow, 1.0, half)
  up = jnp.where(narrow, 0.5, jnp.clip((point - (high - half)) / safe, 0, 1))
  down = jnp.where(narrow, 0.5, jnp.clip((low + half - point) / safe, 0, 1))
  return point + up * (box.upper - high) + down * (box.lower - low)


def _attack(suffix_fn, key, box: Interval, labels, rows, rates):
  """(K - 1, B, ...): for every other class the latent point of least margin that was found."""
  suffix_fn, box, _, _, num_classes = detach(suffix_fn, box, labels)
  low, high, half, rates = box.lower, box.upper, box.radius, rates.astype(box.dtype)

  def descend(key, row):
    def margin(x):
      values = jnp.einsum("bk,bk->b", suffix_fn(x), row)
      return values.sum(), values

    def move(carry, rate):
      x, best, least = carry
      (_, values), grad = jax.value_and_grad(margin, has_aux=True)(x)
      better = (values < least).reshape(-1, *(1,) * (x.ndim - 1))
      best, least = jnp.where(better, x, best), jnp.minimum(values, least)
      return (jnp.clip(x - rate * half * jnp.sign(grad), low, high), best, least), None

    start = low + jax.random.uniform(key, low.shape, low.dtype) * (high - low)
    worst = jnp.full(low.shape[:1], jnp.inf, low.dtype)
    (x, best, least), _ = jax.lax.scan(move, (start, start, worst), rates)
    better = (margin(x)[1] < least).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(better, x, best)

  keys = jax.random.split(key, num_classes - 1)
  points = jax.vmap(descend, in_axes=(0, 1))(keys, rows)
  return jax.lax.stop_gradient(points)
