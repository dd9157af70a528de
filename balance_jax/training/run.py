"""A run: `lax.scan` of steps with sampling inside; the host looks on once a chunk."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from balance_jax import _checks
from balance_jax.data import GroupReader
from balance_jax.training.reading import ReadAhead, advance_on, plan_rows
from balance_jax.training.state import TrainState

# Metrics whose NaN or infinity means that training is lost.
VITAL = ("loss", "grad_norm")


class TrainingDivergedError(RuntimeError):
  """The loss or the gradient norm became NaN or infinite.

  Attributes:
    step: the first step it happened in, counted from 0.
    metric: "loss" or "grad_norm".
    run: which run of a sweep, or "".
  """

  def __init__(self, step: int, metric: str, run: str = ""):
    self.step, self.metric, self.run = step, metric, run
    where = f" of run {run}" if run else ""
    super().__init__(
      f"{metric}{where} is not finite at step {step}; lower the learning rate or clip the gradient"
    )


def run(
  step,
  state: TrainState,
  num_steps: int,
  *,
  chunk: int = 100,
  on_chunk: Callable[[TrainState, dict], None] | None = None,
  allow_divergence: bool = False,
) -> tuple[TrainState, dict]:
  """Takes `num_steps` steps from `state`.

  Every chunk of steps is one call of a compiled program. The given state is donated to it: use the
  returned one.

  With a `data.GroupReader` in place of a table, the host reads the rows of the next chunk while the
  device computes this one. The numbers are those of a table; all that is needed to go on from a
  state is in the state. A mixer that learns from the training has to be foreseen for it, see
  `mixing.delayed`; else its chunk is one step, read when the step before is done.

  Args:
    step: a `Step` with a table, or what `data_parallel` makes of one.
    state: where to start.
    num_steps: >= 1.
    chunk: steps in a program, >= 1. It changes no number, only how often the host looks. A last
      chunk of another length is compiled for itself.
    on_chunk: called on_chunk(state, metrics) after each chunk, before the next one starts; metrics
      are NumPy arrays stacked over its steps. The state may be read but is invalid afterwards.
      Without it, the host reads a chunk's metrics while the next chunk is running.
    allow_divergence: go on after a loss that is not finite.

  Returns:
    (state, history): history is the dict of metrics as NumPy arrays (num_steps, ...). With a reader
    also "data_seconds" and "compute_seconds", the mean in each step's chunk: the device waited for
    rows for the share data / (data + compute) of the time.

  Raises:
    ValueError: an argument out of range, a chunk longer than the mixer is foreseen for.
    CorruptedDataError: from a reader, when more records are damaged than it may replace.
    TrainingDivergedError: names the first step whose loss or gradient norm is not finite.
  """
  _checks.check_number("num_steps", num_steps, low=1, integer=True)
  _checks.check_number("chunk", chunk, low=1, integer=True)
  if step.table is None:
    raise ValueError("step has no table to draw from; call step(state, batch) on your own batches")
  lengths = [min(chunk, num_steps - start) for start in range(0, num_steps, chunk)]
  reading = _read_ahead(step) if isinstance(step.table, GroupReader) else None
  first_step, history, unread = int(state.step), [], []

  def read():
    if reading:
      metrics, seconds = reading.collect(unread.pop(0))
      length = _length(metrics)
      metrics |= {name: np.full(length, value / length) for name, value in seconds.items()}
    else:
      metrics = jax.device_get(unread.pop(0))
    if not allow_divergence:
      check_finite(metrics, first_step + sum(map(_length, history)))
    history.append(metrics)
    return metrics

  for number, (length, following) in enumerate(zip(lengths, [*lengths[1:], 0], strict=True)):
    if reading:
      state, metrics = reading.advance(state, first_step + number * chunk, length, following)
    else:
      state, metrics = step.compiled_advance(state, step.table, length)
    unread.append(metrics)
    if on_chunk is not None:
      on_chunk(state, read())
    elif len(unread) > 1:
      read()
  while unread:
    read()
  return state, concatenate_history(history)


def _read_ahead(step) -> ReadAhead:
  plan, advance = (functools.partial(program, step) for program in (plan_rows, advance_on))
  return ReadAhead(step.table, step.mixer, plan, advance)


def check_finite(metrics: dict, first_step: int, run: str = "") -> None:
  """Raises TrainingDivergedError at the first step of `metrics` (steps, ...) that is not finite."""
  for name in VITAL:
    if name in metrics and not np.all(np.isfinite(metrics[name])):
      bad = int(np.argmin(np.isfinite(metrics[name])))
      raise TrainingDivergedError(first_step + bad, name, run)


def concatenate_history(parts: list[Any], axis: int = 0) -> Any:
  """Joins the metrics of several chunks along the axis of the steps."""
  return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=axis), *parts)


def _length(metrics) -> int:
  leaves = jax.tree.leaves(metrics)
  return leaves[0].shape[0] if leaves else 0
