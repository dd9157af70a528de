"""Train steps of the decoder: `training.run` against PyTorch on the same CPU, at equal tokens.

AdamW, clip of the global norm at 1, mean cross entropy, float32. Here: what a user gets, that is
`make_step` with two groups and the default metrics, in chunks of one compiled scan. PyTorch: the
model of torch_decoder.py, rows gathered from a tensor in memory (no data loader), eager and
`torch.compile`. All run in one process with as many threads as there are cores and take turns;
the first turn of each is warm-up. Ratios are torch time over jax time: above 1, this library is
faster. PyTorch's threads wait for each other, so that one preempted thread stalls both: on a busy
machine the plain median flatters this library, and `quiet_median`, over the turns in which other
processes took less than a tenth of the cores, is the number to read. With `taskset -c 0` in front
both run on one core, and CPU time compares them whatever else is running.

Command: python benchmarks/decoder_step.py --out benchmarks/results/decoder_step.json
Needs torch 2.13 and a C++ compiler; about five minutes on two idle cores.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import torch

from balance_jax import data, mixing, models, training
from balance_jax.losses import cross_entropy
from balance_jax.training.optimizers import make_optimizer

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from torch_decoder import TorchTrainer

VOCAB_SIZE = 256
ROWS = 512
# heads, depth, T, B, and the steps of one turn, by width. 48 is the quickstart's size.
SIZES = {
  48: {"heads": 4, "depth": 2, "length": 64, "batch": 32, "turn": 8},
  64: {"heads": 4, "depth": 3, "length": 128, "batch": 16, "turn": 4},
  128: {"heads": 4, "depth": 3, "length": 128, "batch": 16, "turn": 2},
  256: {"heads": 4, "depth": 4, "length": 256, "batch": 8, "turn": 1},
}

# A turn is quiet where other processes took less than this share of the cores during it.
QUIET = 0.1
ENOUGH = 40
STATISTICS = {
  "quiet_median": lambda wall, cpu: np.median(wall),
  "median": lambda wall, cpu: np.median(wall),
  "minimum": lambda wall, cpu: wall.min(),
  "cpu_minimum": lambda wall, cpu: cpu.min(),
}


def jax_turn(width: int, size: dict) -> Callable[[], float]:
  """A function that takes the steps of one turn and returns the last loss."""
  tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (ROWS, size["length"] + 1), np.uint8)
  table = data.GroupTable.from_rows({"a": tokens[: ROWS // 4], "b": tokens[ROWS // 4 :]})
  config = models.DecoderConfig(VOCAB_SIZE, width, depth=size["depth"], heads=size["heads"])
  decoder = models.Decoder(config)

  def per_example_loss(params, rows, key):
    del key
    return cross_entropy(decoder.apply(params, rows[:, :-1]), rows[:, 1:]).mean(-1)

  optimizer = make_optimizer(1e-3, total_steps=10**6, weight_decay=0.1, clip_norm=1.0)
  mixer = mixing.proportional(table.sizes)
  step = training.make_step(per_example_loss, optimizer, mixer, table, batch_size=size["batch"])
  params = jax.jit(decoder.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  state = training.init_state(jax.random.key(1), params, step)

  def turn() -> float:
    nonlocal state
    state, history = training.run(step, state, size["turn"], chunk=size["turn"])
    return float(history["loss"][-1])

  return turn


def torch_turn(width: int, size: dict, compiled: bool) -> Callable[[], float]:
  """Like `jax_turn`, with PyTorch."""
  windows = torch.randint(0, VOCAB_SIZE, (ROWS, size["length"] + 1))
  trainer = TorchTrainer(
    windows,
    batch=size["batch"],
    compiled=compiled,
    vocab_size=VOCAB_SIZE,
    width=width,
    depth=size["depth"],
    heads=size["heads"],
  )
  return lambda: trainer.run(size["turn"])


def take_turns(sides: dict[str, Callable], seconds: float) -> dict[str, np.ndarray]:
  """Wall and CPU seconds and others' share of the cores, of every turn by side: (3, rounds).

  Ends after `seconds`, or sooner once every side has had ENOUGH quiet turns.
  """
  for run in sides.values():
    run()
  times = {name: [] for name in sides}
  end = time.perf_counter() + seconds
  quiet_turns = dict.fromkeys(sides, 0)
  while min(quiet_turns.values()) < ENOUGH and time.perf_counter() < end:
    for name, run in sides.items():
      await_quiet()
      taken, others = clocked(run)
      times[name].append((*taken, others))
      quiet_turns[name] += others < QUIET
  return {name: np.array(values).T for name, values in times.items()}


def await_quiet(patience: float = 5.0):
  """Returns once other processes are quiet for a tenth of a second, or after `patience` seconds."""
  end = time.perf_counter() + patience
  while time.perf_counter() < end and clocked(lambda: time.sleep(0.1))[1] >= QUIET:
    pass


def clocked(run: Callable) -> tuple[np.ndarray, float]:
  """(wall, CPU) seconds of run(), and the share of the cores that other processes had."""
  start = clocks()
  run()
  wall, cpu, everyone = clocks() - start
  return np.array([wall, cpu]), (everyone - cpu) / (wall * os.cpu_count())


def clocks() -> np.ndarray:
  """Wall seconds, CPU seconds of this process, CPU seconds of all (0 where there is no /proc)."""
  stat = pathlib.Path("/proc/stat")
  ticks = stat.read_text().split(maxsplit=4)[1:4] if stat.exists() else ["0"]
  everyone = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
  return np.array([time.perf_counter(), time.process_time(), everyone])


def measure(width: int, seconds: float) -> dict:
  """Rates and ratios for one size, by statistic."""
  size = SIZES[width]
  times = take_turns(
    {
      "jax": jax_turn(width, size),
      "torch": torch_turn(width, size, compiled=False),
      "torch.compile": torch_turn(width, size, compiled=True),
    },
    seconds,
  )
  tokens = size["turn"] * size["batch"] * size["length"]
  quiet = {side: values[:, values[2] < QUIET] for side, values in times.items()}
  result = {"width": width, **size, "rounds": times["jax"].shape[1]}
  result["quiet_turns"] = {side: values.shape[1] for side, values in quiet.items()}
  for name, statistic in STATISTICS.items():
    chosen = quiet if name == "quiet_median" else times
    if min(values.shape[1] for values in chosen.values()) < 3:
      continue
    taken = {side: float(statistic(*values[:2])) for side, values in chosen.items()}
    result[name] = {
      "tokens_per_second": {side: round(tokens / value) for side, value in taken.items()},
      "torch_time_over_jax_time": {
        side: round(taken[side] / taken["jax"], 3) for side in ("torch", "torch.compile")
      },
    }
  return result


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--widths", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
  parser.add_argument("--seconds", type=float, default=300.0, help="most time for a size")
  args = parser.parse_args()
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  report = {
    "command": f"python benchmarks/decoder_step.py {' '.join(sys.argv[1:])}".strip(),
    "device": f"{torch.get_num_threads()} CPU cores, {platform.processor() or platform.machine()}",
    "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "torch")},
    "python": platform.python_version(),
    "sizes": [],
  }
  for width in args.widths:
    result = measure(width, args.seconds)
    report["sizes"].append(result)
    found = [name for name in STATISTICS if name in result]
    cells = (f"{name} {result[name]['torch_time_over_jax_time']}" for name in found)
    print(f"d {width}, {result['rounds']} rounds:", "; ".join(cells), flush=True)
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  main()
