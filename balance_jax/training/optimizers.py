"""The optimizer of a config: clip, rule, schedule and decay; every number may be traced."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from balance_jax import _checks
from balance_jax.stability.optimizers import OPTIMIZERS
from balance_jax.stability.schedules import warmup_cosine

# Numbers of `make_optimizer` that may differ between the runs of one program.
SWEEPABLE = (
  "learning_rate",
  "warmup_fraction",
  "end_fraction",
  "end_learning_rate",
  "weight_decay",
  "b1",
  "b2",
  "eps",
  "clip_norm",
)


def make_optimizer(
  learning_rate,
  *,
  total_steps,
  rule="adamw",
  warmup_fraction=0.05,
  end_fraction=0.0,
  end_learning_rate=0.0,
  weight_decay=1e-4,
  weight_decay_mode="coupled",
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  clip_norm=jnp.inf,
  multipliers: Any = None,
) -> optax.GradientTransformation:
  """An optimizer on `warmup_cosine`, behind a clip of the global norm.

  Args:
    learning_rate: the peak, > 0.
    total_steps: length of the schedule, >= 1.
    rule: a name in `stability.OPTIMIZERS`.
    warmup_fraction: share of the steps spent in warm-up, in [0, 1).
    end_fraction: final learning rate as a share of the peak, in [0, 1].
    end_learning_rate: final learning rate, absolute; the larger of the two counts, but never more
      than the peak.
    weight_decay: >= 0.
    weight_decay_mode: "coupled" (multiplied by the learning rate) or "independent" of it.
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    eps: added to the root of the second moment, > 0; `adam_atan2` has none and ignores it.
    clip_norm: global norm above which a gradient is scaled down, > 0; infinity switches it off.
      Clipping biases importance-weighted gradients: the rare, heavy batches are the clipped ones.
    multipliers: pytree like params, factors on the step of each tensor, not on its decay, such as
      muP's `learning_rate`; or None.

  Returns:
    An optax transformation. All numbers may be traced, so a sweep over them compiles once.
  """
  _checks.check_choice("rule", rule, OPTIMIZERS)
  for name, value in (("learning_rate", learning_rate), ("clip_norm", clip_norm)):
    _checks.check_number(name, value, low=0.0, open_low=True)
  _checks.check_number("warmup_fraction", warmup_fraction, low=0.0, high=0.999)
  _checks.check_number("end_fraction", end_fraction, low=0.0, high=1.0)
  _checks.check_number("end_learning_rate", end_learning_rate, low=0.0)
  _checks.check_number("total_steps", total_steps, low=1)
  last = jnp.clip(end_learning_rate / learning_rate, end_fraction, 1.0)
  schedule = warmup_cosine(1.0, warmup_fraction * total_steps // 1, total_steps, end=last)
  moments = {"b1": b1, "b2": b2} | ({} if rule == "adam_atan2" else {"eps": eps})
  step = OPTIMIZERS[rule](
    learning_rate,
    schedule,
    weight_decay=weight_decay,
    weight_decay_mode=weight_decay_mode,
    multipliers=multipliers,
    **moments,
  )
  if _checks.is_concrete(clip_norm) and not np.isfinite(clip_norm):
    return step
  return optax.chain(optax.clip_by_global_norm(clip_norm), step)
