"""Checkpoints hold every kind of array, keep the newest and the best, and notice any damage."""

import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import args

from balance_jax import training
from balance_jax.training.checkpoint import SEAL, Checkpointer, CheckpointError
from tests.training.problems import make_problem
from tests.training.tiny_run import files_of_at_most

ONE = {"x": jax.ShapeDtypeStruct((), jnp.float32)}


def save_three(path):
  with Checkpointer(path, max_to_keep=3) as checkpoints:
    for step in (4, 8, 12):
      checkpoints.save(step, {"x": jnp.float32(step)}, {"seconds": step})


def names(path):
  return sorted(entry.name for entry in path.iterdir())


def test_state_comes_back_bit_for_bit(tmp_path):
  step, state = make_problem()
  state, _ = training.run(step, state, 3)
  tree = {"state": state, "half": jnp.arange(3, dtype=jnp.bfloat16)}
  with Checkpointer(tmp_path / "c") as checkpoints:
    assert checkpoints.latest_step() is None
    checkpoints.save(3, tree, {"note": [1, "x"]})
  with Checkpointer(tmp_path / "c") as checkpoints:
    restored, extra = checkpoints.restore(jax.eval_shape(lambda: tree))
  assert extra == {"note": [1, "x"]}
  assert restored["half"].dtype == jnp.bfloat16
  after, history = training.run(step, restored["state"], 2)
  expected, expected_history = training.run(step, state, 2)
  np.testing.assert_array_equal(after.params["w"], expected.params["w"])
  np.testing.assert_array_equal(history["loss"], expected_history["loss"])


def test_the_run_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
  may_end, seal = threading.Event(), Checkpointer._seal

  def seal_late(*args):
    assert may_end.wait(60)
    seal(*args)

  monkeypatch.setattr(Checkpointer, "_seal", seal_late)
  state = {"x": jnp.arange(1e6), "key": jax.random.key(3)}
  expected = np.asarray(state["x"]).copy()
  json_save, extra = args.JsonSave, {"counts": [1]}

  def save_late(value):  # as where orbax comes to the JSON only when the next steps are done
    extra["counts"].append(2)
    return json_save(value)

  with Checkpointer(tmp_path) as checkpoints:
    monkeypatch.setattr(args, "JsonSave", save_late)
    checkpoints.save(4, state, extra)
    changed = jax.jit(lambda s: {**s, "x": -s["x"]}, donate_argnums=0)(state)
    assert state["x"].is_deleted()
    assert float(changed["x"][2]) == -2.0
    assert checkpoints.finished_step is None
    may_end.set()
    restored, kept = checkpoints.restore(jax.eval_shape(lambda: changed))
    assert checkpoints.finished_step == 4
    assert kept == {"counts": [1]}
  np.testing.assert_array_equal(restored["x"], expected)


def test_what_goes_wrong_with_a_running_save_is_said_by_the_next(tmp_path, monkeypatch):
  def refuse(*args):
    raise OSError(28, os.strerror(28))

  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(4, {"x": jnp.float32(4)})
    checkpoints.finish()
    with monkeypatch.context() as patch:
      patch.setattr(Checkpointer, "_seal", refuse)
      checkpoints.save(8, {"x": jnp.float32(8)})
      with pytest.raises(CheckpointError, match=r"/8 cannot be written: No space .* from step 4"):
        checkpoints.save(12, {"x": jnp.float32(12)})
    assert names(tmp_path) == ["4"]
    assert checkpoints.finished_step == 4
    checkpoints.save(12, {"x": jnp.float32(12)})
  assert names(tmp_path) == ["12", "4"]


def test_keeps_the_newest(tmp_path):
  with Checkpointer(tmp_path, max_to_keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, {"x": jnp.float32(step)})
    checkpoints.save(3, {"x": jnp.float32(9)})  # saved already: left as it is
    restored, _ = checkpoints.restore(ONE)
    assert float(restored["x"]) == 3.0
    old, _ = checkpoints.restore(ONE, 2)
    assert float(old["x"]) == 2.0
  assert names(tmp_path) == ["2", "3"]


