"""Tests of the metrics file, the TensorBoard events and the progress line."""

import builtins
import io
import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.training import metric_log
from balance_jax.training.metric_log import MetricLog, Progress, read_records, replace_file


def _record(step, **fields):
  return {"event": "train", "method": "uniform", "seed": 0, "step": step, **fields}


def test_write_then_read(tmp_path):
  path = tmp_path / "deep" / "metrics.jsonl"
  with MetricLog(path) as log:
    log.write([_record(1, loss=2.5), _record(2, group_loss=[1.0, None])])
  assert read_records(path) == [_record(1, loss=2.5), _record(2, group_loss=[1.0, None])]


def test_every_write_is_flushed(tmp_path):
  log = MetricLog(tmp_path / "m.jsonl")
  log.write([_record(1)])
  assert read_records(tmp_path / "m.jsonl") == [_record(1)]
  log.close()
  log.close()


def test_arrays_and_numbers_that_are_not_finite(tmp_path):
  fields = {
    "f32": np.float32(0.5),
    "jax": jnp.asarray([1.0, jnp.nan, -jnp.inf]),
    "bf16": jnp.asarray([1.5], jnp.bfloat16),
    "bf16_scalar": np.asarray(1.5, jnp.bfloat16)[()],
    "nan": math.nan,
    "count": np.int32(7),
    "nested": {"x": [math.inf, 1]},
    "text": 'é"\n',
  }
  with MetricLog(tmp_path / "m.jsonl") as log:
    log.write([_record(np.int64(3), **fields)])
  text = (tmp_path / "m.jsonl").read_text(encoding="utf-8")
  assert "NaN" not in text
  assert "Infinity" not in text
  assert text.count("\n") == 2
  expected = dict(fields, f32=0.5, jax=[1.0, None, None], bf16=[1.5], bf16_scalar=1.5, nan=None)
  expected |= {"count": 7, "nested": {"x": [None, 1]}}
  assert read_records(tmp_path / "m.jsonl") == [_record(3, **expected)]


def test_the_first_line_is_the_schema(tmp_path):
  path = tmp_path / "m.jsonl"
  header = '{"schema": 1}\n'
  with MetricLog(path) as log:
    assert log.is_empty()
    assert path.read_text() == header
    log.write([_record(1), _record(2)])
    assert not log.is_empty()
  with MetricLog(path, resume_step=1):
    pass
  assert path.read_text().startswith(header)
  assert path.read_text().count("schema") == 1
  # Without a header, and with one in each of two files put together.
  old = path.read_text().removeprefix(header)
  for text in (old, path.read_text() + path.read_text()):
    path.write_text(text)
    assert set(map(str, read_records(path))) == {str(_record(1))}
  path.write_text(old)
  with MetricLog(path, resume_step=1):
    pass
  assert path.read_text() == header + old
  # A header that was torn is written again.
  path.write_text(header[:5])
  with MetricLog(path, resume_step=0) as log:
    assert log.is_empty()
  assert path.read_text() == header


@pytest.mark.parametrize("schema", ["2", "0", '"1"', "null", "true"])
def test_another_schema_is_refused(tmp_path, schema):
  path = tmp_path / "m.jsonl"
  path.write_text(f'{{"schema": {schema}, "more": 1}}\n{{"step": 1}}\n')
  before = path.read_bytes()
  for read in (read_records, lambda path: MetricLog(path, resume_step=0)):
    with pytest.raises(ValueError, match=r"in schema .*, this version of balance_jax reads 1 to 1"):
      read(path)
  assert path.read_bytes() == before


def test_torn_last_line_is_dropped(tmp_path):
  path = tmp_path / "m.jsonl"
  whole = json.dumps(_record(1)) + "\n"
  # Cut inside the two bytes of é as well: reading must not fail on the encoding.
  torn = '{"step": 2, "text": "é'.encode()
  for end in range(len(torn)):
    path.write_bytes(whole.encode() + torn[: end + 1])
    assert read_records(path) == [_record(1)]


