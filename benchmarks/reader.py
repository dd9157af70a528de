"""Training from files larger than memory: `data.GroupReader` against the device table.

Memory: a process of its own trains on a corpus of ArrayRecord files. Once it has compiled, the
kernel allows it only `--allowed` megabytes more of memory (RLIMIT_DATA), a fraction of the corpus.
Another process has as little to cut the rows of a TFDS data set of this size with `data.load_rows`.

Speed: the quickstart's decoder with its batch of 32 rows, a chunk of 50 steps a program. The device
table holds as many rows of 65 tokens; a record on disk holds 16 KiB, of which the model reads the
first 65 tokens, so the reader moves 250 times the bytes that the quickstart needs. Turns alternate
in one process. Reported: table / reader, and the share of the time that the device waited for rows,
with and without the first chunk of a turn, whose reading nothing can hide.

Command: python benchmarks/reader.py
About seven minutes on two cores; writes 6 GB into a temporary folder.
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
  resident, rows, target = limit_memory(args), 0, sum(reader.group_sizes)
  while rows < target:  # as many rows as the corpus has
    turn()
    rows += args.steps * args.batch
  tell(resident, rows_read=rows)


def prepare_within(directory, args):
  """In a process of its own: cuts the rows of the data set in little memory."""
  # What is imported late counts as memory that is needed anyway.
  data.load_rows(directory / "small", "train", window=64, data_dir=directory / "rows")
  resident = limit_memory(args)
  reader = data.load_rows(directory / "large", "train", window=64, data_dir=directory / "rows")
  tell(resident, rows_written=sum(reader.group_sizes))


def limit_memory(args):
  """Allows this process `args.allowed` megabytes more; returns those that it has resident."""
  limit = int((memory("VmData") + args.allowed) * MEGABYTE)
  resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
  return memory("VmRSS")


def memory(kind):
  """Megabytes of this process, from the kernel; getrusage may give the peak of its parent."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(dict(line.split(":") for line in status.splitlines())[kind].split()[0]) / 1024


def tell(resident, **counts):
  """To the process that started this one."""
  print(json.dumps({"megabytes_before": resident, "megabytes_peak": memory("VmHWM"), **counts}))


def measure_memory(what, directory, pattern, args):
  """Runs `read_within` or `prepare_within` and judges what it says.

  Args:
    what: "train" or "prepare".
    directory: given to that process.
    pattern: of the files of the corpus below it.
    args: of the command line.
  """
  flags = [f"--{name}={getattr(args, name)}" for name in ("batch", "chunk", "steps", "workers")]
  command = [sys.executable, __file__, f"--within={what}:{directory}", f"--allowed={args.allowed}"]
  done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=1800)
  if done.returncode:
    raise SystemExit(f"{what} within {args.allowed} MB failed:\n{done.stderr[-3000:]}")
  found = json.loads(done.stdout.splitlines()[-1])
  files = sum(path.stat().st_size for path in directory.glob(pattern)) / MEGABYTE
  growth = found["megabytes_peak"] - found["megabytes_before"]
  result = {
    **found,
    "megabytes_corpus": files,
    "megabytes_allowed": args.allowed,
    "megabytes_growth": growth,
    "corpus_over_allowed": files / args.allowed,
  }
  print(
    f"memory, {what:8} grew by {growth:.0f} MB with {files:.0f} MB on disk, "
    f"{files / args.allowed:.1f} times the {args.allowed} MB allowed"
  )
  return result


def write_dataset(directory, megabytes, document_bytes):
  """A TFDS data set of documents of random letters, which do not compress well."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import shuffle

  # Beyond 1000 MB TFDS would sort the examples on disk, which takes TensorFlow.
  shuffle.MAX_MEM_BUFFER_SIZE = 2 * megabytes * MEGABYTE
  count = megabytes * MEGABYTE // document_bytes
  text = tfds.features.Text()

  class Corpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    name = "corpus"
    url_infos = {}  # noqa: RUF012

    def _info(self):
      features = tfds.features.FeaturesDict({"language": text, "text": text})
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      rng = np.random.default_rng(0)
      letters = np.frombuffer(bytes(range(32, 127)), np.uint8)
      groups = rng.choice(len(SHARES), count, p=np.array(SHARES) / sum(SHARES))
      for number, group in enumerate(groups):
        document = letters[rng.integers(len(letters), size=document_bytes)].tobytes().decode()
        yield number, {"language": f"group{group}", "text": document}

  tfds.disable_progress_bar()
  made = Corpus(data_dir=f"{directory}.made", file_format="array_record")
  made.download_and_prepare()
  made.data_path.rename(directory)


def measure_preparation(directory, args):
  """Writes a small and the large data set; rows of the large one are cut in little memory."""
  for name, megabytes in (("small", 1), ("large", args.megabytes)):
    write_dataset(directory / name, megabytes, args.document_bytes)
  return measure_memory("prepare", directory, "large/*.array_record*", args)


def main():
  """Writes the corpus, measures, prints and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--megabytes", type=int, default=1450, help="of the corpus")
  parser.add_argument("--record_bytes", type=int, default=16384)
  parser.add_argument("--allowed", type=int, default=300, help="megabytes of memory")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--chunk", type=int, default=50)
  parser.add_argument("--steps", type=int, default=250, help="of a turn")
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--document_bytes", type=int, default=4096, help="of the data set")
  parser.add_argument("--within", default="", help="internal: what to do in little memory, where")
  parser.add_argument("--out", default="")
  args = parser.parse_args()
  if args.within:
    what, _, directory = args.within.partition(":")
    {"train": read_within, "prepare": prepare_within}[what](pathlib.Path(directory), args)
    return
  result = {}
  with tempfile.TemporaryDirectory() as directory:
    result["preparation"] = measure_preparation(pathlib.Path(directory), args)
  with tempfile.TemporaryDirectory() as folder:
    directory, pattern = pathlib.Path(folder), "*.array_record"
    write_corpus(directory, args.megabytes, args.record_bytes)
    result["memory"] = measure_memory("train", directory, pattern, args)
    result["speed"] = measure_speed(directory, args)
  packages = ("jax", "optax", "numpy", "array_record", "tensorflow_datasets")
  common.write("reader", result, packages, args.out)


if __name__ == "__main__":
  main()
