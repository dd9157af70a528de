"""Training: state, step, run, sweep, devices, checkpoints, logs and reports."""

from balance_jax.training.batch import Batch, Observed, Share
from balance_jax.training.mesh import data_mesh, data_parallel, replicate
from balance_jax.training.run import TrainingDivergedError, run
from balance_jax.training.state import Carried, Context, TrainState, init_state
from balance_jax.training.step import Step, make_step
from balance_jax.training.step_metrics import METRICS
from balance_jax.training.sweep import chain, product, stack_cells, sweep, zip_
from balance_jax.training.sweep_runs import SweepRuns, run_sweep

__all__ = [
  "Batch",
  "Carried",
  "Context",
  "METRICS",
  "Observed",
  "Share",
  "Step",
  "SweepRuns",
  "TrainState",
  "TrainingDivergedError",
  "chain",
  "data_mesh",
  "data_parallel",
  "init_state",
  "make_step",
  "product",
  "replicate",
  "run",
  "run_sweep",
  "stack_cells",
  "sweep",
  "zip_",
]
