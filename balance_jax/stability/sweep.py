"""One train function over learning rates and seeds, in one compiled program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from balance_jax import _checks

HOW = ("vmap", "map")


def sweep_learning_rates(
  train_fn: Callable, learning_rates, keys, *, numbers: Any = (), how: str = "vmap"
) -> Any:
  """Trains at every learning rate with every key; `train_fn` is traced and compiled once.

  Args:
    train_fn: train_fn(learning_rate, key, *numbers) -> pytree of arrays; learning rate and numbers
      are traced scalars. A scan over the steps belongs inside.
    learning_rates: float (K,).
    keys: S PRNG keys, such as `jax.random.split(jax.random.key(0), S)`.
    numbers: further arguments, the same for all runs but traced: a second call with other values of
      decay, warm-up or eps compiles nothing, given the same `train_fn`.
    how: "vmap" batches all runs; "map" runs them one after another, faster on a CPU for all but the
      smallest models.

  Returns:
    The pytree with leading axes (K, S).

  Raises:
    ValueError: an empty grid, keys that are not (S,), an unknown `how`.

  >>> final = sweep_learning_rates(
  ...   lambda rate, key: (1.0 - rate) ** 2, [0.5, 1.0], jax.random.split(jax.random.key(0), 3)
  ... )
  >>> final.tolist()
  [[0.25, 0.25, 0.25], [0.0, 0.0, 0.0]]
  """
  _checks.check_choice("how", how, HOW)
  rates = jnp.asarray(learning_rates, jnp.float32)
  if rates.ndim != 1 or not rates.size:
    raise ValueError(f"learning_rates has shape {rates.shape}; expected (K,) with K >= 1")
  if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.ndim != 1 or not keys.size:
    raise ValueError(f"keys is {keys.dtype} {keys.shape}; expected S typed keys, S >= 1")
  return _sweep(train_fn, how, rates, keys, tuple(numbers))


def _all_runs(train_fn, how, rates, keys, numbers):
  pairs = jnp.repeat(rates, keys.size), jnp.tile(keys, rates.size)

  def one(pair):
    return train_fn(*pair, *numbers)

  results = jax.vmap(one)(pairs) if how == "vmap" else jax.lax.map(one, pairs)
  return jax.tree.map(lambda x: x.reshape(rates.size, keys.size, *x.shape[1:]), results)


_sweep = jax.jit(_all_runs, static_argnums=(0, 1))
