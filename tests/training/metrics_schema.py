"""Records of a job against the tables of docs/metrics.md, which this file reads."""

import dataclasses
import re
from pathlib import Path

from balance_jax.training import stability_task
from balance_jax.training.timing import without_times

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
        assert set(value) <= set(stability_task.WATCHED)
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
