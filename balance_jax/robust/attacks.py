"""Projected gradient attacks inside a box, and the parts that all attacks share.

An attack bounds robust accuracy from above, a certificate from below: one must never break what the
other certified. The threat set is an `Interval`, so radius, valid range and smaller boxes are one
thing. Results carry no gradient, and an outer gradient does not pass through the search.

Sources: Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018 (arXiv
1706.06083) for PGD; Croce and Hein, "Reliable evaluation of adversarial robustness", 2020 (arXiv
2003.01690), section 4, for the DLR loss; the default step sizes are those of CTBench.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax.bounds.interval import Interval, check_interval
from balance_jax.losses import cross_entropy

LOSSES = ("ce", "margin", "dlr")
INITS = ("uniform", "center")
GOALS = ("success", "loss")
_LEAST_SPREAD = 1e-12  # in the denominator of DLR, from the paper


class Found(NamedTuple):
  """What a search returns: x float (B, ...), its loss float (B,), broken bool (B,)."""

  x: jax.Array
  loss: jax.Array
  broken: jax.Array


def attack_succeeds(logits_fn: Callable, x_adv, labels) -> jax.Array:
  """True where some other class has a logit >= the label's; NaN counts as a success as well.

  The negation of "every margin > 0, strictly", by which an example is verified. Where both are
  compared on an accelerator, run both under `jax.default_matmul_precision("highest")`.

  Args:
    logits_fn: float (B, ...) -> float (B, K).
    x_adv: float (B, ...).
    labels: int (B,), each in [0, K); for any other the attack succeeds.

  Returns:
    bool (B,).

  >>> attack_succeeds(lambda x: x, jnp.array([[2.0, 1.0], [1.0, 1.0]]), jnp.array([0, 0])).tolist()
  [False, True]
  """
  logits, labels = logits_fn(x_adv), jnp.asarray(labels)
  _checks.check_shape("labels", labels, logits.shape[:1])
  return misclassified(logits, labels)


def pgd(
  logits_fn: Callable,
  key,
  box: Interval,
  labels,
  *,
  center=None,
  steps: int = 50,
  step_size=None,
  restarts: int = 1,
  loss: str = "ce",
  init: str = "uniform",
  goal: str = "success",
) -> jax.Array:
  """Projected gradient attack: x <- clip(x + s * half-width * sign(gradient)), best x kept.

  FGSM is `steps=1, step_size=1.0, init="center"`. Call it under `jax.jit`.

  Args:
    logits_fn: float (B, ...) -> float (B, K), K >= 2, example by example (batch normalisation with
      fixed statistics).
    key: of the random starts; restart r depends on key and r alone, so more never do worse.
    box: `Interval` (B, ...), the allowed inputs, cut to the valid range.
    labels: int (B,), each in [0, K).
    center: float (B, ...), the clean input, somewhere in the box; default the middle of the box.
    steps: >= 1.
    step_size: s, > 0, constant over the steps, relative to the half-width of the box in each
      coordinate; may be traced. Default max(0.25, 2 / steps), times 0.1 after 70 % of the steps if
      there are 20 or more, after 50, 80 and 90 % each if there are 50 or more.
    restarts: >= 1.
    loss: what ascends: "ce", "margin" (largest other logit minus the label's) or "dlr" (K >= 4).
    init: "uniform" in the box, or "center".
    goal: "success" tries the center first and stops at the first x that is misclassified, for
      evaluation; "loss" looks for the highest loss, broken or not, for training.

  Returns:
    x_adv like box.lower, inside of the box: the first success, else the highest loss over all
    steps and restarts. Where the loss is NaN but the label still wins, the center.

  Raises:
    ValueError: an argument outside its range, a center outside of the box, values not finite;
      those that are traced are not looked at.

  >>> box = Interval.from_linf(jnp.array([[0.5, 0.4]]), 0.1)
  >>> x_adv = pgd(lambda x: x, jax.random.key(0), box, jnp.array([0]), steps=5)
  >>> bool(attack_succeeds(lambda x: x, x_adv, jnp.array([0]))[0])
  True
  """
  _checks.check_number("restarts", restarts, low=1, integer=True)
  _checks.check_choice("loss", loss, LOSSES)
  _checks.check_choice("init", init, INITS)
  _checks.check_choice("goal", goal, GOALS)
  if init == "center" and restarts > 1:
    raise ValueError(f'restarts is {restarts}; allowed with init="center", which is one point: 1')
  rates = step_sizes(steps, step_size)
  logits_fn, box, labels, center, num_classes = detach(logits_fn, box, labels, center)
  check_classes(loss, num_classes)

  def score(x):
    logits = logits_fn(x)
    value = attack_loss(loss, logits, labels)
    broken = misclassified(logits, labels)
    return value, broken if goal == "success" else jnp.zeros_like(broken)

  def start(restart):
    if init == "center":
      return center
    share = jax.random.uniform(jax.random.fold_in(key, restart), box.shape, box.dtype)
    return clip(box.lower + share * (box.upper - box.lower), box)

  found = nothing_found(center)
  if goal == "success" and init == "uniform":
    found = keep_better(found, center, *score(center))
  return ascend(score, box, start, rates, restarts, found)


def step_sizes(steps: int, step_size=None) -> jax.Array:
  """float32 (steps,), relative step sizes; the default schedule is the one of `pgd`."""
  _checks.check_number("steps", steps, low=1, integer=True)
  if step_size is not None:
    _checks.check_number("step_size", step_size, low=0.0, open_low=True)
    return jnp.full((steps,), step_size, jnp.float32)
  tenths = (5, 8, 9) if steps >= 50 else (7,) if steps >= 20 else ()
  # In integers: int(0.7 * steps) would round some products down by one.
  decays = sum((np.arange(steps) >= tenth * steps // 10).astype(int) for tenth in tenths)
  return jnp.asarray(max(0.25, 2 / steps) * 0.1**decays * np.ones(steps), jnp.float32)


def ascend(score: Callable, box: Interval, start: Callable, rates, restarts, found: Found):
  """Signed gradient ascent from `start(restart)`; float (B, ...), the best point of all.

  Args:
    score: float (B, ...) -> (loss float (B,), broken bool (B,)).
    box: `Interval` (B, ...).
    start: int -> float (B, ...).
    rates: float (steps,), step sizes relative to the half-width.
    restarts: static.
    found: best so far.
  """
  rates = rates.astype(box.dtype)

  def step(i, carry):
    x, found = carry
    loss, broken, grad = score_and_gradient(score, x)
    x_next = clip(x + rates[i] * box.radius * direction(grad), box)
    return x_next, keep_better(found, x, loss, broken)

  def restart(r, found):
    x, found = jax.lax.fori_loop(0, len(rates), step, (start(r), found))
    return keep_better(found, x, *score(x))

  return jax.lax.stop_gradient(jax.lax.fori_loop(0, restarts, restart, found).x)


def detach(logits_fn: Callable, box: Interval, labels, center=None):
  """(logits_fn, box, labels, center, K) of an attack, checked, without a gradient into them."""
  check_interval("box", box)
  if not jnp.issubdtype(box.dtype, jnp.floating) or len(box.shape) == 0:
    raise ValueError(f"box holds {box.dtype} of shape {box.shape}; expected float (B, ...)")
  box = jax.lax.stop_gradient(Interval(jnp.asarray(box.lower), jnp.asarray(box.upper)))
  # Parameters that an outer gradient is taken of become arguments and are cut here. Through the
  # closure, that gradient would run along, and store, every step of the search.
  function, hoisted = jax.closure_convert(logits_fn, box.lower)
  hoisted = jax.lax.stop_gradient(hoisted)
  logits = jax.eval_shape(function, box.lower, *hoisted)
  if len(getattr(logits, "shape", ())) != 2 or logits.shape[0] != box.shape[0]:
    raise ValueError(f"logits_fn returns {logits}; expected one array ({box.shape[0]}, K)")
  if logits.shape[1] < 2:
    raise ValueError(f"logits_fn returns {logits.shape[1]} class; expected 2 or more")
  labels = check_labels(labels, logits.shape)
  return lambda x: function(x, *hoisted), box, labels, check_center(center, box), logits.shape[1]


def check_labels(labels, logits_shape: tuple[int, int]) -> jax.Array:
  """int (B,), in [0, K) where the values are known."""
  _checks.check_shape("labels", labels, logits_shape[:1])
  if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    raise ValueError(f"labels has dtype {jnp.result_type(labels)}; expected integers")
  if _checks.is_concrete(labels):
    values = np.asarray(labels)
    outside = values[(values < 0) | (values >= logits_shape[1])]
    if outside.size:
      raise ValueError(f"labels holds {outside[0]}; allowed: 0 to {logits_shape[1] - 1}")
  return jnp.asarray(labels)


def check_center(center, box: Interval) -> jax.Array:
  """The clean input, inside of the box where the values are known; default its middle."""
  if center is None:
    return box.center
  _checks.check_shape("center", center, box.shape)
  if _checks.is_concrete((center, box.lower, box.upper)):
    values = np.asarray(center)
    # Also catches NaN.
    if not np.all((values >= np.asarray(box.lower)) & (values <= np.asarray(box.upper))):
      raise ValueError("center has values outside of the box; expected lower <= center <= upper")
  return jax.lax.stop_gradient(jnp.asarray(center, box.dtype))


def check_classes(loss: str, num_classes: int) -> None:
  """Raises ValueError where the loss needs more classes."""
  if "dlr" in loss and num_classes < 4:
    raise ValueError(f"loss is {loss!r}, for 4 classes or more; logits_fn returns {num_classes}")


def attack_loss(name: str, logits, labels, targets=None) -> jax.Array:
  """float32 (or wider) (B,): the loss that an attack ascends.

  Args:
    name: one of `LOSSES`, or "targeted-dlr".
    logits: float (B, K).
    labels: int (B,); outside of [0, K) the loss is NaN.
    targets: int (B,), the class to reach; for "targeted-dlr" only.
  """
  if name == "ce":
    return cross_entropy(logits, labels)
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  own = logit_of(logits, labels)
  if name == "targeted-dlr":
    first, _, third, fourth = jnp.unstack(jax.lax.top_k(logits, 4)[0], axis=-1)
    spread = first - 0.5 * (third + fourth)
    return (logit_of(logits, targets) - own) / (spread + _LEAST_SPREAD)
  margin = jnp.where(is_label(logits, labels), -jnp.inf, logits).max(axis=-1) - own
  if name == "margin":
    return margin
  first, _, third = jnp.unstack(jax.lax.top_k(logits, 3)[0], axis=-1)
  return margin / (first - third + _LEAST_SPREAD)


def misclassified(logits, labels) -> jax.Array:
  """bool (B,): not every other logit is below the label's."""
  below = logits < logit_of(logits, labels)[:, None]
  return jnp.any(~below & ~is_label(logits, labels), axis=-1)


def is_label(logits, labels) -> jax.Array:
  """bool (B, K), one True a row."""
  return labels[:, None] == jnp.arange(logits.shape[-1])[None, :]


def logit_of(logits, classes) -> jax.Array:
  """logits[b, classes[b]], float (B,); NaN for a class outside of [0, K)."""
  index = jnp.where(classes < 0, logits.shape[-1], classes.astype(jnp.int32))
  return jnp.take_along_axis(logits, index[:, None], axis=-1, mode="fill")[:, 0]


def score_and_gradient(score: Callable, x):
  """(loss (B,), broken (B,), gradient of each loss like x)."""

  def total(x):
    loss, broken = score(x)
    return loss.sum(), (loss, broken)

  grad, (loss, broken) = jax.grad(total, has_aux=True)(x)
  return loss, broken, grad


def nothing_found(x) -> Found:
  """A start for `keep_better` that every loss but NaN replaces."""
  batch = x.shape[:1]
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return Found(x, jnp.full(batch, -jnp.inf, dtype), jnp.zeros(batch, bool))


def keep_better(found: Found, x, loss, broken) -> Found:
  """Takes x over where it is the first success, or has a higher loss and none succeeded."""
  better = ~found.broken & (broken | (loss > found.loss))
  new = Found(x, loss.astype(found.loss.dtype), broken)
  return jax.tree.map(lambda new, old: select(better, new, old), new, found)


def select(mask, new, old) -> jax.Array:
  """new where the mask (B,) holds, else old; both (B, ...)."""
  return jnp.where(mask.reshape(mask.shape + (1,) * (new.ndim - 1)), new, old)


def direction(grad) -> jax.Array:
  """Sign of the gradient; 0 where it is NaN, so that x stays a number."""
  return jnp.where(jnp.isnan(grad), 0.0, jnp.sign(grad))


def clip(x, box: Interval) -> jax.Array:
  return jnp.clip(x, box.lower, box.upper)
