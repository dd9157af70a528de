"""What a run carries from step to step: arrays only, so it can be jitted, vmapped and saved."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from balance_jax.mixing import StreamState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The whole state of a run; together with the data it determines all that follows.

  Attributes:
    step: int32 scalar, steps taken.
    key: typed PRNG key of the run; step t uses `fold_in(key, t)`.
    params: pytree of the model's parameters.
    opt_state: state of the optax optimizer.
    mixer: state of the mixing rule.
    streams: position of every group's index stream, or () where batches come from the host.
    carry: float32 (K,), what the quotas still owe each group, or ().
  """

  step: jax.Array
  key: jax.Array
  params: Any
  opt_state: Any
  mixer: Any
  streams: StreamState | tuple
  carry: jax.Array | tuple


def init_state(key, params, step) -> TrainState:
  """The state before the first step.

  Args:
    key: PRNG key of the run (`jax.random.key(seed)`); params come initialised.
    params: pytree of float arrays.
    step: the `Step` that will train; it owns the optimizer, the mixer and the streams.

  Returns:
    `TrainState` at step 0.
  """
  run_key, mixer_key = jax.random.split(key)
  on_device = step.streams is not None
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    key=run_key,
    params=params,
    opt_state=step.optimizer.init(params),
    mixer=step.mixer.init(mixer_key),
    streams=step.streams.init() if on_device else (),
    carry=jnp.zeros(step.num_groups, jnp.float32) if on_device else (),
  )
  # A run donates its state. Copies keep the caller's params alive and no buffer is there twice.
  return jax.tree.map(jnp.copy, state)
