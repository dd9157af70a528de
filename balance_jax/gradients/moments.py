"""Measured moments of per-example gradients by group: what the variance formulas are fed with.

G_i = E||grad l||^2 and the inner products of the mean gradients g_i = E grad l, from a batch of
examples at fixed parameters. `balance_jax.mixing.estimator_moments` turns them into the variance of
any (p, r); `balance_jax.mixing.optimal_sampling` into the draw of least variance.

Source: Li et al., 2025 (arXiv 2410.04579), section 3.3; the estimators are unbiased (ours).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from balance_jax import _checks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientMoments:
  """Moments by group; entries that the batch cannot give are NaN.

  Attributes:
    count: float32 (K,), examples used.
    second_moment: float32 (K,), G_i; NaN for a group without an example.
    mean_grad: float32 (K, P), mean gradients, flattened; NaN rows likewise. P = parameter count.
    gram: float32 (K, K), unbiased estimates of <g_i, g_j>. The diagonal corrects the squared norm
      of a sample mean for its noise and is NaN for a group with fewer than 2 examples; it may come
      out below zero where noise dominates.
  """

  count: jax.Array
  second_moment: jax.Array
  mean_grad: jax.Array
  gram: jax.Array

  def between_group(self, p, r=None) -> jax.Array:
    """Variance a one-example estimate owes to drawing its group at random; fixed quotas remove it.

    sum_i p_i^2 / r_i ||g_i||^2 - ||sum_i p_i g_i||^2; for r = p it is sum_i p_i ||g_i - gbar||^2.

    Args:
      p: float (K,), what is optimised.
      r: float (K,), what is drawn; p by default.

    Returns:
      float scalar; estimated without bias, so noise may push it below zero.
    """
    p = jnp.asarray(p)
    r = p if r is None else jnp.asarray(r)
    factor = jnp.where(p > 0, p * p / jnp.where(p > 0, r, 1.0), 0.0)
    squared_norm = jnp.einsum("i,ij,j->", p, self.gram, p, precision="highest")
    return jnp.sum(factor * jnp.diagonal(self.gram)) - squared_norm


def measure_gradient_moments(
  per_example_loss: Callable[[Any, Any, Any], jax.Array],
  params: Any,
  rows: Any,
  groups,
  num_groups: int,
  *,
  key=None,
  chunk: int = 16,
) -> GradientMoments:
  """Moments of the gradients of single examples, by group, at `params`.

  Args:
    per_example_loss: per_example_loss(params, rows, key) -> float (B,), as given to `make_step`.
    params: pytree of float arrays, P numbers in all.
    rows: pytree of arrays (B, ...), the examples, B >= 1.
    groups: int (B,), each in [0, num_groups).
    num_groups: K, static.
    key: passed on to the loss; None for a deterministic loss.
    chunk: examples whose gradients are held at once; memory is chunk * P + K * P floats.

  Returns:
    `GradientMoments`.
  """
  _checks.check_shape("groups", groups, (None,))
  batch = jnp.shape(groups)[0]
  shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(rows)]
  if batch == 0 or not shapes or any(shape[:1] != (batch,) for shape in shapes):
    raise ValueError(f"rows has shapes {shapes}, groups ({batch},); expected (B, ...), B >= 1")
  _checks.check_number("num_groups", num_groups, low=1, integer=True)
  _checks.check_number("chunk", chunk, low=1, integer=True)

  def example_gradient(row):
    def loss(params):
      return per_example_loss(params, jax.tree.map(lambda x: x[None], row), key)[0]

    return ravel_pytree(jax.grad(loss)(params))[0].astype(jnp.float32)

  def accumulate(carry, part):
    row, member = part  # member (chunk, K): one-hot group, all zero for padding
    grads = jax.vmap(example_gradient)(row)
    squared = jnp.sum(jnp.square(grads), axis=-1)
    sums, squares = carry
    sums = sums + jnp.matmul(member.T, grads, precision="highest")
    return (sums, squares + jnp.matmul(member.T, squared, precision="highest")), None

  chunk = min(chunk, batch)
  pad = -batch % chunk
  member = jax.nn.one_hot(jnp.asarray(groups), num_groups, dtype=jnp.float32)
  # A padded row repeats the first one, whose gradient is as good as any, and counts for no group.
  rows = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[:1], pad, axis=0)]), rows)
  member = jnp.pad(member, ((0, pad), (0, 0)))
  parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (rows, member))
  num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
  start = (jnp.zeros((num_groups, num_params)), jnp.zeros(num_groups))
  (sums, squares), _ = jax.lax.scan(accumulate, start, parts)
  return _moments(member.sum(axis=0), sums, squares)


def _moments(count, sums, squares) -> GradientMoments:
  some = jnp.where(count > 0, count, jnp.nan)
  pairs = jnp.where(count > 1, count * (count - 1.0), jnp.nan)
  mean_grad = sums / some[:, None]
  # TPUs and recent GPUs round the factors of a float32 product unless told otherwise.
  gram = jnp.matmul(mean_grad, mean_grad.T, precision="highest")
  # The mean of ||x_a||^2 over a = b enters ||sum||^2; without it the pairs a != b are independent.
  squared_norm = (jnp.sum(jnp.square(sums), axis=-1) - squares) / pairs
  gram = jnp.where(jnp.eye(count.shape[0], dtype=bool), squared_norm[:, None], gram)
  return GradientMoments(count, squares / some, mean_grad, gram)
