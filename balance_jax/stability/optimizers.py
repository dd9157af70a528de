"""AdamW with independent weight decay and its relatives, built from a direction and a decay.

With the direction D of a tensor theta, the schedule s_t in [0, 1] relative to the peak learning
rate eta, the decay lambda and a learning-rate multiplier m per tensor (muP), one step is

  independent: theta <- theta - s_t (eta m D + lambda theta)
  coupled:     theta <- theta - s_t eta (m D + lambda theta)

Independent decay (Loshchilov and Hutter's original proposal) with lambda equals coupled decay, the
"AdamW" of optax and PyTorch, with lambda / eta: a sweep over eta leaves the decay alone. The paper
prints D - lambda theta in both formulas, a sign error: it would make weights grow.

Source: Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities",
2023 (arXiv 2309.14322), sections 2 and 3.2.2. Later work says so at its function.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balance_jax import _checks

WEIGHT_DECAY_MODES = ("independent", "coupled")


def adamw(
  learning_rate,
  schedule: Callable | None = None,
  *,
  weight_decay=1e-4,
  weight_decay_mode: str = "independent",
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  mask=None,
  multipliers=None,
  decay_multipliers=None,
) -> optax.GradientTransformation:
  """AdamW with independent (the default) or coupled weight decay; D = v / (sqrt(u) + eps).

  Coupled with `learning_rate=eta`, no masks and no multipliers it is `optax.adamw(eta)`.

  Args:
    learning_rate: peak eta, > 0.
    schedule: schedule(step) -> s_t relative to the peak, in [0, 1], for instance
      `warmup_cosine(1.0, ...)`; None is constant 1. The first update uses step 0.
    weight_decay: lambda, >= 0. The paper: 1e-4 independent, 0.1 coupled.
    weight_decay_mode: "independent" or "coupled".
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    eps: added to the root of the second moment, > 0. With gradients as small as eps the updates
      vanish; the paper then takes 1e-15.
    mask: which tensors decay: pytree of bools like params, or a prefix of it, or a function from
      params to one; None decays all.
    multipliers: learning-rate multipliers m, >= 0: pytree of numbers like params, or a prefix of
      it, or a function from the current params to one. They scale D, never the decay.
    decay_multipliers: factors on lambda, >= 0, in the same form. muP needs none here, as its
      learning-rate multipliers do not reach the decay.

  Returns:
    An optax transformation; its update needs params. Moments are kept in float32 or wider. The
    state is an `optax.ScaleByAdamState`. Every number may be traced, so a sweep compiles once.

  Raises:
    ValueError: a number outside its range, an unknown mode, a tree unlike params.

  >>> params = {"w": jnp.array([1.0, -2.0])}
  >>> optimizer = adamw(0.1, weight_decay=0.01)
  >>> updates, _ = optimizer.update({"w": jnp.zeros(2)}, optimizer.init(params), params)
  >>> [round(float(x), 4) for x in updates["w"]]  # decay alone, whatever the learning rate
  [-0.01, 0.02]
  """
  _checks.check_number("eps", eps, low=0.0, open_low=True)

  def direction(mean, root, gradient):
    del gradient
    return mean / (root + eps)

  return _build(
    direction,
    learning_rate=learning_rate,
    schedule=schedule,
    weight_decay=weight_decay,
    weight_decay_mode=weight_decay_mode,
    b1=b1,
    b2=b2,
    mask=mask,
    multipliers=multipliers,
    decay_multipliers=decay_multipliers,
  )


def stable_adamw(
  learning_rate,
  schedule: Callable | None = None,
  *,
  weight_decay=1e-4,
  weight_decay_mode: str = "independent",
  b1=0.9,
  b2=0.99,
  eps=1e-6,
  clip_threshold=1.0,
  mask=None,
  multipliers=None,
  decay_multipliers=None,
) -> optax.GradientTransformation:
  """Later work: AdamW with update clipping, D / max(1, R / clip_threshold) per tensor.

  R = sqrt(mean(g^2 / max(u, eps^2))) with the bias-corrected second moment u, the current gradient
  g included; it exceeds 1 where u has not caught up with g. Only D is clipped, not the decay.

  Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language
  models", 2023 (arXiv 2304.13013), and the authors' published code; the clipping is Adafactor's.

  Args:
    learning_rate: see `adamw`, as for every argument not named here.
    schedule: see `adamw`.
    weight_decay: see `adamw`.
    weight_decay_mode: see `adamw`.
    b1: see `adamw`.
    b2: see `adamw`; the authors' default.
    eps: see `adamw`; the authors' default.
    clip_threshold: R above which D is scaled down, > 0; infinity gives `adamw`.
    mask: see `adamw`.
    multipliers: see `adamw`.
    decay_multipliers: see `adamw`.

  Returns:
    An optax transformation, see `adamw`.
  """
  _checks.check_number("eps", eps, low=0.0, open_low=True)
  _checks.check_number("clip_threshold", clip_threshold, low=0.0, open_low=True)

  def direction(mean, root, gradient):
    # g / max(sqrt(u), eps), squared after the division: eps^2 may be below float32.
    ratio = jnp.sqrt(jnp.mean(jnp.square(gradient / jnp.maximum(root, eps))))
    return mean / (root + eps) / jnp.maximum(1.0, ratio / clip_threshold)

  return _build(
    direction,
    learning_rate=learning_rate,
    schedule=schedule,
    weight_decay=weight_decay,
    weight_decay_mode=weight_decay_mode,
    b1=b1,
    b2=b2,
    mask=mask,
    multipliers=multipliers,
    decay_multipliers=decay_multipliers,
  )


def adam_atan2(
  learning_rate,
  schedule: Callable | None = None,
  *,
  weight_decay=1e-4,
  weight_decay_mode: str = "independent",
  b1=0.9,
  b2=0.95,
  eps=None,
  scale_a=1.27,
  scale_b=1.0,
  mask=None,
  multipliers=None,
  decay_multipliers=None,
) -> optax.GradientTransformation:
  """Later work: Adam without eps, D = a atan2(v, b sqrt(u)); the scale of gradients cancels.

  Source: Everett et al., "Scaling Exponents Across Parameterizations and Optimizers", 2024 (arXiv
  2407.05872). The scales are those of public implementations: 1.27 is near 4 / pi, which gives
  D = 1 where v = sqrt(u), as in Adam.

  Args:
    learning_rate: see `adamw`, as for every argument not named here.
    schedule: see `adamw`.
    weight_decay: see `adamw`.
    weight_decay_mode: see `adamw`.
    b1: see `adamw`.
    b2: see `adamw`.
    eps: has no effect; accepted so that the optimizers can be exchanged by name.
    scale_a: a, > 0; |D| stays below a pi / 2.
    scale_b: b, > 0.
    mask: see `adamw`.
    multipliers: see `adamw`.
    decay_multipliers: see `adamw`.

  Returns:
    An optax transformation, see `adamw`.
  """
  del eps
  _checks.check_number("scale_a", scale_a, low=0.0, open_low=True)
  _checks.check_number("scale_b", scale_b, low=0.0, open_low=True)

  def direction(mean, root, gradient):
    del gradient
    return scale_a * jnp.arctan2(mean, scale_b * root)

  return _build(
    direction,
    learning_rate=learning_rate,
    schedule=schedule,
    weight_decay=weight_decay,
    weight_decay_mode=weight_decay_mode,
    b1=b1,
    b2=b2,
    mask=mask,
    multipliers=multipliers,
    decay_multipliers=decay_multipliers,
  )


OPTIMIZERS = {"adamw": adamw, "stable_adamw": stable_adamw, "adam_atan2": adam_atan2}


def _build(
  direction,
  *,
  learning_rate,
  schedule,
  weight_decay,
  weight_decay_mode,
  b1,
  b2,
  mask,
  multipliers,
  decay_multipliers,
):
  """The optimizer of direction(mean, root, gradient) -> D: bias-corrected v, sqrt(u), and g."""
  _check_settings(learning_rate, schedule, weight_decay, weight_decay_mode, b1, b2)

  def init(params):
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide(p)), params)
    return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros, zeros)

  def update(updates, state, params=None):
    if params is None:
      raise ValueError("params is None; update(gradients, state, params) needs them for the decay")
    directions, new_state = _directions(direction, updates, state, b1, b2)
    # The count before this update, as in optax: the first one is at step 0.
    relative = 1.0 if schedule is None else schedule(state.count)

    def step(d, p, m, decays, decay_multiplier):
      decay = weight_decay * decays * decay_multiplier * p.astype(d.dtype)
      if weight_decay_mode == "independent":
        new = -(relative * learning_rate) * (m * d) - relative * decay
      else:
        new = -(relative * learning_rate) * (m * d + decay)
      return new.astype(jnp.result_type(p))

    factors = (
      _spread("multipliers", 1.0 if multipliers is None else multipliers, params),
      _spread("mask", True if mask is None else mask, params),
      _spread("decay_multipliers", 1.0 if decay_multipliers is None else decay_multipliers, params),
    )
    return jax.tree.map(step, directions, params, *factors), new_state

  return optax.GradientTransformation(init, update)


def _check_settings(learning_rate, schedule, weight_decay, weight_decay_mode, b1, b2):
  _checks.check_number("learning_rate", learning_rate, low=0.0, open_low=True)
  _checks.check_number("weight_decay", weight_decay, low=0.0)
  _checks.check_choice("weight_decay_mode", weight_decay_mode, WEIGHT_DECAY_MODES)
  for name, value in (("b1", b1), ("b2", b2)):
    _checks.check_number(name, value, low=0.0, high=1.0)
    if _checks.is_concrete(value) and float(value) == 1.0:
      raise ValueError(f"{name} is {value}; allowed: [0, 1)")
  if schedule is not None and not callable(schedule):
    raise ValueError(f"schedule is {schedule!r}; expected a function of the step, or None")


def _directions(direction, gradients, state, b1, b2):
  """D of each tensor, and the state after this gradient."""
  gradients = jax.tree.map(lambda g: g.astype(_wide(g)), gradients)
  mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
  nu = optax.tree.update_moment_per_elem_norm(gradients, state.nu, b2, 2)
  count = optax.safe_increment(state.count)
  mean = optax.tree.bias_correction(mu, b1, count)
  root = jax.tree.map(jnp.sqrt, optax.tree.bias_correction(nu, b2, count))
  new_state = optax.ScaleByAdamState(count, mu, nu)
  return jax.tree.map(direction, mean, root, gradients), new_state


def _wide(x) -> jnp.dtype:
  # result_type, because a float64 array of NumPy is float32 here.
  return jnp.promote_types(jnp.result_type(x), jnp.float32)


def _spread(argument: str, prefix: Any, params: Any) -> Any:
  """`prefix`, or prefix(params), with each leaf repeated over the part of params it stands for."""
  tree = prefix(params) if callable(prefix) else prefix
  for leaf in jax.tree.leaves(tree):
    if argument != "mask":
      _checks.check_number(argument, leaf, low=0.0)
    elif not isinstance(leaf, bool | np.bool_):
      raise ValueError(f"mask holds {leaf!r}; expected True or False for each tensor")
  try:
    return jax.tree.map(lambda x, part: jax.tree.map(lambda _: x, part), tree, params)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(
      f"{argument} has the structure {jax.tree.structure(tree)}; expected that of params, "
      f"{jax.tree.structure(params)}, or a prefix of it"
    ) from error
