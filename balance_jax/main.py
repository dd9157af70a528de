"""Command line: python -m balance_jax.main --config=configs/NAME.py --workdir=DIR [--config.a.b=v].

Exit codes: 0 finished, 2 bad input or a run that cannot go on (one line says why), 128 + n stopped
by signal n with its state saved.
"""

import os
import sys

from absl import flags
from ml_collections import config_flags

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The experiment; see configs/.", lock_config=True)
flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics, results and report.")


def parse(argv: list[str]) -> tuple[dict, str]:
  """Flags -> (resolved config as plain nested dicts, workdir); ValueError for bad ones."""
  from balance_jax.training.config import resolve

  try:
    rest = FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
    # The message itself, as str() of a KeyError is its repr; ml_collections nests them.
    message = error
    while isinstance(message, BaseException) and message.args:
      message = message.args[0]
    raise ValueError(" ".join(str(message).split())) from error
  if rest[1:]:
    raise ValueError(f"unexpected argument {rest[1]!r}; flags start with --")
  for name in ("config", "workdir"):
    if FLAGS[name].value is None:
      raise ValueError(f"--{name} is missing; usage: {__doc__.splitlines()[0]}")
  return resolve(FLAGS.config), FLAGS.workdir


def main(argv: list[str] | None = None) -> int:
  """Runs one experiment; returns the exit code."""
  import jax

  # Runs of a sweep go to separate CPU devices; must be said before the first use of a device.
  jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
  from balance_jax import data, training
  from balance_jax.training import experiment

  try:
    config, workdir = parse(sys.argv if argv is None else argv)
    experiment.run_experiment(config, workdir)
  except experiment.InterruptedRunError as stop:
    print(stop, file=sys.stderr)
    return 128 + stop.signum
  except (
    ValueError,
    OSError,
    ImportError,
    data.DatasetNotInstalledError,
    data.CorruptedDataError,
    training.TrainingDivergedError,
  ) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
