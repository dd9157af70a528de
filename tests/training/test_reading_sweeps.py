"""Sweeps and experiments whose rows are read from disk equal those with a table in memory."""

import functools

import jax
import numpy as np
import pytest

from balance_jax import data, mixing, training
from balance_jax.data import row_files, sources
from balance_jax.training import experiment
from balance_jax.training.measure import gradient_variance, variance_draws, variance_on_rows
from balance_jax.training.metric_log import read_records
from balance_jax.training.reading import plan_rows, sampler_of
from balance_jax.training.sharding import Placement, make_mesh
from tests.data.conftest import write_catalogues
from tests.training import tiny_run
from tests.training.problems import init_params, make_problem
from tests.training.test_reading import MIXERS, TABLE, Recorder, assert_same_bytes
from tests.training.test_run import assert_same, copy


def sweep_of(table, how="map", names=("temperature", "cooldown", "optimal"), **kwargs):
  """Three methods with two seeds each; odd numbers of runs do not divide the devices."""
  mixers = [MIXERS[name](table.sizes) for name in names]

  def build(cell):
    mixer = mixing.select(mixers, cell["method"])
    return make_problem(mixer, table=table, measure_every=3)[0]

  def init(cell, step):
    return training.init_state(jax.random.key(cell["seed"]), init_params(), step)

  cells = training.product(method=range(len(mixers)), seed=[0, 1])[:5]
  return training.SweepRuns(build, init, cells, table, how=how, **kwargs)


@pytest.mark.parametrize("how", ["vmap", pytest.param("map", marks=pytest.mark.slow), "shard"])
def test_the_runs_of_a_sweep_read_their_own_rows(how):
  devices = {"devices": jax.devices()[:2]} if how == "shard" else {}
  expected, history = training.run_sweep(sweep_of(TABLE, how, **devices), 12, chunk=4)
  reader = Recorder()
  after, read_history = training.run_sweep(sweep_of(reader, how, **devices), 12, chunk=4)
  assert_same((after.streams, after.carry), (expected.streams, expected.carry))
  assert_same(after, expected, rtol=1e-4, atol=1e-5)
  assert_same(read_history, history, rtol=1e-4, atol=1e-5)
  batches = [rows for rows in reader.read if np.shape(rows["y"])[2:3] == (16,)]
  assert [np.shape(rows["y"]) for rows in batches] == [(5, 4, 16)] * 3  # each chunk once
  step, _ = make_problem(MIXERS["temperature"](TABLE.sizes), table=TABLE)
  first = jax.tree.map(lambda x: x[0], sampler_of(sweep_of(TABLE, how, **devices).init()))
  plan = plan_rows(step, first, 4)
  first_read = jax.tree.map(lambda x: x[0], batches[0])
  assert_same_bytes(first_read, TABLE.take(plan.groups, plan.indices))


def test_on_a_mesh_every_device_reads_its_part_of_every_run():
  _, history = training.run_sweep(sweep_of(TABLE), 8, chunk=4)
  reader = Recorder()
  runs = sweep_of(reader, placement=Placement(make_mesh(4, 1)))
  after, read_history = training.run_sweep(runs, 8, chunk=4)
  assert_same(read_history, history, rtol=1e-4, atol=1e-5)
  draw = functools.partial(variance_draws, examples=3, batches=2)
  measure = functools.partial(variance_on_rows, examples=3, batches=2)
  whole = sweep_of(TABLE)
  expected, _ = training.run_sweep(whole, 8, chunk=4)
  assert_same(
    runs.apply_to_rows(draw, measure, after),
    whole.apply_to_rows(draw, measure, expected),
    rtol=1e-3,
    atol=1e-5,
  )


def test_a_sweep_that_goes_back_reads_anew():
  runs = sweep_of(Recorder())
  states, _ = runs.advance(runs.init(), 4, following=4)
  kept = copy(states)
  states, metrics = runs.advance(states, 4, following=4)
  runs.collect(metrics)
  again, _ = runs.advance(kept, 4)
  assert_same(again, states)
  other = sweep_of(Recorder())
  shorter, _ = other.advance(other.init(), 2, following=2)
  shorter, _ = other.advance(shorter, 2)
  assert_same(other.advance(shorter, 4)[0], states, rtol=1e-6, atol=1e-7)


def test_a_sweep_says_how_long_it_waited():
  runs = sweep_of(Recorder(pause=0.2))
  _, metrics = runs.advance(runs.init(), 4)
  runs.collect(metrics)
  assert 0.2 <= runs.seconds["data"] < 5
  table_runs = sweep_of(TABLE)
  table_runs.collect(table_runs.advance(table_runs.init(), 4)[1])
  assert table_runs.seconds["data"] == 0.0


