"""The folder of a run: one config, whole files, clear refusals."""

import os
import subprocess
import sys

import pytest

from balance_jax.training.workdir import Workdir, WorkdirError, flatten

CONFIG = {"train": {"steps": 3, "rates": (0.1, float("inf"))}, "sweep": {}}


def test_open_writes_the_config_once_and_knows_it_again(tmp_path):
  folder = Workdir(tmp_path / "a" / "b")
  assert folder.check(CONFIG) is False
  assert not folder.path.exists()  # checking writes nothing
  folder.open(CONFIG)
  assert folder.check(CONFIG) is True
  assert folder.read("config.json")["train"] == {"steps": 3, "rates": [0.1, "inf"]}
  assert folder.read("other.json") is None


def test_another_config_is_refused_with_its_keys(tmp_path):
  Workdir(tmp_path).open(CONFIG)
  other = {"train": {"steps": 4, "rates": (0.1, float("inf")), "new": 1}, "sweep": {}}
  with pytest.raises(WorkdirError, match=r"train\.new was absent, is 1; train\.steps was 3, is 4"):
    Workdir(tmp_path).open(other)
  assert Workdir(tmp_path).check(CONFIG)


def test_how_the_runs_are_made_may_change(tmp_path):
  Workdir(tmp_path).open({**CONFIG, "profile": "3:4"})
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
    Workdir(tmp_path / "run").open(CONFIG)
  assert not (tmp_path / "run").exists()


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
  """Also where it was the very first file."""
  leftovers = [tmp_path / ".config.json.77.tmp", tmp_path / "arms" / "a" / ".finished.json.77.tmp"]
  leftovers[0].write_text("{")
  folder = Workdir(tmp_path)
  folder.open(CONFIG)
  folder.close()
  leftovers[1].parent.mkdir(parents=True)
  for path in leftovers:
    path.write_text("{")
  folder.open(CONFIG)
  assert not any(path.exists() for path in leftovers)
  assert folder.read("config.json")["sweep"] == {}


def test_one_process_at_a_time(tmp_path):
  folder = Workdir(tmp_path)
  folder.open(CONFIG)
  code = f"""
from balance_jax.training.workdir import Workdir
Workdir({str(tmp_path)!r}).open({CONFIG!r}.copy())
""".replace("inf", "float('inf')")

  def other_process():
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

  assert "is in use by another process" in other_process().stderr
  folder.close()
  assert other_process().returncode == 0


def test_flatten():
  assert flatten({"a": {"b": 1, "c": {}}, "d": 2}) == {"a.b": 1, "a.c": {}, "d": 2}
