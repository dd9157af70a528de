import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import data
from balance_jax.data import table as table_module


def make_table():
  return data.GroupTable.from_rows(
    {
      "a": {"x": np.arange(6.0, dtype=np.float32).reshape(3, 2), "y": np.array([0, 1, 2])},
      "b": {"x": np.arange(10.0, 12.0, dtype=np.float32).reshape(1, 2), "y": np.array([3])},
      "c": {"x": np.arange(20.0, 24.0, dtype=np.float32).reshape(2, 2), "y": np.array([4, 5])},
    }
  )


def reference_rows(documents, window, separator=255):
  """Rows by a plain loop over the joined stream."""
  stream = []
  for number, document in enumerate(documents):
    stream += ([separator] if number else []) + list(document)
  return [stream[start : start + window + 1] for start in range(0, len(stream) - window, window)]


def test_properties():
  table = make_table()
  assert table.names == ("a", "b", "c")
  assert table.group_sizes == (3, 1, 2)
  assert table.sizes.dtype == np.int64
  assert table.sizes.tolist() == [3, 1, 2]
  assert table.offsets.tolist() == [0, 3, 4]
  assert table.rows["x"].dtype == jnp.float32
  assert table.rows["y"].shape == (6,)


def test_take_reads_every_row():
  table = make_table()
  groups = np.array([0, 0, 0, 1, 2, 2])
  indices = np.array([0, 1, 2, 0, 0, 1])
  for take in (table.take, jax.jit(table.take), jax.vmap(table.take)):
    batch = take(groups, indices)
    np.testing.assert_array_equal(batch["y"], np.arange(6))
    np.testing.assert_array_equal(batch["x"], table.rows["x"])


def test_table_is_a_jit_argument_with_static_names():
  table = make_table()
  assert len(jax.tree.leaves(table)) == 2
  read = jax.jit(lambda table, g, i: table.take(g, i)["y"] + len(table.names))
  np.testing.assert_array_equal(read(table, jnp.array([2, 1]), jnp.array([1, 0])), [8, 6])
  moved = jax.tree.map(np.asarray, table)
  assert moved.names == table.names
  np.testing.assert_array_equal(moved.take(np.array([2]), np.array([1]))["y"], [5])


def test_take_stays_in_the_group():
  y = make_table().take(np.array([0, 1, 1, -4, 9]), np.array([3, 2**31 - 1, -1, 1, 1]))["y"]
  np.testing.assert_array_equal(y, [2, 3, 3, 1, 5])


def test_take_with_small_group_dtype_and_many_groups():
  table = data.GroupTable.from_rows({str(k): np.array([k]) for k in range(300)})
  np.testing.assert_array_equal(
    table.take(np.array([7, 255], np.uint8), np.zeros(2, np.uint8)), [7, 255]
  )


@pytest.mark.parametrize(
  ("groups", "indices", "message"),
  [
    (np.zeros(2), np.zeros(2, int), "groups must be integers"),
    (np.zeros(2, int), np.zeros(2, bool), "indices must be integers"),
    (np.zeros(2, int), np.zeros(3, int), r"one shape, got \(2,\) and \(3,\)"),
  ],
)
def test_take_rejects(groups, indices, message):
  with pytest.raises(ValueError, match=message):
    make_table().take(groups, indices)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 11])
def test_rows_equal_a_plain_loop(window):
  rng = np.random.default_rng(0)
  groups = {
    name: [bytes(rng.integers(0, 200, rng.integers(1, 9)).tolist()) for _ in range(count)]
    for name, count in (("x", 9), ("y", 4))
  }
  table = data.group_table(groups, window=window)
  for name, offset, size in zip(table.names, table.offsets, table.sizes, strict=True):
    expected = reference_rows(groups[name], window)
    rows = table.rows["tokens"][offset : offset + size]
    np.testing.assert_array_equal(rows, expected)
  assert table.rows["tokens"].dtype == jnp.uint8


def test_each_token_but_the_first_is_a_label_once():
  stream = np.arange(1, 32)
  rows = np.asarray(data.group_table({"g": stream}, window=6).rows["tokens"])
  np.testing.assert_array_equal(rows[:, 1:].ravel(), stream[1:])
  np.testing.assert_array_equal(rows[:, :-1].ravel(), stream[:-1])


def test_remainder_is_dropped():
  assert data.group_table({"g": ["abcdefg"]}, window=3).group_sizes == (2,)
  assert data.group_table({"g": ["abcdef"]}, window=3).group_sizes == (1,)


