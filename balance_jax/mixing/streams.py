"""Shuffled index streams per group, computed instead of stored.

Item k of epoch e of group g is a pure function of (key, g, e, k): a keyed bijection of [0, n_g).
No permutation is stored, so a billion rows cost nothing, resuming needs one position per group,
and any host can compute its own share of a batch.

The bijection is a generalised Feistel network on Z_a x Z_b, a = ceil(sqrt(n)), b = ceil(n / a)
(Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): one half is shifted by a
keyed hash of the other, `ROUNDS` times in turn, and a value that falls outside [0, n) is sent
through the network again until it is inside ("cycle walking"). As a * b - n < a, that is rare.
It is a statistical shuffle, not a cipher.
"""

import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks

# From the exact law with ideal hashes: after 16 rounds the order of 3, 4, 5 and 6 items is within
# 5e-6, 2e-5, 4e-3 and 6e-3 of uniform (total variation), and a pair of 9 or more within 1e-7. With
# 8 rounds it would be 1e-3, 5e-3, 6e-2 and 9e-2, and 3e-4.
ROUNDS = 16
MAX_SIZE = 2**31  # Indices are int32 on the device, and a half fits 16 bits.
MAX_HOST_SIZE = 2**40

_GOLDEN = np.uint32(0x9E3779B9)


class StreamState(NamedTuple):
  """Position of every group, in mixed radix: `epoch * n + offset` items were taken.

  Attributes:
    epoch: uint32 (K,), whole passes.
    offset: uint32 (K,), items taken of the current pass, in [0, n_g).
  """

  epoch: jax.Array
  offset: jax.Array


