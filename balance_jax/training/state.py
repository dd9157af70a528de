"""What a run carries from step to step: arrays only, so it can be jitted, vmapped and saved."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from balance_jax.mixing import StreamState


class Context(NamedTuple):
  """What a loss may read beside parameters, rows and key, where its step was given a `Carried`.

  Attributes:
    step: int32 scalar, steps taken before this one; for schedules.
    carried: state of the `Carried` rule before this step.
    where: bool (B,), False for padding; None where every row is valid. For means over the rows,
      which padding must not enter.
  """

  step: jax.Array
  carried: Any
  where: jax.Array | None = None


def _nothing(key):
  del key
  return ()


def _unchanged(state, observed, step):
  del observed, step
  return state


@dataclasses.dataclass(frozen=True)
class Carried:
  """A rule whose state the loss reads: running statistics, temperatures, weights of its terms.

  `Carried()` has no state; it is for a loss that wants to know the step.

  Attributes:
    init: init(key) -> state, a pytree of arrays.
    update: update(state, observed, step) -> state of the same shapes and dtypes; observed is the
      dict `Observed.carried` of the whole batch, step the number of steps before this one.
  """

  init: Callable[[Any], Any] = _nothing
  update: Callable[[Any, dict, Any], Any] = _unchanged

  def checked_update(self, state, observed: dict[str, Any], step) -> Any:
    """`update`, whose result must have the form of `state`, or ValueError."""
    after = self.update(state, observed, step)
    expected, got = jax.tree.structure(state), jax.tree.structure(after)
    if expected != got:
      raise ValueError(f"carried.update returned {got}; expected {expected} as its state")

    def checked(path, old, new):
      old, new = jnp.asarray(old), jnp.asarray(new)
      if (old.shape, old.dtype) != (new.shape, new.dtype):
        raise ValueError(
          f"carried.update returned {new.dtype} {new.shape} at state{jax.tree_util.keystr(path)}; "
          f"expected {old.dtype} {old.shape} as its state (what a loss puts into Observed.carried "
          "has no batch axis)"
        )
      return _own(new)

    return jax.tree_util.tree_map_with_path(checked, state, after)


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
    carried: state of the `Carried` rule that the loss reads, or ().
  """

  step: jax.Array
  key: jax.Array
  params: Any
  opt_state: Any
  mixer: Any
  streams: StreamState | tuple
  carry: jax.Array | tuple
  carried: Any = ()


def init_state(key, params, step) -> TrainState:
  """The state before the first step.

  Args:
    key: PRNG key of the run (`jax.random.key(seed)`); params come initialised.
    params: pytree of float arrays.
    step: the `Step` that will train; it owns the optimizer, the mixer, the streams and
      the carried rule.

  Returns:
    `TrainState` at step 0.
  """
  run_key, mixer_key, carried_key = jax.random.split(key, 3)
  on_device = step.streams is not None
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    key=run_key,
    params=params,
    opt_state=step.optimizer.init(params),
    mixer=step.mixer.init(mixer_key),
    streams=step.streams.init() if on_device else (),
    carry=jnp.zeros(step.num_groups, jnp.float32) if on_device else (),
    carried=() if step.carried is None else step.carried.init(carried_key),
  )
  return jax.tree.map(_own, state)


def _own(x) -> jax.Array:
  """A copy, because a run donates its state: the caller's params stay alive and no buffer is there
  twice. Without the weak type of a Python number, which would compile the run twice."""
  return jnp.array(x, dtype=jnp.asarray(x).dtype)
