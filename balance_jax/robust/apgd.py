"""APGD: a projected gradient attack that sets its own step size.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", 2020 (arXiv 2003.01690), algorithm 1 and conditions 1 and 2. Their code
counts rises otherwise, which variant="code" does as well: the first step rises if its loss is above
0, and not above that of the start; the step after a restart is compared with the point that was
left, and not with the one it starts from; and a window fails at rho of its steps, not only below.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax.bounds.interval import Interval
from balance_jax.robust import attacks
from balance_jax.robust.attacks import Found, clip, direction, keep_better, select

LOSSES = ("ce", "dlr", "targeted-dlr")
VARIANTS = ("paper", "code")
_MOMENTUM = 0.75  # weight of the gradient step against the last move


class _State(NamedTuple):
  """One run. Arrays (B, ...) or (B,); `found` goes on over runs, all else is new in each."""

  x: jax.Array
  x_before: jax.Array
  grad: jax.Array
  last_loss: jax.Array  # what the next loss must be above to count as a rise
  best: tuple[jax.Array, jax.Array, jax.Array]  # x, gradient and loss of the highest loss
  step: jax.Array  # step size in radii
  rises: jax.Array  # steps of this window that raised the loss
  halved: jax.Array  # whether the last checkpoint halved the step
  best_loss_before: jax.Array  # at the last checkpoint
  found: Found


def apgd(
  logits_fn: Callable,
  key,
  box: Interval,
  labels,
  *,
  center=None,
  steps: int = 100,
  restarts: int = 1,
  loss: str = "ce",
  num_targets: int = 9,
  rho: float = 0.75,
  variant: str = "paper",
) -> jax.Array:
  """Auto-PGD: momentum, and a step size that halves when the loss stops to rise.

  The ball is seen from `center`: its radius is max(upper - center, center - lower) in each
  coordinate. With the clean input as center this is eps wherever the valid range cuts one side
  only; with the default it is the half-width of the box. Every start lies in the box, at center +
  radius * t / max|t| before it is cut, t uniform in (-1, 1); the first step size is 2 radii. With
  bounds on the other side, "ce" and "dlr" one after the other are a good check. Call it under
  `jax.jit`.

  Args:
    logits_fn: float (B, ...) -> float (B, K), K >= 2, example by example.
    key: of the random starts; restart r depends on key and r alone, so more never do worse.
    box: `Interval` (B, ...), the allowed inputs, cut to the valid range.
    labels: int (B,), each in [0, K).
    center: float (B, ...), the clean input, somewhere in the box; default the middle of the box.
    steps: >= 1. Checkpoints follow `checkpoints`.
    restarts: >= 1; "targeted-dlr" runs each target that often.
    loss: "ce", "dlr" or "targeted-dlr"; the last two need K >= 4.
    num_targets: >= 1, targets of "targeted-dlr": the highest logits at the center, except the
      label's; K - 1 at most are used.
    rho: in [0, 1], share of rising steps below which a checkpoint halves the step; static.
    variant: "paper" or "code", how rises are counted; see the top of the module.

  Returns:
    x_adv like box.lower, inside of the box: the center where that is misclassified, else the first
    success, else the highest loss over all steps, restarts and targets.

  Raises:
    ValueError: as `pgd`.

  >>> box = Interval.from_linf(jnp.array([[0.5, 0.4]]), 0.1)
  >>> x_adv = apgd(lambda x: x, jax.random.key(0), box, jnp.array([0]), steps=5)
  >>> bool(attacks.attack_succeeds(lambda x: x, x_adv, jnp.array([0]))[0])
  True
  """
  _checks.check_number("restarts", restarts, low=1, integer=True)
  _checks.check_number("num_targets", num_targets, low=1, integer=True)
  _checks.check_choice("loss", loss, LOSSES)
  _checks.check_choice("variant", variant, VARIANTS)
  plan = _plan(steps, rho, variant)
  logits_fn, box, labels, center, num_classes = attacks.detach(logits_fn, box, labels, center)
  attacks.check_classes(loss, num_classes)

  def score(x, target):
    logits = logits_fn(x)
    value = attacks.attack_loss(loss, logits, labels, target)
    return value, attacks.misclassified(logits, labels)

  clean_logits = logits_fn(center)
  targets = labels[None, :]
  if loss == "targeted-dlr":
    others = jnp.where(attacks.is_label(clean_logits, labels), -jnp.inf, clean_logits)
    targets = jax.lax.top_k(others, min(num_targets, num_classes - 1))[1].T

  def run(r, found):
    # All targets come before the next restart: runs of fewer restarts are the first of more.
    target = targets[r % len(targets)]
    x = _start(jax.random.fold_in(key, r), box, center)
    return _run(lambda x: score(x, target), x, box, center, plan, found, variant)

  broken = attacks.misclassified(clean_logits, labels)
  found = attacks.nothing_found(center)._replace(broken=broken)
  found = jax.lax.fori_loop(0, restarts * len(targets), run, found)
  return jax.lax.stop_gradient(found.x)


def checkpoints(steps: int) -> tuple[int, ...]:
  """Numbers of done steps at which the step size may halve.

  The first window has int(0.22 steps), each further one int(0.03 steps) fewer, down to
  int(0.06 steps); all of them at least 1.

  Args:
    steps: >= 1.

  >>> checkpoints(100)
  (22, 41, 57, 70, 80, 87, 93, 99)
  """
  _checks.check_number("steps", steps, low=1, integer=True)
  # In integers: a product such as 0.06 * 50 may come out below 3.
  window, shrink, least = (max(percent * steps // 100, 1) for percent in (22, 3, 6))
  found, done = [], window
  while done <= steps:
    found.append(done)
    window = max(window - shrink, least)
    done += window
  return tuple(found)


def _plan(steps: int, rho: float, variant: str):
  """For each step: weight of the gradient step, whether a checkpoint follows, rises it asks for."""
  _checks.check_known("rho", rho)
  _checks.check_number("rho", rho, low=0.0, high=1.0)
  marks = checkpoints(steps)
  weight = np.where(np.arange(steps) == 0, 1.0, _MOMENTUM).astype(np.float32)
  at_checkpoint, needed = np.zeros(steps, bool), np.zeros(steps, np.int32)
  for before, mark in zip((0, *marks), marks, strict=False):
    at_checkpoint[mark - 1] = True
    share = rho * (mark - before)
    needed[mark - 1] = math.floor(share) + 1 if variant == "code" else math.ceil(share)
  return weight, at_checkpoint, needed


def _radius(box, center):
  return jnp.maximum(box.upper - center, center - box.lower)


def _start(key, box, center):
  t = jax.random.uniform(key, box.shape, box.dtype, -1.0, 1.0)
  largest = jnp.abs(t).max(axis=tuple(range(1, t.ndim)), keepdims=True)
  tiny = jnp.finfo(t.dtype).tiny
  return clip(center + _radius(box, center) * t / jnp.maximum(largest, tiny), box)


def _run(score, x, box, center, plan, found: Found, variant: str) -> Found:
  """One ascent of `len(plan[0])` steps from x."""
  radius = _radius(box, center)
  loss, broken, grad = attacks.score_and_gradient(score, x)
  count = jnp.zeros(loss.shape, jnp.int32)
  state = _State(
    x=x,
    x_before=x,
    grad=grad,
    last_loss=jnp.zeros_like(loss) if variant == "code" else loss,
    best=(x, grad, loss),
    step=jnp.full(loss.shape, 2.0, x.dtype),
    rises=count,
    halved=jnp.ones(loss.shape, bool),  # so that the second condition waits for one full window
    best_loss_before=loss,
    found=keep_better(found, x, loss, broken),
  )

  def advance(state, planned):
    weight, at_checkpoint, needed = planned
    state = _move(score, state, weight.astype(x.dtype), radius, box)
    return _checkpoint(state, at_checkpoint, needed, variant), None

  return jax.lax.scan(advance, state, plan)[0].found


def _move(score, state: _State, weight, radius, box) -> _State:
  """One gradient step with momentum, and its loss."""
  step = state.step.reshape(state.step.shape + (1,) * (state.x.ndim - 1))
  z = clip(state.x + step * radius * direction(state.grad), box)
  last_move = state.x - state.x_before
  x = clip(state.x + weight * (z - state.x) + (1 - weight) * last_move, box)
  loss, broken, grad = attacks.score_and_gradient(score, x)
  better = loss > state.best[2]
  best = jax.tree.map(lambda new, old: select(better, new, old), (x, grad, loss), state.best)
  return state._replace(
    x=x,
    x_before=state.x,
    grad=grad,
    last_loss=loss,
    best=best,
    rises=state.rises + (loss > state.last_loss),
    found=keep_better(state.found, x, loss, broken),
  )


def _checkpoint(state: _State, here, needed, variant) -> _State:
  """Halves the step and goes back to the best point where the window did not do well."""
  best_x, best_grad, best_loss = state.best
  stalled = ~state.halved & (best_loss <= state.best_loss_before)
  halve = here & ((state.rises < needed) | stalled)
  if variant == "paper":
    state = state._replace(last_loss=select(halve, best_loss, state.last_loss))
  return state._replace(
    x=select(halve, best_x, state.x),
    grad=select(halve, best_grad, state.grad),
    step=jnp.where(halve, state.step / 2, state.step),
    rises=jnp.where(here, 0, state.rises),
    halved=jnp.where(here, halve, state.halved),
    best_loss_before=jnp.where(here, best_loss, state.best_loss_before),
  )
