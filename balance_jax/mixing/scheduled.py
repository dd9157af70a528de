"""Mixers that follow a schedule of the step: Cooldown, temperature schedules, staged mixtures.

A schedule is a function step -> value that traces (no Python branch on the step). Switching the
mixture resets nothing: optimizer, streams and learning rate go on. Counting starts at step 0.

Source: Li et al., 2025 (arXiv 2410.04579), section 4, and the papers named below.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax.mixing.mixer import Mixer, make_mixer
from balance_jax.mixing.probabilities import given_probs, temperature_probs

SHAPES = ("linear", "cosine", "exponential")


def piecewise_tau(boundaries, values) -> Callable:
  """tau = values[j] from step boundaries[j-1] on; one more value than boundaries.

  Args:
    boundaries: increasing step counts (J,), the steps at which the next value starts; numbers may
      be traced.
    values: temperatures (J + 1,), > 0.

  Returns:
    schedule(step) -> float scalar.
  """
  _check_stages("values", values, boundaries)
  for value in values:
    _checks.check_number("values", value, low=0.0, open_low=True)

  def schedule(step):
    tau = jnp.asarray(values[0], jnp.result_type(float))
    for boundary, value in zip(boundaries, values[1:], strict=True):
      tau = jnp.where(step >= boundary, value, tau)
    return tau

  return schedule


def _check_stages(argument, stages, boundaries) -> None:
  if len(stages) != len(boundaries) + 1:
    raise ValueError(
      f"{argument} has {len(stages)} entries and boundaries {len(boundaries)}; "
      "expected one more than boundaries"
    )
  # In this form NaN fails as well.
  if _checks.is_concrete(boundaries) and not np.all(np.diff(np.asarray(boundaries)) > 0):
    raise ValueError(f"boundaries must increase, got {np.asarray(boundaries).tolist()}")


def decay_tau(shape: str, *, start, end, num_steps) -> Callable:
  """A temperature that moves from `start` to `end` in `num_steps` steps and stays there.

  Args:
    shape: "linear", "cosine" (half a period) or "exponential" (geometric).
    start: temperature at step 0, > 0, finite.
    end: temperature from step `num_steps` on, > 0, finite; above or below `start`.
    num_steps: length, >= 1.

  Returns:
    schedule(step) -> float scalar.

  >>> schedule = decay_tau("linear", start=5.0, end=1.0, num_steps=100)
  >>> float(schedule(50))
  3.0
  """
  _checks.check_choice("shape", shape, SHAPES)
  for name, value in (("start", start), ("end", end)):
    _checks.check_number(name, value, low=0.0, high=np.finfo(np.float32).max, open_low=True)
  _checks.check_number("num_steps", num_steps, low=1)

  def schedule(step):
    done = jnp.clip(jnp.asarray(step, jnp.result_type(float)) / num_steps, 0.0, 1.0)
    if shape == "exponential":
      return start * (end / start) ** done
    share = done if shape == "linear" else 0.5 * (1.0 - jnp.cos(jnp.pi * done))
    return start + (end - start) * share

  return schedule


def tau_schedule(sizes, schedule: Callable, *, draw: str | float = "target") -> Mixer:
  """p_i ~ n_i^(1/tau(step)) for any schedule.

  Args:
    sizes: numbers (K,), group sizes.
    schedule: step -> temperature > 0; see `piecewise_tau` and `decay_tau`.
    draw: see `make_mixer`.

  Returns:
    `Mixer`.
  """
  return make_mixer(lambda state, step: temperature_probs(sizes, schedule(step)), sizes, draw=draw)


def cooldown(sizes, *, switch_step, tau_hi=5.0, tau_lo=1.0, draw: str | float = "target") -> Mixer:
  """Cooldown: a high temperature first, a low one from `switch_step` on (section 4).

  Args:
    sizes: numbers (K,), group sizes.
    switch_step: first step of the low temperature; the paper uses half of training.
    tau_hi: temperature before, > 0.
    tau_lo: temperature after, > 0.
    draw: see `make_mixer`.

  Returns:
    `Mixer`.

  >>> mixer = cooldown([900, 100], switch_step=10, tau_hi=jnp.inf)
  >>> [round(float(mixer.weights((), step)[0][1]), 2) for step in (9, 10)]
  [0.5, 0.1]
  """
  _checks.check_number("switch_step", switch_step, low=0)
  for name, tau in (("tau_hi", tau_hi), ("tau_lo", tau_lo)):
    _checks.check_number(name, tau, low=0.0, open_low=True)
  return tau_schedule(sizes, piecewise_tau([switch_step], [tau_hi, tau_lo]), draw=draw)


def temperature_warmup(
  sizes, *, warmup_steps, tau_start=1.0, tau_end=5.0, draw: str | float = "target"
) -> Mixer:
  """Temperature rising linearly from proportional towards uniform: Cooldown's opposite.

  Args:
    sizes: numbers (K,), group sizes.
    warmup_steps: steps until `tau_end` is reached, >= 1 (in the literature often 5 epochs).
    tau_start: temperature at step 0, > 0, finite.
    tau_end: temperature from `warmup_steps` on, > 0, finite.
    draw: see `make_mixer`.

  Returns:
    `Mixer`.
  """
  _checks.check_number("warmup_steps", warmup_steps, low=1)
  for name, tau in (("tau_start", tau_start), ("tau_end", tau_end)):
    _checks.check_number(name, tau, low=0.0, high=np.finfo(np.float32).max, open_low=True)
  schedule = decay_tau("linear", start=tau_start, end=tau_end, num_steps=warmup_steps)
  return tau_schedule(sizes, schedule, draw=draw)


def order_matters(
  sizes, *, switch_step, num_high: int | None = None, tau=1.0, draw: str | float = "target"
) -> Mixer:
  """High-resource groups alone first, all groups afterwards (Choi et al., 2023).

  Args:
    sizes: numbers (K,), group sizes.
    switch_step: first step that draws from all groups.
    num_high: how many of the largest groups make stage 1, in [1, K]; by default those larger than
      the mean size. Ties go to the group that comes first.
    tau: temperature of both stages, > 0; stage 1 renormalises over its groups.
    draw: see `make_mixer`. With "natural", stage 1 gives examples of the other groups weight 0.

  Returns:
    `Mixer`.
  """
  array = _checks.check_sizes(sizes)
  _checks.check_number("switch_step", switch_step, low=0)
  if num_high is None:
    num_high = max(1, int(np.sum(array > array.mean())))
  _checks.check_known("num_high", num_high)
  _checks.check_number("num_high", num_high, low=1, high=len(array), integer=True)
  high = np.zeros(len(array), bool)
  high[np.argsort(-array, kind="stable")[: int(num_high)]] = True
  first = temperature_probs(np.where(high, array, 0.0), tau)
  second = temperature_probs(array, tau)
  return staged([first, second], [switch_step], sizes, draw=draw)


def staged(mixtures, boundaries, sizes, *, draw: str | float = "target") -> Mixer:
  """A sequence of fixed mixtures: mixtures[j] from step boundaries[j-1] on.

  Args:
    mixtures: J + 1 vectors float (K,), >= 0, 0 where the size is 0, each divided by its sum. May be
      traced.
    boundaries: J increasing step counts; may be traced.
    sizes: numbers (K,), group sizes.
    draw: see `make_mixer`.

  Returns:
    `Mixer`.
  """
  _check_stages("mixtures", mixtures, boundaries)
  table = jnp.stack([given_probs(mixture, sizes, "mixtures") for mixture in mixtures])
  boundaries = jnp.asarray(boundaries)

  def target(state, step):
    return table[jnp.sum(step >= boundaries)]

  return make_mixer(target, sizes, draw=draw)
