"""The training step: the only place where model, loss, mixer and optimizer meet.

A step is made of additive shares. `share` gives one part of the batch's contribution to the loss
and its gradient, already divided by the global number of examples; shares add up over
micro-batches and over devices to the whole, whatever the weights. `finish` applies the sum. So one
device, several devices and accumulation run the same two functions.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from balance_jax import _checks
from balance_jax.gradients import measure_gradient_moments
from balance_jax.losses import group_weighted_mean, weighted_mean
from balance_jax.mixing import GroupStreams, Mixer, allocate_counts, importance_weights
from balance_jax.mixing.mixer import MEASURED, OBSERVATIONS
from balance_jax.mixing.quotas import METHODS as ALLOCATIONS
from balance_jax.stability.health import tree_rms
from balance_jax.training.batch import Batch, Observed, Share
from balance_jax.training.sharding import ONE_DEVICE, Placement
from balance_jax.training.state import Carried, Context, TrainState
from balance_jax.training.step_metrics import choose_metrics


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """A training step; build it with `make_step`. `step(state, batch) -> (state, metrics)`."""

  per_example_loss: Callable[..., Any]
  optimizer: optax.GradientTransformation
  mixer: Mixer
  table: Any
  num_groups: int
  batch_size: int
  allocation: str
  metrics: tuple[str, ...]
  micro_batches: int
  measure_every: int
  measure_examples: int
  streams: GroupStreams | None
  carried: Carried | None = None
  skip_bad_steps: bool = False
  placement: Placement = ONE_DEVICE

  def draw(self, state: TrainState, table, part=None) -> tuple[TrainState, Batch]:
    """Draws the batch of this step on the device and moves the streams.

    Args:
      state: the state before the step.
      table: a `GroupTable` of the same groups as the one given to `make_step`.
      part: (index, parts) to read only that equal part of the rows; the draw itself is the same on
        every device.

    Returns:
      (state with the streams moved on, `Batch` of batch_size / parts examples).
    """
    after, groups, indices = self.plan(state)
    weights = self.example_weights(state, groups)
    groups, indices, weights = self.placement.everywhere((groups, indices, weights))
    if part is not None:
      index, parts = part
      size = self.batch_size // parts
      groups, indices, weights = (
        jax.lax.dynamic_slice_in_dim(x, index * size, size) for x in (groups, indices, weights)
      )
    return after, Batch(table.take(groups, indices), groups, weights)

  def plan(self, state: TrainState) -> tuple[TrainState, jax.Array, jax.Array]:
    """Which rows this step draws; parameters and optimizer play no part, and may be missing.

    Args:
      state: the state before the step.

    Returns:
      (state with the streams moved on, groups, indices within them), both int32 (B,).
    """
    _, r = self.mixer.weights(state.mixer, state.step)
    quota_key, _, _ = _step_keys(state)
    counts, carry = allocate_counts(quota_key, r, self.batch_size, self.allocation, state.carry)
    # One key for the whole run: the streams themselves are keyed by group and epoch.
    groups, indices, streams = self.streams.take(state.key, state.streams, counts, self.batch_size)
    return dataclasses.replace(state, streams=streams, carry=carry), groups, indices

  def example_weights(self, state: TrainState, groups) -> jax.Array:
    """float (B,): loss weight p / r of each example, for batches composed elsewhere."""
    return importance_weights(*self.mixer.weights(state.mixer, state.step))[groups]

  def share(self, state: TrainState, batch: Batch, count) -> Share:
    """The contribution of `batch` to a loss averaged over `count` examples in all."""
    _, key, _ = _step_keys(state)
    if self.micro_batches == 1:
      return self._share(state, batch, count, key)
    parts = jax.tree.map(lambda x: x.reshape(self.micro_batches, -1, *x.shape[1:]), batch)

    def accumulate(total, part):
      index, micro = part
      share = self._share(state, micro, count, jax.random.fold_in(key, index))
      return total.merge(share), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(self._share, state, first, count, key)
    return jax.lax.scan(accumulate, Share.empty(shapes), (jnp.arange(self.micro_batches), parts))[0]

  def losses(
    self, state: TrainState, rows, key, *, params=None, where=None
  ) -> tuple[jax.Array, Observed]:
    """The loss function called as in a step that starts from `state`.

    Args:
      state: gives the parameters and, where the step carries state, the loss's `Context`.
      rows: pytree of arrays (B, ...).
      key: passed on to the loss.
      params: in place of the state's, to differentiate with respect to them.
      where: bool (B,), False for padding, or None.

    Returns:
      (float (B,) losses, what the loss function observed, which may be nothing).
    """
    params = self.placement.whole(state.params if params is None else params)
    args = (params, self.placement.parts(rows), key)
    if self.carried is not None:
      args += (Context(state.step, state.carried, where),)
    result = self.per_example_loss(*args)
    return result if isinstance(result, tuple) else (result, Observed())

  def _share(self, state: TrainState, batch: Batch, count, key) -> Share:
    def objective(params):
      losses, observed = self.losses(state, batch.rows, key, params=params, where=batch.where)
      _checks.check_shape("the result of per_example_loss", losses, batch.weights.shape)
      num = weighted_mean(losses, batch.weights, batch.where).num
      return num / jnp.maximum(count, 1.0), (losses, observed)

    (loss, (losses, observed)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    group_loss = None
    if "group_loss" in self.metrics or self.mixer.needs & {"group_loss", "group_count"}:
      group_loss = group_weighted_mean(losses, batch.groups, self.num_groups, where=batch.where)
    return Share(loss, grads, group_loss, self._wanted(observed).reduce(batch, count))

  def _wanted(self, observed: Observed) -> Observed:
    """The part of it that somebody asked for."""
    if observed.carried and self.carried is None:
      raise ValueError(
        f"the loss observes {sorted(observed.carried)} for a rule; give make_step its `carried`"
      )
    return observed if "observed" in self.metrics else Observed(carried=observed.carried)

  def finish(self, state: TrainState, share: Share, table=None) -> tuple[TrainState, dict]:
    """Applies the whole gradient, updates the rules and collects the metrics asked for.

    Args:
      state: the state whose parameters gave the share.
      share: the sum over all parts of the batch.
      table: the `GroupTable`, for mixers that need measured gradient moments.

    Returns:
      (state after the step, dict of the metrics named in `make_step`; see `METRICS`).
    """
    updates, opt_state = self.optimizer.update(share.grads, state.opt_state, state.params)
    after = dataclasses.replace(
      state,
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      mixer=self._update_mixer(state, share, table),
      carried=self._update_carried(state, share),
    )
    if self.skip_bad_steps:
      bad = ~(jnp.isfinite(share.loss) & jnp.isfinite(optax.tree.norm(share.grads)))
      kept = dataclasses.replace(state, step=after.step)
      after = jax.tree.map(lambda old, new: jnp.where(bad, old, new), kept, after)
    return after, self._collect(state, after, share, updates)

  def __call__(self, state: TrainState, batch: Batch, table=None) -> tuple[TrainState, dict]:
    """One step on a given batch; `run` draws its batches with `draw`."""
    return self.finish(state, self.share(state, batch, batch.count()), table)

  def _collect(self, before, after, share, updates) -> dict:
    readers = {
      "loss": lambda: share.loss,
      "grad_norm": lambda: optax.tree.norm(share.grads),
      "group_loss": lambda: share.group_loss,
      "mixture": lambda: dict(
        zip("pr", self.mixer.weights(before.mixer, before.step), strict=True)
      ),
      "epochs": lambda: self.streams.epochs_seen(after.streams),
      "observed": lambda: share.observed.means | share.observed.maxima,
      "grad_rms": lambda: tree_rms(share.grads),
      "update_rms": lambda: tree_rms(updates),
    }
    return {name: readers[name]() for name in self.metrics}

  def _update_carried(self, state, share):
    if self.carried is None:
      return state.carried
    return self.carried.checked_update(state.carried, share.observed.carried, state.step)

  def _update_mixer(self, state, share, table):
    needs = self.mixer.needs
    observation = {}
    if needs & {"group_loss", "group_count"}:
      observation["group_loss"] = share.group_loss.mean()
      observation["group_count"] = share.group_loss.den
    if "epochs_seen" in needs:
      observation["epochs_seen"] = self.streams.epochs_seen(state.streams)
    if not needs & MEASURED:
      return self.mixer.update(state.mixer, observation) if needs else state.mixer
    if table is None:
      raise ValueError(
        f"the mixer needs {sorted(needs & MEASURED)}, measured on examples of the table; "
        "give the table to the step"
      )

    def measured():
      moments = self.measure(state, table)
      found = {"group_second_moment": moments.second_moment, "group_gram": moments.gram}
      return self.mixer.update(state.mixer, observation | found)

    due = state.step % self.measure_every == 0
    return jax.lax.cond(due, measured, lambda: self.mixer.update(state.mixer, observation))

  def measured_rows(self, state: TrainState, table, examples: int | None = None):
    """(groups, indices), int32 (K * examples,): what `measure` reads, by key and step alone."""
    examples = examples or self.measure_examples
    groups = jnp.repeat(jnp.arange(self.num_groups), examples)
    sizes = jnp.asarray(table.group_sizes, jnp.int32)[groups]
    _, _, key = _step_keys(state)
    return groups, jax.random.randint(key, groups.shape, 0, sizes)

  def measure(self, state: TrainState, table, examples: int | None = None):
    """Gradient moments at the state's parameters from random examples of every group.

    Args:
      state: gives the parameters and, with its step, the examples; no stream moves.
      table: the `GroupTable`.
      examples: examples of each group, drawn with replacement; `measure_examples` by default.

    Returns:
      `GradientMoments`.
    """
    places = self.measured_rows(state, table, examples)
    return self.measure_on(state, table.take(*places), examples)

  def measure_on(self, state: TrainState, rows, examples: int | None = None):
    """`measure` on the rows that `measured_rows` chose."""
    _, loss_key, _ = _step_keys(state)
    groups = jnp.repeat(jnp.arange(self.num_groups), examples or self.measure_examples)
    return measure_gradient_moments(
      lambda params, rows, key: self.losses(state, rows, key, params=params)[0],
      state.params,
      rows,
      groups,
      self.num_groups,
      key=loss_key,
      chunk=min(groups.shape[0], 64),
    )

  def advance(self, state: TrainState, table, length: int) -> tuple[TrainState, dict]:
    """`length` steps in one scan, batches drawn inside; metrics stacked along the first axis."""

    def body(state, _):
      state, batch = self.draw(state, table)
      return self(state, self.placement.parts(batch), table)

    return jax.lax.scan(body, state, None, length=length)

  @functools.cached_property
  def compiled_advance(self):
    """`advance` under jit with the state donated; kept, so that a second `run` compiles nothing."""
    return jax.jit(self.advance, static_argnums=2, donate_argnums=0)


def _step_keys(state: TrainState):
  """Keys of one step by purpose: quotas, loss, measurement."""
  return jax.random.split(jax.random.fold_in(state.key, state.step), 3)


def make_step(
  per_example_loss: Callable[..., Any],
  optimizer: optax.GradientTransformation,
  mixer: Mixer,
  table=None,
  *,
  batch_size: int,
  num_groups: int | None = None,
  allocation: str = "stratified",
  metrics: Sequence[str] | None = None,
  micro_batches: int = 1,
  measure_every: int = 50,
  measure_examples: int = 4,
  carried: Carried | None = None,
  skip_bad_steps: bool = False,
) -> Step:
  """Builds a training step.

  Args:
    per_example_loss: per_example_loss(params, rows, key) -> float (B,), one loss per example; or
      (losses, `Observed`), where other figures of the same forward pass are wanted. With `carried`
      it is called (params, rows, key, `Context`). Its rows are a part of the batch where there are
      micro-batches, and one example where gradient moments are measured.
    optimizer: any optax optimizer.
    mixer: what is optimised and drawn; see `balance_jax.mixing`.
    table: the `GroupTable` that batches are drawn from; None where they come from the host.
    batch_size: examples in a step, >= 1.
    num_groups: K; needed only without a table.
    allocation: how r becomes counts, "stratified", "systematic" or "multinomial"; see
      `allocate_counts`.
    metrics: names out of `METRICS`; by default all that apply, without the root mean squares by
      tensor. What is not named is not computed.
    micro_batches: parts the batch is processed in, one after another; divides batch_size.
    measure_every: steps between measurements of gradient moments, for mixers that need them.
    measure_examples: examples of each group in such a measurement, >= 2.
    carried: a rule with state for the loss to read, updated after every step with what the loss put
      into `Observed.carried`, be it running statistics or the weights of its terms; `Carried()` for
      a loss that only reads the step number.
    skip_bad_steps: a step whose loss or gradient is not finite moves on in the data and changes
      nothing else: no parameter, no state of the optimizer or of a rule. Its metrics tell.

  Returns:
    `Step`: `step(state, batch) -> (state, metrics)`, pure.

  Raises:
    ValueError: for an argument outside its range, an unknown name, a table whose K differs.
  """
  numbers = {
    "batch_size": (batch_size, 1),
    "micro_batches": (micro_batches, 1),
    "measure_every": (measure_every, 1),
    "measure_examples": (measure_examples, 2),
  }
  for name, (value, low) in numbers.items():
    _checks.check_number(name, value, low=low, integer=True)
  if batch_size % micro_batches:
    raise ValueError(f"micro_batches is {micro_batches}; it must divide batch_size = {batch_size}")
  _checks.check_choice("allocation", allocation, ALLOCATIONS)
  if not (carried is None or isinstance(carried, Carried)):
    raise ValueError(f"carried is {carried!r}; expected a training.Carried or None")
  num_groups = _count_groups(table, num_groups)
  _check_mixer(mixer, num_groups)
  return Step(
    per_example_loss=per_example_loss,
    optimizer=optimizer,
    mixer=mixer,
    table=table,
    num_groups=num_groups,
    batch_size=batch_size,
    allocation=allocation,
    metrics=choose_metrics(metrics, table),
    micro_batches=micro_batches,
    measure_every=measure_every,
    measure_examples=measure_examples,
    streams=None if table is None else GroupStreams(table.group_sizes),
    carried=carried,
    skip_bad_steps=skip_bad_steps,
  )


def _count_groups(table, num_groups: int | None) -> int:
  if table is None:
    if num_groups is None:
      raise ValueError("num_groups is missing; it is needed where no table is given")
    return num_groups
  if num_groups not in (None, len(table.group_sizes)):
    raise ValueError(f"num_groups is {num_groups}; the table has {len(table.group_sizes)} groups")
  return len(table.group_sizes)


def _check_mixer(mixer: Mixer, num_groups: int) -> None:
  """A mixer made for other groups than the table's is the likeliest mistake of all."""
  for name in mixer.needs:
    _checks.check_choice("mixer.needs", name, OBSERVATIONS)

  def read_out():
    return mixer.weights(mixer.init(jax.random.key(0)), jnp.zeros((), jnp.int32))

  for name, value in zip("pr", jax.eval_shape(read_out), strict=True):
    if value.shape != (num_groups,):
      raise ValueError(f"the mixer's {name} has shape {value.shape}; expected ({num_groups},)")
