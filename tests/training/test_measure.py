"""Evaluation on padded batches, and the variance of the gradient: predicted, observed, exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import mixing
from balance_jax.training.measure import evaluate, evaluation_batches, gradient_variance
from tests.training.problems import make_problem, make_table, per_example_loss


def test_evaluation_equals_a_loop_over_the_rows():
  table = make_table((10, 3))
  step, state = make_problem(table=table)
  batches = evaluation_batches(table, rows_per_group=7, batch_size=4)
  assert batches.where.shape == (3, 4)  # 7 + 3 rows in 3 batches of 4: two are padding
  result = jax.jit(evaluate, static_argnums=0)(step, state, batches)
  losses = np.asarray(per_example_loss(state.params, table.rows, None))
  np.testing.assert_allclose(result.den, [7, 3])
  np.testing.assert_allclose(result.mean(), [losses[:7].mean(), losses[10:].mean()], rtol=1e-5)


@pytest.mark.parametrize("draw", ["target", "natural"])
def test_predicted_and_observed_variance_agree_with_the_exact_one(draw):
  """Exact: enumeration of a finite data set with the formula of the variance of a batch mean."""
  table = make_table((12, 4))
  mixer = mixing.temperature(table.sizes, 5.0, draw=draw)
  step, state = make_problem(mixer, table=table, batch_size=4)

  def gradient(x, y):
    rows = {"x": x[None], "y": y[None]}
    return jax.grad(lambda p: per_example_loss(p, rows, None)[0])(state.params)["w"].ravel()

  grads = np.asarray(jax.vmap(gradient)(table.rows["x"], table.rows["y"]), np.float64)
  groups = np.repeat([0, 1], table.sizes)
  p, r = (np.asarray(x, np.float64) for x in mixer.weights((), 0))
  chance = r[groups] / table.sizes[groups]
  weighted = (p / r)[groups][:, None] * grads
  mean = chance @ weighted
  exact = (chance @ (weighted**2).sum(axis=1) - mean @ mean) / 4

  measured = jax.jit(
    lambda key: gradient_variance(
      step, dataclasses.replace(state, key=key), table, examples=64, batches=64
    )
  )
  results = jax.vmap(measured)(jax.random.split(jax.random.key(1), 40))
  for name in ("predicted_variance", "observed_variance"):
    values = np.asarray(results[name])
    error = abs(values.mean() - exact)
    assert error < 5 * values.std() / np.sqrt(len(values)), (name, values.mean(), exact)
    assert error < 0.1 * exact
  second = np.array([(grads[groups == g] ** 2).sum(axis=1).mean() for g in (0, 1)])
  np.testing.assert_allclose(results["second_moment"].mean(axis=0), second, rtol=0.1)


def test_bad_arguments():
  step, state = make_problem()
  for kwargs, message in (
    ({"examples": 1, "batches": 2}, "examples is 1"),
    ({"examples": 2, "batches": 1}, "batches is 1"),
  ):
    with pytest.raises(ValueError, match=message):
      gradient_variance(step, state, step.table, **kwargs)
  with pytest.raises(ValueError, match="rows_per_group is 0"):
    evaluation_batches(step.table, 0, 4)
  assert jnp.isfinite(state.carry).all()
