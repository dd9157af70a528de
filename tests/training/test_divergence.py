"""Numbers that are not finite: stop, or go back and take another way. Data are synthetic."""

import json

import jax
import jax.numpy as jnp
import pytest

from balance_jax import data
from balance_jax.training import TrainingDivergedError, byte_text, experiment, loop
from balance_jax.training.checkpoint import Checkpointer
from balance_jax.training.metric_log import read_records
from balance_jax.training.timing import without_times
from tests.training.tiny_run import load_documents, tiny

ONE_METHOD = {
  "methods": ("temperature_5",),
  "train__checkpoint_every": 4,
  "seeds": (0, 1, 2),
}
cross_entropy_loss = byte_text.cross_entropy_loss


class Killed(Exception):
  """Stands in for a kill between two chunks."""


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
  return without_times(read_records(path / "metrics.jsonl"))


def of_seed(records, seed):
  return [r for r in records if r["seed"] == seed and r["event"] != "moments"]


def test_going_back_changes_the_runs_that_diverged_and_no_other(tmp_path, monkeypatch):
  poison(monkeypatch, 0.0)
  clean = run(tmp_path / "clean", train__max_rollbacks=4)
  poison(monkeypatch, 0.06)
  records = run(tmp_path / "poisoned", train__max_rollbacks=4)
  told = [r for r in records if r["event"] == "rollback"]
  diverged = {r["seed"] for r in told}
  assert diverged  # otherwise this test says nothing: choose another rate
  assert diverged < {0, 1, 2}
  assert [r["rollback"] for r in told] == sorted(r["rollback"] for r in told)
  for record in told:
    assert record["metric"] == "loss"
    # It belongs to the first step that is done again.
    assert record["step"] % 4 == 1
    assert record["step"] - 1 <= record["diverged"] < record["step"] + 3
  for seed in (0, 1, 2):
    own = [r for r in of_seed(records, seed) if r["event"] != "rollback"]
    assert (own == of_seed(clean, seed)) == (seed not in diverged)
    assert [r["step"] for r in own] == [r["step"] for r in of_seed(clean, seed)]
    assert all(r["loss"] is not None for r in own if r["event"] == "train")
  # Killed in the second chunk and started again, it goes the same way, and counts on.
  group_means, calls = loop.group_means, []

  def kill_in_the_second(*args):
    calls.append(args)
    if len(calls) == 2:
      raise Killed
    return group_means(*args)

  monkeypatch.setattr(loop, "group_means", kill_in_the_second)
  with pytest.raises(Killed):
    run(tmp_path / "killed", train__max_rollbacks=4)
  assert run(tmp_path / "killed", train__max_rollbacks=4) == records


def test_the_number_of_returns_is_limited_and_the_last_good_state_kept(tmp_path, monkeypatch):
  poison(monkeypatch, 1.0)
  with pytest.raises(TrainingDivergedError, match="seed 0 is not finite at step 0"):
    run(tmp_path, train__max_rollbacks=2)
  records = read_records(tmp_path / "metrics.jsonl")
  told = [(r["rollback"], r["seed"]) for r in records if r["event"] == "rollback"]
  assert told == [(number, seed) for number in (1, 2) for seed in (0, 1, 2)]
  with Checkpointer(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.latest_step() == 0
  with pytest.raises(experiment.BadInputError, match=r"train\.max_rollbacks is -1"):
    run(tmp_path / "wrong", train__max_rollbacks=-1)


def test_bad_steps_are_left_out_up_to_a_limit(tmp_path, monkeypatch):
  poison(monkeypatch, 0.0)
  clean = run(tmp_path / "clean", train__max_skips=3)
  assert {r["skipped"] for r in clean if r["event"] == "train"} == {0}
  poison(monkeypatch, 0.06)
  records = run(tmp_path / "poisoned", train__max_skips=3)
  counts = {seed: sum(r.get("skipped", 0) for r in of_seed(records, seed)) for seed in (0, 1, 2)}
  assert 0 in counts.values()  # otherwise this test says nothing: choose another rate
  assert 0 < max(counts.values()) <= 3
  for seed, count in counts.items():
    assert (of_seed(records, seed) == of_seed(clean, seed)) == (count == 0)
    assert all(r["loss"] is not None for r in of_seed(records, seed) if r["event"] == "train")
  # One less is not enough, also when it is interrupted between two of them and goes on.
  with pytest.raises(TrainingDivergedError, match=r"is not finite at step"):
    run(tmp_path / "fewer", train__max_skips=max(counts.values()) - 1)
  first = max(r["step"] for r in records if r.get("skipped"))
  monkeypatch.setattr(loop, "group_means", _killed_at(first))
  with pytest.raises(Killed):
    run(tmp_path / "killed", train__max_skips=3)
  assert run(tmp_path / "killed", train__max_skips=3) == records
  (extra,) = json.loads((tmp_path / "killed" / "checkpoints/12/extra/metadata").read_text())
  assert extra["skipped"] == list(counts.values())  # those before the kill count
  with pytest.raises(experiment.BadInputError, match=r"train\.max_skips is -1"):
    run(tmp_path / "wrong", train__max_skips=-1)


def _killed_at(step, original=loop.group_means):
  calls = []

  def group_means(arm, metrics):
    calls.append(step)
    if 4 * len(calls) == step:
      raise Killed
    return original(arm, metrics)

  return group_means


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
  """The step that breaks them has a finite loss and a finite gradient."""
  huge = {"learning_rate": 1e38, "weight_decay": 1e6, "warmup_fraction": 0.0}
  often = {"train__chunk": 1, "train__checkpoint_every": 1}
  config = tiny(**ONE_METHOD | often | {f"optimizer__{key}": x for key, x in huge.items()})
  with pytest.raises(TrainingDivergedError, match=r"a parameter of run .* at step 0"):
    experiment.run_experiment(config, tmp_path)
  with Checkpointer(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.latest_step() == 0


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
  run(tmp_path / "run")
  (tmp_path / "run" / "results.json").unlink()
  path = tmp_path / "run" / "config.json"
  path.write_text(path.read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.02'))
  for what in ("runs", "checkpoints"):
    with pytest.raises(experiment.BadInputError, match=f"the {what} .* those of another config"):
      run(tmp_path / "run", optimizer__learning_rate=0.02)
    (tmp_path / "run" / "finished.json").unlink(missing_ok=True)
  with Checkpointer(tmp_path / "run" / "checkpoints") as checkpoints:
    assert checkpoints.latest_step() == 12
