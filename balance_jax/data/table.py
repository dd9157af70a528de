"""The grouped table: all rows of all groups on the device, read by (group, index).

Rows lie group after group, so a batch drawn from any mixture of groups is one gather and runs
inside a `lax.scan`; the host takes no part in a step.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax.data import text

# Positions are int32: JAX's default integer, and what a gather takes on every device.
MAX_ROWS = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GroupTable:
  """Rows of K groups. A pytree whose only data are `rows`, so it passes through jit as an argument.

  Build it with `GroupTable.from_rows` or `group_table`, which check what they are given.

  Attributes:
    rows: pytree of arrays (N, ...): the rows of group 0, then those of group 1, and so on.
    names: the K names of the groups; static.
    group_sizes: the K numbers of rows, each >= 1, with sum N; static.

  >>> table = GroupTable.from_rows({"even": np.array([0, 2, 4]), "odd": np.array([1, 3])})
  >>> table.names, table.sizes.tolist()
  (('even', 'odd'), [3, 2])
  >>> table.take(np.array([0, 1, 0]), np.array([2, 0, 0])).tolist()
  [4, 1, 0]
  """

  rows: Any
  names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
  group_sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

  @classmethod
  def from_rows(cls, groups: Mapping[str, Any]) -> "GroupTable":
    """Puts the rows of several groups, such as images with labels, into one table.

    Args:
      groups: name -> pytree of arrays (n_g, ...) with n_g >= 1. Tree structure, dtypes and shapes
        behind the first dimension are the same in all groups. Bool or numbers, stored in JAX's
        dtype for theirs (float64 becomes float32 unless x64 is enabled).

    Returns:
      The table, with the groups in the order of the mapping.

    Raises:
      ValueError: no group, a group without rows, groups that do not match, an integer that does not
        fit the stored dtype, or more than 2**31 - 1 rows.
    """
    check_groups("groups", groups)
    trees = {name: jax.tree.map(np.asarray, tree) for name, tree in groups.items()}
    sizes = tuple(row_count(name, tree) for name, tree in trees.items())
    _offsets(sizes)
    first_name, first = next(iter(trees.items()))
    for name, tree in trees.items():
      check_same_rows(first_name, first, name, tree)
    return cls(jax.tree.map(_concatenate, *trees.values()), tuple(trees), sizes)

  @property
  def sizes(self) -> np.ndarray:
    """int64 (K,): rows by group."""
    return np.array(self.group_sizes, np.int64)

  @property
  def offsets(self) -> np.ndarray:
    """int32 (K,): the position of each group's first row."""
    return _offsets(self.group_sizes)

  def take(self, groups: jax.Array, indices: jax.Array) -> Any:
    """Reads rows; safe under jit, vmap and scan.

    Args:
      groups: integers (B,), each in [0, K).
      indices: integers (B,), each in [0, group_sizes[groups]). A value outside its range counts as
        the nearest one in it, so a wrong index never reads a row of another group.

    Returns:
      The pytree of `rows`, with arrays (B, ...).

    Raises:
      ValueError: `groups` or `indices` are no integers, or differ in shape.
    """
    groups, indices = jnp.asarray(groups), jnp.asarray(indices)
    for name, value in (("groups", groups), ("indices", indices)):
      if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got dtype {value.dtype}")
    if groups.shape != indices.shape:
      raise ValueError(
        f"groups and indices must have one shape, got {groups.shape} and {indices.shape}"
      )
    sizes = jnp.asarray(self.group_sizes, jnp.int32)
    groups = jnp.clip(groups.astype(jnp.int32), 0, len(self.group_sizes) - 1)
    # Clipped before the addition, which could otherwise overflow or enter the next group.
    indices = jnp.clip(indices.astype(jnp.int32), 0, sizes[groups] - 1)
    positions = jnp.asarray(self.offsets)[groups] + indices
    return jax.tree.map(lambda x: jnp.asarray(x).at[positions].get(mode="clip"), self.rows)


def group_table(
  documents: Mapping[str, Any], *, window: int, end_of_document: int = text.END_OF_DOCUMENT
) -> GroupTable:
  """Cuts the text of several groups into rows of tokens for next-token prediction.

  The documents of a group are joined into one stream with `end_of_document` between them; row i
  holds the tokens [i * window, i * window + window] of it, both ends included. Inputs are
  `row[:-1]` and labels `row[1:]`, so each token but the first of the stream is a label once. The
  remainder, fewer than `window` labels at the end of each group, is dropped.

  Args:
    documents: name -> list of documents, each a str, bytes (UTF-8) or integers (T,) >= 0; or
      name -> one stream of integers (T,). Strings and bytes become byte tokens.
    window: labels in a row, >= 1.
    end_of_document: token in [0, 2**31) between two documents. Tokens of another vocabulary than
      bytes need their own, as 255 is an ordinary token there.

  Returns:
    A table with rows {"tokens": (N, window + 1)}, uint8 if all tokens of all groups are below 256
    (byte tokens are) and int32 otherwise.

  Raises:
    ValueError: no group, a group without documents or with fewer than window + 1 tokens, a document
      of another kind, a byte equal to `end_of_document`, a token outside [0, 2**31), or window < 1.

  >>> table = group_table({"de": ["ja", "nein"], "fr": ["oui, non"]}, window=3)
  >>> table.sizes.tolist(), table.rows["tokens"].dtype.name
  ([2, 2], 'uint8')
  >>> [text.decode(row) for row in np.asarray(table.rows["tokens"])[2:]]
  ['oui,', ', no']
  """
  _checks.check_number("window", window, low=1, integer=True)
  check_groups("documents", documents)
  separator = _tokens("end_of_document", np.array([end_of_document]))
  streams = {name: _stream(name, value, separator) for name, value in documents.items()}
  for name, stream in streams.items():
    check_length(name, stream.size, window)
  small = all(stream.dtype == np.uint8 for stream in streams.values())
  dtype = np.uint8 if small else np.int32
  return GroupTable.from_rows(
    {
      name: {"tokens": windows(stream.astype(dtype, copy=False), window)}
      for name, stream in streams.items()
    }
  )


