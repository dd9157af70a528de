"""A small classification problem in two groups of very different size, shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balance_jax import data, losses, mixing, training

FEATURES, CLASSES = 6, 4


def make_table(sizes=(300, 20)) -> data.GroupTable:
  """Rows {"x": float (n, 6), "y": int (n,)}; every group has its own true weights."""
  rng = np.random.default_rng(0)

  def rows(count):
    x = rng.normal(size=(count, FEATURES)).astype(np.float32)
    scores = 2.0 * x @ rng.normal(size=(FEATURES, CLASSES)) + rng.gumbel(size=(count, CLASSES))
    return {"x": x, "y": scores.argmax(axis=-1).astype(np.int32)}

  return data.GroupTable.from_rows({f"group{i}": rows(size) for i, size in enumerate(sizes)})


def per_example_loss(params, rows, key):
  del key
  return losses.cross_entropy(rows["x"] @ params["w"], rows["y"])


def init_params():
  w = np.random.default_rng(1).normal(size=(FEATURES, CLASSES)) / 10
  return {"w": jnp.asarray(w, jnp.float32)}


def make_problem(
  mixer=None, *, loss=None, optimizer=None, batch_size=16, table=None, seed=0, **kwargs
):
  """(step, state) of temperature 5 upweighting with SGD, unless told otherwise."""
  table = make_table() if table is None else table
  mixer = mixing.temperature(table.sizes, 5.0, draw="natural") if mixer is None else mixer
  optimizer = optax.sgd(0.3) if optimizer is None else optimizer
  step = training.make_step(
    loss or per_example_loss, optimizer, mixer, table, batch_size=batch_size, **kwargs
  )
  return step, training.init_state(jax.random.key(seed), init_params(), step)


def flops(fn, *args) -> float:
  """Floating-point operations of the compiled function."""
  return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]
