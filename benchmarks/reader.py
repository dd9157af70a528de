"""Training from files larger than memory: `data.GroupReader` against the device table.

Memory: a process of its own trains on a corpus of ArrayRecord files. Once it has compiled, the
kernel allows it only `--allowed` megabytes more of memory (RLIMIT_DATA), a fraction of the corpus.

Speed: the quickstart's decoder with its batch of 32 rows, a chunk of 50 steps a program. The device
table holds as many rows of 65 tokens; a record on disk holds 16 KiB, of which the model reads the
first 65 tokens, so the reader moves 250 times the bytes that the quickstart needs. Turns alternate
in one process. Reported: table / reader, and the share of the time that the device waited for rows,
with and without the first chunk of a turn, whose reading nothing can hide.

Command: python benchmarks/reader.py
About five minutes on two cores; writes 1.3 GB into a temporary folder.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile

import common
import jax
import numpy as np
import optax
import workloads
from array_record.python import array_record_data_source, array_record_module

from balance_jax import data, mixing, training

SHARES = (20, 5, 1, 0.2)  # of the groups, as in the other benchmarks
TOKENS = 65  # of a row of the quickstart
MEGABYTE = 2**20


class Documents:
  """Records of one ArrayRecord file as rows {"tokens": uint8 (bytes,)}."""

  def __init__(self, path):
    self._records = array_record_data_source.ArrayRecordDataSource(str(path))

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    return self.__getitems__([index])[0]

  def __getitems__(self, indices):
    records = self._records.__getitems__(indices)
    return [{"tokens": np.frombuffer(record, np.uint8)} for record in records]


def write_corpus(directory, megabytes, record_bytes):
  """One file a group; the sizes are in the proportions of `SHARES`."""
  rng = np.random.default_rng(0)
  rows = megabytes * MEGABYTE / record_bytes / sum(SHARES)
  for group, share in enumerate(SHARES):
    path = directory / f"group{group}.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for _ in range(int(rows * share)):
      writer.write(rng.bytes(record_bytes))
    writer.close()


def open_corpus(directory):
  return {path.stem: Documents(path) for path in sorted(directory.glob("*.array_record"))}


def make_run(table, batch_size, mixer=None):
  """(step, state) of the quickstart's decoder on the first tokens of each row."""
  per_example_loss, init_params, _ = workloads.quickstart_decoder()

  def loss(params, rows, key):
    return per_example_loss(params, {"tokens": rows["tokens"][:, :TOKENS]}, key)

  mixer = mixing.temperature(table.sizes, 5.0) if mixer is None else mixer
  step = training.make_step(
    loss, optax.adam(1e-3), mixer, table, batch_size=batch_size, metrics=("loss", "mixture")
  )
  state = training.init_state(jax.random.key(0), init_params(jax.random.key(1)), step)
  return step, state


def turns(table, args, mixer=None):
  """(a call that trains `args.steps` steps, the histories of its calls)."""
  step, state = make_run(table, args.batch, mixer)
  histories = []

  def turn():
    nonlocal state
    state, history = training.run(step, state, args.steps, chunk=args.chunk)
    histories.append(history)

  return turn, histories


def share_waited(histories, skip=0):
  """Share of the time that the device waited for rows, of each turn but the warm-up.

  Args:
    histories: of the turns.
    skip: steps at the start of a turn that do not count.
  """
  seconds = ("data_seconds", "compute_seconds")
  sums = [[history[name][skip:].sum() for name in seconds] for history in histories[1:]]
  return [float(waited / (waited + computed)) for waited, computed in sums]


def learning(sizes, chunk):
  """A mixer that follows the measured second moments of the gradients, two chunks late."""
  return mixing.delayed(mixing.temperature(sizes, 5.0, draw="optimal"), 2 * chunk)


