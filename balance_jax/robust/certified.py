"""Losses of certified training: what is made of bounds, and of bounds and an attack.

Every loss of this file takes arrays that are already bounded or attacked and returns one value per
example, so each is a few lines and they combine freely; `objective` puts them together.

Only the IBP and CROWN-IBP losses are upper bounds of the worst loss in the box. SABR, MTL, EXP, CC
and TAPS are not, on purpose: never report their margins as certificates.

Sources: SABR, Müller et al., 2023 (arXiv 2210.04871); MTL-IBP, CC-IBP and EXP-IBP, De Palma et al.,
2024 (arXiv 2305.13991); CROWN-IBP, Zhang et al., 2020 (arXiv 1906.06316).
"""

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.bounds import Interval
from balance_jax.robust.margins import margin_cross_entropy

SABR_VARIANTS = ("ctbench", "original")


def mixed_loss(natural_losses, robust_losses, kappa) -> jax.Array:
  """(1 - kappa) natural + kappa robust, the mixture of accuracy and robustness.

  Args:
    natural_losses: float (B,), cross entropy of the clean examples.
    robust_losses: float (B,).
    kappa: robust weight in [0, 1]; may be traced. 1 is the robust loss alone. (Papers on
      CROWN-IBP give kappa to the natural loss: theirs is 1 minus this.)

  Returns:
    float (B,).
  """
  _checks.check_number("kappa", kappa, low=0.0, high=1.0)
  return (1 - kappa) * natural_losses + kappa * robust_losses


def sabr_box(x_adv, box: Interval, lam, variant: str = "ctbench") -> Interval:
  """The small box of SABR around an adversarial example, inside of the whole one.

  Args:
    x_adv: float (B, ...), in the box; no gradient passes through it.
    box: `Interval` (B, ...).
    lam: lambda in [0, 1], share of the radius; 1 gives the whole box, 0 the example; may be traced.
    variant: "ctbench": half-widths are lam times those of the box, which is cut to the valid
      range, and the centre moves so that the small box stays inside. "original": half-width lam
      times the largest of the box, centre moved likewise, then cut to the box.

  Returns:
    `Interval` (B, ...).
  """
  _checks.check_number("lam", lam, low=0.0, high=1.0)
  _checks.check_choice("variant", variant, SABR_VARIANTS)
  _checks.check_shape("x_adv", x_adv, box.shape)
  x_adv = jax.lax.stop_gradient(x_adv)
  radius = box.radius
  if variant == "original":
    radius = jnp.max(radius, axis=tuple(range(1, radius.ndim)), keepdims=True)
  radius = lam * radius
  # Where the box is narrower than that, the limits of the clip cross, and all of it is returned.
  high = box.upper - radius
  center = jnp.clip(x_adv, jnp.minimum(box.lower + radius, high), high)
  return Interval(jnp.maximum(center - radius, box.lower), jnp.minimum(center + radius, box.upper))


def mtl_ibp_loss(certified_losses, adversarial_losses, alpha) -> jax.Array:
  """MTL-IBP: alpha times the certified loss plus 1 - alpha times the adversarial one.

  Args:
    certified_losses: float (B,), cross entropy of bounded margins.
    adversarial_losses: float (B,), cross entropy at an attacked point.
    alpha: in [0, 1]; 1 is IBP, 0 adversarial training; may be traced.

  Returns:
    float (B,).
  """
  _checks.check_number("alpha", alpha, low=0.0, high=1.0)
  return alpha * certified_losses + (1 - alpha) * adversarial_losses


def exp_ibp_loss(certified_losses, adversarial_losses, alpha) -> jax.Array:
  """EXP-IBP: certified^alpha adversarial^(1 - alpha), at most `mtl_ibp_loss`.

  Args:
    certified_losses: float (B,), >= 0.
    adversarial_losses: float (B,), >= 0.
    alpha: in [0, 1]; may be traced.

  Returns:
    float (B,); 0 where either loss is 0 (with a finite gradient), unless its exponent is 0.
  """
  _checks.check_number("alpha", alpha, low=0.0, high=1.0)
  return _power(certified_losses, alpha) * _power(adversarial_losses, 1 - alpha)


def cc_ibp_loss(certified_margins, adversarial_margins, alpha) -> jax.Array:
  """CC-IBP: cross entropy of the mixed margins, at most `mtl_ibp_loss` by convexity.

  Args:
    certified_margins: float (B, K - 1), lower bounds.
    adversarial_margins: float (B, K - 1), margins at an attacked point.
    alpha: in [0, 1]; may be traced.

  Returns:
    float (B,).
  """
  _checks.check_number("alpha", alpha, low=0.0, high=1.0)
  return margin_cross_entropy(alpha * certified_margins + (1 - alpha) * adversarial_margins)


def _power(losses, exponent) -> jax.Array:
  """losses^exponent, exponent in [0, 1]; gradient 0 where the loss is 0, and 0^0 is 1."""
  empty = losses <= 0
  power = jnp.exp(exponent * jnp.log(jnp.where(empty, 1.0, losses)))
  return jnp.where(empty & (exponent > 0), 0.0, power)


def l1_penalty(params) -> jax.Array:
  """Sum of absolute weights over all arrays of two or more axes: kernels, not biases or norms.

  CTBench's regulariser, times 1e-6 to 5e-5 (arXiv 2406.04848, appendix).

  Args:
    params: pytree of arrays.

  Returns:
    float scalar.
  """
  kernels = [leaf for leaf in jax.tree.leaves(params) if jnp.ndim(leaf) > 1]
  return sum((jnp.sum(jnp.abs(kernel)) for kernel in kernels), jnp.zeros(()))
