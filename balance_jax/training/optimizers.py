"""The optimizer of a config: AdamW with warm-up and cosine decay; every number may be traced."""

import jax.numpy as jnp
import numpy as np
import optax

from balance_jax import _checks


def warmup_cosine(peak, *, warmup_steps, total_steps, end_fraction=0.0):
  """Linear warm-up from 0, then half a cosine down to `end_fraction * peak`.

  Args:
    peak: learning rate at step `warmup_steps`, > 0.
    warmup_steps: steps of the warm-up, in [0, total_steps); may be traced.
    total_steps: step at which the end value is reached, >= 1.
    end_fraction: end value as a share of the peak, in [0, 1]; 1 keeps the peak after the warm-up.

  Returns:
    schedule(step) -> float scalar.
  """
  _checks.check_number("peak", peak, low=0.0, open_low=True)
  _checks.check_number("total_steps", total_steps, low=1)
  _checks.check_number("warmup_steps", warmup_steps, low=0, high=total_steps - 1)
  _checks.check_number("end_fraction", end_fraction, low=0.0, high=1.0)

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    done = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
    cosine = end_fraction + (1.0 - end_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    rising = step / jnp.maximum(warmup_steps, 1)
    return peak * jnp.where(step < warmup_steps, rising, cosine)

  return schedule


def adamw(
  learning_rate,
  *,
  total_steps,
  warmup_fraction=0.05,
  end_fraction=0.1,
  weight_decay=1e-4,
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  clip_norm=jnp.inf,
) -> optax.GradientTransformation:
  """AdamW on `warmup_cosine`, behind a clip of the global norm.

  Args:
    learning_rate: the peak, > 0.
    total_steps: length of the schedule, >= 1.
    warmup_fraction: share of the steps spent in warm-up, in [0, 1).
    end_fraction: final learning rate as a share of the peak.
    weight_decay: optax's, multiplied by the learning rate; >= 0.
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    eps: added to the root of the second moment, > 0.
    clip_norm: global norm above which a gradient is scaled down, > 0; infinity switches it off.
      Clipping biases importance-weighted gradients: the rare, heavy batches are the clipped ones.

  Returns:
    An optax transformation. All numbers may be traced, so a sweep over them compiles once.
  """
  for name, value in (("weight_decay", weight_decay), ("b1", b1), ("b2", b2)):
    _checks.check_number(name, value, low=0.0)
  for name, value in (("learning_rate", learning_rate), ("eps", eps), ("clip_norm", clip_norm)):
    _checks.check_number(name, value, low=0.0, open_low=True)
  _checks.check_number("warmup_fraction", warmup_fraction, low=0.0, high=0.999)
  schedule = warmup_cosine(
    learning_rate,
    warmup_steps=warmup_fraction * total_steps // 1,
    total_steps=total_steps,
    end_fraction=end_fraction,
  )
  step = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
  if _checks.is_concrete(clip_norm) and not np.isfinite(clip_norm):
    return step
  return optax.chain(optax.clip_by_global_norm(clip_norm), step)