class GroupStreams:
  """Endless epoch-shuffled index streams, one per group.

  Every epoch of a group visits each of its `n_g` items exactly once, in an order of its own.

  Args:
    sizes: K ints in [1, 2^31], rows of each group.

  Raises:
    ValueError: if `sizes` is empty, or one of them is no int or out of range.

  Example:
    >>> streams = GroupStreams([3, 5])
    >>> state = streams.init()
    >>> counts = jnp.array([4, 2])
    >>> groups, indices, state = streams.take(jax.random.key(0), state, counts, batch=6)
    >>> groups.tolist()
    [0, 0, 0, 0, 1, 1]
    >>> sorted(indices[:3].tolist())
    [0, 1, 2]
    >>> state.epoch.tolist(), state.offset.tolist()
    ([1, 0], [1, 2])
  """

  def __init__(self, sizes):
    self.sizes = _check_sizes(sizes, MAX_SIZE).astype(np.uint32)
    rows, columns = _grid(self.sizes.astype(np.uint64))
    self._rows, self._columns = rows.astype(np.uint32), columns.astype(np.uint32)
    for table in (self.sizes, self._rows, self._columns):
      table.setflags(write=False)

  def init(self) -> StreamState:
    """Returns the `StreamState` at the start of epoch 0 of every group."""
    zeros = jnp.zeros(self.sizes.shape, jnp.uint32)
    return StreamState(epoch=zeros, offset=zeros)

  def take(
    self, key, state: StreamState, counts, batch: int
  ) -> tuple[jax.Array, jax.Array, StreamState]:
    """Takes the next `counts[g]` items of every group g.

    Args:
      key: PRNG key of the run (typed or raw), the same in every call.
      state: `StreamState`.
      counts: int (K,), non-negative, sum `batch` (see `allocate_counts`); a count may exceed the
        size of its group, which is then visited several times.
      batch: static int, number of rows B.

    Returns:
      groups: int32 (B,), group of each row, in ascending order.
      indices: int32 (B,), row within its group, in [0, n_g).
      state: `StreamState` after these items.

    Raises:
      ValueError: if a shape or `batch` is wrong, or (outside of jit) `counts` do not sum to it.
    """
    for name, value in {"counts": counts, **state._asdict()}.items():
      _checks.check_shape(name, value, self.sizes.shape)
    if isinstance(batch, bool) or not isinstance(batch, numbers.Integral) or batch < 1:
      raise ValueError(f"batch must be a static int >= 1, got {batch!r}")
    if _checks.is_concrete(counts):
      counts = np.asarray(counts)  # Of a jax array, np.min would be traced where it is a constant.
      if counts.min() < 0 or counts.sum() != batch:
        raise ValueError(f"counts must be >= 0 with sum {batch}, got {counts.tolist()}")
    counts = jnp.asarray(counts, jnp.int32)
    ids = jnp.arange(self.sizes.shape[0], dtype=jnp.int32)
    groups = jnp.repeat(ids, counts, total_repeat_length=int(batch))
    first = jnp.cumsum(counts, dtype=jnp.int32) - counts
    rank = (jnp.arange(batch, dtype=jnp.int32) - first[groups]).astype(jnp.uint32)
    indices = self.item(key, groups, state.epoch[groups], state.offset[groups] + rank)
    taken = state.offset + counts.astype(jnp.uint32)
    state = StreamState(epoch=state.epoch + taken // self.sizes, offset=taken % self.sizes)
    return groups, indices, state

  def item(self, key, group, epoch, k) -> jax.Array:
    """Index of item `k` of epoch `epoch` of group `group`.

    Args:
      key: PRNG key of the run (typed or raw).
      group: int, in [0, K).
      epoch: int, in [0, 2^32).
      k: int, in [0, 2^32); k >= n_g is item k - n_g of the epoch after, and so on.
        The three broadcast against each other.

    Returns:
      int32 of the broadcast shape, in [0, n_g).

    Raises:
      ValueError: if `key` is not one PRNG key, or (outside of jit) an int is out of range.
    """
    ends = {"group": self.sizes.size, "epoch": 2**32, "k": 2**32}
    values = dict(zip(ends, (group, epoch, k), strict=True))
    for name, value in values.items():
      if _checks.is_concrete(value):
        values[name] = _check_range(name, value, ends[name])
    shape = jnp.broadcast_shapes(*(np.shape(value) for value in values.values()))
    group, epoch, k = (
      jnp.broadcast_to(value.astype(np.uint32), shape) for value in values.values()
    )
    size, rows, columns = (
      jnp.asarray(table)[group] for table in (self.sizes, self._rows, self._columns)
    )
    seeds = _seeds(_key_words(key), group, epoch + k // size)

    def walk(position):
      x, outside = position
      x = jnp.where(outside, _feistel(x, rows, columns, seeds, _scale_32bit), x)
      return x, x >= size

    # All start outside, so that the network is compiled once, not before the loop and in it.
    start = k % size, jnp.ones(shape, bool)
    x, _ = jax.lax.while_loop(lambda position: jnp.any(position[1]), walk, start)
    return x.astype(jnp.int32)

  def epochs_seen(self, state: StreamState) -> jax.Array:
    """Passes over each group so far, whole and broken: float32 (K,)."""
    part = state.offset.astype(jnp.float32) / self.sizes.astype(np.float32)
    return state.epoch.astype(jnp.float32) + part


def host_item(key_words, sizes, group, epoch, k) -> np.ndarray:
  """`GroupStreams.item` in NumPy, for groups of up to 2^40 rows; the same indices.

  Args:
    key_words: uint32 (2,), `jax.random.key_data(key)` (any length, for other key types).
    sizes: K ints in [1, 2^40], rows of each group.
    group: int, in [0, K).
    epoch: int, in [0, 2^32).
    k: int, in [0, 2^63); k >= n_g runs into the following epochs. The three broadcast.

  Returns:
    int64 array of the broadcast shape, in [0, n_g).

  Raises:
    ValueError: if an argument is out of range.

  Example:
    >>> words = jax.random.key_data(jax.random.key(0))
    >>> sorted(host_item(words, [4], 0, 7, np.arange(4)).tolist())
    [0, 1, 2, 3]
  """
  sizes = _check_sizes(sizes, MAX_HOST_SIZE).astype(np.uint64)
  words = np.asarray(key_words)
  if words.ndim != 1 or words.dtype != np.uint32:
    raise ValueError(f"key_words must be uint32 (2,), got {words.dtype} {words.shape}")
  group = _check_range("group", group, sizes.size)
  epoch = _check_range("epoch", epoch, 2**32)
  k = _check_range("k", k, 2**63)
  shape = np.broadcast_shapes(group.shape, epoch.shape, k.shape)
  group, epoch, k = (np.broadcast_to(value, shape).reshape(-1) for value in (group, epoch, k))
  size = sizes[group]
  rows, columns = (side[group] for side in _grid(sizes))
  epoch = (epoch + k // size).astype(np.uint32)
  seeds = _seeds(words[:, None], group.astype(np.uint32), epoch)
  x = _feistel(k % size, rows, columns, seeds, _scale_64bit)
  while (outside := np.flatnonzero(x >= size)).size:
    again = tuple(seed[outside] for seed in seeds)
    x[outside] = _feistel(x[outside], rows[outside], columns[outside], again, _scale_64bit)
  return x.astype(np.int64).reshape(shape)


def _check_sizes(sizes, largest) -> np.ndarray:
  if not _checks.is_concrete(sizes):
    raise ValueError("sizes must be known when the function is traced; pass host numbers")
  sizes = np.asarray(sizes)
  if sizes.ndim != 1 or sizes.size < 1 or sizes.dtype.kind not in "iu":
    raise ValueError(f"sizes must be K >= 1 ints, got {sizes.dtype} of shape {sizes.shape}")
  if sizes.min() < 1 or sizes.max() > largest:
    raise ValueError(
      f"sizes must be in [1, {largest}], got a range of [{sizes.min()}, {sizes.max()}]"
    )
  return sizes


def _check_range(name, values, end) -> np.ndarray:
  values = np.asarray(values)
  if values.dtype.kind not in "iu":
    raise ValueError(f"{name} must be int, got {values.dtype}")
  if values.size and (values.min() < 0 or values.max() >= end):
    raise ValueError(f"{name} must be in [0, {end}), got [{values.min()}, {values.max()}]")
  return values.astype(np.uint64)


def _grid(sizes):
  """Sides (rows, columns) of the smallest near-square grid of at least `sizes` cells."""
  # math.isqrt is exact; a float square root is not beyond 2^52, and numpy's is a float one.
  rows = [math.isqrt(int(size) - 1) + 1 for size in sizes]
  rows = np.array(rows, np.uint64)
  return rows, (sizes + rows - np.uint64(1)) // rows


def _key_words(key) -> jax.Array:
  key = jnp.asarray(key)
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.key_data(key)
  if key.ndim != 1 or key.dtype != jnp.uint32:
    raise ValueError(
      f"key must be one PRNG key, typed or uint32 (2,), got {key.dtype} of shape {key.shape}"
    )
  return key


# The helpers below use operators only, so that JAX and NumPy run the same lines.


def _mix(x):
  """Scrambles uint32 (a bijection; the constants of Wellons, "lowbias32")."""
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
  return x ^ (x >> np.uint32(16))


def _seeds(words, group, epoch):
  """Two uint32 per item from the key's words, group and epoch."""
  low, high = group ^ _GOLDEN, epoch ^ np.uint32(0x85EBCA6B)
  # Words enter both halves in different ways: 32 bits would repeat within 1e5 (group, epoch) pairs.
  for word in (*words, epoch):
    low = _mix(low ^ word)
  for word in (*words, group):
    high = _mix(high + word * _GOLDEN)
  return low, high


def _feistel(x, rows, columns, seeds, scale):
  """One pass of the network over [0, rows * columns), a bijection for every pair of seeds."""
  left, right = x // columns, x % columns
  for i in range(ROUNDS):
    if i % 2 == 0:
      left = _shift(left, scale(_hash(right.astype(np.uint32), i, seeds), rows), rows)
    else:
      right = _shift(right, scale(_hash(left.astype(np.uint32), i, seeds), columns), columns)
  return left * columns + right


def _hash(half, i, seeds):
  """Keyed hash of a half in round `i`; the multiples of _GOLDEN keep the rounds' inputs apart."""
  # The half enters first: a term of seeds and i alone would be hoisted out of the walk, and an
  # array per round carried through its loop made a draw of 128 rows three times slower.
  return _mix(_mix((half ^ seeds[0]) + np.uint32(i * 0x9E3779B9 % 2**32)) ^ seeds[1])


def _shift(x, by, modulus):
  total = x + by
  return total - modulus * (total >= modulus)


def _scale_32bit(bits, end):
  """floor(bits * end / 2^32), for end < 2^16, with 32-bit products only."""
  high, low = bits >> np.uint32(16), bits & np.uint32(0xFFFF)
  return (high * end + (low * end >> np.uint32(16))) >> np.uint32(16)


def _scale_64bit(bits, end):
  return (bits.astype(np.uint64) * end) >> np.uint64(32)
