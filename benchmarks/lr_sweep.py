"""Seven learning rates as one program against seven processes with a Python loop each.

Whole processes on the clock, imports, data and compilation included, no compilation cache. Both
sides train the same step with the same statistics off; a process of the loop side calls the jitted
step (drawing its batch on the device) from Python and waits for the last loss only. The processes
run one after another, and again two at a time, which is what two cores can do at best.

Then the cost of statistics: steps of a run with attention logits, entropy, log Z, block, gradient
and update sizes on, against the same steps without, by turns.

Command: python benchmarks/lr_sweep.py
About twelve minutes on two idle cores.
"""

import argparse
import concurrent.futures
import os
import pathlib
import runpy
import subprocess
import sys
import time

import common

ROOT = pathlib.Path(__file__).resolve().parent.parent
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
STEPS = 400
WORKLOADS = ("decoder_64_3", "mlp_64")


def base_config():
  """The recipe of configs/lr_sensitivity.py, to be changed and given to `resolved`."""
  return runpy.run_path(str(ROOT / "configs" / "lr_sensitivity.py"))["base"]()


def resolved(config):
  """The config as plain values."""
  from balance_jax.training.config import resolve

  return resolve(config)


def decoder_runs(rates, statistics=False):
  """The runs of the d 64, three-block decoder of configs/lr_sensitivity.py."""
  from balance_jax.training import byte_text, stability_task

  config = base_config()
  config.sizes = ((64, 3, 4),)
  config.statistics = statistics
  config = resolved(config)
  arm = next(iter(stability_task.arm_configs(config).values()))
  table = byte_text.load_table(config["data"], "train")
  cells = [{"learning_rate": rate, "seed": 0} for rate in rates]
  return stability_task.make_runs(config, arm, table, cells)


def mlp_runs(rates):
  """The runs of the MLP 64-64-10, batch 32."""
  import jax
  import optax
  import workloads

  from balance_jax import mixing, training

  loss, init_params, groups = workloads.mlp(64)
  table = workloads.table_of(groups)

  def build(cell):
    return training.make_step(
      loss, optax.adam(cell["learning_rate"]), mixing.proportional(table.sizes), table,
      batch_size=32, metrics=["loss"],
    )  # fmt: skip

  def init(cell, step):
    return training.init_state(jax.random.key(0), init_params(jax.random.key(1)), step)

  return training.SweepRuns(build, init, [{"learning_rate": rate} for rate in rates], table)


def runs_of(workload, rates):
  return decoder_runs(rates) if workload == "decoder_64_3" else mlp_runs(rates)


def one_program(workload, steps):
  """What the process of the sweep does."""
  import jax

  from balance_jax import training

  jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
  runs = runs_of(workload, RATES)
  _, history = training.run_sweep(runs, steps, chunk=100, allow_divergence=True)
  print(history["loss"][:, -1].tolist())


def python_loop(workload, rate, steps):
  """What a process of one learning rate does."""
  import jax

  runs = runs_of(workload, (rate,))
  cell = {name: value[0] for name, value in runs.cells.items()}
  step = runs._build(cell)

  def advance(state, table):
    state, batch = step.draw(state, table)
    return step(state, batch, table)

  advance = jax.jit(advance, donate_argnums=0)
  state = jax.jit(lambda: runs._init(cell, step))()
  for _ in range(steps):
    state, metrics = advance(state, runs.table)
  print(float(metrics["loss"]))


def seconds_of(*arguments) -> float:
  """Seconds of one process of this script."""
  environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, __file__, *map(str, arguments)]
  began = time.perf_counter()
  subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
  return time.perf_counter() - began


def measure(workload: str, steps: int, repeats: int) -> dict:
  """Times of both sides, by turns, and their ratios."""
  alone = [("--loop", workload, "--rate", rate, "--steps", steps) for rate in RATES]

  def after_another():
    for arguments in alone:
      seconds_of(*arguments)

  def two_at_a_time():
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      list(pool.map(lambda arguments: seconds_of(*arguments), alone))

  sides = {
    "one_program": lambda: seconds_of("--sweep", workload, "--steps", steps),
    "processes_one_after_another": after_another,
    "processes_two_at_a_time": two_at_a_time,
  }
  times = {name: [] for name in sides}
  for _ in range(repeats):
    for name, call in sides.items():
      began = time.perf_counter()
      call()
      times[name].append(time.perf_counter() - began)
  return {
    "steps": steps,
    "seconds": times,
    "against_one_after_another": common.paired_ratio(
      times, "processes_one_after_another", "one_program"
    ),
    "against_two_at_a_time": common.paired_ratio(times, "processes_two_at_a_time", "one_program"),
  }


def statistics_cost(turns: int) -> dict:
  """Seconds of 20 steps with statistics over seconds without."""
  import jax

  sides, held = {}, {}
  for name, statistics in (("with", True), ("without", False)):
    runs = decoder_runs(RATES[2:3], statistics)
    held[name] = runs.init()

    def call(name=name, runs=runs):
      held[name], metrics = runs.advance(held[name], 20)
      jax.block_until_ready(metrics)

    sides[name] = call
  times = common.alternate(sides, turns)
  return {"turns": turns, **common.paired_ratio(times, "with", "without")}


def main():
  """Measures, prints and writes the result; or is one of the measured processes."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sweep", choices=WORKLOADS)
  parser.add_argument("--loop", choices=WORKLOADS)
  parser.add_argument("--rate", type=float)
  parser.add_argument("--steps", type=int, default=STEPS)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--out", default="")
  args = parser.parse_args()
  if args.sweep:
    return one_program(args.sweep, args.steps)
  if args.loop:
    return python_loop(args.loop, args.rate, args.steps)
  result = {name: measure(name, args.steps, args.repeats) for name in WORKLOADS}
  result["statistics"] = statistics_cost(turns=25)
  for name, value in result.items():
    print(f"{name}: {value}")
  common.write("lr_sweep", result, ("jax", "flax"), args.out)


if __name__ == "__main__":
  main()
