"""Several processes that run one program together: how they start, agree and end.

Process 0 alone writes config, logs, results and report; all of them save checkpoints, into a folder
that they share.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from balance_jax.training.config import cache_directory

# Seconds without a sign of life after which a process counts as dead, and all the others end.
HEARTBEAT = 100

# Seconds that process 0 gives the others to say what they know of a failure.
LAST_WORDS = 3.0


class OtherProcessError(RuntimeError):
  """Another process failed; its own message says why."""


class StartError(ValueError):
  """The processes could not be joined; the message says what is wrong or missing."""


def set_up(cpu_devices: int) -> None:
  """Settings of JAX in every process that trains; before the first use of a device.

  Args:
    cpu_devices: how many devices the CPU counts as; the runs of a sweep go to separate ones.
  """
  jax.config.update("jax_num_cpu_devices", cpu_devices)
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", cache_directory("compiled"))


def start(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Joins the other processes; before the first use of a device.

  Args:
    coordinator: host:port of process 0, the same for all; None to ask the cluster (Cloud TPU,
      SLURM, Open MPI, Kubernetes).
    num_processes: how many there are, >= 1; None to ask the cluster.
    process_id: which one this is, from 0; None to ask the cluster.

  Raises:
    StartError: some of them without the others, or no cluster that could be asked.
  """
  given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if 0 < len(missing) < len(given):
    raise StartError(f"{', '.join(missing)} missing; give all of --{', --'.join(given)}, or none")
  if not missing and not 0 <= process_id < num_processes:
    raise StartError(f"process_id is {process_id}; allowed: 0 to {num_processes - 1}")
  try:
    jax.distributed.initialize(
      coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT
    )
  except (ValueError, RuntimeError) as error:
    raise StartError(
      f"the processes did not find each other ({error}); give --coordinator, --num_processes and "
      "--process_id where the cluster is not one that can be asked"
    ) from error


def is_main() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """A line on standard error, of process 0."""
  if is_main():
    print(text, file=sys.stderr)


def any_process(flag: bool) -> bool:
  """Whether the flag is set in at least one process; all must ask together."""
  if jax.process_count() == 1:
    return flag
  from jax.experimental import multihost_utils

  return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def wait_for_all() -> None:
  """Until every process has come here."""
  any_process(False)


def on_main(fn: Callable, *args) -> Any:
  """fn(*args) in process 0, while the others wait.

  Returns:
    What fn returned, in process 0; None elsewhere.

  Raises:
    OtherProcessError: in the others, where fn raised; process 0 has what it raised.
  """
  result, error = None, None
  if is_main():
    try:
      result = fn(*args)
    except Exception as raised:  # told to the others first, who would wait for ever
      error = raised
  failed = any_process(error is not None)
  if error is not None:
    raise error
  if failed:
    raise OtherProcessError("process 0 stopped; its message says why")
  return result


def leave(code: int) -> int:
  """Ends this process after a failure, where there are others; otherwise gives the code back.

  An orderly end would wait for the others, who wait for this one where they do not know of it. With
  process 0 the meeting point of all goes, and JAX aborts whoever is left: so it leaves last.
  """
  if jax.process_count() > 1:
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
      time.sleep(LAST_WORDS)
    os._exit(code)
  return code


class Silent:
  """In place of a log or a progress line in all processes but 0."""

  def write(self, records) -> None:
    pass

  def update(self, step, means) -> None:
    pass

  def sync(self) -> None:
    pass

  def is_empty(self) -> bool:
    return False

  def __enter__(self) -> "Silent":
    return self

  def __exit__(self, *exc_info) -> None:
    pass
