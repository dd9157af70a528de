"""The schema of docs/metrics.md is whole and strict; the tests of other tasks use it too."""

import pytest

from balance_jax import data
from balance_jax.training import experiment
from balance_jax.training.metric_log import SCHEMA, read_records
from balance_jax.training.timing import PARTS
from tests.training.metrics_schema import DOC, EVENTS, TABLES, check, check_order
from tests.training.test_divergence import poison
from tests.training.tiny_run import load_documents, tiny


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
    reference="", train__checkpoint_every=4, train__max_rollbacks=9, train__variance_every=12,
  )  # fmt: skip
  # The figures of its report would take most of the time.
  monkeypatch.setattr(experiment, "_conclude", lambda *_: {"complete": True, "table": ""})
  experiment.run_experiment(config, tmp_path)
  file = tmp_path / "metrics.jsonl"
  assert file.read_bytes().startswith(b'{"schema": %d}\n' % SCHEMA)
  records = read_records(file)
  check(records, "language_model")
  check_order(records, 4)
  assert {record["event"] for record in records} == set(EVENTS)
  with pytest.raises(AssertionError):  # an unknown field
    check([{**records[0], "surprise": 1}], "language_model")
  with pytest.raises(AssertionError):  # a field of another shape
    check([*records, {**records[0], "group_loss": [1.0]}], "language_model")
  with pytest.raises(AssertionError):  # null where the table says there is none
    check([{**records[0], "group_loss": [None, 1.0]}], "language_model")
