"""Measurements on a state: losses by group on held-out rows, variance of the gradient estimate."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from balance_jax import _checks
from balance_jax.losses import WeightedMean, group_weighted_mean
from balance_jax.mixing import estimator_moments
from balance_jax.training.batch import Batch
from balance_jax.training.state import TrainState
from balance_jax.training.step import Step


def evaluation_batches(table, rows_per_group: int, batch_size: int) -> Batch:
  """The first rows of every group in batches of one shape, padded with masked rows.

  Args:
    table: `GroupTable` of held-out rows.
    rows_per_group: at most so many rows of a group, >= 1.
    batch_size: B, rows in a batch, >= 1.

  Returns:
    `Batch` whose arrays have the leading axes (batches, B); weights are 1.
  """
  _checks.check_number("rows_per_group", rows_per_group, low=1, integer=True)
  _checks.check_number("batch_size", batch_size, low=1, integer=True)
  counts = np.minimum(table.sizes, rows_per_group)
  groups = np.repeat(np.arange(len(counts)), counts)
  indices = np.concatenate([np.arange(count) for count in counts])
  pad = -len(groups) % batch_size
  where = np.arange(len(groups) + pad) < len(groups)
  groups, indices = np.pad(groups, (0, pad)), np.pad(indices, (0, pad))
  batch = Batch(table.take(groups, indices), groups, np.ones(len(groups), np.float32), where)
  return jax.tree.map(lambda x: jnp.reshape(x, (-1, batch_size, *x.shape[1:])), batch)


def evaluate(
  step: Step, state: TrainState, batches: Batch, per_example_loss: Any = None
) -> WeightedMean:
  """Mean loss by group over all batches, unweighted.

  Args:
    step: gives the loss; it is called with a constant key.
    state: gives the parameters and, where the step carries state, the loss's `Context`.
    batches: `Batch` with leading axes (batches, B), see `evaluation_batches`.
    per_example_loss: what to evaluate where it is not the loss that is trained, such as a cross
      entropy without its z term, or a network normalised by its running statistics.

  Returns:
    `WeightedMean` of (K,).
  """
  if per_example_loss is not None:
    step = dataclasses.replace(step, per_example_loss=per_example_loss)

  def one(batch):
    losses, _ = step.losses(state, batch.rows, jax.random.key(0), where=batch.where)
    return group_weighted_mean(losses, batch.groups, step.num_groups, where=batch.where)

  return jax.tree.map(lambda x: x.sum(axis=0), jax.lax.map(one, batches))


def gradient_variance(
  step: Step, state: TrainState, table: Any, *, examples: int, batches: int
) -> dict[str, jax.Array]:
  """Variance of one mini-batch gradient at a state: predicted from moments, and observed.

  The prediction puts the measured moments of the groups into `estimator_moments` with the p and r
  of this step. The observation is the scatter of the gradients of `batches` mini-batches drawn and
  weighted as the step would, but with independent draws, which is what the formula is about; fixed
  quotas and draws without replacement can only lower it.

  Args:
    step: the step; its optimizer plays no part.
    state: gives parameters, mixture and position; nothing is changed.
    table: the `GroupTable`.
    examples: examples of each group for the moments, >= 2.
    batches: mini-batches of the observation, >= 2.

  Returns:
    dict of "second_moment" (K,), G by group; "predicted_variance", "observed_variance", float
    scalars, the trace of the covariance of the batch gradient.
  """
  sizes = {"examples": examples, "batches": batches}
  rows = [table.take(*places) for places in variance_draws(step, state, **sizes)]
  return variance_on_rows(step, state, rows, **sizes)


def variance_draws(step: Step, state: TrainState, *, examples: int, batches: int) -> list[tuple]:
  """What `gradient_variance` reads of a step's table, as (groups, indices).

  Returns:
    [int32 (K * examples,) twice, int32 (batches, B) twice].
  """
  _checks.check_number("examples", examples, low=2, integer=True)
  _checks.check_number("batches", batches, low=2, integer=True)
  _, r = step.mixer.weights(state.mixer, state.step)
  keys = jax.random.split(jax.random.fold_in(state.key, state.step), batches)
  independent = jax.vmap(lambda key: _independent_draws(step, r, key))(keys)
  return [step.measured_rows(state, step.table, examples), independent]


def variance_on_rows(
  step: Step, state: TrainState, rows: list, *, examples: int, batches: int
) -> dict[str, jax.Array]:
  """`gradient_variance` on the rows of `variance_draws`."""
  (_, _), (groups, _) = variance_draws(step, state, examples=examples, batches=batches)
  for_moments, of_batches = rows
  moments = step.measure_on(state, for_moments, examples)
  p, r = step.mixer.weights(state.mixer, state.step)
  predicted = estimator_moments(p, r, moments.second_moment, gram=moments.gram)["variance"]

  def accumulate(sums, given):
    rows, groups = given
    batch = Batch(rows, groups, step.example_weights(state, groups))
    grad = ravel_pytree(step.share(state, batch, batch.count()).grads)[0]
    return (sums[0] + grad, sums[1] + jnp.sum(jnp.square(grad))), None

  num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  start = jnp.zeros(num_params), jnp.zeros(())
  (total, squares), _ = jax.lax.scan(accumulate, start, (of_batches, groups))
  observed = (squares - jnp.sum(jnp.square(total)) / batches) / (batches - 1)
  return {
    "second_moment": moments.second_moment,
    "predicted_variance": predicted / step.batch_size,
    "observed_variance": observed,
  }


def _independent_draws(step: Step, r, key) -> tuple[jax.Array, jax.Array]:
  """Every example draws its group and row for itself, with replacement, as in the formula."""
  group_key, row_key = jax.random.split(key)
  groups = jax.random.choice(group_key, step.num_groups, (step.batch_size,), p=r)
  sizes = jnp.asarray(step.table.group_sizes, jnp.int32)[groups]
  return groups, jax.random.randint(row_key, groups.shape, 0, sizes)
