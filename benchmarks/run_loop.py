"""`training.run` against a Python loop with a jitted optax step and NumPy sampling on the host.

The loop is what most scripts do: draw groups and rows with NumPy, stack the batch, call a jitted
step, read the loss. Both optimise the same mixture with the same optimizer. Rates are medians of
turns that alternate in one process.

Command: python benchmarks/run_loop.py
About three minutes on two cores.
"""

import argparse

import common
import jax
import numpy as np
import optax
import workloads

from balance_jax import mixing, training
from balance_jax.losses import weighted_mean

STEPS = {
  "mlp_64_32_10_batch_32": 2000,
  "mlp_64_128_10_batch_128": 1000,
  "quickstart_decoder": 30,
}


def ours(loss, init_params, table, batch_size, steps):
  """A turn of `run`, metrics read by the host at the end of the chunk."""
  mixer = mixing.temperature(table.sizes, 5.0)
  step = training.make_step(
    loss, optax.adam(1e-3), mixer, table, batch_size=batch_size, metrics=("loss",)
  )
  state = training.init_state(jax.random.key(0), init_params(jax.random.key(1)), step)

  def turn():
    nonlocal state
    state, _ = training.run(step, state, steps, chunk=steps)

  return turn


def python_loop(loss, init_params, groups, batch_size, steps):
  """A turn of the plain loop."""
  names = list(groups)
  sizes = np.array([len(next(iter(groups[name].values()))) for name in names])
  p = np.asarray(mixing.temperature_probs(sizes, 5.0), np.float64)
  p /= p.sum()
  optimizer = optax.adam(1e-3)
  rng = np.random.default_rng(0)
  params = init_params(jax.random.key(1))
  opt_state = optimizer.init(params)

  @jax.jit
  def update(params, opt_state, rows):
    def objective(params):
      return weighted_mean(loss(params, rows, None)).mean()

    value, grads = jax.value_and_grad(objective)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  def draw():
    drawn = rng.choice(len(names), size=batch_size, p=p)
    rows = [(names[g], rng.integers(sizes[g])) for g in drawn]
    return {
      field: np.stack([groups[name][field][row] for name, row in rows])
      for field in groups[names[0]]
    }

  def turn():
    nonlocal params, opt_state
    for _ in range(steps):
      params, opt_state, value = update(params, opt_state, draw())
      float(value)

  return turn


def main():
  """Measures every workload, prints the ratios and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--scale", type=float, default=1.0, help="share of the steps of a turn")
  parser.add_argument("--out", default="")
  args = parser.parse_args()
  result = {}
  for name, (make, batch_size) in workloads.WORKLOADS.items():
    loss, init_params, groups = make()
    steps = max(1, int(STEPS[name] * args.scale))
    sides = {
      "run": ours(loss, init_params, workloads.table_of(groups), batch_size, steps),
      "python_loop": python_loop(loss, init_params, groups, batch_size, steps),
    }
    times = common.alternate(sides, args.repeats)
    ratio = common.paired_ratio(times, "python_loop", "run")
    seconds = {side: value / steps for side, value in common.medians(times).items()}
    result[name] = {"seconds_per_step": seconds, "speedup": ratio}
    print(
      f"{name:26} run {seconds['run'] * 1e6:9.1f} us  loop {seconds['python_loop'] * 1e6:9.1f} us  "
      f"speedup {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"
    )
  common.write("run_loop", {"workloads": result}, ("jax", "optax", "numpy"), args.out)


if __name__ == "__main__":
  main()