def test_last_line_without_newline_is_kept(tmp_path):
  (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2}')
  assert read_records(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("bad", ['{"step": 2', "3", '{"step": NaN}', "\x00\x00"])
def test_corrupt_line_names_its_number(tmp_path, bad):
  (tmp_path / "m.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
  with pytest.raises(ValueError, match="line 2"):
    read_records(tmp_path / "m.jsonl")


def test_resume_removes_later_steps_and_the_torn_line(tmp_path):
  path = tmp_path / "m.jsonl"
  with MetricLog(path) as log:
    log.write([_record(step) for step in (0, 10, 20, 30)])
  with open(path, "a") as file:
    file.write('{"event": "train", "st')
  with MetricLog(path, resume_step=20) as log:
    log.write([_record(30, loss=1.0)])
  assert read_records(path) == [_record(0), _record(10), _record(20), _record(30, loss=1.0)]
  assert os.listdir(tmp_path) == ["m.jsonl"]


def test_resume_without_a_file_starts_one(tmp_path):
  with MetricLog(tmp_path / "m.jsonl", resume_step=5) as log:
    log.write([_record(6)])
  assert read_records(tmp_path / "m.jsonl") == [_record(6)]


def test_crash_while_resuming_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "m.jsonl"
  with MetricLog(path) as log:
    log.write([_record(1), _record(2)])

  def crash(*_):
    raise OSError("disk gone")

  monkeypatch.setattr(metric_log.os, "replace", crash)
  with pytest.raises(OSError, match="disk gone"):
    MetricLog(path, resume_step=1)
  assert read_records(path) == [_record(1), _record(2)]
  assert os.listdir(tmp_path) == ["m.jsonl"]


def test_a_new_log_does_not_overwrite(tmp_path):
  with MetricLog(tmp_path / "m.jsonl") as log:
    log.write([_record(1)])
  with pytest.raises(ValueError, match="resume_step"):
    MetricLog(tmp_path / "m.jsonl")


@pytest.mark.parametrize("resume_step", [-1, 1.5, True, "3"])
def test_bad_resume_step(tmp_path, resume_step):
  with pytest.raises(ValueError, match="resume_step must be None or an int >= 0"):
    MetricLog(tmp_path / "m.jsonl", resume_step=resume_step)


@pytest.mark.parametrize(
  ("record", "match"),
  [
    ({"loss": 1.0}, "int step >= 0, got step=None"),
    ({"step": 1.5}, "got step=1.5"),
    ({"step": -1}, "got step=-1"),
    ({"step": True}, "got step=True"),
    ({"step": 1, "x": {"y": object()}}, "record.x.y must hold"),
  ],
)
def test_a_bad_record_writes_nothing(tmp_path, record, match):
  with MetricLog(tmp_path / "m.jsonl") as log, pytest.raises(ValueError, match=match):
    log.write([_record(1), record])
  assert read_records(tmp_path / "m.jsonl") == []


def test_replace_file_makes_folders_and_replaces(tmp_path):
  replace_file(tmp_path / "a" / "b", b"1")
  replace_file(tmp_path / "a" / "b", b"2")
  assert (tmp_path / "a" / "b").read_bytes() == b"2"
  assert os.listdir(tmp_path / "a") == ["b"]


def test_tensorboard_events(tmp_path):
  pytest.importorskip("tensorboardX")
  from tensorboardX.proto.event_pb2 import Event

  with MetricLog(tmp_path / "m.jsonl", tensorboard_dir=tmp_path / "tb", groups=["fr", "rm"]) as log:
    log.write([_record(5, loss=2.5, group_loss=[1.0, None]), _record(6, loss=math.nan)])
  (file,) = (tmp_path / "tb" / "uniform" / "seed0").iterdir()
  data, points = file.read_bytes(), []
  while data:  # length (8 bytes), its checksum (4), the event, its checksum (4)
    size = int.from_bytes(data[:8], "little")
    event = Event.FromString(data[12 : 12 + size])
    points += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    data = data[16 + size :]
  assert points == [(5, "train/loss", 2.5), (5, "train/group_loss/fr", 1.0)]


def test_missing_tensorboard_names_the_command(tmp_path, monkeypatch):
  real_import = builtins.__import__

  def without(name, *args, **kwargs):
    if name == "tensorboardX":
      raise ImportError(name)
    return real_import(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(ImportError, match=r"pip install 'balance_jax\[tensorboard\]'"):
    MetricLog(tmp_path / "m.jsonl", tensorboard_dir=tmp_path / "tb")
  assert not (tmp_path / "m.jsonl").exists()


class _Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test moves by hand."""
  now = [0.0]
  monkeypatch.setattr(metric_log.time, "monotonic", lambda: now[0])
  return now


def test_progress_in_a_log_file(clock):
  stream = io.StringIO()
  with Progress(1000, stream=stream) as progress:
    for step in range(10, 1001, 10):
      clock[0] += 1.0
      progress.update(step, {"fr": 1.0, "rm": None})
  lines = stream.getvalue().splitlines()
  assert [line.split(" (")[0] for line in lines] == [
    f"step {step}/1000" for step in (10, *range(100, 1001, 100))
  ]
  assert lines[5] == "step 500/1000 (50%) | 10 steps/s | ETA 0:50 | loss fr 1.000"
  assert "took 1:40" in lines[-1]


def test_progress_speed_forgets_compilation(clock):
  stream = _Terminal()
  progress = Progress(10_000, runs=3, stream=stream, start_step=100)
  clock[0] = 60.0  # compilation and 100 steps
  progress.update(200)
  assert "| 1.67 steps/s | ETA 1:38:00" in stream.getvalue()
  clock[0] = 61.0
  progress.update(300)
  assert "3 runs | 100 steps/s | ETA 1:37" in stream.getvalue()


def test_progress_on_a_terminal_rewrites_one_line(clock, monkeypatch):
  monkeypatch.setenv("COLUMNS", "40")
  stream = _Terminal()
  with Progress(10, stream=stream) as progress:
    for step in range(1, 11):
      clock[0] += 1
      progress.update(step, {g: float(i) for i, g in enumerate("abcdef")})
  text = stream.getvalue()
  assert text.count("\n") == 1
  assert text.endswith("\n")
  parts = text[:-1].split("\r")[1:]
  assert len(parts) == 10
  assert all(part.endswith("\x1b[K") and len(part) - 3 <= 39 for part in parts)


def test_progress_shows_best_and_worst_of_many(clock):
  stream = io.StringIO()
  losses = {"a": 2.0, "b": 1.0, "c": 3.0, "d": 2.5, "e": math.nan}
  Progress(10, stream=stream).update(10, losses)
  assert "loss best b 1.000, worst e nan" in stream.getvalue()


@pytest.mark.parametrize(("steps", "runs", "name"), [(0, 1, "total_steps"), (1, 0, "runs")])
def test_progress_bad_input(steps, runs, name):
  with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
    Progress(steps, runs)
