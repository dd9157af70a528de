"""Ctrl-C and SIGTERM: save after the chunk, or leave at once where there is nothing to save."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

# Seconds the main thread gets to leave by itself; while XLA compiles it cannot even notice.
GRACE = 1.0


class InterruptedRunError(RuntimeError):
  """A signal stopped the run after its state was saved; `signum` is the signal."""

  def __init__(self, signum: int, step: int, path):
    self.signum = signum
    super().__init__(
      f"stopped by {signal.Signals(signum).name} at step {step}; saved in {path}: "
      "the same command goes on from here"
    )


class InterruptedPartsError(InterruptedRunError):
  """A signal stopped a job whose parts are trained by other processes."""

  def __init__(self, signum: int, missing: int):
    self.signum = signum
    RuntimeError.__init__(
      self,
      f"stopped by {signal.Signals(signum).name}, {missing} parts not finished: the same command "
      "goes on from their checkpoints",
    )


class StopRequest:
  """What the signals asked for.

  Attributes:
    caught: the signals so far.
  """

  def __init__(self):
    self.caught: list[int] = []
    self.heeded = threading.Event()

  def heed(self) -> None:
    """The main thread leaves by itself; from now on it takes the time it needs."""
    self.heeded.set()


@contextlib.contextmanager
def stop_signals(is_saved: Callable[[], bool] | None = None):
  """Collects Ctrl-C and SIGTERM instead of dying; a second Ctrl-C interrupts at once.

  SIGTERM with nothing unsaved ends the process within `GRACE` seconds, or when the running save is
  over, in the middle of a compilation too, with exit code 143, unless the main thread has heeded
  it. Only for the main thread.

  Args:
    is_saved: tells whether all that is done has been saved, from another thread; None never to end
      like this, as where other processes take part, which would lose one.

  Yields:
    `StopRequest`.
  """
  stop = StopRequest()

  def handler(signum, frame):
    if stop.caught and signum == signal.SIGINT:
      raise KeyboardInterrupt
    stop.caught.append(signum)
    print(f"{signal.Signals(signum).name}: stopping after this chunk", file=sys.stderr)

  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  # Handlers run between two lines of Python only; the number of the signal is written at once.
  old_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
  watcher = threading.Thread(target=_watch, args=(reader, stop.heeded, is_saved), daemon=True)
  watcher.start()
  try:
    yield stop
  finally:
    stop.heed()
    for number, previous in old.items():
      signal.signal(number, previous)
    signal.set_wakeup_fd(old_fd)
    os.close(writer)
    watcher.join()
    os.close(reader)


def _watch(reader: int, heeded: threading.Event, is_saved: Callable[[], bool] | None) -> None:
  """Ends the process after a SIGTERM that the main thread does not heed, if that loses nothing."""
  while number := os.read(reader, 1):
    if is_saved is None or number[0] != signal.SIGTERM:
      continue
    while not heeded.wait(GRACE):
      if is_saved():  # or may be so in a moment: a save takes its time
        print(
          "stopped by SIGTERM, nothing to save: the same command goes on from the last checkpoint",
          file=sys.stderr,
          flush=True,
        )
        os._exit(128 + signal.SIGTERM)
