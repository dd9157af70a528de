"""Distillation: one student, one or several teachers, and the balance between them."""

from balance_jax.distillation.mtard import (
  MTARDState,
  entropy_balance,
  init_mtard_state,
  mtard_loss,
  mtard_update,
  normalization_loss_balance,
)
from balance_jax.distillation.soft_labels import ard_loss, rslad_loss, soft_entropy, soft_kl

__all__ = [
  "MTARDState",
  "ard_loss",
  "entropy_balance",
  "init_mtard_state",
  "mtard_loss",
  "mtard_update",
  "normalization_loss_balance",
  "rslad_loss",
  "soft_entropy",
  "soft_kl",
]
