"""Regularisers on the bounds before each ReLU: tightness, balance of ReLU states, stability.

`preacts` is a sequence of `Interval`s, one for each ReLU layer, each (B, ...): what
`ibp(fn, record=True)` of `balance_jax.bounds` returns. All statistics are over batch, channels and
space at once. `where` leaves padded rows out, whatever they hold. Nothing is stop-gradiented; the
choice of active and inactive neurons carries no gradient.

Source: Shi et al., "Fast Certified Robust Training with Short Warmup", 2021 (arXiv 2103.17268),
sections 3.3 and 3.4 (balance against tightness); Xiao et al., 2019 (arXiv 1809.03008, ReLU
stability); Balunovic and Vechev, "Adversarial training and provable defenses: bridging the gap",
2020 (COLT, ReLU volume).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.bounds.interval import Interval

# Below this mean radius a layer counts as a point: there is nothing to tighten.
_LEAST_RADIUS = 1e-12


class ReluStates(NamedTuple):
  """Fractions of the neurons of each ReLU layer, float32 (m,) each; they sum to 1.

  Attributes:
    active: lower >= 0 and upper > 0: passes its input on.
    inactive: upper <= 0: always 0.
    unstable: lower < 0 < upper.
  """

  active: jax.Array
  inactive: jax.Array
  unstable: jax.Array


def tightness_regularizer(
  input_interval: Interval, preacts: Sequence[Interval], tau=0.5, where=None
) -> jax.Array:
  """mean_i relu(tau - d_0 / d_i) / tau, with mean radii d_0 of the input and d_i of layer i.

  It punishes layers whose bounds are more than 1 / tau times as wide as the input's.

  Args:
    input_interval: float (B, ...), the box the bounds were computed for: clipped and normalised,
      so that its radius is not just eps.
    preacts: m >= 1 Intervals (B, ...).
    tau: > 0; 0.5 in the paper. May be traced.
    where: bool (B,), False for padded rows; None for none.

  Returns:
    float32 (or wider), in [0, 1]. Layers with a mean radius of up to 1e-12, and everything if no
    row is left, add 0 with gradient 0.

  >>> box = Interval(jnp.full((1, 2), -0.1), jnp.full((1, 2), 0.1))
  >>> wide = Interval(jnp.full((1, 3), -0.4), jnp.full((1, 3), 0.4))
  >>> round(float(tightness_regularizer(box, [box, wide])), 4)
  0.25
  """
  _checks.check_number("tau", tau, low=0.0, open_low=True)
  _check_layers(preacts, where, input_interval)

  def mean_radius(interval):
    lower, upper, _, count = _kept(interval, where)
    return (0.5 * (upper - lower)).sum() / count

  input_radius = mean_radius(input_interval)
  terms = []
  for layer in preacts:
    radius = mean_radius(layer)
    wide = radius > _LEAST_RADIUS
    ratio = input_radius / jnp.where(wide, radius, 1.0)
    terms.append(jnp.where(wide, jax.nn.relu(tau - ratio) / tau, 0.0))
  return sum(terms) / len(terms)


def relu_balance_regularizer(preacts: Sequence[Interval], tau=0.5, where=None) -> jax.Array:
  """mean_i [relu(tau - fold(alpha_i)) + relu(tau - fold(beta_i))] / tau, fold(t) = min(t, 1/t).

  With centres c of mean mu, alpha is the sum of c over active neurons (lower > 0) over that of -c
  over inactive ones (upper < 0), and beta the same with (c - mu)^2: it asks both kinds to weigh
  about the same in mean and variance.

  A layer without an active or without an inactive neuron adds 0 with gradient 0, as in the paper.
  The official code adds a constant 2 where only inactive neurons exist; gradients agree.

  Args:
    preacts: m >= 1 Intervals (B, ...).
    tau: > 0; 0.5 in the paper. May be traced.
    where: bool (B,), False for padded rows; None for none.

  Returns:
    float32 (or wider), in [0, 2].

  >>> centers = jnp.array([[3.0, -1.0]])
  >>> round(float(relu_balance_regularizer([Interval(centers - 0.1, centers + 0.1)])), 4)
  0.3333
  """
  _checks.check_number("tau", tau, low=0.0, open_low=True)
  _check_layers(preacts, where)
  terms = []
  for layer in preacts:
    lower, upper, _, count = _kept(layer, where)
    center = 0.5 * (lower + upper)
    active, inactive = lower > 0, upper < 0
    square = jnp.square(center - center.sum() / count)
    both = active.any() & inactive.any()
    term = 0.0
    for weight in (jnp.abs(center), square):
      fold = _fold(jnp.where(active, weight, 0.0).sum(), jnp.where(inactive, weight, 0.0).sum())
      term += jnp.where(both, jax.nn.relu(tau - fold), 0.0)
    terms.append(term / tau)
  return sum(terms) / len(terms)


def relu_stability_regularizer(preacts: Sequence[Interval], where=None) -> jax.Array:
  """-mean_b sum over all neurons of tanh(1 + lower * upper) (Xiao et al., 2019); 1e-5 as weight.

  It pulls unstable neurons, with lower * upper < 0, to one side. On the bounds before the ReLU, as
  in that paper; on those after it the product is never negative.

  Args:
    preacts: m >= 1 Intervals (B, ...).
    where: bool (B,), False for padded rows; None for none.

  Returns:
    float32 (or wider); 0 if no row is left.

  >>> layer = Interval(jnp.array([[1.0, -1.0]]), jnp.array([[2.0, 1.0]]))
  >>> round(float(relu_stability_regularizer([layer])), 4)  # -tanh(3) - tanh(0)
  -0.9951
  """
  _check_layers(preacts, where)
  rows = jnp.shape(preacts[0].lower)[0] if where is None else jnp.asarray(where).sum()
  total = 0.0
  for layer in preacts:
    lower, upper, kept, _ = _kept(layer, where)
    total -= jnp.where(kept, jnp.tanh(1.0 + lower * upper), 0.0).sum()
  return total / jnp.maximum(rows, 1)


def relu_volume_regularizer(preacts: Sequence[Interval], where=None) -> jax.Array:
  """sum_i mean(relu(-lower) * relu(upper)): twice the area of the triangles that relax the ReLUs.

  Args:
    preacts: m >= 1 Intervals (B, ...).
    where: bool (B,), False for padded rows; None for none.

  Returns:
    float32 (or wider), >= 0; 0 if every neuron is stable or no row is left.

  >>> float(relu_volume_regularizer([Interval(jnp.array([[-2.0, 1.0]]), jnp.array([[3.0, 2.0]]))]))
  3.0
  """
  _check_layers(preacts, where)
  total = 0.0
  for layer in preacts:
    lower, upper, _, count = _kept(layer, where)
    total += (jax.nn.relu(-lower) * jax.nn.relu(upper)).sum() / count
  return total


def relu_state_counts(preacts: Sequence[Interval], where=None) -> ReluStates:
  """Fractions of active, inactive and unstable neurons of each ReLU layer.

  Args:
    preacts: m >= 1 Intervals (B, ...).
    where: bool (B,), False for padded rows; None for none.

  Returns:
    `ReluStates` of float32 (m,); a bound that is NaN belongs to none, no row at all gives zeros.

  >>> layer = Interval(jnp.array([[1.0, -3.0, -1.0, -2.0]]), jnp.array([[2.0, -1.0, 1.0, 1.0]]))
  >>> [float(fraction[0]) for fraction in relu_state_counts([layer])]
  [0.25, 0.25, 0.5]
  """
  _check_layers(preacts, where)
  rows = []
  for layer in preacts:
    lower, upper, kept, count = _kept(layer, where)
    states = ((lower >= 0) & (upper > 0), upper <= 0, (lower < 0) & (upper > 0))
    rows.append([(state & kept).sum() / count for state in states])
  return ReluStates(*jnp.asarray(rows, jnp.float32).T)


def _fold(a, b):
  """min(a / b, b / a) for a, b >= 0; 0 where both are 0, with finite gradients throughout."""
  larger = jnp.maximum(a, b)
  empty = larger == 0
  # Scaled first: the derivative of a quotient squares its denominator, which would underflow.
  scale = jax.lax.stop_gradient(jnp.where(empty, 1.0, larger))
  a, b = a / scale, b / scale
  return jnp.where(empty, 0.0, jnp.minimum(a, b) / jnp.where(empty, 1.0, jnp.maximum(a, b)))


def _kept(interval, where):
  """Ends in float32 or wider, 0 in rows left out; which entries count, to broadcast; how many."""
  lower, upper = jnp.asarray(interval.lower), jnp.asarray(interval.upper)
  dtype = jnp.promote_types(lower.dtype, jnp.float32)
  lower, upper = lower.astype(dtype), upper.astype(dtype)
  if where is None:
    return lower, upper, True, max(lower.size, 1)
  rows = jnp.asarray(where).astype(bool).reshape((-1,) + (1,) * (lower.ndim - 1))
  count = jnp.maximum(rows.sum() * (lower.size // max(rows.size, 1)), 1)
  # On the input side: a padded row may hold anything and must leave no trace.
  return jnp.where(rows, lower, 0.0), jnp.where(rows, upper, 0.0), rows, count


def _check_layers(preacts, where, *more) -> None:
  if not isinstance(preacts, Sequence) or not preacts:
    raise ValueError(f"preacts is {preacts!r}; expected a sequence of at least one Interval")
  named = [(f"preacts[{i}]", layer) for i, layer in enumerate(preacts)]
  named += [("input_interval", layer) for layer in more]
  batch = jnp.shape(preacts[0].lower)[:1] if where is None else jnp.shape(where)
  if len(batch) != 1:
    raise ValueError(f"{'preacts[0]' if where is None else 'where'} has no batch axis")
  for name, layer in named:
    shape = jnp.shape(layer.lower)
    if shape != jnp.shape(layer.upper):
      raise ValueError(f"{name} has ends of shapes {shape} and {jnp.shape(layer.upper)}")
    if shape[:1] != batch:
      raise ValueError(f"{name} has shape {shape}; expected ({batch[0]}, ...)")
