"""How the radius grows during certified training, and what follows it.

Source: the smoothed ramp of interval bound propagation, as used by Shi et al., "Fast Certified
Robust Training with Short Warmup", 2021 (arXiv 2103.17268); values that are linear in the radius:
Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks", 2020
(arXiv 1906.06316), and the weight of the warm-up regularisers in Shi et al., section 3.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks


def smoothed_eps_schedule(
  start_step, end_step, eps, mid=0.25, exponent=4
) -> Callable[..., jax.Array]:
  """0 up to `start_step`, a power, then a line with the slope of the power's end, then `eps`.

  The power ends `floor(mid * (end_step - start_step))` steps after the start; at the defaults the
  radius there is eps / 13. The first batch of a training is step 0. In epochs, counted from 1 as
  in the paper, with a ramp over epochs s to s + n - 1 and b batches each: start_step = (s - 1) b,
  end_step = (s + n - 1) b.

  Args:
    start_step: last step at radius 0, >= 0.
    end_step: first step at radius `eps`, >= start_step; equal means a jump after `start_step`.
    eps: the target, >= 0; also an array that broadcasts against the step.
    mid: share of the ramp that is a power, in [0, 1]; 0 gives a linear ramp.
    exponent: of the power, >= 1. All five may be traced, then unchecked.

  Returns:
    schedule(step) -> float32 with the shape of step (and eps); exactly `eps` from `end_step` on.

  >>> schedule = smoothed_eps_schedule(10, 50, eps=0.13)
  >>> [f"{schedule(step):.6f}" for step in (0, 10, 15, 20, 35, 50, 999)]
  ['0.000000', '0.000000', '0.000625', '0.010000', '0.070000', '0.130000', '0.130000']
  """
  _checks.check_number("start_step", start_step, low=0)
  first = float(start_step) if _checks.is_concrete(start_step) else 0.0
  _checks.check_number("end_step", end_step, low=first)
  _check_radius("eps", eps)
  _checks.check_number("mid", mid, low=0.0, high=1.0)
  _checks.check_number("exponent", exponent, low=1.0)

  def schedule(step):
    done = jnp.asarray(step, jnp.float32) - start_step
    length = jnp.asarray(end_step, jnp.float32) - start_step
    curved = jnp.floor(mid * length)
    straight = length - curved
    # In units of eps. A line of slope exponent * joint / curved goes on from (curved, joint) to 1.
    joint = curved / jnp.maximum(exponent * straight + curved, 1.0)
    power = joint * jnp.clip(done / jnp.maximum(curved, 1.0), 0.0, 1.0) ** exponent
    way = jnp.clip((done - curved) / jnp.maximum(straight, 1.0), 0.0, 1.0)
    # This form of the line, because it ends in exactly 1: `1 - share` is then exactly 0.
    share = jnp.where(done < curved, power, (1.0 - way) * joint + way)
    return jnp.where(done <= 0, 0.0, share * jnp.asarray(eps, jnp.float32))

  return schedule


def linear_in_eps(eps, eps_target, start, end) -> jax.Array:
  """A value that moves from `start` at radius 0 to `end` at the target: kappa, beta of CROWN-IBP.

  The weight of the CROWN bound in training is `linear_in_eps(eps, eps_target, 1.0, 0.0)`, and
  exactly 0 at the target; kappa, the weight of the clean loss, uses its own two ends.

  Args:
    eps: float (...), the radius of this step; below 0 and above the target it counts as the end.
    eps_target: the radius at the end of the ramp, > 0.
    start: value at radius 0.
    end: value at the target. All four may be traced and broadcast.

  Returns:
    float32 (...).

  >>> [round(float(linear_in_eps(eps, 0.2, 1.0, 0.5)), 3) for eps in (0.0, 0.1, 0.2, 0.3)]
  [1.0, 0.75, 0.5, 0.5]
  """
  _check_radius("eps", eps)
  _check_radius("eps_target", eps_target, above_zero=True)
  share = jnp.clip(jnp.asarray(eps, jnp.float32) / jnp.asarray(eps_target, jnp.float32), 0.0, 1.0)
  return (1.0 - share) * start + share * end


def warmup_lambda(eps, eps_target, lam0) -> jax.Array:
  """lam0 * (1 - eps / eps_target), the weight of the two warm-up regularisers (Shi et al., 2021).

  Args:
    eps: float (...), the radius of this step.
    eps_target: the radius at the end of the ramp, > 0.
    lam0: weight at radius 0, >= 0; 0.5 in the paper, 0.2 on TinyImageNet. All may be traced.

  Returns:
    float32 (...), exactly 0 from the target on.

  >>> [round(float(warmup_lambda(eps, 0.2, 0.5)), 3) for eps in (0.0, 0.05, 0.2)]
  [0.5, 0.375, 0.0]
  """
  _checks.check_number("lam0", lam0, low=0.0)
  return linear_in_eps(eps, eps_target, lam0, 0.0)


def _check_radius(argument, value, above_zero=False) -> None:
  """Like `check_number`, for one radius or an array of them; finite."""
  if not _checks.is_concrete(value):
    return
  radius = np.asarray(value)
  inside = np.isfinite(radius) & (radius > 0 if above_zero else radius >= 0)
  if not np.all(inside):
    raise ValueError(f"{argument} is {value}; allowed: finite and {'>' if above_zero else '>='} 0")
