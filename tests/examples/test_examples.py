"""The examples run and show what they claim."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
  spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_mixer_in_your_loop():
  results = load("mixer_in_your_loop").main(steps=60)
  for losses in results.values():
    assert losses[0] < 1.0  # from log 3 = 1.1 at the start
  assert results["target"] != results["natural"]


def test_weighted_loss_on_devices():
  errors = load("weighted_loss_on_devices").main()
  wrong = errors.pop("mean of means (wrong)")
  assert set(errors) == {"jit", "shard_map", "pmap"}
  assert max(errors.values()) < 1e-5
  assert wrong > 0.05


def test_custom_mixer():
  p = load("custom_mixer").main()
  assert p[0, 1] == pytest.approx(0.5)
  assert p[-1, 1] > 0.55  # the group that cannot be learned ends above average


def test_examples_run_as_scripts():
  """One of them as a user starts it; it makes its own eight devices."""
  done = subprocess.run(
    [sys.executable, str(EXAMPLES / "weighted_loss_on_devices.py")],
    capture_output=True, text=True, cwd=EXAMPLES.parent, timeout=120,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("relative error") == 4


def test_will_it_break():
  found = load("will_it_break").main(steps=60)
  assert found[True]["sensitivity"] > 0.0
  without, with_norm = (found[key]["report"].max_logit for key in (False, True))
  assert without > 10 * with_norm
