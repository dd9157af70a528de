"""The folder of a run: one config, whole files, clear refusals."""

import os
import subprocess
import sys
import threading

import pytest

from balance_jax.training.workdir import (
  LOCK,
  Workdir,
  WorkdirError,
  WorkdirInUseError,
  flatten,
  identity,
)

CONFIG = {"train": {"steps": 3, "rates": (0.1, float("inf"))}, "sweep": {}}


def test_open_writes_the_config_once_and_knows_it_again(tmp_path):
  folder = Workdir(tmp_path / "a" / "b")
  assert folder.check(CONFIG) is False
  assert not folder.path.exists()  # checking writes nothing
  folder.begin(CONFIG)
  assert folder.check(CONFIG) is True
  assert folder.read("config.json")["train"] == {"steps": 3, "rates": [0.1, "inf"]}
  assert folder.read("other.json") is None


def test_another_config_is_refused_with_its_keys(tmp_path):
  Workdir(tmp_path).begin(CONFIG)
  other = {"train": {"steps": 4, "rates": (0.1, float("inf")), "new": 1}, "sweep": {}}
  with pytest.raises(WorkdirError, match=r"train\.new was absent, is 1; train\.steps was 3, is 4"):
    Workdir(tmp_path).begin(other)
  assert Workdir(tmp_path).check(CONFIG)


def test_how_the_runs_are_made_may_change(tmp_path):
  Workdir(tmp_path).begin({**CONFIG, "profile": "3:4"})
  assert "profile" not in Workdir(tmp_path).read("config.json")
  assert Workdir(tmp_path).check({**CONFIG, "profile": ""})


def test_foreign_damaged_and_unusable_folders(tmp_path):
  (tmp_path / "foreign").mkdir()
  (tmp_path / "foreign" / "letter.txt").write_text("dear")
  with pytest.raises(WorkdirError, match="is not empty and holds no config"):
    Workdir(tmp_path / "foreign").check(CONFIG)
  with pytest.raises(WorkdirError, match="is not a folder"):
    Workdir(tmp_path / "foreign" / "letter.txt" / "run").check(CONFIG)
  (tmp_path / "damaged").mkdir()
  (tmp_path / "damaged" / "config.json").write_text('{"a": ')
  with pytest.raises(WorkdirError, match="is damaged"):
    Workdir(tmp_path / "damaged").check(CONFIG)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
  """Through a trial file that fails: the superuser can write everywhere a test could look."""

  def refuse(*args, **kwargs):
    raise OSError(30, os.strerror(30))

  monkeypatch.setattr("tempfile.TemporaryFile", refuse)
  with pytest.raises(WorkdirError, match=r"cannot be written \(Read-only file system\)"):
    Workdir(tmp_path / "run").begin(CONFIG)
  assert not (tmp_path / "run").exists()


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
  """Also where it was the very first file; but not what another part is writing."""
  folder, part = Workdir(tmp_path / "run"), Workdir(tmp_path / "run").part(1, 2)
  folder.path.mkdir()
  (folder.path / ".config.json.77.tmp").write_text("{")
  assert folder.check(CONFIG) is False
  folder.begin(CONFIG)
  with part.held():
    (part.path / ".finished.json.77.tmp").write_text("{")
    with folder.held():
      assert {p.name for p in folder.path.iterdir()} == {LOCK, "config.json", "parts"}
    assert len(list(part.path.iterdir())) == 2
  with part.held():
    assert {p.name for p in part.path.iterdir()} == {LOCK}


def test_one_process_at_a_time(tmp_path):
  folder, code = Workdir(tmp_path), "from balance_jax.training.workdir import *\n"
  code += f"with Workdir({str(tmp_path)!r}).held(): pass"

  def other_process():
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

  with folder.held(), folder.held():
    assert "is in use by another process" in other_process().stderr
  assert other_process().returncode == 0


def test_waiting_for_another_process(tmp_path):
  other = Workdir(tmp_path).held()
  other.__enter__()
  threading.Timer(0.3, other.__exit__, (None, None, None)).start()
  with pytest.raises(WorkdirInUseError), Workdir(tmp_path).held(wait=0.05):
    pass
  with Workdir(tmp_path).held(wait=60):
    pass


def test_of_two_that_begin_at_once_the_first_writes_the_config(tmp_path):
  """Begun by another process, which keeps the folder, between the check and the lock."""
  folder, first = Workdir(tmp_path), Workdir(tmp_path)
  with first.held():
    threading.Timer(0.3, first.write, ("config.json", identity(CONFIG))).start()
    folder.begin(CONFIG)
  with pytest.raises(WorkdirError, match="holds another config"):
    folder.begin({**CONFIG, "sweep": {"parts": 2}})


def test_flatten():
  assert flatten({"a": {"b": 1, "c": {}}, "d": 2}) == {"a.b": 1, "a.c": {}, "d": 2}
