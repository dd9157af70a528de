"""The grouped reader: rows of all groups on disk, read by (group, index) as a `GroupTable` is.

For data larger than memory. It takes any source with random access: the data sources of TFDS and
of grain, grain's lazily mapped data sets, memory-mapped arrays. Which rows are wanted is decided
elsewhere (`mixing.GroupStreams`), so the reader keeps no position and has nothing to save.
"""

import concurrent.futures
import multiprocessing
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from balance_jax import _checks
from balance_jax.data.digests import CorruptedDataError
from balance_jax.data.table import as_stored, check_groups, check_same_rows, row_count

HOW = ("threads", "processes")


class GroupReader:
  """Rows of K groups that stay where they are until they are asked for.

  Give it to `training.make_step` in place of a `GroupTable`: the batches are the same to the byte,
  and `training.run` reads a chunk of them while the device computes the one before.

  Args:
    sources: name -> rows of the group. Either a source, anything with `__len__`,
      `__getitem__(int)` and possibly `__getitems__(list of int)`, whose records are pytrees of
      arrays or numbers; or a pytree of arrays (n_g, ...), memory maps among them. All records have
      one structure, dtype and shape.
    how: "threads", enough where reading is waiting; or "processes", where records are decoded in
      Python. Processes get the sources pickled and import the main module once more, so guard that
      by `if __name__ == "__main__"`.
    workers: how many of them, >= 1. It changes no row.
    max_corrupt: how many records, >= 0, may fail to be read. In place of such a record the next
      readable one of its group is read, always the same one, and a warning names both. One failure
      more, be it the first, stops the run.

  Raises:
    ValueError: no group, a group without rows, groups whose records differ in kind, arrays with
      how = "processes", an argument out of range.
    CorruptedDataError: as in `take`.

  Attributes:
    names: the K names of the groups.
    group_sizes: the K numbers of rows.
    replaced: (name, index) of each record that could not be read -> the index read instead.

  >>> reader = GroupReader({"even": np.array([0, 2, 4]), "odd": np.array([1, 3])})
  >>> reader.take(np.array([0, 1, 0]), np.array([2, 0, 0])).tolist()
  [4, 1, 0]
  """

  def __init__(
    self,
    sources: Mapping[str, Any],
    *,
    how: str = "threads",
    workers: int = 4,
    max_corrupt: int = 0,
  ):
    check_groups("sources", sources)
    _checks.check_choice("how", how, HOW)
    _checks.check_number("workers", workers, low=1, integer=True)
    _checks.check_number("max_corrupt", max_corrupt, low=0, integer=True)
    self.names = tuple(sources)
    self.replaced: dict[tuple[str, int], int] = {}
    self._rows = tuple(_open(name, source, how) for name, source in sources.items())
    self.group_sizes = tuple(len(rows) for rows in self._rows)
    self._starts = np.cumsum(self.sizes) - self.sizes
    self._how, self._workers, self._max_corrupt = how, workers, max_corrupt
    self._pool: concurrent.futures.Executor | None = None
    # (name of the first group, its rows without any): what all records have to be like.
    self._like: tuple[str, Any] | None = None
    self._like = self._describe()

  @property
  def sizes(self) -> np.ndarray:
    """int64 (K,): rows by group."""
    return np.array(self.group_sizes, np.int64)

  @property
  def row_shapes(self) -> Any:
    """Pytree of `jax.ShapeDtypeStruct`: shape and dtype of one row."""
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], as_stored(x).dtype), self._like[1]
    )

  def take(self, groups, indices) -> Any:
    """Reads rows: on the host, so not under jit. A row asked for several times is read once.

    Args:
      groups: integers of any shape S, each in [0, K), at least one.
      indices: integers of shape S, each in [0, group_sizes[groups]).

    Returns:
      Pytree of NumPy arrays (*S, ...) in the dtypes that a `GroupTable` has.

    Raises:
      ValueError: groups or indices are no integers, differ in shape or are out of range.
      CorruptedDataError: too many records cannot be read; names group, index and reason.
    """
    groups, indices = self._check_request(groups, indices)
    wanted = self._starts[groups.ravel()] + indices.ravel()
    leaves, failures = self._read(self._with_replacements(wanted))
    while failures:
      for failure in failures:
        self._find_replacement(*failure)
      leaves, failures = self._read(self._with_replacements(wanted))
    shaped = [leaf.reshape(*groups.shape, *leaf.shape[1:]) for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(self._like[1]), shaped)

  def close(self) -> None:
    """Ends the workers; a later read starts new ones."""
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
      self._pool = None

  def __enter__(self) -> "GroupReader":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _check_request(self, groups, indices) -> tuple[np.ndarray, np.ndarray]:
    request = {"groups": groups, "indices": indices}
    for name, value in request.items():
      _checks.check_known(name, value)
      request[name] = np.asarray(value)
      if request[name].dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got dtype {request[name].dtype}")
    groups, indices = request.values()
    if groups.shape != indices.shape or groups.size == 0:
      raise ValueError(
        "groups and indices must have one shape with at least one row, got "
        f"{groups.shape} and {indices.shape}"
      )
    if groups.min() < 0 or groups.max() >= len(self.names):
      raise ValueError(
        f"groups must be in [0, {len(self.names)}), got [{groups.min()}, {groups.max()}]"
      )
    outside = (indices < 0) | (indices >= self.sizes[groups])
    if outside.any():
      group, index = groups[outside][0], indices[outside][0]
      raise ValueError(
        f"indices of group {self.names[group]!r} must be in [0, {self.group_sizes[group]}), "
        f"got {index}"
      )
    return groups, indices

  def _describe(self) -> tuple[str, Any]:
    """`_like`, from the first record of each group, so that groups that differ are seen at once."""
    first = None
    for group, (name, rows) in enumerate(zip(self.names, self._rows, strict=True)):
      found, failures = _read_rows(name, rows, [0], None)
      if failures:
        found, _ = _read_rows(name, rows, [self._find_replacement(group, 0, failures[0])], None)
      first = found if first is None else first
      check_same_rows(self.names[0], first, name, found)
    jax.tree.map(as_stored, first)  # refuses what is no number
    return self.names[0], jax.tree.map(lambda x: x[:0], first)

  # --- Reading ---

  def _read(self, positions: np.ndarray) -> tuple[list[np.ndarray], list[tuple[int, int, str]]]:
    """Rows at positions (n,), counted through all groups: (arrays (n, ...), failures)."""
    distinct, inverse = np.unique(positions, return_inverse=True)
    # The places in the batch of the distinct rows, those of row i from first[i] to first[i + 1].
    places = np.argsort(inverse, kind="stable")
    first = np.searchsorted(inverse[places], np.arange(len(distinct) + 1))
    leaves = [
      np.empty((len(positions), *leaf.shape[1:]), as_stored(leaf).dtype)
      for leaf in jax.tree.leaves(self._like[1])
    ]
    failures = []
    parts = self._split(distinct)
    results = [self._submit(group, distinct[start:end]) for group, start, end in parts]
    for number, (group, start, _) in enumerate(parts):
      found, bad = results[number].result()
      results[number] = None  # Frees the part, or all of the rows would be held twice.
      if bad:
        failures += [(group, index, reason) for index, reason in bad.items()]
        continue
      for leaf, part in zip(leaves, jax.tree.leaves(found), strict=True):
        here = places[first[start] : first[start + len(part)]]
        leaf[here] = as_stored(part)[inverse[here] - start]
    return leaves, failures

  def _split(self, distinct: np.ndarray) -> list[tuple[int, int, int]]:
    """Parts (group, start, end) of sorted positions: two for a worker, and none of two groups."""
    size = -(-len(distinct) // (2 * self._workers))
    ends = np.searchsorted(distinct, self._starts + self.sizes)
    parts, start = [], 0
    for group, end in enumerate(ends.tolist()):
      parts += [(group, low, min(low + size, end)) for low in range(start, end, size)]
      start = end
    return parts

  def _submit(self, group: int, positions: np.ndarray) -> concurrent.futures.Future:
    name, rows = self.names[group], self._rows[group]
    indices = (positions - self._starts[group]).tolist()
    if self._pool is None:
      self._pool = self._start()
    if self._how == "threads":
      return self._pool.submit(_read_rows, name, rows, indices, self._like)
    return self._pool.submit(_read_in_process, group, name, indices, self._like)

  def _start(self) -> concurrent.futures.Executor:
    if self._how == "threads":
      return concurrent.futures.ThreadPoolExecutor(self._workers, "reader")
    return concurrent.futures.ProcessPoolExecutor(
      self._workers,
      # A fork of a process in which JAX has started its threads may hang.
      mp_context=multiprocessing.get_context("spawn"),
      initializer=_start_process,
      initargs=(self._rows,),
    )

  # --- Records that cannot be read ---

  def _with_replacements(self, positions: np.ndarray) -> np.ndarray:
    positions = positions.copy()
    for (name, index), replacement in self.replaced.items():
      start = self._starts[self.names.index(name)]
      positions[positions == start + index] = start + replacement
    return positions

  def _find_replacement(self, group: int, index: int, reason: str) -> int:
    """The next record that can be read, whatever was read before: resumed runs read the same."""
    name, size = self.names[group], self.group_sizes[group]
    failed = []
    for candidate in ((index + i) % size for i in range(size)):
      if (name, candidate) in self.replaced:
        continue
      if candidate != index:
        _, bad = _read_rows(name, self._rows[group], [candidate], self._like)
        if not bad:
          break
        reason = bad[candidate]
      failed.append(candidate)
      if len(self.replaced) + len(failed) > self._max_corrupt:
        raise CorruptedDataError(
          f"record {candidate} of group {name!r} cannot be read ({reason}); max_corrupt = "
          f"{self._max_corrupt} such records may be replaced by others"
        )
    else:
      raise CorruptedDataError(f"no record of group {name!r} can be read ({reason})")
    for bad in failed:
      self.replaced[name, bad] = candidate
      warnings.warn(
        f"record {bad} of group {name!r} cannot be read ({reason}); record {candidate} takes its "
        f"place ({len(self.replaced)} of at most {self._max_corrupt})",
        stacklevel=3,
      )
    return candidate


class _Arrays:
  """Rows of a pytree of arrays."""

  def __init__(self, name: str, tree: Any):
    self._tree = tree
    self._length = row_count(name, tree)

  def __len__(self) -> int:
    return self._length

  def read(self, indices: Sequence[int]) -> Any:
    return jax.tree.map(lambda x: np.asarray(x[indices]), self._tree)


class _Records:
  """Rows of a random-access source, which are stacked."""

  def __init__(self, source: Any):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def read(self, indices: Sequence[int]) -> Any:
    if hasattr(self._source, "__getitems__"):
      records = self._source.__getitems__(indices)
    else:
      records = [self._source[index] for index in indices]
    if len(records) != len(indices):
      raise ValueError(f"the source returned {len(records)} records for {len(indices)} indices")
    return jax.tree.map(lambda *leaves: np.stack(leaves), *records)


def _open(name: str, source: Any, how: str) -> _Arrays | _Records:
  leaves = jax.tree.leaves(source)
  # A list is taken for its records.
  if leaves and not isinstance(source, list) and all(isinstance(x, np.ndarray) for x in leaves):
    if how == "processes":
      # Pickling a memory map sends all of its data.
      raise ValueError(f"how is {how!r}; the arrays of group {name!r} are read by 'threads' only")
    return _Arrays(name, source)
  missing = [method for method in ("__len__", "__getitem__") if not hasattr(source, method)]
  if missing:
    raise ValueError(
      f"group {name!r} must be a source with __len__ and __getitem__ or a pytree of NumPy arrays, "
      f"got {type(source).__name__} without {' and '.join(missing)}"
    )
  if len(source) < 1:
    raise ValueError(f"group {name!r} has no rows; expected at least one")
  return _Records(source)


def _read_rows(name: str, rows, indices: list[int], like: Any) -> tuple[Any, dict[int, str]]:
  """(rows at the indices, {}) or, where one cannot be read, (None, index -> reason)."""
  try:
    found = rows.read(indices)
    if like is not None:
      check_same_rows(*like, name, found)
    return found, {}
  except MemoryError:
    raise
  except Exception as error:  # What a source raises for a damaged record is its own affair.
    if len(indices) == 1:
      reason = " ".join(str(error).split())
      return None, {indices[0]: f"{type(error).__name__}: {reason:.300}"}
  # One record fails the whole request.
  single = [_read_rows(name, rows, [index], like) for index in indices]
  failures = {index: reason for _, bad in single for index, reason in bad.items()}
  if failures:
    return None, failures
  return jax.tree.map(lambda *parts: np.concatenate(parts), *(found for found, _ in single)), {}


# --- In a worker process ---

_process_rows: Sequence[Any] = ()


def _start_process(rows: Sequence[Any]) -> None:
  global _process_rows
  _process_rows = rows
  # A parent that was killed takes no leave; its workers would wait for work forever.
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)


def _read_in_process(group: int, name: str, indices: list[int], like: Any):
  return _read_rows(name, _process_rows[group], indices, like)
