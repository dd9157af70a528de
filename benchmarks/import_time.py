"""What `import balance_jax` adds to `import jax`, each in fresh processes.

Sides alternate, one process each. Medians of the seconds that the import statement takes are
compared: on the clock, and of CPU time, which other work on the machine disturbs less.
`import balance_jax` loads its sub-packages when they are first used, so the method families, which
an engineer imports into a loop of their own, are measured as well.

Command: python benchmarks/import_time.py --out benchmarks/results/import_time.json
About two minutes on two cores.
"""

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys
from importlib import metadata

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLOCKS = ("clock", "CPU")
STATEMENTS = {
  "jax": "import jax",
  "balance_jax": "import jax, balance_jax",
  "method families": "import jax; from balance_jax import gradients, losses, mixing",
  "all sub-packages": "import jax; from balance_jax import *",
}


def import_seconds(statement):
  """(clock, CPU) seconds that a statement takes in a new process that has imported nothing."""
  now = "(time.perf_counter(), time.process_time())"
  code = f"import time; start = {now}; {statement}; end = {now}; print(*start, *end)"
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  clock, cpu, clock_end, cpu_end = map(float, done.stdout.split())
  return clock_end - clock, cpu_end - cpu


def measure(repeats):
  """Clock -> statement -> seconds; a first round, not counted, fills the caches of files."""
  times = {clock: {name: [] for name in STATEMENTS} for clock in CLOCKS}
  for turn in range(repeats + 1):
    for name, statement in STATEMENTS.items():
      for clock, seconds in zip(CLOCKS, import_seconds(statement), strict=True):
        if turn:
          times[clock][name].append(seconds)
  return times


def main():
  """Parses the flags, measures, prints and writes the JSON file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", default="benchmarks/results/import_time.json")
  parser.add_argument("--repeats", type=int, default=15)
  args = parser.parse_args()
  times = measure(args.repeats)
  medians = {
    clock: {name: statistics.median(values) for name, values in by_name.items()}
    for clock, by_name in times.items()
  }
  ratios = {
    clock: {name: median / by_name["jax"] for name, median in by_name.items()}
    for clock, by_name in medians.items()
  }
  for name, statement in STATEMENTS.items():
    figures = (f"{c} {medians[c][name]:.3f} s, {ratios[c][name]:.3f} x jax" for c in CLOCKS)
    print(f"{name:18s}{'; '.join(figures)}   {statement}")
  result = {
    "benchmark": "import_time",
    "command": " ".join(["python", *sys.argv]),
    "settings": {"repeats": args.repeats},
    "statements": STATEMENTS,
    "median_seconds": medians,
    "ratio_to_jax": ratios,
    "seconds": times,
    "machine": platform.machine(),
    "versions": {"python": platform.python_version()}
    | {name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
  }
  out = pathlib.Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
