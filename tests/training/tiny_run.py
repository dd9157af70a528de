"""The quickstart at a size of seconds on two made-up languages, here or in a process of its own."""

import contextlib
import importlib.util
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np

from balance_jax.training.config import resolve

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def load_config(path=None):
  path = path or next(p for p in CONFIGS if p.stem == "quickstart")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def tiny(**changes):
  """The resolved config; changes are given as optimizer__learning_rate=...

  The moments of the gradient would be measured for the first time after the last step.
  """
  config = load_config()
  config.data.languages = ("big", "small")
  config.data.window = 8
  config.model.update(width=8, depth=1, heads=2)
  config.train.update(
    steps=12, chunk=4, batch_size=4, eval_every=4, checkpoint_every=8, variance_every=16,
    measure_every=4, variance_examples=2, variance_batches=2,
  )  # fmt: skip
  config.methods = ("temperature_5", "optimal_5", "cooldown")
  config.seeds = (0, 1)
  config.parallel = "map"  # compiles fastest; the ways to map runs have their own tests
  for name, value in changes.items():
    *sections, key = name.split("__")
    section = config
    for part in sections:
      section = section[part]
    section[key] = value
  return resolve(config)


def load_documents(source, split, *, languages, **kwargs):
  """Stands in for `data.load_documents`."""
  words = {"big": ["alpha", "beta", "gamma", "delta"], "small": ["uno", "due", "tre"]}
  rng = np.random.default_rng(len(split))
  size = {"big": 400, "small": 30} if split == "train" else {"big": 30, "small": 30}
  return {name: [" ".join(rng.choice(words[name], size[name]))] for name in languages}


# Processes are forked from one that has imported everything, but has not used a device.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
  ["balance_jax.main", "balance_jax.models", "orbax.checkpoint", "matplotlib.figure", __name__]
)


def start(path, prepare=None, flags=(), log="", **changes):
  """Runs the command line on the tiny config in a process of its own.

  Args:
    path: the workdir; what the process says goes to the files path.out and path.err beside it.
    prepare: called in that process first; picklable.
    flags: of the command line, beside config and workdir.
    log: put before .out and .err, to tell several processes apart.
    **changes: as for `tiny`.

  Returns:
    The started process.
  """
  arguments = Path(path), prepare, flags, log, changes
  process = _PROCESSES.Process(target=_command, args=arguments, daemon=True)
  process.start()
  return process


def finish(path, prepare=None, **changes) -> tuple[int, str]:
  """As `start`, to the end: (exit code, standard error)."""
  process = start(path, prepare, **changes)
  process.join(timeout=300)
  assert process.exitcode is not None, "the process hangs"
  return process.exitcode, Path(f"{path}.err").read_text()


def _command(path: Path, prepare, given, log, changes) -> None:
  for number, suffix in ((1, "out"), (2, "err")):
    with open(f"{path}{log}.{suffix}", "wb") as file:
      os.dup2(file.fileno(), number)
  import jax
  from absl import flags

  from balance_jax import data, main
  from balance_jax.training import config

  data.load_documents = load_documents
  config.parse_flags = lambda *_: (tiny(**changes), str(path))
  flags.FLAGS(["", *given])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  if prepare is not None:
    prepare()
  sys.exit(main.main([""]))


@contextlib.contextmanager
def files_of_at_most(size: int):
  """Inside of it no file can grow beyond `size` bytes, whichever thread writes: a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:  # standard error is a file, too
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def on_file_events(path, do, *args) -> None:
  """do(count, *args) before everything Python opens, makes, renames or removes below `path`."""
  watched = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
  count = 0

  def hook(event, event_args):
    nonlocal count
    # A file may also be opened by its number.
    if event in watched and str(event_args[0]).startswith(f"{path}/"):
      count += 1
      do(count, *args)

  sys.addaudithook(hook)  # cannot be taken away, so only in a process of its own


def kill_at(count: int, wanted: int) -> None:
  if count == wanted:
    os.kill(os.getpid(), signal.SIGKILL)


def note(count: int, file) -> None:
  Path(file).write_text(str(count))
