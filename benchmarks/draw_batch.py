"""Time to draw one batch from many groups: GroupStreams in a scan against grain's mix on the host.

128 rows a batch, 64 groups with power-law sizes, 1e8 rows in all. Here: stratified counts, shuffled
indices and the gather from a device table, inside one jitted `lax.scan`. Grain: one shuffled,
repeated `MapDataset` per group over slices of the same array, `MapDataset.mix` with the same
weights and `batch(128)`; read by 16 threads (grain's default) and by none, and the faster counts.
The sides alternate in one process; medians of the repeats are compared.

Command: python benchmarks/draw_batch.py --out benchmarks/results/draw_batch.json
Needs grain and 1 GB of memory; about half a minute on two cores.
"""

import argparse
import json
import pathlib
import platform
import statistics
import sys
import time
from importlib import metadata

import grain
import jax
import jax.numpy as jnp
import numpy as np

from balance_jax.mixing.quotas import allocate_counts
from balance_jax.mixing.streams import GroupStreams

GRAIN_THREADS = 16


def group_sizes(num_groups, total):
  """Sizes falling as rank^-1.2, at least 1, summing to `total`: int64 (K,)."""
  share = np.arange(1, num_groups + 1) ** -1.2
  sizes = np.maximum((share / share.sum() * total).astype(np.int64), 1)
  sizes[0] += total - sizes.sum()
  return sizes


def make_draws(sizes, batch, num_draws):
  """A jitted function (key, table, carry, state) that draws `num_draws` batches, and its state."""
  streams = GroupStreams(sizes)
  starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int32)
  r = jnp.asarray(sizes / sizes.sum(), jnp.float32)

  @jax.jit
  def draws(key, table, carry, state):
    def draw(position, _):
      carry, state, total = position
      counts, carry = allocate_counts(None, r, batch, carry=carry)
      groups, indices, state = streams.take(key, state, counts, batch)
      rows = table[jnp.asarray(starts)[groups] + indices]
      # The sum makes sure that the rows are read.
      return (carry, state, total + jnp.sum(rows)), None

    return jax.lax.scan(draw, (carry, state, jnp.uint32(0)), length=num_draws)[0]

  carry = jnp.zeros(len(sizes), jnp.float32)
  return draws, (carry, streams.init())


def grain_iterator(rows, sizes, batch, num_threads):
  """Endless batches of `rows`, mixed in proportion to `sizes`."""
  groups = [
    grain.MapDataset.source(part).shuffle(seed=i).repeat()
    for i, part in enumerate(np.split(rows, np.cumsum(sizes)[:-1]))
  ]
  mixed = grain.MapDataset.mix(groups, weights=(sizes / sizes.sum()).tolist()).batch(batch)
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
  return iter(mixed.to_iter_dataset(options))


def seconds_per_batch(loader, batches):
  """Steady-state time of `next(loader)`."""
  for _ in range(GRAIN_THREADS):  # What was read ahead while the other side ran is not counted.
    next(loader)
  start = time.perf_counter()
  for _ in range(batches):
    next(loader)
  return (time.perf_counter() - start) / batches


def measure(args):
  """Alternates the sides `repeats` times; returns lists of seconds per batch by side."""
  sizes = group_sizes(args.groups, args.rows)
  rows = np.random.default_rng(0).integers(2**32, size=args.rows, dtype=np.uint32)
  table = jax.device_put(rows)
  draws, start = make_draws(sizes, args.batch, args.draws)
  loaders = {
    f"grain, {threads} threads": grain_iterator(rows, sizes, args.batch, threads)
    for threads in (0, GRAIN_THREADS)
  }

  def ours(position):
    begin = time.perf_counter()
    *position, _ = jax.block_until_ready(draws(jax.random.key(0), table, *position))
    return (time.perf_counter() - begin) / args.draws, position

  _, position = ours(start)  # compiles
  times = {name: [] for name in ("balance_jax", *loaders)}
  for _ in range(args.repeats):
    seconds, position = ours(position)  # Goes on, so that its rows are no more cached than grain's.
    times["balance_jax"].append(seconds)
    for name, loader in loaders.items():
      times[name].append(seconds_per_batch(loader, args.grain_batches))
    time.sleep(0.5)  # Lets grain's threads finish reading ahead, or they slow the other side.
  return times


def main():
  """Parses the flags, measures, prints and writes the JSON file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", default="benchmarks/results/draw_batch.json")
  parser.add_argument("--rows", type=int, default=10**8)
  parser.add_argument("--groups", type=int, default=64)
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--draws", type=int, default=2000, help="batches per scan")
  parser.add_argument("--grain_batches", type=int, default=30, help="grain batches per repeat")
  parser.add_argument("--repeats", type=int, default=9)
  args = parser.parse_args()
  times = measure(args)
  medians = {name: statistics.median(values) * 1e6 for name, values in times.items()}
  ratio = min(value for name, value in medians.items() if name != "balance_jax")
  ratio /= medians["balance_jax"]
  result = {
    "benchmark": "draw_batch",
    "command": " ".join(["python", *sys.argv]),
    "settings": {name: value for name, value in vars(args).items() if name != "out"},
    "median_us_per_batch": medians,
    "us_per_batch": {name: [value * 1e6 for value in values] for name, values in times.items()},
    "speedup_over_fastest_grain": ratio,
    "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
    "machine": platform.machine(),
    "versions": {"python": platform.python_version()}
    | {name: metadata.version(name) for name in ("jax", "grain", "numpy")},
  }
  for name, value in medians.items():
    print(f"{name:24s}{value:12.1f} us per batch")
  print(f"ratio (fastest grain / balance_jax): {ratio:.0f}x")
  out = pathlib.Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