@pytest.mark.parametrize(
  ("high", "separator", "dtype"),
  [(255, 255, jnp.uint8), (256, 255, jnp.int32), (3, 256, jnp.int32), (2**31 - 1, 0, jnp.int32)],
)
def test_dtype_holds_the_vocabulary(high, separator, dtype):
  documents = {"g": [np.array([1, high]), np.array([2, 3], np.uint8)], "h": np.array([1, 2])}
  table = data.group_table(documents, window=1, end_of_document=separator)
  assert table.rows["tokens"].dtype == dtype
  np.testing.assert_array_equal(
    table.rows["tokens"], [[1, high], [high, separator], [separator, 2], [2, 3], [1, 2]]
  )


def test_str_bytes_and_tokens_agree():
  window = 4
  kinds = [["né", "oui"], ["né".encode(), b"oui"], [data.encode("né"), jnp.array(list(b"oui"))]]
  tables = [data.group_table({"fr": kind}, window=window) for kind in kinds]
  for table in tables:
    np.testing.assert_array_equal(table.rows["tokens"], [[*"né".encode(), 255, ord("o")]])


@pytest.mark.parametrize(
  ("documents", "window", "message"),
  [
    ({}, 2, "documents must be a mapping"),
    ([("a", ["bc"])], 2, "documents must be a mapping"),
    ({1: ["abcd"]}, 2, "name of a group must be a str, got 1"),
    ({"a": ["abcd"]}, 0, "window is 0"),
    ({"a": ["abcd"]}, 2.0, "window is 2.0; expected an integer"),
    ({"a": ["abcd"]}, True, "window is True; expected an integer"),
    ({"a": ["abcd"], "b": []}, 2, "documents of group 'b' must be a list of >= 1"),
    ({"a": "abcd"}, 2, "documents of group 'a' must be a list.* got str 'abcd'"),
    ({"a": b"abcd"}, 2, "documents of group 'a' must be a list.* got bytes"),
    ({"a": [1, 2, 3]}, 2, "document of group 'a' must be .* got int"),
    ({"a": ["abcd"], "b": ["ab"]}, 2, r"group 'b' has 2 tokens, fewer than the 3 .*window = 2"),
    ({"a": [""]}, 2, "group 'a' has 0 tokens"),
    ({"a": np.zeros((4, 2), int)}, 2, r"tokens of group 'a' must be integers .*\(4, 2\)"),
    ({"a": np.zeros(4)}, 2, "tokens of group 'a' must be integers .*float64"),
    ({"a": np.array([1, -1, 2])}, 2, r"tokens of group 'a' .*got \[-1, 2\]"),
    ({"a": [np.array([2**31])]}, 2, r"tokens of group 'a' must be in \[0, 2\*\*31\)"),
    ({"a": [b"ab\xffcd"]}, 2, "'a' holds the byte 255, which is end_of_document"),
  ],
)
def test_group_table_rejects(documents, window, message):
  with pytest.raises(ValueError, match=message):
    data.group_table(documents, window=window)


def test_end_of_document_is_checked():
  with pytest.raises(ValueError, match="'a' holds the byte 98"):
    data.group_table({"a": ["abc"]}, window=1, end_of_document=98)
  with pytest.raises(ValueError, match="tokens of end_of_document"):
    data.group_table({"a": ["abc"]}, window=1, end_of_document=-1)


@pytest.mark.parametrize(
  ("groups", "message"),
  [
    ({}, "groups must be a mapping"),
    ({"a": np.zeros((0, 2))}, "group 'a' must share a leading dimension >= 1"),
    ({"a": {"x": np.zeros(2), "y": np.zeros(3)}}, r"group 'a' .*\[\(2,\), \(3,\)\]"),
    ({"a": np.float32(1)}, "group 'a' must share a leading dimension"),
    ({"a": ()}, "group 'a' must share a leading dimension"),
    ({"a": np.zeros((2, 3)), "b": np.zeros((2, 4))}, "'b' must be like those of group 'a'"),
    ({"a": np.zeros(2), "b": np.zeros(2, int)}, r"expected float64\[\], got int64\[\]"),
    ({"a": {"x": np.zeros(2)}, "b": {"z": np.zeros(2)}}, "'b' must be like those of group 'a'"),
    ({"a": np.array(["x"])}, "bool or numbers"),
    ({"a": np.array([2**31])}, "stored as int32, but have values in"),
  ],
)
def test_from_rows_rejects(groups, message):
  with pytest.raises(ValueError, match=message):
    data.GroupTable.from_rows(groups)


def test_row_positions_fit_int32():
  # Views of one byte: no memory is used before the check.
  def view(n):
    return np.broadcast_to(np.uint8(0), (n,))

  with pytest.raises(ValueError, match="at most 2147483647 rows, got 2147483648"):
    data.GroupTable.from_rows({"a": view(2**31 - 1), "b": view(1)})
  largest = data.GroupTable(rows=None, names=("a", "b"), group_sizes=(2**31 - 2, 1))
  assert largest.offsets.tolist() == [0, table_module.MAX_ROWS - 1]
  assert largest.offsets.dtype == np.int32
