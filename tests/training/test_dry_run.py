"""What a dry run says of every task: memory, sizes of the data, mixture. Data are synthetic."""

import json

import jax
import numpy as np
import pytest

from balance_jax import data
from balance_jax.training import experiment
from balance_jax.training.dry_run import bytes_of
from balance_jax.training.metric_log import read_records
from tests.training import test_coordinate_check_task, test_robust_task, test_stability_task
from tests.training.tiny_run import load_documents, tiny

SMALL = {"methods": ("temperature_5", "optimal_5", "scalarization_5"), "seeds": (0, 1)}

ONE_ARM = {"arms": {"a": {}}, "baseline": "a", "objective__method": "natural"}


@pytest.fixture(autouse=True)
def documents(monkeypatch):
  monkeypatch.setattr(data, "load_documents", load_documents)


def rows_of(text) -> dict[str, list[str]]:
  """First cell of every row of the tables -> the others; cells are two spaces apart."""
  cells = [line.split("  ") for line in text.splitlines() if "  " in line]
  return {first.strip(): [cell.strip() for cell in rest if cell.strip()] for first, *rest in cells}


def size(text: str) -> float:
  number, unit = text.split()
  return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_sizes_and_mixture_are_those_of_the_run(tmp_path):
  config = tiny(**SMALL, parallel="vmap")
  rows = rows_of(experiment.describe(config))
  experiment.run_experiment(config, tmp_path)
  sizes = json.loads((tmp_path / "results.json").read_text())["rows"]
  assert rows["rows"] == ["sum", "big", "small"]
  assert rows["train"] == [f"{sum(sizes.values()):,}", *(f"{n:,}" for n in sizes.values())]
  held_out = data.group_table(load_documents("", "validation", languages=sizes), window=8)
  counts = [min(n, 48) for n in held_out.group_sizes]
  assert rows["validation"] == [str(sum(counts)), *map(str, counts)]
  first = {
    r["method"]: r for r in read_records(tmp_path / "metrics.jsonl")
    if r["event"] == "train" and r["step"] == 4
  }  # fmt: skip
  assert set(first) == set(SMALL["methods"])
  for method, record in first.items():
    for name in "pr":
      if method != "optimal_5":  # whose draw has moved by then
        shown = [float(cell) for cell in rows[f"{method}, {name}"]]
        np.testing.assert_allclose(shown, record[name], rtol=5e-3)


def test_the_memory_of_all_runs():
  """State and table of the runs, and the temporary memory of those that advance together."""
  arm = experiment.TASKS["language_model"](tiny(**SMALL)).arms[""]()
  table = sum(leaf.nbytes for leaf in arm.runs.table.rows.values())
  state = sum(map(bytes_of, jax.tree.leaves(arm.runs.shapes())))
  temporary = arm.runs.cost_of_step()["temporary_bytes"]
  for how, together in (("map", 1), ("vmap", 6)):
    row = rows_of(experiment.describe(tiny(**SMALL, parallel=how)))["all"]
    *_, devices, of_device, of_all = row
    assert devices == "1"
    assert size(of_device) == pytest.approx(state + together * temporary + table, rel=0.01)
    assert of_device == of_all
  row = rows_of(experiment.describe(tiny(**SMALL, parallel="shard")))["all"]
  *_, devices, of_device, of_all = row
  assert devices == "6"
  assert size(of_device) == pytest.approx(state / 6 + temporary + table, rel=0.01)
  assert size(of_all) == pytest.approx(6 * size(of_device), rel=0.01)


def test_of_many_groups_both_ends_are_shown():
  names = [f"g{i}" for i in range(20)]

  def load(source, split, **kwargs):
    return {name: ["some text " * (i + 5)] for i, name in enumerate(names)}

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(data, "load_documents", load)
    rows = rows_of(experiment.describe(tiny(methods=("uniform",), reference="", seeds=(0,))))
  shown = ["g0", "g1", "g2", "g3", "…", "g16", "g17", "g18", "g19"]
  assert rows["rows"] == ["sum", *shown]
  assert rows["mixture"] == shown
  assert rows["uniform, p"] == [*["0.05"] * 4, "…", *["0.05"] * 4]