def test_keeps_the_best_beside_the_newest(tmp_path):
  scores = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 1.5, 5: None, 6: 1.0}
  kept = []
  with Checkpointer(tmp_path, max_to_keep=1) as checkpoints:
    for step, score in scores.items():
      checkpoints.save(step, {"x": jnp.float32(step)}, score=score)
      checkpoints.finish()
      kept.append(names(tmp_path))
    assert checkpoints.best_step() == 6  # the newer of two equal ones
    checkpoints.save(7, {"x": jnp.float32(7)}, score=2.0)
    checkpoints.finish()
    seal = tmp_path / "7" / SEAL
    seal.write_text(seal.read_text().replace('"score": 2.0', '"score": 0.5'))
    assert checkpoints.best_step() == 6  # a seal that was changed counts for nothing
  assert kept == [["1"], ["2"], ["2", "3"], ["2", "4"], ["2", "5"], ["6"]]
  with Checkpointer(tmp_path / "other") as checkpoints:
    checkpoints.save(0, {"x": jnp.float32(0)})
    checkpoints.finish()
    assert checkpoints.best_step() is None


def test_another_shape_or_nothing_at_all(tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
      checkpoints.restore({})
    checkpoints.save(0, {"x": jnp.ones(3)})
    with pytest.raises(ValueError, match="shape"):
      checkpoints.restore({"x": jax.ShapeDtypeStruct((4,), jnp.float32)})


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()])
def test_damage_to_any_file_is_noticed(tmp_path, damage):
  save_three(tmp_path / "whole")
  files = sorted(p for p in (tmp_path / "whole" / "12").rglob("*") if p.is_file())
  assert len(files) > 8  # orbax's data, its metadata and ours
  for file in files:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "c")
    damage(tmp_path / "c" / file.relative_to(tmp_path / "whole"))
    with Checkpointer(tmp_path / "c") as checkpoints:
      restored, extra = checkpoints.restore(ONE)
    assert (float(restored["x"]), extra) == (8.0, {"seconds": 8}), file


def test_falls_back_to_the_last_good_one_and_says_so(tmp_path, capsys):
  save_three(tmp_path)
  flip(tmp_path / "12" / "extra" / "metadata")
  (tmp_path / "8" / SEAL).unlink()
  with Checkpointer(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore(ONE)
    assert float(restored["x"]) == 4.0
    first, second = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/12 cannot be used: extra/metadata has changed" in first
    assert f"{tmp_path}/8 cannot be used: its save was not finished; going back to step 4" in second
    # The newer ones are gone, so that their numbers can be saved again.
    assert names(tmp_path) == ["4"]
    checkpoints.save(8, {"x": jnp.float32(88)})
    assert float(checkpoints.restore(ONE)[0]["x"]) == 88.0


def test_without_a_good_one_all_is_left_as_it_is(tmp_path):
  save_three(tmp_path)
  for step in (4, 8, 12):
    truncate(tmp_path / str(step) / SEAL)
  with Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match=r"/12 cannot be used: .*/4 cannot .* no other is"):
      checkpoints.restore(ONE)
    with pytest.raises(CheckpointError, match="/8 cannot be used"):
      checkpoints.restore(ONE, 8)
  assert names(tmp_path) == ["12", "4", "8"]


def test_an_unfinished_save_is_written_again(tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(0, {"x": jnp.float32(1)})
  (tmp_path / "0" / SEAL).unlink()
  (tmp_path / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(0, {"x": jnp.float32(2)})
    assert float(checkpoints.restore(ONE)[0]["x"]) == 2.0
  assert names(tmp_path) == ["0"]


# The state does not fit; the state fits, but the seal does not.
@pytest.mark.parametrize("limit", [3000, 600])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(tmp_path, capfd, limit):
  state = {"x": jnp.asarray(np.random.default_rng(0).random(1000 if limit == 3000 else 3))}
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(4, state)
    checkpoints.finish()
    files = {path: path.stat().st_size for path in (tmp_path / "4").rglob("*") if path.is_file()}
    too_large = [path.name for path, size in files.items() if size > limit]
    assert (too_large == [SEAL]) == (limit == 600)
    with files_of_at_most(limit):
      checkpoints.save(8, state)
      with pytest.raises(CheckpointError) as error:
        checkpoints.finish()
    message = f"checkpoint {tmp_path}/8 cannot be written: File too large; the same command goes"
    assert str(error.value) == f"{message} on from step 4"
    assert capfd.readouterr().err == ""
    assert names(tmp_path) == ["4"]
    restored, _ = checkpoints.restore(state)
    np.testing.assert_array_equal(restored["x"], state["x"])
    checkpoints.save(8, state)  # as soon as there is room again
  assert names(tmp_path) == ["4", "8"]