def check_length(name: str, tokens: int, window: int) -> None:
  """ValueError for a group without enough text for one row."""
  if tokens < window + 1:
    raise ValueError(
      f"group {name!r} has {tokens} tokens, fewer than the {window + 1} of one row (window "
      f"= {window}): give it more text or take a smaller window"
    )


def check_groups(argument: str, groups) -> None:
  if not isinstance(groups, Mapping) or not groups:
    raise ValueError(
      f"{argument} must be a mapping name -> data with >= 1 group, got {groups!r:.60}"
    )
  for name in groups:
    if not isinstance(name, str):
      raise ValueError(f"{argument}: the name of a group must be a str, got {name!r}")


def _offsets(sizes: tuple[int, ...]) -> np.ndarray:
  ends = np.cumsum(np.array(sizes, np.int64))
  if ends[-1] > MAX_ROWS:
    raise ValueError(f"a table holds at most {MAX_ROWS} rows, got {ends[-1]}: use a GroupReader")
  return (ends - np.array(sizes, np.int64)).astype(np.int32)


def row_count(name: str, tree) -> int:
  leaves = jax.tree.leaves(tree)
  lengths = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
  if len(lengths) != 1 or None in lengths or 0 in lengths:
    raise ValueError(
      f"the arrays of group {name!r} must share a leading dimension >= 1, got shapes "
      f"{[leaf.shape for leaf in leaves]}"
    )
  return lengths.pop()


def check_same_rows(first_name: str, first, name: str, tree) -> None:
  """All groups must hold rows of one kind, else they cannot lie in the same arrays."""

  def describe(tree):
    return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape[1:])}", tree)

  expected, got = describe(first), describe(tree)
  if jax.tree.structure(first) != jax.tree.structure(tree) or expected != got:
    raise ValueError(
      f"rows of group {name!r} must be like those of group {first_name!r}: expected {expected}, "
      f"got {got}"
    )


def _concatenate(*arrays: np.ndarray) -> jax.Array:
  return jnp.asarray(as_stored(np.concatenate(arrays)))


def as_stored(rows: np.ndarray) -> np.ndarray:
  """Rows in JAX's dtype for theirs, as a table holds them.

  Args:
    rows: bool or numbers, of any shape.

  Returns:
    The same values; float64 and int64 become float32 and int32 unless x64 is enabled.

  Raises:
    ValueError: another kind of array, or an integer that does not fit.
  """
  dtype = rows.dtype
  if not (jnp.issubdtype(dtype, np.number) or dtype.kind == "b"):
    raise ValueError(f"rows must be bool or numbers, got dtype {dtype}")
  stored = jax.dtypes.canonicalize_dtype(dtype)
  if dtype.kind in "iu" and stored != dtype and rows.size:
    limits = np.iinfo(stored)
    if rows.min() < limits.min or rows.max() > limits.max:
      raise ValueError(
        f"rows of dtype {dtype} are stored as {stored}, but have values in [{rows.min()}, "
        f"{rows.max()}]: enable x64 or use smaller values"
      )
  return rows.astype(stored, copy=False)


def _stream(name: str, value, separator: np.ndarray) -> np.ndarray:
  """One group's tokens: uint8 where all are below 256, else int32."""
  if isinstance(value, np.ndarray | jax.Array):
    return _tokens(f"group {name!r}", np.asarray(value))
  if not isinstance(value, list | tuple) or not value:
    raise ValueError(
      f"documents of group {name!r} must be a list of >= 1 documents or an integer array (T,), got "
      f"{type(value).__name__} {value!r:.60}"
    )
  parts = [part for document in value for part in (_document(name, document, separator), separator)]
  return np.concatenate(parts[:-1])


def _document(name: str, document, separator: np.ndarray) -> np.ndarray:
  if isinstance(document, np.ndarray | jax.Array):
    return _tokens(f"group {name!r}", np.asarray(document))
  if isinstance(document, str):
    tokens = text.encode(document)
  elif isinstance(document, bytes):
    tokens = np.frombuffer(document, np.uint8)
  else:
    raise ValueError(
      f"a document of group {name!r} must be a str, bytes or an integer array (T,), got "
      f"{type(document).__name__}"
    )
  # Only bytes that are not UTF-8 hold the default separator; the end would not be one then.
  if np.any(tokens == separator):
    raise ValueError(
      f"a document of group {name!r} holds the byte {separator[0]}, which is end_of_document"
    )
  return tokens


def _tokens(owner: str, tokens: np.ndarray) -> np.ndarray:
  if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(
      f"tokens of {owner} must be integers (T,), got shape {tokens.shape} and dtype {tokens.dtype}"
    )
  low, high = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
  if low < 0 or high >= 2**31:
    raise ValueError(f"tokens of {owner} must be in [0, 2**31), got [{low}, {high}]")
  return tokens.astype(np.uint8 if high < text.VOCAB_SIZE else np.int32)


def windows(stream: np.ndarray, window: int) -> np.ndarray:
  """Rows (n, window + 1) of tokens (T,), T > window; two neighbours share a token."""
  return np.lib.stride_tricks.sliding_window_view(stream, window + 1)[::window]
