"""What the benchmarks share: turns that alternate, medians, one shape of result file."""

import json
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata

RESULTS = pathlib.Path(__file__).parent / "results"


def alternate(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
  """Seconds of every call, the sides taking turns; a first round, not counted, warms up."""
  times = {name: [] for name in sides}
  for turn in range(repeats + 1):
    for name, call in sides.items():
      start = time.perf_counter()
      call()
      if turn:
        times[name].append(time.perf_counter() - start)
  return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
  """Median seconds by side."""
  return {name: statistics.median(values) for name, values in times.items()}


def paired_ratio(times: dict[str, list[float]], slow: str, fast: str) -> dict[str, float]:
  """Median, lowest and highest of slow / fast, turn by turn: drift of the machine cancels."""
  ratios = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
  return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def write(name: str, result: dict, packages: tuple[str, ...] = ("jax",), out: str = "") -> None:
  """Adds command, device and versions, and writes benchmarks/results/NAME.json (or `out`)."""
  import jax

  device = jax.devices()[0]
  result = {
    "benchmark": name,
    "command": " ".join(["python", *sys.argv]),
    **result,
    "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    "machine": platform.machine(),
    "versions": {"python": platform.python_version()}
    | {package: metadata.version(package) for package in packages},
  }
  path = pathlib.Path(out) if out else RESULTS / f"{name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=2) + "\n")
  print(f"wrote {path}")
