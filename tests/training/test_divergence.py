"""Numbers that are not finite: stop, or go back and take another way. Data are synthetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import data
from balance_jax.training import TrainingDivergedError, byte_text, experiment, loop
from balance_jax.training.checkpoint import Checkpointer
from balance_jax.training.metric_log import read_records
from tests.training.tiny_run import load_documents, tiny

ONE_METHOD = {"methods": ("temperature_5",), "train__checkpoint_every": 4}
cross_entropy_loss = byte_text.cross_entropy_loss


@pytest.fixture(autouse=True)
def documents(monkeypatch):
  monkeypatch.setattr(data, "load_documents", load_documents)


def poison(monkeypatch, rate):
  """Makes the loss NaN in a share of the steps, which depend on the key of the run."""

  def poisoned(decoder):
    clean = cross_entropy_loss(decoder)

    def per_example_loss(params, rows, key):
      bad = jax.random.uniform(jax.random.fold_in(key, 5)) < rate
      return clean(params, rows, key) * jnp.where(bad, jnp.nan, 1.0)

    return per_example_loss

  monkeypatch.setattr(byte_text, "cross_entropy_loss", poisoned)


def run(path, **changes):
  experiment.run_experiment(tiny(**ONE_METHOD, **changes), path)
  return read_records(path / "metrics.jsonl")


def of_seed(records, seed, event=None):
  return [r for r in records if r["seed"] == seed and event in (None, r["event"])]


def test_rolling_back_takes_another_way_in_the_run_that_diverged_only(
  tmp_path, monkeypatch, capsys
):
  poison(monkeypatch, 0.0)
  clean = run(tmp_path / "clean", train__max_rollbacks=4)
  poison(monkeypatch, 0.08)
  records = run(tmp_path / "poisoned", train__max_rollbacks=4)
  told = [r for r in records if r["event"] == "rollback"]
  print(told)
  print(capsys.readouterr().err)
  assert 0