def test_one_group_has_sizes_and_no_choice(monkeypatch):
  monkeypatch.setattr(data, "load_documents", lambda *_, **__: {"en": ["alpha beta gamma " * 90]})
  config = test_stability_task.tiny(architectures={"plain": {}}, sizes=((8, 1, 2),))
  text = experiment.describe(config)
  assert rows_of(text)["rows"] == ["sum", "en"]
  assert rows_of(text)["validation"] == ["8", "8"]
  assert "One group, en: p = r = 1." in text


def test_images_are_counted():
  pytest.importorskip("sklearn", reason="pip install 'balance_jax[data]'")
  text = experiment.describe(test_robust_task.tiny(**ONE_ARM))
  rows = rows_of(text)
  assert [rows[split] for split in ("train", "validation", "test")] == [
    ["64", "64"], ["20", "20"], ["20", "20"],
  ]  # fmt: skip
  assert f"takes {64 * (64 + 4) / 1000:.3g} kB" in text  # 8 x 8 bytes and a label each


def test_without_data_there_are_shapes_only(monkeypatch):
  def load(*_, **__):
    raise data.DatasetNotInstalledError("what to do")

  monkeypatch.setattr(data, "load_documents", load)
  text = experiment.describe(tiny(**SMALL))
  assert "Data not installed: shapes only; no table, sizes or mixture (what to do)." in text
  assert rows_of(text).keys() == {"arm", "---", "all"}
  for images in ({"source": "npz_jpeg"}, {"source": "npz_jpeg", "path": "nowhere.npz"}):
    with pytest.raises(data.DatasetNotInstalledError):
      data.load_images(split="train", **images)
  text = experiment.describe(test_robust_task.tiny(**ONE_ARM, data__source="npz_jpeg"))
  assert "Data not installed: shapes only" in text


def test_a_dry_run_prepares_nothing(monkeypatch, tmp_path):
  monkeypatch.undo()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  config = tiny(data__source="python_topics", data__languages=(), methods=("uniform",), seeds=(0,))
  assert "is not prepared yet; a run does it" in experiment.describe({**config, "reference": ""})
  assert not list(tmp_path.iterdir())


def test_rows_that_are_read_from_disk_are_no_table(monkeypatch):
  table = data.group_table(load_documents("", "train", languages=("big", "small")), window=8)
  starts = [0, *np.cumsum(table.group_sizes)]
  rows = np.asarray(table.rows["tokens"])
  groups = {
    name: {"tokens": rows[start:end]}
    for name, start, end in zip(table.names, starts, starts[1:], strict=False)
  }
  monkeypatch.setattr(data, "load_rows", lambda **_: data.GroupReader(groups))
  alone = {"methods": ("uniform",), "seeds": (0,), "reference": ""}
  read = experiment.describe(tiny(**alone, data__reader="threads"))
  # Two chunks of 4 steps with 4 rows of 9 bytes.
  assert "The training rows are read from disk, 288 B for each run." in read
  kept = experiment.describe(tiny(**alone))
  for first in ("train", "uniform, p", "uniform, r"):
    assert rows_of(read)[first] == rows_of(kept)[first]


def test_bad_input_and_a_task_without_arms(monkeypatch):
  for changes, message in (
    ({"data__window": 2000}, "window = 2000"),
    ({"profile": "8:13"}, "profile is '8:13'; allowed: up to 12"),
    ({"task": "nothing"}, "task is 'nothing'"),
  ):
    with pytest.raises(experiment.BadInputError, match=message):
      experiment.describe(tiny(**SMALL, **changes))
  monkeypatch.setattr(data, "load_documents", lambda *_, **__: {"en": ["alpha beta gamma " * 90]})
  text = experiment.describe(test_coordinate_check_task.tiny())
  assert text == "No arms: what is computed takes no training of many steps (batch [2, 9])."
