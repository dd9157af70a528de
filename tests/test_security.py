"""Nothing that is loaded is executed: no pickle in the code, and hostile files are refused."""

import ast
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from balance_jax import data
from balance_jax.training.metric_log import read_records
from balance_jax.training.workdir import Workdir, WorkdirError

PACKAGE = Path(__file__).parents[1] / "balance_jax"
# What turns bytes into code or calls: modules, built-in functions, keyword arguments.
MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FUNCTIONS = {"compile", "eval", "exec", "__import__"}
KEYWORDS = {"allow_pickle", "shell"}


def dangers(source: str) -> list[str]:
  """What of the above a piece of code uses."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
      found += [name for name in names if name.partition(".")[0] in MODULES]
    elif isinstance(node, ast.Call):
      if isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
        found.append(node.func.id)
      for keyword in node.keywords:
        refused = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in KEYWORDS and not refused:
          found.append(keyword.arg)
  return found


def test_no_code_of_the_package_unpickles_or_evaluates():
  files = sorted(PACKAGE.rglob("*.py"))
  assert len(files) > 100
  assert {str(path): found for path in files if (found := dangers(path.read_text()))} == {}


@pytest.mark.parametrize(
  "source",
  [
    "import pickle",
    "from joblib import load",
    "np.load(path, allow_pickle=True)",
    "np.load(path, allow_pickle=flag)",
    "eval(text)",
    "subprocess.run(line, shell=True)",
  ],
)
def test_the_scan_finds(source):
  assert dangers(source)
  assert not dangers("np.load(path, allow_pickle=False)\nast.literal_eval(text)")


class Bomb:
  """Unpickled, it makes a file."""

  def __init__(self, mark: Path):
    self.mark = mark

  def __reduce__(self):
    return os.mkdir, (str(self.mark),)


@pytest.fixture
def bomb(tmp_path):
  """(bytes, whether they went off)."""
  mark = tmp_path / "mark"
  content = pickle.dumps(Bomb(mark))
  pickle.loads(content)
  assert mark.exists()  # it does go off
  mark.rmdir()
  return content, mark.exists


def test_archives_of_images_are_not_unpickled(tmp_path, bomb):
  path = tmp_path / "images.npz"
  array = np.empty(1, object)
  array[0] = Bomb(tmp_path / "mark")
  np.savez(path, jpeg=array, offsets=np.arange(2), labels=np.zeros(1, int), is_train=[True])
  with pytest.raises(data.CorruptedDataError, match=r"images\.npz"):
    data.load_images("npz_jpeg", "train", path=path)
  path.write_bytes(bomb[0])
  with pytest.raises(data.CorruptedDataError, match=r"images\.npz"):
    data.load_images("npz_jpeg", "train", path=path)
  assert not bomb[1]()


def test_archives_do_not_write_outside_of_themselves(tmp_path):
  path, outside = tmp_path / "inner" / "images.npz", tmp_path / "evil.npy"
  path.parent.mkdir()
  array = io.BytesIO()
  np.save(array, np.zeros(1))
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("../evil.npy", array.getvalue())
  with pytest.raises(ValueError, match="has no array jpeg"):
    data.load_images("npz_jpeg", "train", path=path)
  assert not outside.exists()


def test_files_of_a_run_are_not_unpickled(tmp_path, bomb):
  folder = Workdir(tmp_path / "run")
  folder.path.mkdir()
  for name in ("config.json", "metrics.jsonl"):
    (folder.path / name).write_bytes(bomb[0] + b'\n{"step": 1}\n')
  with pytest.raises(WorkdirError, match=r"config\.json is damaged"):
    folder.read("config.json")
  with pytest.raises(ValueError, match=r"metrics\.jsonl"):
    read_records(folder.metrics)
  assert not bomb[1]()
