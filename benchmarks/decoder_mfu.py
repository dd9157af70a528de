"""Tokens a second and utilisation of the decoder on an accelerator, and seven rates in one program.

Utilisation (MFU) is the model's floating-point operations, 6 a parameter and token and 12 a token,
layer, width and position of attention, over the device's measured peak: the fastest of some large
bfloat16 matrix products. The sweep is one program of seven learning rates against the same runs one
after another, both compiled before the clock starts.

Command: python benchmarks/decoder_mfu.py [--tiny]
Meant for one GPU; --tiny runs the same code in a minute on a CPU, where the figures mean nothing.
"""

import argparse
import functools

import common
import jax
import jax.numpy as jnp
import lr_sweep

SIZES = {"100M": (768, 14, 12, 16), "400M": (1280, 20, 20, 8)}  # width, depth, heads, batch
TINY = {"tiny": (32, 1, 2, 2)}


def matmul_peak(sizes, repeats: int = 10) -> float:
  """FLOPs a second of the fastest square bfloat16 product."""
  best = 0.0
  for size in sizes:
    key = jax.random.key(size)
    a = jax.random.normal(key, (size, size), jnp.bfloat16)

    @jax.jit
    def chain(a):
      # Ten dependent products, so that one launch does not dominate.
      return jax.lax.fori_loop(0, 10, lambda _, x: (x @ a) * 1e-2, a)

    times = common.alternate({"matmul": lambda a=a, f=chain: jax.block_until_ready(f(a))}, repeats)
    best = max(best, 10 * 2 * size**3 / min(times["matmul"]))
  return best


def decoder_runs(size, batch: int, window: int, rates, how: str):
  """The runs of `configs/lr_sensitivity.py` at a size, in bfloat16, without statistics."""
  from balance_jax.training import byte_text, stability_task

  width, depth, heads = size
  config = lr_sweep.base_config()
  config.sizes = ((width, depth, heads),)
  config.data.window = window
  config.model.dtype = "bfloat16"
  config.train.batch_size = batch
  config.statistics = False
  config.parallel = how
  config.data.source = byte_text.STAND_IN
  config = lr_sweep.resolved(config)
  arm = next(iter(stability_task.arm_configs(config).values()))
  table = byte_text.load_table(config["data"], "train")
  cells = [{"learning_rate": rate, "seed": 0} for rate in rates]
  return stability_task.make_runs(config, arm, table, cells)


def seconds_per_step(runs, steps: int, repeats: int) -> float:
  """Median over repeats of calls of `steps` steps of all runs."""
  held = {"states": runs.init()}

  def call():
    held["states"], metrics = runs.advance(held["states"], steps)
    jax.block_until_ready(metrics)

  times = common.alternate({"runs": call}, repeats)
  return common.medians(times)["runs"] / steps


def utilisation(size, batch, window, steps, repeats, peak) -> dict:
  """Tokens a second, and the share of the peak, of one run."""
  from balance_jax import models

  runs = decoder_runs(size, batch, window, (1e-3,), "map")
  parameters = models.count_params(jax.eval_shape(runs.init).params)
  width, depth, _ = size
  flops = 6 * parameters + 12 * depth * width * window
  rate = batch * window / seconds_per_step(runs, steps, repeats)
  return {
    "parameters": parameters,
    "batch": batch,
    "window": window,
    "tokens_per_second": rate,
    "mfu": rate * flops / peak,
  }


def sweep_ratio(size, batch, window, steps, repeats) -> dict:
  """Seven rates in one program (vmap) against one after another (map)."""
  measure = functools.partial(seconds_per_step, steps=steps, repeats=repeats)
  seconds = {
    how: measure(decoder_runs(size, batch, window, lr_sweep.RATES, how)) for how in ("vmap", "map")
  }
  return {**seconds, "one_after_another_over_together": seconds["map"] / seconds["vmap"]}


def main():
  """Measures, prints and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tiny", action="store_true", help="a minute on a CPU; nothing is written")
  parser.add_argument("--out", default="")
  args = parser.parse_args()
  sizes, window = (TINY, 16) if args.tiny else (SIZES, 512)
  steps, repeats = (2, 2) if args.tiny else (20, 5)
  peak = matmul_peak((256,) if args.tiny else (4096, 8192, 16384))
  result = {"matmul_peak_flops": peak}
  for name, (*size, batch) in sizes.items():
    result[name] = utilisation(size, batch, window, steps, repeats, peak)
  swept = (32, 1, 2) if args.tiny else (256, 3, 4)
  result["seven_rates"] = sweep_ratio(swept, 2 if args.tiny else 16, window, steps, repeats)
  for name, value in result.items():
    print(f"{name}: {value}")
  if not args.tiny:
    common.write("decoder_mfu", result, ("jax", "flax"), args.out)


if __name__ == "__main__":
  main()
