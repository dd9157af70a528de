"""Stability: what large Transformers die of, measured and treated on small ones.

Source: Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities",
2023 (arXiv 2309.14322). Remedies from later work say so in their docstrings. The z-loss is
`balance_jax.losses.cross_entropy_with_z_loss`.
"""

from balance_jax.stability import mup
from balance_jax.stability.attention import AttentionStats, attention_stats
from balance_jax.stability.health import (
  StabilityReport,
  global_rms,
  spike_score,
  tree_rms,
  update_to_eps_ratio,
)
from balance_jax.stability.optimizers import OPTIMIZERS, adam_atan2, adamw, stable_adamw
from balance_jax.stability.probes import block_output_rms, capture_outputs, probe_attention, sown
from balance_jax.stability.reparam import (
  SigmaKernel,
  materialize,
  sigma_reparam,
  with_power_iteration,
)
from balance_jax.stability.schedules import warmup_cosine
from balance_jax.stability.sensitivity import (
  diverged_count,
  lr_grid,
  lr_sensitivity,
  lr_sensitivity_best_window,
)
from balance_jax.stability.sweep import sweep_learning_rates
from balance_jax.stability.trends import (
  Trend,
  fit_scaling_trend,
  max_stable_learning_rate,
  predict_unstable,
)
from balance_jax.stability.updates import (
  param_rms,
  qk_clip,
  scale_by_param_rms,
  skip_unstable_steps,
  soft_cap,
)

__all__ = [
  "AttentionStats",
  "OPTIMIZERS",
  "SigmaKernel",
  "StabilityReport",
  "Trend",
  "adam_atan2",
  "adamw",
  "attention_stats",
  "block_output_rms",
  "capture_outputs",
  "diverged_count",
  "fit_scaling_trend",
  "global_rms",
  "lr_grid",
  "lr_sensitivity",
  "lr_sensitivity_best_window",
  "materialize",
  "max_stable_learning_rate",
  "mup",
  "param_rms",
  "predict_unstable",
  "probe_attention",
  "qk_clip",
  "scale_by_param_rms",
  "sigma_reparam",
  "skip_unstable_steps",
  "soft_cap",
  "sown",
  "spike_score",
  "stable_adamw",
  "sweep_learning_rates",
  "tree_rms",
  "update_to_eps_ratio",
  "warmup_cosine",
  "with_power_iteration",
]
