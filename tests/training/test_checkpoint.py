"""Checkpoints hold every kind of array, keep the newest, and refuse another shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import training
from balance_jax.training.checkpoint import Checkpointer
from tests.training.problems import make_problem


def test_state_comes_back_bit_for_bit(tmp_path):
  step, state = make_problem()
  state, _ = training.run(step, state, 3)
  tree = {"state": state, "half": jnp.arange(3, dtype=jnp.bfloat16)}
  with Checkpointer(tmp_path / "c") as checkpoints:
    assert checkpoints.latest_step() is None
    checkpoints.save(3, tree, {"note": [1, "x"]})
  with Checkpointer(tmp_path / "c") as checkpoints:
    restored, extra = checkpoints.restore(jax.eval_shape(lambda: tree))
  assert extra == {"note": [1, "x"]}
  assert restored["half"].dtype == jnp.bfloat16
  after, history = training.run(step, restored["state"], 2)
  expected, expected_history = training.run(step, state, 2)
  np.testing.assert_array_equal(after.params["w"], expected.params["w"])
  np.testing.assert_array_equal(history["loss"], expected_history["loss"])


def test_keeps_the_newest(tmp_path):
  with Checkpointer(tmp_path, max_to_keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, {"x": jnp.float32(step)})
    checkpoints.save(3, {"x": jnp.float32(9)})  # saved already: left as it is
    restored, _ = checkpoints.restore({"x": jax.ShapeDtypeStruct((), jnp.float32)})
    assert float(restored["x"]) == 3.0
    old, _ = checkpoints.restore({"x": jax.ShapeDtypeStruct((), jnp.float32)}, 2)
    assert float(old["x"]) == 2.0
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_another_shape_or_nothing_at_all(tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
      checkpoints.restore({})
    checkpoints.save(0, {"x": jnp.ones(3)})
    with pytest.raises(ValueError, match="shape"):
      checkpoints.restore({"x": jax.ShapeDtypeStruct((4,), jnp.float32)})
