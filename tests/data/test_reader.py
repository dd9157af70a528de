"""The grouped reader: the rows of a device table from any source, and what damaged records do."""

import os
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest

from balance_jax import data
from tests.data.conftest import write_dataset

SIZES = {"large": 57, "small": 3, "middle": 20}


def make_groups():
  """Rows of every kind that a table stores in another dtype, and of some that it does not."""
  rng = np.random.default_rng(0)
  return {
    name: {
      "tokens": rng.integers(256, size=(size, 5), dtype=np.uint8),
      "nested": (rng.normal(size=(size, 2, 2)), rng.integers(-9, 9, size=size)),
      "flag": rng.random(size) < 0.5,
    }
    for name, size in SIZES.items()
  }


class Source:
  """Records of a group, counted as they are read; at module level, so that it can be pickled."""

  def __init__(self, rows, bad=()):
    self.rows, self.bad, self.asked = rows, set(bad), []

  def __len__(self):
    return len(jax.tree.leaves(self.rows)[0])

  def __getitem__(self, index):
    self.asked.append(index)
    if index in self.bad:
      raise OSError(f"checksum of {index}")
    return jax.tree.map(lambda x: x[index], self.rows)


class BatchedSource(Source):
  """One that reads several records at once, and fails as a whole."""

  def __getitems__(self, indices):
    return [self[index] for index in indices]

  def __getitem__(self, index):
    assert type(index) is int
    return super().__getitem__(index)


def mapped(tree, directory):
  """The arrays as memory maps of files."""

  def write(path, x):
    file = directory / f"{jax.tree_util.keystr(path, simple=True, separator='_')}.npy"
    np.save(file, x)
    return np.load(file, mmap_mode="r")

  return jax.tree_util.tree_map_with_path(write, tree)


def request(shape, seed=0):
  rng = np.random.default_rng(seed)
  groups = rng.integers(len(SIZES), size=shape)
  return groups, rng.integers(2**31, size=shape) % np.array(list(SIZES.values()))[groups]


