"""The command line in fresh processes: exit codes, one line of error, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def command(workdir, *flags, config="configs/quickstart.py"):
  arguments = [f"--config={config}"] if config else []
  arguments += [f"--workdir={workdir}"] if workdir else []
  return subprocess.run(
    [sys.executable, "-m", "balance_jax.main", *arguments, *flags],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )


@pytest.mark.parametrize(
  ("kwargs", "flags", "message"),
  [
    ({}, ["--config.optimizer.lerning_rate=1"], 'Did you mean "learning_rate"'),
    ({}, ["--config.train.steps=many"], "--config.train.steps=many"),
    ({}, ["--confg=3"], "Unknown command line flag 'confg'. Did you mean: config"),
    ({}, ["surplus"], "unexpected argument 'surplus'"),
    ({"config": None}, [], "--config is missing"),
    ({"config": "configs/none.py"}, [], "configs/none.py"),
    ({}, ["--config.methods=('unifrom',)"], "did you mean 'uniform'"),
  ],
)
def test_bad_command_lines(tmp_path, kwargs, flags, message):
  done = command(tmp_path / "run", *flags, **kwargs)
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr.startswith("error: ")
  assert len(done.stderr.splitlines()) == 1
  assert message in done.stderr
  assert not (tmp_path / "run").exists()


def test_a_small_run_on_real_data(tmp_path):
  """The command of the README at a tiny size, with the data from the installed package."""
  pytest.importorskip("tensorflow_datasets")
  try:
    from importlib.metadata import distribution

    distribution("plone.app.locales")
  except ImportError:
    pytest.skip("needs the [data] extra: pip install 'balance_jax[data]'")
  sizes = {
    "model.width": 8, "model.depth": 1, "model.heads": 2, "seeds": "(0,)",
    "train.steps": 4, "train.chunk": 2, "train.eval_every": 4, "train.checkpoint_every": 4,
    "train.batch_size": 4, "train.variance_every": 4, "train.variance_batches": 2,
    "train.variance_examples": 2,
  }  # fmt: skip
  small = [f"--config.{name}={value}" for name, value in sizes.items()]
  methods = "--config.methods=('temperature_5','scalarization_5')"
  done = command(tmp_path / "run", *small, methods)
  assert done.returncode == 0, done.stderr
  assert "temperature_5" in done.stdout
  assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
  again = command(tmp_path / "run", *small, methods)
  assert again.returncode == 0
  assert "finished before" in again.stdout


def test_a_dry_run_needs_no_data_and_no_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  sizes = "--config.sizes=((8,1,2),)"
  done = command(None, "--dry_run", sizes, config="configs/lr_sensitivity.py")
  assert done.returncode == 0, done.stderr
  assert "qk_norm-w8-d1" in done.stdout
  assert "FLOPs a step" in done.stdout
  assert "Data not installed: shapes only" in done.stdout
  assert not list(tmp_path.iterdir())
