"""Mixing: which group counts (p) and which is drawn (r).

A mixer is a pure rule; see `balance_jax.mixing.mixer`. `MIXERS` maps the names used in configs to
the constructors.
"""

from balance_jax.mixing.delayed import delayed
from balance_jax.mixing.mixer import DRAWS, OBSERVATIONS, Mixer, make_mixer, select
from balance_jax.mixing.probabilities import (
  capped_probs,
  chi2_inflation,
  estimator_moments,
  importance_weights,
  natural_probs,
  optimal_sampling,
  scalarization_weights,
  temperature_probs,
  unimax_probs,
)
from balance_jax.mixing.quotas import allocate_counts
from balance_jax.mixing.scheduled import (
  cooldown,
  decay_tau,
  order_matters,
  piecewise_tau,
  staged,
  tau_schedule,
  temperature_warmup,
)
from balance_jax.mixing.static import capped, fixed, proportional, temperature, uniform, unimax
from balance_jax.mixing.streams import GroupStreams, StreamState

MIXERS = {
  "capped": capped,
  "cooldown": cooldown,
  "fixed": fixed,
  "order_matters": order_matters,
  "proportional": proportional,
  "staged": staged,
  "tau_schedule": tau_schedule,
  "temperature": temperature,
  "temperature_warmup": temperature_warmup,
  "uniform": uniform,
  "unimax": unimax,
}

__all__ = [
  "DRAWS",
  "GroupStreams",
  "MIXERS",
  "Mixer",
  "OBSERVATIONS",
  "StreamState",
  "allocate_counts",
  "capped",
  "capped_probs",
  "chi2_inflation",
  "cooldown",
  "decay_tau",
  "delayed",
  "estimator_moments",
  "fixed",
  "importance_weights",
  "make_mixer",
  "natural_probs",
  "optimal_sampling",
  "order_matters",
  "piecewise_tau",
  "proportional",
  "scalarization_weights",
  "select",
  "staged",
  "tau_schedule",
  "temperature",
  "temperature_probs",
  "temperature_warmup",
  "uniform",
  "unimax",
  "unimax_probs",
]
