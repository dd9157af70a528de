"""Mixers whose p never moves: proportional, uniform, temperature, capped, UniMax, any fixed p.

Every one takes `draw=` (see `make_mixer`): `temperature(sizes, 5.0, draw="natural")` is the
scalarization that optimises the same mixture as temperature sampling.
"""

import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.mixing.mixer import Mixer, make_mixer
from balance_jax.mixing.probabilities import (
  capped_probs,
  given_probs,
  natural_probs,
  temperature_probs,
  unimax_probs,
)


def fixed(p, sizes, *, draw: str | float = "target") -> Mixer:
  """A given mixture for the whole training.

  Args:
    p: float (K,), >= 0, 0 where the size is 0; divided by its sum. May be traced.
    sizes: numbers (K,), group sizes.
    draw: see `make_mixer`.

  Returns:
    `Mixer`.
  """
  return _constant(given_probs(p, sizes), sizes, draw)


def proportional(sizes, *, draw: str | float = "target") -> Mixer:
  """p = natural frequencies; temperature 1. See `make_mixer` for `sizes` and `draw`."""
  return _constant(natural_probs(sizes), sizes, draw)


def uniform(sizes, *, draw: str | float = "target") -> Mixer:
  """p = uniform over the groups that have data; temperature infinity."""
  return _constant(temperature_probs(sizes, jnp.inf), sizes, draw)


def temperature(sizes, tau=5.0, *, draw: str | float = "target") -> Mixer:
  """p_i ~ n_i^(1/tau), constant; tau > 0 may be traced (arXiv 2410.04579, section 2).

  >>> p, r = temperature([900, 100], 2.0).weights((), 0)
  >>> [round(float(x), 2) for x in p]
  [0.75, 0.25]
  """
  return _constant(temperature_probs(sizes, tau), sizes, draw)


def capped(sizes, cap, *, draw: str | float = "target") -> Mixer:
  """T5's examples-proportional mixing, p_i ~ min(n_i, cap); cap > 0 in the unit of `sizes`."""
  return _constant(capped_probs(sizes, cap), sizes, draw)


def unimax(
  sizes, max_epochs=1.0, budget=None, *, mode: str = "static", draw: str | float = "target"
) -> Mixer:
  """UniMax: uniform, but no group more often than `max_epochs` times (Chung et al., 2023).

  Args:
    sizes: numbers (K,), group sizes in rows of the table, not all zero.
    max_epochs: cap on the passes over any group; > 0.
    budget: total number of draws of the training in the unit of `sizes`; needed by "static" only.
    mode: "static" solves for the mixture once, knowing the budget; "online" draws uniformly and
      drops a group once it has been seen `max_epochs` times (the reading of arXiv 2410.04579). When
      no group is left, "online" goes on uniformly over all.
    draw: see `make_mixer`.

  Returns:
    `Mixer`; "online" needs the observation "epochs_seen".
  """
  _checks.check_choice("mode", mode, ("static", "online"))
  if mode == "static":
    if budget is None:
      raise ValueError("budget is missing; unimax with mode='static' needs the number of draws")
    return _constant(unimax_probs(sizes, budget, max_epochs), sizes, draw)
  if budget is not None:
    raise ValueError(f"budget is {budget}; unimax with mode='online' takes none")
  _checks.check_number("max_epochs", max_epochs, low=0.0, open_low=True)
  has_data = jnp.asarray(_checks.check_sizes(sizes) > 0)

  def target(available, step):
    del step
    left = jnp.where(available.any(), available, has_data)
    return left / left.sum()

  def update(available, observation):
    return available & (observation["epochs_seen"] < max_epochs)

  return make_mixer(
    target, sizes, draw=draw, init=lambda key: has_data, update=update, needs={"epochs_seen"}
  )


def _constant(p, sizes, draw) -> Mixer:
  return make_mixer(lambda state, step: p, sizes, draw=draw)
