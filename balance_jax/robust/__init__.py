"""Certified and adversarial training: bounds of margins, losses, attacks, certification."""

from balance_jax.robust.adversarial import pgd_at_loss, trades_loss
from balance_jax.robust.apgd import apgd
from balance_jax.robust.attacks import attack_succeeds, pgd
from balance_jax.robust.certified import (
  cc_ibp_loss,
  exp_ibp_loss,
  l1_penalty,
  mixed_loss,
  mtl_ibp_loss,
  sabr_box,
)
from balance_jax.robust.certify import CertifyResult, accuracy_curve, certify
from balance_jax.robust.certify_cascade import ATTACKS, SoundnessError
from balance_jax.robust.certify_log import Outcome
from balance_jax.robust.initialization import fan_in_uniform, ibp_init_params, ibp_normal
from balance_jax.robust.margin_bounds import (
  MarginBounds,
  bound_margins,
  loss_fusion_bound,
  margin_bounds,
)
from balance_jax.robust.margins import margin_cross_entropy, margin_matrix, verified
from balance_jax.robust.objective import METHODS, Network, Objective
from balance_jax.robust.regularizers import (
  relu_balance_regularizer,
  relu_stability_regularizer,
  relu_state_counts,
  relu_volume_regularizer,
  tightness_regularizer,
)
from balance_jax.robust.schedules import linear_in_eps, smoothed_eps_schedule, warmup_lambda
from balance_jax.robust.srat import (
  ClassErrors,
  gaussian_two_class_errors,
  robust_separation,
  srat_loss,
)
from balance_jax.robust.statistics import CleanPass, clean_pass, precise_statistics
from balance_jax.robust.taps import TapsLoss, taps_loss

__all__ = [
  "ATTACKS",
  "CertifyResult",
  "ClassErrors",
  "CleanPass",
  "METHODS",
  "MarginBounds",
  "Network",
  "Objective",
  "Outcome",
  "SoundnessError",
  "TapsLoss",
  "accuracy_curve",
  "apgd",
  "attack_succeeds",
  "bound_margins",
  "cc_ibp_loss",
  "certify",
  "clean_pass",
  "exp_ibp_loss",
  "fan_in_uniform",
  "gaussian_two_class_errors",
  "ibp_init_params",
  "ibp_normal",
  "l1_penalty",
  "linear_in_eps",
  "loss_fusion_bound",
  "margin_bounds",
  "margin_cross_entropy",
  "margin_matrix",
  "mixed_loss",
  "mtl_ibp_loss",
  "pgd",
  "pgd_at_loss",
  "precise_statistics",
  "relu_balance_regularizer",
  "relu_stability_regularizer",
  "relu_state_counts",
  "relu_volume_regularizer",
  "robust_separation",
  "sabr_box",
  "smoothed_eps_schedule",
  "srat_loss",
  "taps_loss",
  "tightness_regularizer",
  "trades_loss",
  "verified",
  "warmup_lambda",
]