def measure_speed(directory, args):
  """Turns of the device table, of the reader, and of the reader with a mixer that learns."""
  sources = open_corpus(directory)
  # The table gets as many rows of its own; of the bytes on disk it needs these alone.
  rng = np.random.default_rng(0)
  table = data.GroupTable.from_rows(
    {
      name: {"tokens": rng.integers(256, size=(len(source), TOKENS), dtype=np.uint8)}
      for name, source in sources.items()
    }
  )
  reader = data.GroupReader(sources, workers=args.workers)
  made = {
    "table": turns(table, args),
    "reader": turns(reader, args),
    "reader_learning": turns(reader, args, learning(reader.sizes, args.chunk)),
    "table_learning": turns(table, args, learning(reader.sizes, args.chunk)),
  }
  times = common.alternate({name: turn for name, (turn, _) in made.items()}, args.repeats)
  seconds = {name: value / args.steps for name, value in common.medians(times).items()}
  result = {"seconds_per_step": seconds}
  for name in ("reader", "reader_learning"):
    ratio = common.paired_ratio(times, name.replace("reader", "table"), name)
    histories = made[name][1]
    waited, later = share_waited(histories), share_waited(histories, args.chunk)
    result[name] = {
      "rate_against_table": ratio,
      "share_waited": waited,
      "share_waited_after_the_first_chunk": later,
    }
    print(
      f"{name:16} {seconds[name] * 1e3:6.2f} ms a step, {ratio['median']:.2f} of the table's rate "
      f"({ratio['min']:.2f} to {ratio['max']:.2f}); device waited {max(waited):.2%} at most, "
      f"{max(later):.2%} after the first chunk"
    )
  return result


def read_within(directory, args):
  """In a process of its own: trains on the whole corpus in little memory, prints what it took."""
  reader = data.GroupReader(open_corpus(directory), workers=args.workers)
  turn, _ = turns(reader, args, mixing.proportional(reader.sizes))
  turn()  # compiles
  status = dict(
    line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines()
  )
  limit = int(status["VmData"].split()[0]) * 1024 + args.allowed * MEGABYTE
  resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
  resident = int(status["VmRSS"].split()[0]) / 1024
  rows, target = 0, sum(reader.group_sizes)
  while rows < target:  # as many rows as the corpus has
    turn()
    rows += args.steps * args.batch
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  print(json.dumps({"megabytes_before": resident, "megabytes_peak": peak, "rows_read": rows}))


def measure_memory(directory, args):
  """Runs `read_within` and judges what it says."""
  flags = [f"--{name}={getattr(args, name)}" for name in ("batch", "chunk", "steps", "workers")]
  command = [sys.executable, __file__, f"--within={directory}", f"--allowed={args.allowed}", *flags]
  done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
  if done.returncode:
    raise SystemExit(f"training within {args.allowed} MB failed:\n{done.stderr[-3000:]}")
  found = json.loads(done.stdout.splitlines()[-1])
  files = sum(path.stat().st_size for path in directory.glob("*.array_record")) / MEGABYTE
  growth = found["megabytes_peak"] - found["megabytes_before"]
  result = {
    **found,
    "megabytes_corpus": files,
    "megabytes_allowed": args.allowed,
    "megabytes_growth": growth,
    "corpus_over_allowed": files / args.allowed,
  }
  print(
    f"memory           grew by {growth:.0f} MB in reading {files:.0f} MB, "
    f"{files / args.allowed:.1f} times the {args.allowed} MB allowed"
  )
  return result


def main():
  """Writes the corpus, measures, prints and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--megabytes", type=int, default=1300, help="of the corpus")
  parser.add_argument("--record_bytes", type=int, default=16384)
  parser.add_argument("--allowed", type=int, default=300, help="megabytes of memory")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--chunk", type=int, default=50)
  parser.add_argument("--steps", type=int, default=250, help="of a turn")
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--within", default="", help="internal: train on this corpus and report")
  parser.add_argument("--out", default="")
  args = parser.parse_args()
  if args.within:
    read_within(pathlib.Path(args.within), args)
    return
  with tempfile.TemporaryDirectory() as directory:
    write_corpus(pathlib.Path(directory), args.megabytes, args.record_bytes)
    memory = measure_memory(pathlib.Path(directory), args)
    speed = measure_speed(pathlib.Path(directory), args)
  packages = ("jax", "optax", "numpy", "array_record")
  common.write("reader", {"memory": memory, "speed": speed}, packages, args.out)


if __name__ == "__main__":
  main()
