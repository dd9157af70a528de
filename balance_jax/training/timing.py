"""Where the time of a training goes: the stop-watch of the loop, and one line that sums it up.

All of it is read from `time.monotonic`, so that a clock that is set, or jumps, changes nothing.
"""

import contextlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

# What the time of a record "time" is divided into; see docs/metrics.md.
PARTS = ("data", "compile", "compute", "measure", "save", "other")
EVENT = "time"


class StopWatch:
  """Divides the time since it was made into `PARTS`, and tells how much came since the last record.

  What happens in no part is "other", so that the parts always sum to the whole.

  Args:
    inner: name of a part -> seconds so far; read, never changed. What it grows by during another
      part is its own and not the other's: compiling for an evaluation is "compile".
  """

  def __init__(self, inner: Mapping[str, float]):
    self._inner, self._began = inner, time.monotonic()
    self._spent = dict.fromkeys(PARTS, 0.0)
    # Step of a record -> what had been spent by then; a return to a checkpoint takes up from there.
    self._told: dict[int, dict[str, float]] = {}
    self._last = dict(self._spent)

  def elapsed(self) -> float:
    """Seconds since the watch was made."""
    return time.monotonic() - self._began

  @contextlib.contextmanager
  def part(self, name: str):
    """Counts what happens inside as `name`."""
    began, before = time.monotonic(), dict(self._inner)
    try:
      yield
    finally:
      seconds = time.monotonic() - began
      for own, earlier in before.items():
        # Never more than there was: waiting may have been measured by another thread.
        share = min(self._inner[own] - earlier, seconds)
        self._spent[own] += share
        seconds -= share
      self._spent[name] += seconds

  def record(self, step: int) -> dict[str, Any]:
    """The record "time" of `step`: seconds by part since the record before it in the file."""
    named = sum(seconds for name, seconds in self._spent.items() if name != "other")
    now = {**self._spent, "other": self.elapsed() - named}
    # To the microsecond; adding zero turns the -0.0 of a rounding error into 0.0.
    since = {name: round(now[name] - self._last[name], 6) + 0.0 for name in PARTS}
    self._told[step] = self._last = now
    return {"event": EVENT, "step": step, "seconds": round(sum(since.values()), 6), **since}

  def go_back(self, step: int | None) -> None:
    """The records after `step` are gone from the file, or all: the next one has their time, too."""
    self._last = self._told.get(step, dict.fromkeys(PARTS, 0.0))


def without_times(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """The records that are the same in every run of a config: all but those of `EVENT`."""
  return [record for record in records if record.get("event") != EVENT]


def time_line(records: Iterable[Mapping[str, Any]]) -> str | None:
  """The shares of all parts over all records, the largest first; None where no time was recorded.

  >>> time_line([{"event": "time", "step": 5, "seconds": 2.0, **dict.fromkeys(PARTS, 0.0),
  ...             "compute": 1.875, "save": 0.125}])
  'compute 94 %, save 6 %'
  """
  times = [record for record in records if record.get("event") == EVENT]
  sums = {name: sum(record[name] for record in times) for name in PARTS}
  whole = sum(sums.values())
  if not whole:
    return None
  shares = sorted(((100 * value / whole, name) for name, value in sums.items()), reverse=True)
  return ", ".join(f"{name} {share:.0f} %" for share, name in shares if share >= 0.5)
