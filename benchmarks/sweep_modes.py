"""Eight runs in one program: vmap, map and shard against one run after another.

This is where the threshold of `how="auto"` comes from (`VMAP_FLOPS` in training/sweep.py). On a CPU
every core is one device here, as `balance_jax.main` sets it up.

Command: python benchmarks/sweep_modes.py
About four minutes on two cores.
"""

import argparse
import os

import common
import jax
import optax
import workloads

from balance_jax import mixing, training
from balance_jax.training.sweep_runs import SweepRuns

RUNS = 8
STEPS = {
  "mlp_64_32_10_batch_32": 500,
  "mlp_64_128_10_batch_128": 200,
  "quickstart_decoder": 8,
}


def sweep_turn(how, build, init, table, steps, runs=RUNS):
  """A turn: `steps` steps of all runs."""
  cells = training.product(rate=[1e-3], seed=list(range(runs)))
  sweep = SweepRuns(build, init, cells, table, how=how)
  states = sweep.init()

  def turn():
    nonlocal states
    states, metrics = sweep.advance(states, steps)
    jax.device_get(metrics)

  return turn, sweep.plan


def main():
  """Measures every workload in every mode, prints the ratios and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--scale", type=float, default=1.0, help="share of the steps of a turn")
  parser.add_argument("--out", default="")
  args = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
  result = {}
  for name, (make, batch_size) in workloads.WORKLOADS.items():
    loss, init_params, groups = make()
    table = workloads.table_of(groups)
    steps = max(1, int(STEPS[name] * args.scale))

    def build(cell, loss=loss, table=table, batch_size=batch_size):
      mixer = mixing.temperature(table.sizes, 5.0)
      optimizer = optax.adam(cell["rate"])
      return training.make_step(
        loss, optimizer, mixer, table, batch_size=batch_size, metrics=("loss",)
      )

    def init(cell, step, init_params=init_params):
      key = jax.random.key(cell["seed"])
      return training.init_state(key, init_params(key), step)

    one, _ = sweep_turn("map", build, init, table, steps, runs=1)
    sides = {"one_after_another": lambda one=one: [one() for _ in range(RUNS)]}
    for how in ("vmap", "map", "shard"):
      sides[how], plan = sweep_turn(how, build, init, table, steps)
    _, auto = sweep_turn("auto", build, init, table, steps)
    times = common.alternate(sides, args.repeats)
    ratios = {
      how: common.paired_ratio(times, "one_after_another", how) for how in ("vmap", "map", "shard")
    }
    chosen = f"{auto.how} on each of {len(auto.devices)} devices"
    result[name] = {"speedup_over_one_after_another": ratios, "auto": chosen, "shard": plan.how}
    figures = "  ".join(f"{how} {ratio['median']:.2f}x" for how, ratio in ratios.items())
    print(f"{name:26} {figures}   auto: {chosen}")
  common.write("sweep_modes", {"runs": RUNS, "workloads": result}, ("jax", "optax"), args.out)


if __name__ == "__main__":
  main()
