"""Adversarial training: accuracy on clean inputs against accuracy on the worst inputs found.

Sources: Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018 (arXiv
1706.06083), eq. 2.1 (PGD-AT); Zhang et al., "Theoretically principled trade-off between robustness
and accuracy", 2019 (arXiv 1901.08573), eq. 5 and algorithm 1 (TRADES). Neither loss is an upper
bound of anything: what they train has to be certified or attacked afterwards.

Both take the network twice, as `train_logits_fn` in training mode (batch statistics, dropout) and
as `attack_logits_fn` in evaluation mode, which is the one attacked.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.bounds.interval import Interval
from balance_jax.losses import cross_entropy
from balance_jax.robust import attacks

_START_NOISE = 0.001  # standard deviation of the start of TRADES, where the divergence is flat


def pgd_at_loss(
  train_logits_fn: Callable,
  attack_logits_fn: Callable,
  key,
  box: Interval,
  labels,
  *,
  steps: int = 10,
  step_size=None,
  restarts: int = 1,
  has_aux: bool = False,
):
  """PGD-AT: cross entropy at the point of highest cross entropy that `pgd` finds in the box.

  Args:
    train_logits_fn: float (B, ...) -> float (B, K), differentiated.
    attack_logits_fn: the same network in evaluation mode, not differentiated.
    key: of the random starts.
    box: `Interval` (B, ...), such as `Interval.from_linf(x, eps)`.
    labels: int (B,), each in [0, K).
    steps: of the attack, >= 1.
    step_size: relative to the half-width of the box; default as in `pgd`, 0.25 for 10 steps.
    restarts: of the attack, >= 1.
    has_aux: whether train_logits_fn returns (logits, extra), such as new running statistics.

  Returns:
    (losses, aux): losses float32 (B,); aux a dict of "x_adv" float (B, ...) without gradient,
    "logits" float (B, K) at x_adv and, with has_aux, "extra".

  >>> box = Interval.from_linf(jnp.array([[0.6, 0.4]]), 0.1)
  >>> losses, aux = pgd_at_loss(lambda x: x, lambda x: x, jax.random.key(0), box, jnp.array([0]))
  >>> [round(float(x), 4) for x in aux["x_adv"][0]], round(float(losses[0]), 4)
  ([0.5, 0.5], 0.6931)
  """
  x_adv = attacks.pgd(
    attack_logits_fn,
    key,
    box,
    labels,
    steps=steps,
    step_size=step_size,
    restarts=restarts,
    goal="loss",
  )
  logits, extra = _call(train_logits_fn, x_adv, has_aux)
  return cross_entropy(logits, labels), {"x_adv": x_adv, "logits": logits, **extra}


def trades_loss(
  train_logits_fn: Callable,
  attack_logits_fn: Callable,
  key,
  x,
  box: Interval,
  labels,
  *,
  beta=6.0,
  steps: int = 10,
  step_size=None,
  has_aux: bool = False,
):
  """TRADES: CE(f(x), y) + beta * KL(p(x) || p(x')), x' of the highest divergence found in the box.

  The search starts at x + 0.001 N(0, 1), as x itself is a minimum. It keeps the best point, where
  the official code takes the last. The gradient runs through both sides of the divergence.

  Args:
    train_logits_fn: float (B, ...) -> float (B, K), differentiated; called for x, then for x'.
    attack_logits_fn: the same network in evaluation mode, not differentiated.
    key: of the start.
    x: float (B, ...), clean inputs, inside of the box.
    box: `Interval` (B, ...), such as `Interval.from_linf(x, eps)`.
    labels: int (B,), each in [0, K).
    beta: weight of the divergence (1 / lambda in the paper), >= 0; may be traced.
    steps: of the attack, >= 1.
    step_size: relative to the half-width of the box; default as in `pgd`, 0.25 for 10 steps.
    has_aux: whether train_logits_fn returns (logits, extra), such as new running statistics.

  Returns:
    (losses, aux): losses float32 (B,); aux a dict of "x_adv" float (B, ...) without gradient,
    "logits" float (B, K) at x, "cross_entropy" and "kl" float32 (B,), which rounding may take below
    0 by 1e-7, and, with has_aux, "extra" of the call for x: running statistics of clean inputs.

  >>> x = jnp.array([[0.5, 0.5]])
  >>> box = Interval.from_linf(x, 0.0)
  >>> losses, aux = trades_loss(lambda x: x, lambda x: x, jax.random.key(0), x, box, jnp.array([0]))
  >>> round(float(losses[0]), 4), float(aux["kl"][0])
  (0.6931, 0.0)
  """
  _checks.check_number("beta", beta, low=0.0)
  x = jnp.asarray(x)
  x_adv = _most_divergent(attack_logits_fn, key, x, box, labels, steps, step_size)
  logits, extra = _call(train_logits_fn, x, has_aux)
  logits_adv, _ = _call(train_logits_fn, x_adv, has_aux)
  nll, kl = cross_entropy(logits, labels), _kl_divergence(logits, logits_adv)
  aux = {"x_adv": x_adv, "logits": logits, "cross_entropy": nll, "kl": kl, **extra}
  return nll + beta * kl, aux


def _most_divergent(logits_fn, key, x, box, labels, steps, step_size):
  rates = attacks.step_sizes(steps, step_size)
  logits_fn, box, _, x, _ = attacks.detach(logits_fn, box, labels, x)
  clean = logits_fn(x)

  def score(x_adv):
    return _kl_divergence(clean, logits_fn(x_adv)), jnp.zeros(x.shape[:1], bool)

  def start(_):
    noise = _START_NOISE * jax.random.normal(key, box.shape, box.dtype)
    return attacks.clip(x + noise, box)

  return attacks.ascend(score, box, start, rates, 1, attacks.nothing_found(x))


def _kl_divergence(logits, other):
  """KL(softmax(logits) || softmax(other)) in float32 (or wider), (B,)."""
  wide = jnp.promote_types(jnp.result_type(logits, other), jnp.float32)
  log_p, log_q = (jax.nn.log_softmax(z.astype(wide), axis=-1) for z in (logits, other))
  # Classes of probability 0 add nothing, even where their logit is -inf in both.
  possible = log_p != -jnp.inf
  log_p = jnp.where(possible, log_p, 0.0)
  terms = jnp.exp(log_p) * (log_p - jnp.where(possible, log_q, 0.0))
  return jnp.where(possible, terms, 0.0).sum(axis=-1)


def _call(logits_fn, x, has_aux):
  """(logits, {"extra": ...} or {})."""
  if not has_aux:
    return logits_fn(x), {}
  logits, extra = logits_fn(x)
  return logits, {"extra": extra}
