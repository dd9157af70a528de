"""What a step may report."""

from collections.abc import Sequence

from balance_jax import _checks

METRICS = {
  "loss": "float scalar: sum_b w_b loss_b / count, the estimate of the objective",
  "grad_norm": "float scalar: norm of the gradient before the optimizer sees it",
  "group_loss": "WeightedMean of (K,): unweighted losses of the batch by group",
  "mixture": "dict of p and r, float (K,): what this step optimised and drew",
  "epochs": "float (K,): passes over each group after this step",
  "observed": "dict: what the loss reported beside its losses, reduced over the batch",
  "grad_rms": "pytree like params: root mean square of each gradient, before the optimizer",
  "update_rms": "pytree like params: root mean square of each parameter's change",
}

# Computed only where they are named: they cost a pass over all parameters.
_ON_REQUEST = ("grad_rms", "update_rms")


def choose_metrics(metrics: Sequence[str] | None, table) -> tuple[str, ...]:
  """The metrics asked for; epochs are counted only where the step draws from a table."""
  available = [name for name in METRICS if table is not None or name != "epochs"]
  for name in metrics or ():
    _checks.check_choice("metrics", name, available)
  default = [name for name in available if name not in _ON_REQUEST]
  return tuple(default if metrics is None else metrics)
