"""One training objective out of the parts of this family: what a step of any method computes.

Clean pass with the batch's statistics -> box -> attack, bounds or both -> loss of the method ->
mixture with the natural loss -> warm-up regularisers. Every number may be traced, so that radii,
weights and seeds share one compiled program; what changes the program is a name.

Source of the order and of what shares statistics: Shi et al., 2021 (arXiv 2103.17268), section 3,
and, for the later losses, Mao et al., 2025 (arXiv 2406.04848).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.bounds import Interval
from balance_jax.bounds.tape import RELU_LOWER
from balance_jax.losses import cross_entropy
from balance_jax.robust import certified
from balance_jax.robust.adversarial import pgd_at_loss, trades_loss
from balance_jax.robust.attacks import pgd
from balance_jax.robust.margin_bounds import bound_margins, loss_fusion_bound
from balance_jax.robust.margins import margin_cross_entropy, verified
from balance_jax.robust.margins import margins as exact_margins
from balance_jax.robust.regularizers import (
  relu_balance_regularizer,
  relu_state_counts,
  tightness_regularizer,
)
from balance_jax.robust.schedules import linear_in_eps, warmup_lambda
from balance_jax.robust.statistics import clean_pass
from balance_jax.robust.taps import taps_loss

BOUNDED = (
  "cc-ibp",
  "crown-ibp",
  "crown-ibp-fusion",
  "exp-ibp",
  "ibp",
  "mtl-ibp",
  "sabr",
  "staps",
  "taps",
)
ATTACKED = ("pgd-at", "trades")
METHODS = (*BOUNDED, *ATTACKED, "natural")
REGULARIZERS = ("both", "none", "relu", "tight")
# Radius of the regularisers' box while that of the loss is still 0.
EPS_MIN = 1e-6


class Network(NamedTuple):
  """A network as the objective sees it.

  Attributes:
    apply: apply({"params", "batch_stats"}, x, train) -> logits (B, K) where train is False, else
      (logits, new batch_stats).
    prefix: prefix(variables, x) -> latent, and
    suffix: suffix(variables, latent) -> logits, both in inference mode; TAPS needs them.
  """

  apply: Callable
  prefix: Callable | None = None
  suffix: Callable | None = None


class Result(NamedTuple):
  """What a step computes.

  Attributes:
    losses: float (B,), to be averaged.
    running: the updated running statistics.
    observed: name -> float (B, ...), figures of the pass, see `Objective`.
  """

  losses: jax.Array
  running: Any
  observed: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss of one method. Only the names are static; every number may be traced.

  `objective(network, params, batch_stats, x, labels, key, eps)` gives a `Result` at the present
  radius `eps`. Observed are "natural_loss", and for bounded methods "margin" (the least lower bound
  of an example), "verified" (whether all are above 0), "radius" (mean radius of each ReLU's input,
  (m,)) and "relu_states" (shares active, inactive, undecided, (m, 3)). SABR's and STAPS' refer to
  the small box: they are no certificates.

  Attributes:
    method: one of `METHODS`.
    eps: the target radius, > 0, that of training.
    kappa_start: robust weight in the mixture with the natural loss at radius 0, in [0, 1].
    kappa_end: the same at the target; linear in the radius between.
    regularizer: which warm-up regularisers: "both", "tight", "relu", "none".
    lambda_0: their weight at radius 0, >= 0; it falls to 0 at the target.
    tau: their tolerance, in (0, 1].
    l1: coefficient of the sum of absolute kernel entries, >= 0.
    alpha: of MTL-IBP, EXP-IBP and CC-IBP, in [0, 1].
    shrinkage: lambda of SABR and STAPS, the share of the radius that is bounded, in [0, 1].
    relu_shrinkage: SABR's factor on undecided ReLUs, in [0, 1]; 1 for none.
    taps_weight: factor on the gradient of TAPS' attacked half, > 0.
    beta: of TRADES, >= 0.
    attack_steps: of every attack, >= 1; static.
    attack_scale: radius of the attack over that of the loss, > 0.
    relu_lower: slope of CROWN's lower lines; see `bounds.crown`.
  """

  method: str = "ibp"
  eps: Any = 0.1
  kappa_start: Any = 1.0
  kappa_end: Any = 1.0
  regularizer: str = "both"
  lambda_0: Any = 0.5
  tau: Any = 0.5
  l1: Any = 0.0
  alpha: Any = 0.5
  shrinkage: Any = 0.4
  relu_shrinkage: Any = 1.0
  taps_weight: Any = 1.0
  beta: Any = 6.0
  attack_steps: int = 8
  attack_scale: Any = 1.0
  relu_lower: str = "adaptive"

  def __post_init__(self):
    _checks.check_choice("method", self.method, METHODS)
    _checks.check_choice("regularizer", self.regularizer, REGULARIZERS)
    _checks.check_choice("relu_lower", self.relu_lower, RELU_LOWER)
    for name in ("kappa_start", "kappa_end", "alpha", "shrinkage", "relu_shrinkage"):
      _checks.check_number(name, getattr(self, name), low=0.0, high=1.0)
    for name in ("lambda_0", "l1", "beta"):
      _checks.check_number(name, getattr(self, name), low=0.0)
    for name in ("eps", "attack_scale", "taps_weight"):
      _checks.check_number(name, getattr(self, name), low=0.0, open_low=True)
    _checks.check_number("tau", self.tau, low=0.0, high=1.0, open_low=True)
    _checks.check_number("attack_steps", self.attack_steps, low=1, integer=True)

  def __call__(
    self,
    network: Network,
    params: Any,
    batch_stats: Any,
    x,
    labels,
    key,
    eps,
    where=None,
  ) -> Result:
    """The losses of a batch.

    Args:
      network: see `Network`.
      params: parameters.
      batch_stats: running statistics; {} without normalisation.
      x: float (B, ...), in [0, 1].
      labels: int (B,), each in [0, K).
      key: of the attacks.
      eps: the present radius, in [0, target].
      where: bool (B,), False for padding, which the regularisers leave out; or None.
    """
    if self.method in ATTACKED:
      losses, running, observed = self._attacked(network, params, batch_stats, x, labels, key, eps)
    else:
      clean = clean_pass(network.apply, params, batch_stats, x)
      natural, running = cross_entropy(clean.logits, labels), clean.running
      losses, observed = natural, {"natural_loss": natural}
      if self.method != "natural":
        variables = {"params": params, "batch_stats": clean.moments}
        losses, seen = self._bounded(network, variables, natural, x, labels, key, eps, where)
        observed |= seen
    penalty = self.l1 * certified.l1_penalty(params)
    return Result(losses + penalty, running, jax.lax.stop_gradient(observed))

  def _attacked(self, network, params, batch_stats, x, labels, key, eps):
    """PGD-AT and TRADES: the attacked batch passes in training mode, the attack in inference."""
    box = Interval.from_linf(x, eps * self.attack_scale)

    def train(v):
      found = clean_pass(network.apply, params, batch_stats, v)
      return found.logits, found.running

    def attack(v):
      return network.apply({"params": params, "batch_stats": batch_stats}, v, train=False)

    if self.method == "pgd-at":
      losses, aux = pgd_at_loss(
        train, attack, key, box, labels, steps=self.attack_steps, has_aux=True
      )
      return losses, aux["extra"], {"natural_loss": cross_entropy(attack(x), labels)}
    losses, aux = trades_loss(
      train, attack, key, x, box, labels, beta=self.beta, steps=self.attack_steps, has_aux=True
    )
    return losses, aux["extra"], {"natural_loss": aux["cross_entropy"]}

  def _bounded(self, network, variables, natural, x, labels, key, eps, where):
    # The regularisers need a box from the first step on, when the radius of the loss is still 0.
    box = Interval.from_linf(x, jnp.maximum(eps, EPS_MIN))
    robust, margins, preacts, box = self._robust(network, variables, box, x, labels, key, eps)
    kappa = linear_in_eps(eps, self.eps, self.kappa_start, self.kappa_end)
    losses = jnp.where(eps > 0, certified.mixed_loss(natural, robust, kappa), natural)
    losses = losses + self._regularizers(box, preacts, eps, where)
    size = len(labels)
    observed = {
      "radius": _spread(jnp.stack([box.radius.mean() for box in preacts]), size),
      "relu_states": _spread(jnp.stack(relu_state_counts(preacts, where), axis=-1), size),
    }
    observed |= {
      "margin": margins.min(axis=-1),
      "verified": verified(margins).astype(margins.dtype),
    }
    return losses, observed

  def _regularizers(self, box, preacts, eps, where):
    """lambda (L_tight + L_relu), skipped once lambda is 0."""
    if self.regularizer == "none":
      return 0.0
    weight = warmup_lambda(eps, self.eps, self.lambda_0)

    def value():
      total = 0.0
      if self.regularizer in ("tight", "both"):
        total = total + tightness_regularizer(box, preacts, self.tau, where)
      if self.regularizer in ("relu", "both"):
        total = total + relu_balance_regularizer(preacts, self.tau, where)
      return weight * total

    skipped = jnp.zeros((), jax.eval_shape(value).dtype)
    return jax.lax.cond(weight > 0, value, lambda: skipped)

  def _robust(self, network, variables, box, x, labels, key, eps):
    """(losses (B,), margins (B, K - 1), preacts, the box they belong to)."""

    def logits_fn(v):
      return network.apply(variables, v, train=False)

    def attack(radius):
      around = Interval.from_linf(x, jnp.maximum(radius, EPS_MIN))
      return pgd(logits_fn, key, around, labels, steps=self.attack_steps, goal="loss", center=x)

    if self.method == "crown-ibp-fusion":
      return *self._fusion(logits_fn, box, labels, eps), box
    if self.method in ("taps", "staps"):
      box = self._small(box, attack(eps)) if self.method == "staps" else box
      return *self._taps(network, variables, key, box, labels, eps), box
    if self.method == "sabr":
      box = self._small(box, attack(eps * self.attack_scale))
    is_crown, shrinks = self.method == "crown-ibp", self.method == "sabr"
    bounds = bound_margins(
      logits_fn,
      box,
      labels,
      self.method if is_crown else "ibp",
      mix=linear_in_eps(eps, self.eps, 1.0, 0.0) if is_crown else None,
      relu_lower=self.relu_lower,
      relu_shrinkage=self.relu_shrinkage if shrinks else None,
      precision=None,
    )
    losses = margin_cross_entropy(bounds.lower)
    if self.method in ("mtl-ibp", "exp-ibp", "cc-ibp"):
      logits = logits_fn(attack(eps * self.attack_scale))
      if self.method == "cc-ibp":
        losses = certified.cc_ibp_loss(bounds.lower, exact_margins(logits, labels), self.alpha)
      else:
        mix = {"mtl-ibp": certified.mtl_ibp_loss, "exp-ibp": certified.exp_ibp_loss}[self.method]
        losses = mix(losses, cross_entropy(logits, labels), self.alpha)
    return losses, bounds.lower, bounds.preacts, box

  def _small(self, box, x_adv):
    return certified.sabr_box(x_adv, box, self.shrinkage)

  def _fusion(self, logits_fn, box, labels, eps):
    """Fused CROWN-IBP during the ramp, IBP from then on; the margins are IBP's."""
    mix = linear_in_eps(eps, self.eps, 1.0, 0.0)

    def plain():
      bounds = bound_margins(logits_fn, box, labels, precision=None)
      return margin_cross_entropy(bounds.lower), bounds

    def fused():
      losses, bounds = loss_fusion_bound(
        logits_fn, box, labels, relu_lower=self.relu_lower, precision=None
      )
      return mix * losses + (1 - mix) * margin_cross_entropy(bounds.lower), bounds

    losses, bounds = jax.lax.cond(mix > 0, fused, plain)
    return losses, bounds.lower, bounds.preacts

  def _taps(self, network, variables, key, box, labels, eps):
    """IBP alone during the ramp, TAPS from then on."""
    if network.prefix is None or network.suffix is None:
      raise ValueError(f"method {self.method!r} needs a network with prefix and suffix, got none")

    def prefix(v):
      return network.prefix(variables, v)

    def suffix(h):
      return network.suffix(variables, h)

    def plain():
      bounds = bound_margins(lambda v: suffix(prefix(v)), box, labels, precision=None)
      return margin_cross_entropy(bounds.lower), bounds.lower, bounds.preacts

    def taps():
      found = taps_loss(
        prefix,
        suffix,
        key,
        box,
        labels,
        steps=self.attack_steps,
        weight=self.taps_weight,
        precision=None,
      )
      return found.losses, found.margins, found.preacts

    return jax.lax.cond(eps >= self.eps, taps, plain)


def _spread(value, size: int):
  """A figure of the whole batch as one an example, so that it averages as the others do."""
  return jnp.broadcast_to(value, (size, *value.shape))
