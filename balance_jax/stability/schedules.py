"""The learning-rate schedule of "Small-scale proxies": linear warm-up, then half a cosine.

Source: Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities",
2023 (arXiv 2309.14322), section 2: 5,000 of 100,000 steps of warm-up, cosine to 1e-5.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks


def warmup_cosine(peak, warmup_steps, total_steps, end=1e-5) -> Callable[..., jax.Array]:
  """Linear warm-up from 0 to `peak`, then half a cosine down to `end`, which is ABSOLUTE.

  An absolute minimum is 3 % of a peak of 3e-4 and next to nothing of a peak of 0.3. The optimizers
  of this package take a schedule RELATIVE to the peak: `warmup_cosine(1.0, w, t, end=1e-5 / peak)`.

  Args:
    peak: value at step `warmup_steps`, > 0.
    warmup_steps: length of the warm-up, in [0, total_steps - 1], not necessarily whole; 0 starts
      at the peak.
    total_steps: step at which `end` is reached, >= 1.
    end: value at `total_steps` and after, in [0, peak]; in the unit of `peak`. All four may be
      traced, then unchecked.

  Returns:
    schedule(step) -> float32 with the shape of step; step is a number or array, >= 0.

  >>> schedule = warmup_cosine(0.3, warmup_steps=10, total_steps=110)
  >>> [f"{schedule(step):.6f}" for step in (0, 5, 10, 60, 110, 500)]
  ['0.000000', '0.150000', '0.300000', '0.150005', '0.000010', '0.000010']
  """
  _checks.check_number("peak", peak, low=0.0, open_low=True)
  _checks.check_number("total_steps", total_steps, low=1)
  last = float(total_steps) - 1 if _checks.is_concrete(total_steps) else np.inf
  _checks.check_number("warmup_steps", warmup_steps, low=0, high=last)
  highest = float(peak) if _checks.is_concrete(peak) else np.inf
  _checks.check_number("end", end, low=0.0, high=highest)

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    # A traced warm-up may be as long as the run; the cosine then takes one step, not 0 / 0.
    length = jnp.maximum(total_steps - warmup_steps, 1)
    done = jnp.clip((step - warmup_steps) / length, 0.0, 1.0)
    falling = end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    rising = peak * (step / jnp.maximum(warmup_steps, 1))
    return jnp.where(step < warmup_steps, rising, falling).astype(jnp.float32)

  return schedule