def assert_same_bytes(ours, expected):
  assert jax.tree.structure(ours) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    y = np.asarray(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("kind", ["arrays", "maps", "list", "source", "batched", "grain"])
def test_rows_are_those_of_the_table(kind, tmp_path):
  grain = pytest.importorskip("grain")
  groups = make_groups()
  table = data.GroupTable.from_rows(groups)
  for name in groups:
    (tmp_path / name).mkdir()
  make = {
    "arrays": lambda name, rows: rows,
    "maps": lambda name, rows: mapped(rows, tmp_path / name),
    "list": lambda name, rows: [Source(rows)[i] for i in range(SIZES[name])],
    "source": lambda name, rows: Source(rows),
    "batched": lambda name, rows: BatchedSource(rows),
    "grain": lambda name, rows: grain.MapDataset.source(Source(rows)).map(lambda row: row),
  }[kind]
  sources = {name: make(name, rows) for name, rows in groups.items()}
  with data.GroupReader(sources) as reader:
    assert (reader.names, reader.group_sizes) == (table.names, table.group_sizes)
    for shape in ((1,), (200,), (4, 16)):
      assert_same_bytes(reader.take(*request(shape)), table.take(*request(shape)))


@pytest.mark.parametrize(("how", "workers"), [("threads", 1), ("threads", 7), ("processes", 2)])
def test_workers_change_no_row(how, workers):
  groups = make_groups()
  sources = {name: BatchedSource(rows, bad=[2]) for name, rows in groups.items()}
  with data.GroupReader(sources, how=how, workers=workers, max_corrupt=3) as reader:
    wanted, indices = request((20, 40))
    with warnings.catch_warnings(record=True) as said:
      warnings.simplefilter("always")
      rows = reader.take(wanted, indices)
    assert len(said) == 3
    sizes = np.array(list(SIZES.values()))
    indices = np.where(indices == 2, 3 % sizes[wanted], indices)
    assert_same_bytes(rows, data.GroupTable.from_rows(groups).take(wanted, indices))
    assert reader.replaced == {("large", 2): 3, ("small", 2): 0, ("middle", 2): 3}


def test_a_row_is_read_once_and_in_order():
  sources = {name: Source(rows) for name, rows in make_groups().items()}
  reader = data.GroupReader(sources, workers=1)
  for source in sources.values():
    source.asked.clear()
  groups, indices = request((30, 30))
  reader.take(groups, indices)
  for group, source in enumerate(sources.values()):
    assert source.asked == np.unique(indices[groups == group]).tolist()


def test_tfds_array_records(tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets", reason="pip install 'balance_jax[data]'")
  rng = np.random.default_rng(0)
  records = [{"x": rng.integers(256, size=6, dtype=np.uint8), "y": i} for i in range(40)]
  features = {
    "x": tfds.features.Tensor(shape=(6,), dtype=np.uint8),
    "y": tfds.features.Scalar(np.int64),
  }
  path = write_dataset(tmp_path, records, features=features)
  dataset = tfds.builder_from_directory(str(path))
  halves = {"first": "train[:25]", "second": "train[25:]"}
  sources = {name: dataset.as_data_source(split) for name, split in halves.items()}
  table = data.GroupTable.from_rows(
    {
      name: {key: np.stack([record[key] for record in source]) for key in ("x", "y")}
      for name, source in sources.items()
    }
  )
  assert table.group_sizes == (25, 15)
  wanted = np.repeat([0, 1], [25, 15]), np.r_[24:-1:-1, :15]
  for how in data.reader.HOW:
    with data.GroupReader(sources, how=how, workers=2) as reader:
      assert_same_bytes(reader.take(*wanted), table.take(*wanted))


def write_array_record(path, records):
  module = pytest.importorskip("array_record.python.array_record_module")
  writer = module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def test_a_damaged_array_record(tmp_path):
  grain = pytest.importorskip("grain")
  rng = np.random.default_rng(0)
  rows = rng.integers(256, size=(9, 2000), dtype=np.uint8)
  path = tmp_path / "rows.array_record"
  write_array_record(path, [row.tobytes() for row in rows])

  def open_source():
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    raw = ArrayRecordDataSource(str(path))
    return {"only": grain.MapDataset.source(raw).map(lambda x: np.frombuffer(x, np.uint8))}

  content = bytearray(path.read_bytes())
  content[content.find(rows[4].tobytes()[:100]) + 700] ^= 16
  path.write_bytes(content)
  everything = np.zeros(9, int), np.arange(9)
  with pytest.raises(data.CorruptedDataError, match=r"record 4 of group 'only' cannot be read"):
    data.GroupReader(open_source()).take(*everything)
  with pytest.warns(UserWarning, match=r"record 5 takes its place \(1 of at most 2\)"):
    found = data.GroupReader(open_source(), max_corrupt=2).take(*everything)
  np.testing.assert_array_equal(found, rows[[0, 1, 2, 3, 5, 5, 6, 7, 8]])


def test_replacements_do_not_depend_on_what_was_read_before():
  rows = {"x": np.arange(10)}
  bad, replacements = (0, 3, 4, 9), {0: 1, 3: 5, 4: 5, 9: 1}
  for order in ([0, 3, 4, 9], [9, 4, 3, 0], [4, 5, 9, 0, 3]):
    reader = _quietly(lambda: data.GroupReader({"only": Source(rows, bad)}, max_corrupt=4))
    for index in order:
      found = _quietly(lambda: reader.take(np.array([0]), np.array([index])))  # noqa: B023
      assert found["x"].tolist() == [replacements.get(index, index)]
    assert reader.replaced == {("only", index): to for index, to in replacements.items()}


def _quietly(call):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return call()


def test_known_damage_is_not_read_again():
  source = Source({"x": np.arange(10)}, bad=[3])
  reader = data.GroupReader({"only": source}, max_corrupt=1)
  every = np.zeros(10, int), np.arange(10)
  _quietly(lambda: reader.take(*every))
  source.asked.clear()
  reader.take(*every)
  assert 3 not in source.asked


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_the_limit_counts_different_records(limit):
  make = lambda: data.GroupReader(  # noqa: E731
    {"a": Source(np.arange(9), bad=[2]), "b": Source(np.arange(9), bad=[5])}, max_corrupt=limit
  )
  reader = make()
  for _ in range(2):  # the same record twice is one
    if limit > 0:
      _quietly(lambda: reader.take(np.array([0]), np.array([2])))
  if limit < 2:
    name, index = ("a", 2) if limit == 0 else ("b", 5)
    match = rf"record {index} of group '{name}' cannot be read \(OSError: checksum of {index}\)"
    with pytest.raises(data.CorruptedDataError, match=match):
      reader.take(np.array([0, 1]), np.array([2, 5]))
  else:
    _quietly(lambda: reader.take(np.array([0, 1]), np.array([2, 5])))


def test_a_record_of_another_kind_is_damaged():
  records = [np.zeros(3), np.zeros(3), np.zeros(4), np.zeros(3, np.int32), {"x": np.zeros(3)}]
  for index, said in {2: "float64[4]", 3: "int32[3]", 4: "'x'"}.items():
    reader = data.GroupReader({"only": [*records[:2], records[index]]})
    with pytest.raises(data.CorruptedDataError, match=r"record 2 .*ValueError") as error:
      reader.take(np.zeros(3, int), np.arange(3))
    assert said in str(error.value)


def test_a_group_without_a_readable_record():
  with pytest.raises(data.CorruptedDataError, match="no record of group 'only' can be read"):
    data.GroupReader({"only": Source(np.arange(3), bad=range(3))}, max_corrupt=9)


def test_running_out_of_memory_is_no_damage():
  class Full(Source):
    def __getitem__(self, index):
      if index > 0:
        raise MemoryError
      return super().__getitem__(index)

  reader = data.GroupReader({"only": Full(np.arange(3))}, max_corrupt=9)
  with pytest.raises(MemoryError):
    reader.take(np.zeros(3, int), np.arange(3))


@pytest.mark.parametrize(
  ("sources", "arguments", "match"),
  [
    ({}, {}, "sources must be a mapping"),
    ({"a": 3}, {}, "group 'a' must be a source .* got int without __len__ and __getitem__"),
    ({"a": []}, {}, "group 'a' has no rows"),
    ({"a": np.zeros((0, 2))}, {}, "group 'a' must share a leading dimension >= 1"),
    ({"a": [b"text"]}, {}, "rows must be bool or numbers"),
    ({"a": np.zeros(2), "b": np.zeros((2, 2))}, {}, "rows of group 'b' must be like those of"),
    ({"a": np.zeros(2)}, {"how": "processes"}, "how is 'processes'; the arrays of group 'a'"),
    ({"a": np.zeros(2)}, {"how": "fibres"}, "how is 'fibres'; allowed: processes, threads"),
    ({"a": np.zeros(2)}, {"workers": 0}, "workers is 0"),
    ({"a": np.zeros(2)}, {"max_corrupt": -1}, "max_corrupt is -1"),
  ],
)
def test_bad_sources(sources, arguments, match):
  with pytest.raises(ValueError, match=match):
    data.GroupReader(sources, **arguments)


@pytest.mark.parametrize(
  ("groups", "indices", "match"),
  [
    ([0.0], [0], "groups must be integers"),
    ([0], [True], "indices must be integers"),
    ([0, 1], [0], "one shape"),
    (np.zeros(0, int), np.zeros(0, int), "at least one row"),
    ([2], [0], r"groups must be in \[0, 2\), got \[2, 2\]"),
    ([1, 1], [0, 2], r"indices of group 'b' must be in \[0, 2\), got 2"),
    ([1], [-1], "got -1"),
  ],
)
def test_bad_requests(groups, indices, match):
  reader = data.GroupReader({"a": np.zeros(5), "b": np.zeros(2)})
  with pytest.raises(ValueError, match=match):
    reader.take(groups, indices)


def test_an_integer_that_does_not_fit():
  reader = data.GroupReader({"a": np.array([1, 2**40])})
  with pytest.raises(ValueError, match="rows of dtype int64 are stored as int32"):
    reader.take([0], [1])


def test_under_jit_it_says_so():
  reader = data.GroupReader({"a": np.zeros(5)})
  with pytest.raises(ValueError, match="groups must be known when the function is traced"):
    jax.jit(reader.take)(np.array([0]), np.array([0]))


WITH_WORKERS = """
import multiprocessing, numpy as np, time
from balance_jax import data
from tests.data.test_reader import Source
if __name__ == "__main__":
  reader = data.GroupReader({"a": Source(np.arange(9))}, how="processes", workers=1)
  reader.take([0], [1])
  print(*(child.pid for child in multiprocessing.active_children()), flush=True)
  time.sleep(60)
"""


def test_workers_end_with_a_killed_parent(tmp_path):
  script = tmp_path / "main.py"
  script.write_text(WITH_WORKERS)
  root = os.path.dirname(os.path.dirname(data.__path__[0]))
  parent = subprocess.Popen(
    [sys.executable, script],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,  # the complaint about semaphores of the killed one
    env=os.environ | {"PYTHONPATH": root},
  )
  (worker,) = map(int, parent.stdout.readline().split())
  parent.send_signal(signal.SIGKILL)
  parent.wait()
  deadline = time.monotonic() + 20
  while _runs(worker):
    assert time.monotonic() < deadline, "the worker lives on"
    time.sleep(0.05)


def _runs(pid):
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False
