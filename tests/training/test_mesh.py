"""One step on eight devices, three ways, equals one device; weights are unequal on purpose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balance_jax import training
from balance_jax.training.mesh import HOW
from tests.training.problems import make_problem, per_example_loss


def observing_loss(params, rows, key):
  losses = per_example_loss(params, rows, key)
  return losses, training.Observed({"mean": rows["x"]}, {"largest": losses})


@pytest.fixture(scope="module")
def single_device():
  step, state = make_problem(
    loss=observing_loss, optimizer=optax.adam(1e-2), micro_batches=2, metrics=None
  )
  after, history = training.run(step, jax.tree.map(jnp.copy, state), 6, chunk=3)
  assert np.ptp(np.asarray(step.draw(state, step.table)[1].weights)) > 1.0  # unequal weights
  return step, state, after, history


@pytest.mark.parametrize("how", HOW)
def test_eight_devices_equal_one(how, single_device):
  step, state, after, history = single_device
  assert jax.device_count() == 8
  parallel = training.data_parallel(step, how)
  result, parallel_history = training.run(parallel, jax.tree.map(jnp.copy, state), 6, chunk=3)
  np.testing.assert_allclose(result.params["w"], after.params["w"], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(parallel_history["loss"], history["loss"], rtol=1e-5)
  np.testing.assert_allclose(parallel_history["grad_norm"], history["grad_norm"], rtol=1e-5)
  np.testing.assert_array_equal(parallel_history["group_loss"].den, history["group_loss"].den)
  for name, value in history["observed"].items():
    np.testing.assert_allclose(parallel_history["observed"][name], value, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(result.streams.offset, after.streams.offset)


def test_the_work_is_really_spread():
  step, state = make_problem()
  parallel = training.data_parallel(step, "jit", training.data_mesh(4))
  program = parallel.compiled_advance.lower(state, parallel.table, 2).compile().as_text()
  assert "all-reduce" in program  # the gradients are summed over devices
  assert "num_partitions=4" in program


def test_bad_arguments():
  step, _ = make_problem(batch_size=12)
  with pytest.raises(ValueError, match="how is 'jitt'"):
    training.data_parallel(step, "jitt")
  with pytest.raises(ValueError, match="batch_size is 12"):
    training.data_parallel(step)
  with pytest.raises(ValueError, match="expected one named 'data'"):
    training.data_parallel(step, mesh=jax.make_mesh((4,), ("model",)))
  with pytest.raises(ValueError, match="num_devices is 9"):
    training.data_mesh(9)
  odd = dataclasses.replace(step, micro_batches=3)
  with pytest.raises(ValueError, match="times 3 micro-batches"):
    training.data_parallel(odd, mesh=training.data_mesh(3))
