"""The coordinate-check task from config to report; its rule has tests with the function."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from balance_jax import data
from balance_jax.training import experiment
from balance_jax.training.config import resolve

CONFIG = Path(__file__).parents[2] / "configs" / "coordinate_check.py"


def tiny(**changes):
  config = runpy.run_path(str(CONFIG))["get_config"]()
  config.data.window = 8
  config.model.depth = 1
  config.widths = (8, 32)
  config.head_dim = 4
  config.variants = ("standard", "tensor_programs")
  config.train.update(batch_size=2, steps=2)
  config.seeds = (0,)
  for name, value in changes.items():
    section, _, key = name.rpartition("__")
    (config[section] if section else config)[key] = value
  return resolve(config)


@pytest.fixture(autouse=True)
def documents(monkeypatch):
  words = np.random.default_rng(0).choice(["alpha", "beta", "gamma"], 300)
  monkeypatch.setattr(data, "load_documents", lambda *args, **kwargs: {"en": [" ".join(words)]})


def test_from_config_to_report(tmp_path, capsys):
  path = tmp_path / "run"
  experiment.run_experiment(tiny(), path)
  results = json.loads((path / "results.json").read_text())
  assert set(results["checks"]) == {"standard", "tensor_programs"}
  check = results["checks"]["tensor_programs"]
  judged = {entry["activation"] for entry in check["slopes"] if entry["judged"]}
  assert {"block_0/mlp", "output"} <= judged
  assert not any("attention_stats" in name for name in judged)
  assert check["passes"] == (not check["failures"])
  assert results["table"] in capsys.readouterr().out
  page = (path / "report.html").read_text()
  assert page.count("<svg") == 2
  assert not list(path.rglob("metrics.jsonl"))  # as docs/metrics.md says
  assert "time" not in results


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"widths": (16,)}, r"widths is \(16,\); expected at least 2"),
    ({"widths": (16, 8)}, "expected at least 2 numbers, increasing"),
    ({"widths": (8, 18)}, "multiples of head_dim = 4"),
    ({"variants": ("standrd",)}, "did you mean 'standard'"),
    ({"variants": ()}, "variants and seeds"),
    ({"train__steps": 0}, r"train\.steps is 0"),
    ({"train__learning_rate": 0.0}, r"train\.learning_rate is 0\.0"),
  ],
)
def test_bad_config_is_one_clear_error_and_writes_nothing(tmp_path, changes, message):
  with pytest.raises(experiment.BadInputError, match=message):
    experiment.run_experiment(tiny(**changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()