def test_measurements_choose_their_rows():
  draw = functools.partial(variance_draws, examples=3, batches=2)
  measure = functools.partial(variance_on_rows, examples=3, batches=2)
  found = [
    runs.apply_to_rows(draw, measure, runs.init())
    for runs in (sweep_of(TABLE), sweep_of(Recorder()))
  ]
  assert found[0]["second_moment"].shape == (5, 3)
  assert_same(*found, rtol=1e-5, atol=1e-7)
  step, _ = make_problem(MIXERS["temperature"](TABLE.sizes), table=TABLE, measure_every=3)
  one = training.init_state(jax.random.key(0), init_params(), step)
  alone = gradient_variance(step, one, TABLE, examples=3, batches=2)
  assert_same(jax.tree.map(lambda x: x[0], found[0]), alone, rtol=1e-5, atol=1e-7)


@pytest.fixture
def source(tmp_path, monkeypatch):
  """What a config needs for text that is prepared on disk."""
  write_catalogues(tmp_path / "locales")
  monkeypatch.setitem(data.SOURCES, "small", sources.plone_catalogues(tmp_path / "locales"))
  return {
    "data__source": "small",
    "data__languages": ("aa", "bb"),
    "data__directory": str(tmp_path / "data"),
    "mixers__optimal_5__delay": 8,
    "train__variance_every": 12,
  }


def records_of(path, event):
  return [record for record in read_records(path / "metrics.jsonl") if record["event"] == event]


def assert_same_job(path, expected):
  """Programs of two shapes round differently; what was drawn is the same."""
  for event in ("train", "eval", "moments", "test"):
    found, wanted = records_of(path, event), records_of(expected, event)
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
      assert one.keys() == other.keys()
      for name in one:
        if isinstance(one[name], str | int):
          assert one[name] == other[name]
        else:
          np.testing.assert_allclose(
            np.array(one[name], float), np.array(other[name], float), rtol=1e-3, atol=1e-5
          )


def test_an_experiment_reads_from_disk(tmp_path, source):
  experiment.run_experiment(tiny_run.tiny(**source), tmp_path / "memory")
  assert not (tmp_path / "data" / "rows").exists()
  config = tiny_run.tiny(**source, data__reader="threads", data__workers=2)
  experiment.run_experiment(config, tmp_path / "disk")
  assert len(list((tmp_path / "data" / "rows").iterdir())) == 3  # one for each split
  assert_same_job(tmp_path / "disk", tmp_path / "memory")


def test_an_adaptive_draw_needs_a_delay_before_anything_is_written(tmp_path, source):
  with pytest.raises(
    experiment.BadInputError, match=r"mixers\.optimal_5: chunk is 4, .* delay of 8"
  ):
    experiment.run_experiment(
      tiny_run.tiny(**source | {"mixers__optimal_5__delay": 1}, data__reader="threads"),
      tmp_path / "run",
    )
  with pytest.raises(experiment.BadInputError, match="delay is 0"):
    experiment.run_experiment(
      tiny_run.tiny(**source | {"mixers__optimal_5__delay": 0}), tmp_path / "run"
    )
  with pytest.raises(experiment.BadInputError, match=r"data\.reader is 'disk'"):
    experiment.run_experiment(tiny_run.tiny(**source, data__reader="disk"), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_damaged_row_stops_the_experiment_or_is_replaced(tmp_path, source, monkeypatch):
  monkeypatch.setattr(row_files, "_PAGE", 1)  # the others of a page would be lost with it
  config = tiny_run.tiny(**source, data__reader="threads")
  experiment.run_experiment(config, tmp_path / "whole")
  rows = data.load_rows(
    "small", "train", window=8, languages=("aa", "bb"), data_dir=tmp_path / "data"
  ).take(np.zeros(20, int), np.arange(20))["tokens"]
  for file in (tmp_path / "data" / "rows").glob("*/0.array_record"):
    content = file.read_bytes()
    if rows[0].tobytes() in content:  # else of another split
      for row in rows:
        content = content.replace(row.tobytes(), bytes(len(row)))
      file.write_bytes(content)
  with pytest.raises(experiment.BadInputError, match=r"record .* of group 'aa' cannot be read"):
    experiment.run_experiment(config, tmp_path / "stops")
  skips = tiny_run.tiny(**source, data__reader="threads", data__max_corrupt=100)
  with pytest.warns(UserWarning, match="takes its place"):
    experiment.run_experiment(skips, tmp_path / "skips")
  assert (tmp_path / "skips" / "report.html").exists()
