"""Every record that a task writes against the tables of docs/metrics.md, which this file reads."""

import dataclasses
import re
from pathlib import Path

import pytest

from balance_jax import data
from balance_jax.training import experiment
from balance_jax.training.metric_log import SCHEMA, read_records
from balance_jax.training.timing import PARTS, without_times
from tests.training import test_robust_task, test_stability_task
from tests.training.test_divergence import poison
from tests.training.tiny_run import load_documents, tiny

DOC = Path(__file__).parents[2] / "docs" / "metrics.md"
COLUMNS = ["field", "type", "unit", "null", "there", "meaning"]
KINDS = {"integer": int, "number": int | float, "string": str}
# The order of events at one step.
EVENTS = ["rollback", "train", "eval", "moments", "test", "time"]


@dataclasses.dataclass(frozen=True)
class Field:
  kind: str  # integer, number, string
  shape: tuple[str, ...]  # sizes, by name or as a number
  by_name: bool  # a mapping of names to numbers
  null: str
  there: str


def read_tables(text: str) -> dict[str, dict[str, Field]]:
  """Title of each table, "" for the one before the first, -> fields."""
  tables, title = {}, ""
  for line in text.splitlines():
    if line.startswith("### "):
      title = line.removeprefix("### ")
    cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
    if not cells or cells == COLUMNS or set(cells[0]) <= {"-"}:
      continue
    name, type_, _, null, there, _ = cells
    kind, sizes, by_name = re.fullmatch(r"(\w+)(?: \((.+)\)| (\{tensor\}))?", type_).groups()
    field = Field(kind, tuple((sizes or "").split(", ")), bool(by_name), null, there)
    assert kind in KINDS, line
    assert null in ("no", "yes", "diverged"), line
    assert tables.setdefault(title, {}).setdefault(name.strip("`"), field) is field, line
  return tables


TABLES = read_tables(DOC.read_text())


def fields_of(task: str, event: str) -> dict[str, Field]:
  """The fields of the records of one event."""
  if event == "time":
    return TABLES[""] | TABLES["time"]
  more = TABLES["robust: eval"] if (task, event) == ("robust", "test") else {}
  return TABLES[""] | TABLES[f"{task}: all but time"] | more | TABLES[f"{task}: {event}"]


def check(records, task: str, options=(), diverged=False) -> None:
  """Raises AssertionError unless all records are as the tables say.

  Args:
    records: of one file.
    task: its name in the config.
    options: which of the conditions under "there" hold.
    diverged: whether null is allowed where the tables say so of such runs.
  """
  sizes = {}
  for record in records:
    fields = fields_of(task, record["event"])
    wanted = {name for name, field in fields.items() if field.there in ("always", *options)}
    assert wanted <= record.keys() <= fields.keys(), (record, wanted ^ record.keys())
    for name, value in record.items():
      field = fields[name]
      if field.by_name:
        assert set(value) <= set(test_stability_task.stability_task.WATCHED)
        value = list(value.values())
      check_value(value, field, () if field.by_name else field.shape, sizes, diverged)


def check_value(value, field: Field, shape, sizes: dict, diverged: bool) -> None:
  if field.by_name and isinstance(value, list):
    for item in value:
      check_value(item, field, (), sizes, diverged)
  elif shape and shape[0]:
    size = int(shape[0]) if shape[0].isdigit() else sizes.setdefault(shape[0], len(value))
    assert len(value) == size, (value, shape)
    for item in value:
      check_value(item, field, shape[1:], sizes, diverged)
  elif value is None:
    assert field.null in ("yes", *(["diverged"] if diverged else [])), field
  else:
    assert isinstance(value, KINDS[field.kind]), (value, field)
    assert not isinstance(value, bool), (value, field)


def check_order(records, num_runs: int) -> None:
  steps = [record["step"] for record in records]
  assert steps == sorted(steps)
  places = [(record["step"], EVENTS.index(record["event"])) for record in records]
  assert places == sorted(places)
  assert records[-1]["event"] == "time"
  full = without_times(records)
  names = [(r["method"], r["seed"]) for r in full if r["event"] != "rollback"]
  assert names == names[:num_runs] * (len(names) // num_runs)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
  """Its figures would take most of the time."""
  monkeypatch.setattr(experiment, "_conclude", lambda *_: {"complete": True, "table": ""})


def run(path, config) -> list[dict]:
  """The records of a run's first arm."""
  experiment.run_experiment(config, path)
  file = next(path.rglob("metrics.jsonl"))
  assert file.read_bytes().startswith(b'{"schema": %d}\n' % SCHEMA)
  return read_records(file)


def test_the_tables_are_all_there():
  assert set(PARTS) | {"seconds"} == set(TABLES["time"])
  assert set(TABLES[""]) == {"event", "step"}
  described = {title.partition(": ")[0] for title in TABLES} - {"", "time"}
  assert described == experiment.TASKS.keys() - {"coordinate_check"}
  assert f'`{{"schema": {SCHEMA}}}`' in DOC.read_text()


def test_language_model(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "load_documents", load_documents)
  poison(monkeypatch, 0.06)
  config = tiny(
    methods=("temperature_5",), seeds=(0, 1), sweep__axes__eps=(1e-8, 1e-6),
    reference="", train__checkpoint_every=4, train__max_rollbacks=9,
  )  # fmt: skip
  records = run(tmp_path / "run", config)
  check(records, "language_model")
  check_order(records, 4)
  assert {record["event"] for record in records} == set(EVENTS)
  with pytest.raises(AssertionError):  # an unknown field
    check([{**records[0], "surprise": 1}], "language_model")
  with pytest.raises(AssertionError):  # a field of another shape
    check([*records, {**records[0], "group_loss": [1.0]}], "language_model")
  with pytest.raises(AssertionError):  # null where the table says there is none
    check([{**records[0], "group_loss": [None, 1.0]}], "language_model")


@pytest.mark.parametrize("statistics", [True, False])
def test_stability(tmp_path, monkeypatch, statistics):
  """Two runs, of which the second diverges."""
  monkeypatch.setattr(data, "load_documents", lambda *_, **__: {"en": ["alpha beta gamma " * 90]})
  config = test_stability_task.tiny(
    architectures={"plain": {}}, sizes=((8, 2, 2),), learning_rates=(1e-2, 1e30),
    window=(1e-2, 1e30), seeds=(0,), statistics=statistics,
  )  # fmt: skip
  records = run(tmp_path / "run", config)
  options = ["if statistics"] if statistics else []
  healthy = [record for record in records if record.get("learning_rate") != 1e30]
  check(healthy, "stability", options)
  check(records, "stability", options, diverged=True)
  with pytest.raises(AssertionError):
    check(records, "stability", options)
  check_order(records, 2)
  assert {record["event"] for record in records} == {"train", "eval", "time"}
  assert ("log_z" in records[2]) <= statistics


def test_robust(tmp_path):
  pytest.importorskip("sklearn", reason="pip install 'balance_jax[data]'")
  config = test_robust_task.tiny(arms={"a": {}}, baseline="a", seeds=(0,))
  records = run(tmp_path / "run", config)
  check(records, "robust", ["if bounded"])
  check_order(records, 1)
  assert {record["event"] for record in records} == {"train", "eval", "test", "time"}
  asked = {"certified_ibp", "certified_crown_ibp"}
  assert all(asked <= record.keys() for record in records if record["event"] in ("eval", "test"))
