"""A window of steps whose chunks are traced by JAX's profiler: `config.profile`, such as "100:110".

The trace of a process lies below `profile/process_0` (its own number) in the folder of the arm, or
of the part, to be read with XProf or Perfetto; see docs/metrics.md. Each of them has its trace, as
each is a program of its own.
"""

import contextlib
import re
from pathlib import Path

import jax

from balance_jax.training import hosts


def parse_window(text: str, num_steps: float) -> range | None:
  """The steps that `config.profile` names.

  Args:
    text: "A:B" for the steps A to B - 1, counted from 0; "" for none.
    num_steps: those of the run; infinity where another run has been asked before.

  Raises:
    ValueError: another form, an empty window, or one that leaves the run.
  """
  if not text:
    return None
  match = re.fullmatch(r"(\d+):(\d+)", text)
  if match is None:
    raise ValueError(f"profile is {text!r}; expected the form 100:110, or nothing")
  window = range(*map(int, match.groups()))
  if not window:
    raise ValueError(f"profile is {text!r}, which holds no step; expected A:B with A < B")
  if window.stop > num_steps:
    raise ValueError(f"profile is {text!r}; allowed: up to {num_steps}, the steps of the run")
  return window


class Profile:
  """Traces the chunks that hold a step of the window; use it as a context manager.

  However it is left, a trace that has begun is written; a process that a signal ends in the middle
  of a chunk (see `signals`) does not leave it. What the profiler cannot do is said, and the
  training goes on without it.

  Args:
    window: the steps, or None; those after the last step of this arm are left out.
    folder: of the arm.
    done: steps done before.
    steps: of the arm.
    chunk: steps of a chunk.
  """

  def __init__(self, window: range | None, folder: Path, *, done: int, steps: int, chunk: int):
    self._folder = folder / "profile" / f"process_{jax.process_index()}"
    self._chunk, self._began = chunk, None
    first, last = (0, -1) if window is None else (window[0], min(window[-1], steps - 1))
    # In whole chunks; steps [start, stop).
    self._start, self._stop = first // chunk * chunk, (last // chunk + 1) * chunk
    if window is not None and first >= steps:
      hosts.say(f"profile: no step {first} here, the last one is {steps - 1}; nothing is traced")
    elif window is not None and self._stop <= done:
      hosts.say(f"profile: step {last} has passed before step {done}; nothing is traced")

  @contextlib.contextmanager
  def chunk(self, done: int):
    """Around the chunk that begins after `done` steps."""
    if self._began is None and self._start <= done < self._stop:
      self._begin(done)
    with jax.profiler.StepTraceAnnotation("chunk", step_num=done):
      yield
    if done + self._chunk >= self._stop:
      self.close(done + self._chunk)

  def _begin(self, done: int) -> None:
    try:
      jax.profiler.start_trace(self._folder)
      self._began = done
    except (RuntimeError, OSError) as error:
      self._give_up(error)

  def close(self, done: int | None = None) -> None:
    """Writes a trace that has begun; `done` steps are complete, or None where one broke off."""
    if self._began is None:
      return
    began, self._began = self._began, None
    try:
      jax.profiler.stop_trace()
    except (RuntimeError, OSError) as error:
      return self._give_up(error)
    steps = f"from {began} on, broken off," if done is None else f"{began} to {done - 1}"
    hosts.say(f"profile: steps {steps} are traced in {self._folder}")

  def _give_up(self, error: Exception) -> None:
    self._stop = 0
    hosts.say(f"profile: {str(error).splitlines()[0]}; going on without a trace")

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()
