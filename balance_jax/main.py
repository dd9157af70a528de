"""Command line: python -m balance_jax.main --config=configs/NAME.py --workdir=DIR [--config.a.b=v].
With --dry_run instead of --workdir: what it would train, its operations, memory, data and mixture.

Exit codes: 0 finished, 2 bad input or a run that cannot go on (one line says why), 128 + n stopped
by signal n with its state saved.
"""

import os
import sys

from absl import flags
from ml_collections import config_flags

config_flags.DEFINE_config_file(
  "config", None, "The experiment; see configs/. A Python file, which is run.", lock_config=True
)
flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics, results and report.")
flags.DEFINE_bool("distributed", False, "One of several processes of a cluster that can be asked.")
flags.DEFINE_string("coordinator", None, "host:port of process 0, where it cannot be asked.")
flags.DEFINE_integer("num_processes", None, "How many processes run this together.")
flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
flags.DEFINE_bool("dry_run", False, "Print sizes, operations, memory, mixture; train nothing.")


def main(argv: list[str] | None = None) -> int:
  """Runs one experiment; returns the exit code."""
  import jax

  from balance_jax.training import experiment, hosts
  from balance_jax.training.config import FlagsError, parse_flags
  from balance_jax.training.signals import InterruptedRunError

  hosts.set_up(os.cpu_count() or 1)
  try:
    config, workdir = parse_flags(flags.FLAGS, sys.argv if argv is None else argv)
    together = [flags.FLAGS[name].value for name in ("coordinator", "num_processes", "process_id")]
    if flags.FLAGS.distributed or together != [None] * 3:
      hosts.start(*together)
    if flags.FLAGS.dry_run:
      print(experiment.describe(config))
    else:
      experiment.run_experiment(config, workdir)
  except InterruptedRunError as stop:
    print(stop, file=sys.stderr)
    return 128 + stop.signum
  except (*experiment.FAILURES, FlagsError, hosts.StartError) as error:
    print(f"error: {error}", file=sys.stderr)
    return hosts.leave(2)
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    print(f"error: another process is gone ({str(error).splitlines()[0]})", file=sys.stderr)
    return hosts.leave(2)
  return 0


if __name__ == "__main__":
  sys.exit(main())
