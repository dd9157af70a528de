"""The quickstart as one program against its cells as separate processes, one after another.

Whole processes on the clock: imports, reading the prepared data, compilation, training, evaluation
and the report. The separate side starts one process per cell (method x seed); by default a sample
of the cells is run and the sum is scaled up. Both sides may use all cores. No compilation cache,
except for the last figure: how soon a second start of the same sweep has taken its first step.

Command: python benchmarks/quickstart_sweep.py
About fifteen minutes on two idle cores.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import common

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.py"
METHODS = (
  "proportional", "temperature_5", "scalarization_5", "optimal_5", "cooldown", "uniform",
)  # fmt: skip
SEEDS = (0, 1, 2)


def start(workdir, cache, *flags):
  """Seconds of one process of the main job."""
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"}
  if cache is None:
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_COMPILATION_CACHE_DIR": ""}
  command = [sys.executable, "-m", "balance_jax.main", f"--config={CONFIG}", f"--workdir={workdir}"]
  began = time.perf_counter()
  done = subprocess.run(
    [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise SystemExit(done.stderr)
  return time.perf_counter() - began


def cell_flags(method, seed):
  return [f"--config.methods=('{method}',)", f"--config.seeds=({seed},)", "--config.reference="]


def seconds_to_first_step(folder) -> float:
  """From the start of the process to the first step, with all programs in the cache.

  The same sweep in chunks of one step: its first line of progress tells when a step was done.
  """
  sizes = {"chunk": 1, "steps": 2, "eval_every": 2, "checkpoint_every": 2, "variance_every": 2}
  flags = [f"--config.train.{name}={size}" for name, size in sizes.items()]
  start(folder / "cold", folder / "cache", *flags)
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
  command = [sys.executable, "-m", "balance_jax.main", f"--config={CONFIG}"]
  began = time.perf_counter()
  process = subprocess.Popen(
    [*command, f"--workdir={folder / 'cached'}", *flags],
    cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
  )  # fmt: skip
  for line in process.stderr:
    if line.startswith("step 1/2"):
      seconds = time.perf_counter() - began
  if process.wait():
    raise SystemExit("the second start failed")
  return seconds


def main():
  """Measures both sides, prints the ratio and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sample", type=int, default=4, help="cells run as separate processes")
  parser.add_argument("--flag", action="append", default=[], help="further flag of the main job")
  parser.add_argument("--out", default="")
  args = parser.parse_args()
  cells = [(method, seed) for seed in SEEDS for method in METHODS]
  sample = cells[:: max(1, len(cells) // args.sample)][: args.sample]
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    start(folder / "warm", None, *args.flag, *cell_flags(*cells[0]))  # prepares the data
    alone = [
      start(folder / f"{method}_{seed}", None, *args.flag, *cell_flags(method, seed))
      for method, seed in sample
    ]
    together = start(folder / "together", None, *args.flag)
    second_start = seconds_to_first_step(folder)
    seconds = json.loads((folder / "together" / "results.json").read_text())["seconds"]
  separate = sum(alone) / len(alone) * len(cells)
  result = {
    "cells": len(cells),
    "sampled_cells": len(sample),
    "seconds_of_a_cell_alone": alone,
    "separate_processes_seconds": separate,
    "one_program_seconds": together,
    "one_program_training_seconds": seconds,
    "speedup": separate / together,
    "second_start_seconds_to_first_step": second_start,
  }
  for name, value in result.items():
    print(f"{name}: {value}")
  common.write("quickstart_sweep", result, ("jax",), args.out)


if __name__ == "__main__":
  main()
