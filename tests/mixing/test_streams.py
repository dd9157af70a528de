import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance_jax.mixing.quotas import allocate_counts
from balance_jax.mixing.streams import ROUNDS, GroupStreams, StreamState, host_item

M = 2**32 - 1
WORDS = np.array([7, 11], np.uint32)
KEY = jax.random.wrap_key_data(jnp.asarray(WORDS))


def item(sizes):
  return jax.jit(GroupStreams(sizes).item)


def take(streams):
  return jax.jit(streams.take, static_argnames="batch")


def mix(x):
  x = (x ^ x >> 16) * 0x7FEB352D & M
  x = (x ^ x >> 15) * 0x846CA68B & M
  return x ^ x >> 16


def reference(n, group, epoch, x, inverse=False, words=WORDS):
  """The bijection in Python integers, forwards or backwards, one item at a time."""
  a = math.isqrt(n - 1) + 1
  b = -(-n // a)
  low, high = group ^ 0x9E3779B9, epoch ^ 0x85EBCA6B
  for word in (*map(int, words), epoch):
    low = mix(low ^ word)
  for word in (*map(int, words), group):
    high = mix(high + word * 0x9E3779B9 & M)
  while True:
    left, right = divmod(x, b)
    for i in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
      half, end = (right, a) if i % 2 == 0 else (left, b)
      by = mix(mix((half ^ low) + i * 0x9E3779B9 & M) ^ high) * end >> 32
      by = -by if inverse else by
      left, right = ((left + by) % a, right) if i % 2 == 0 else (left, (right + by) % b)
    x = left * b + right
    if x < n:
      return x


TINY = [1, 2, 3, 4, 7, 12, 50]


@jax.jit  # One program for all sizes; positions past the end belong to the next epoch.
def first_items_by_key(keys, group):
  return jax.vmap(lambda key: GroupStreams(TINY).item(key, group, 0, np.arange(50)))(keys)


def orders(n, num_orders, by="epoch"):
  """Item of every position, int (num_orders, n), over epochs, groups or keys."""
  which, k = np.arange(num_orders)[:, None], np.arange(n)[None, :]
  if by == "key":
    keys = jax.random.split(jax.random.key(3), 12_000)
    return np.asarray(first_items_by_key(keys, TINY.index(n)))[:num_orders, :n]
  if by == "group":
    return host_item(WORDS, [n] * num_orders, which, 0, k)
  return host_item(WORDS, [n], 0, which, k)


def assert_chi_square(counts, expected, freedom):
  """Pearson's statistic within five standard deviations of its mean, on both sides."""
  statistic = np.sum((counts - expected) ** 2 / expected)
  assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_reference_by_hand():
  # One column (n = 2) leaves only shifts of the left half, by bit 31 of its eight hashes.
  low, high = 0x9E3779B9, 0x85EBCA6B
  for word in (7, 11, 0):
    low = mix(low ^ word)
  for word in (7, 11, 0):
    high = mix(high + word * 0x9E3779B9 & M)
  flips = sum(mix(mix(low + i * 0x9E3779B9 & M) ^ high) >> 31 for i in range(0, ROUNDS, 2))
  assert [reference(2, 0, 0, k) for k in (0, 1)] == [flips % 2, (flips + 1) % 2]
  assert reference(10**6, 3, 4, reference(10**6, 3, 4, 123), inverse=True) == 123


def test_every_item_once_an_epoch_for_all_small_sizes():
  sizes = np.arange(1, 201)
  device = item(sizes)
  group = np.repeat(np.arange(200), sizes)
  k = np.concatenate([np.arange(n) for n in sizes])
  for epoch in (0, 2**32 - 1):
    items = np.asarray(device(KEY, group, np.uint32(epoch), k))
    for ours, n in zip(np.split(items, np.cumsum(sizes)[:-1]), sizes, strict=True):
      np.testing.assert_array_equal(np.sort(ours), np.arange(n))
    np.testing.assert_array_equal(items, host_item(WORDS, sizes, group, epoch, k))


def test_every_item_once_for_a_large_prime_size():
  n = 1_000_003
  items = np.asarray(item([n])(KEY, 0, 5, np.arange(n)))
  assert np.bincount(items, minlength=n).tolist() == [1] * n


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5000), epoch=st.integers(0, 2**32 - 1), word=st.integers(0, M))
def test_every_item_once_for_any_size(n, epoch, word):
  items = host_item(np.array([word, 1], np.uint32), [3, n], 1, epoch, np.arange(n))
  np.testing.assert_array_equal(np.sort(items), np.arange(n))


SIZES = [1, 2, 3, 10, 65_536, 65_537, 99_999_989, 2**31 - 1, 2**31, 46_341**2 - 1]


def test_device_equals_host_equals_reference():
  sizes = [min(n, 2**31) for n in SIZES]
  rng = np.random.default_rng(0)
  group = np.repeat(np.arange(len(sizes)), 200)
  epoch = rng.integers(2**32, size=group.size)
  k = rng.integers(np.array(sizes)[group])
  k[::200], k[1::200] = 0, np.array(sizes) - 1
  device = item(sizes)(KEY, group, epoch.astype(np.uint32), k.astype(np.uint32))
  host = host_item(WORDS, sizes, group, epoch, k)
  assert device.dtype == jnp.int32
  assert host.dtype == np.int64
  np.testing.assert_array_equal(device, host)
  for i in range(0, group.size, 17):
    assert host[i] == reference(sizes[group[i]], int(group[i]), int(epoch[i]), int(k[i]))


@pytest.mark.parametrize("n", [2**40, 2**40 - 1, 2**39 + 12_345, (2**20 - 1) ** 2 + 1])
def test_host_is_a_bijection_for_huge_groups(n):
  k = np.random.default_rng(1).integers(n, size=300)
  k[:2] = 0, n - 1
  items = host_item(WORDS, [n], 0, 9, k)
  assert items.min() >= 0
  assert items.max() < n
  assert [reference(n, 0, 9, int(x), inverse=True) for x in items] == k.tolist()


def test_huge_groups_look_uniform():
  n = 2**40
  items = host_item(WORDS, [n], 0, 0, np.arange(64_000))
  assert len(set(items.tolist())) == 64_000
  assert_chi_square(np.bincount(items * 64 // n, minlength=64), 1000, 63)
  # The step from one position to the next is uniform too: nothing is left of the order.
  assert_chi_square(np.bincount(np.diff(items) % n * 64 // n, minlength=64), 63_999 / 64, 63)


@pytest.mark.parametrize("by", ["epoch", "group", "key"])
@pytest.mark.parametrize(("n", "distinct"), [(1, 1), (2, 2), (3, 6), (4, 24)])
def test_all_orders_of_tiny_groups_are_equally_likely(n, distinct, by):
  num_orders = 12_000
  found, counts = np.unique(orders(n, num_orders, by), axis=0, return_counts=True)
  assert len(found) == distinct
  if distinct > 1:
    assert_chi_square(counts, num_orders / distinct, distinct - 1)


@pytest.mark.parametrize("by", ["epoch", "group", "key"])
@pytest.mark.parametrize("n", [7, 12, 50])
def test_any_item_at_any_position(n, by):
  num_orders = 6000
  order = orders(n, num_orders, by)
  cells = np.bincount((order + np.arange(n) * n).ravel(), minlength=n * n)
  # Rows and columns of the table are fixed: (n-1)^2 degrees of freedom.
  assert_chi_square(
    cells * np.sqrt((n - 1) / n), num_orders / n * np.sqrt((n - 1) / n), (n - 1) ** 2
  )


@pytest.mark.parametrize("n", [7, 9, 12])
def test_neighbours_are_a_uniform_pair(n):
  num_orders = 20_000
  order = orders(n, num_orders)
  for first in (0, n - 2):
    pairs = np.bincount(order[:, first] * n + order[:, first + 1], minlength=n * n)
    assert not np.any(pairs.reshape(n, n).diagonal())
    assert_chi_square(pairs[pairs > 0], num_orders / (n * (n - 1)), n * (n - 1) - 1)


@pytest.mark.parametrize("by", ["epoch", "group"])
def test_orders_are_independent_of_each_other_and_of_the_identity(by):
  n = 1009
  order = np.concatenate([np.arange(n)[None], orders(n, 40, by)])
  correlation = np.corrcoef(order)[np.triu_indices(41, 1)]
  assert np.abs(correlation).max() < 5 / np.sqrt(n)
  # Two random orders agree in one position on average, Poisson.
  agreements = np.array(
    [np.sum(order[i] == order[j]) for i, j in np.argwhere(np.triu(np.ones((41, 41)), 1))]
  )
  assert abs(agreements.mean() - 1) < 5 / np.sqrt(agreements.size)
  assert abs(agreements.var() - 1) < 0.25


def test_key_styles_and_x64_agree():
  device = item([100, 10**9])
  expected = device(KEY, 1, 2, np.arange(20))
  np.testing.assert_array_equal(device(jnp.asarray(WORDS), 1, 2, np.arange(20)), expected)
  with jax.enable_x64(True):
    wide = device(KEY, 1, 2, np.arange(20))
    assert wide.dtype == jnp.int32
    np.testing.assert_array_equal(wide, expected)
  four_words = jax.random.key(1, impl="rbg")
  words = np.asarray(jax.random.key_data(four_words))
  np.testing.assert_array_equal(
    device(four_words, 1, 2, np.arange(20)),
    host_item(words, [100, 10**9], 1, 2, np.arange(20)),
  )


def test_take_follows_the_epochs_of_each_group():
  sizes, counts = [3, 7, 1, 10], jnp.array([8, 0, 2, 5])
  streams = GroupStreams(sizes)
  state = StreamState(jnp.array([4, 1, 9, 0], jnp.uint32), jnp.array([2, 6, 0, 3], jnp.uint32))
  groups, indices, after = take(streams)(KEY, state, counts, batch=15)
  assert groups.tolist() == [0] * 8 + [2] * 2 + [3] * 5
  plan = [(0, 4, 2), *[(0, e, k) for e in (5, 6) for k in range(3)], (0, 7, 0)]
  plan += [(2, 9, 0), (2, 10, 0), *[(3, 0, k) for k in range(3, 8)]]
  assert indices.tolist() == [reference(sizes[g], g, e, k) for g, e, k in plan]
  assert after.epoch.tolist() == [7, 1, 11, 0]
  assert after.offset.tolist() == [1, 6, 0, 8]
  np.testing.assert_allclose(streams.epochs_seen(after), [7 + 1 / 3, 1 + 6 / 7, 11, 0.8], rtol=1e-6)
  assert streams.epochs_seen(after).dtype == jnp.float32


def draw_scan(streams, key, r):
  def step(position, _):
    carry, state = position
    counts, carry = allocate_counts(None, r, 16, carry=carry)
    groups, indices, state = streams.take(key, state, counts, 16)
    return (carry, state), (groups, indices)

  run = jax.jit(lambda start, n: jax.lax.scan(step, start, length=n), static_argnums=1)
  return run, (jnp.zeros(r.shape), streams.init())


def test_resume_is_exact_and_epochs_are_complete():
  sizes = np.array([5, 17, 40, 2])
  streams, r = GroupStreams(sizes), jnp.array([0.1, 0.4, 0.2, 0.3])
  run, start = draw_scan(streams, KEY, r)
  end, (groups, indices) = run(start, 60)
  middle, first = run(start, 30)
  again, second = run(jax.tree.map(jnp.asarray, jax.device_get(middle)), 30)
  np.testing.assert_array_equal(np.concatenate([first[0], second[0]]), groups)
  np.testing.assert_array_equal(np.concatenate([first[1], second[1]]), indices)
  jax.tree.map(np.testing.assert_array_equal, end, again)
  for g, n in enumerate(sizes):
    seen = np.asarray(indices)[np.asarray(groups) == g]
    assert seen.size == int(end[1].epoch[g]) * n + int(end[1].offset[g])
    for epoch in np.split(seen, np.arange(n, seen.size, n)):
      assert len(set(epoch.tolist())) == epoch.size


def test_counts_may_be_a_constant_of_the_program():
  streams = GroupStreams([5, 9])
  counts = jnp.array([3, 1])
  step = lambda state, _: streams.take(KEY, state, counts, 4)[::-1][:2]  # noqa: E731
  after, indices = jax.lax.scan(step, streams.init(), length=3)
  assert after.epoch.tolist() == [1, 0]
  assert sorted(indices[0][:3].tolist() + indices[1][:2].tolist()) == [0, 1, 2, 3, 4]


def test_vmap_over_runs_equals_single_runs():
  streams = GroupStreams([5, 100])
  keys = jax.random.split(jax.random.key(1), 3)
  states = StreamState(
    *(jnp.array(x, jnp.uint32) for x in ([[0, 1]] * 3, [[4, 1], [0, 2], [2, 99]]))
  )
  counts = jnp.array([[1, 7], [8, 0], [4, 4]])
  runs = jax.vmap(lambda key, state, counts: streams.take(key, state, counts, 8))
  batched = jax.jit(runs)(keys, states, counts)
  one = take(streams)
  for i in range(3):
    single = one(keys[i], jax.tree.map(lambda x: x[i], states), counts[i], batch=8)  # noqa: B023
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[i], b), batched, single)  # noqa: B023
  assert batched[1][0].tolist() != batched[1][1].tolist()


def test_positions_beyond_32_bits_are_exact():
  sizes = [2**31 - 1, 2**31, 1]
  streams = GroupStreams(sizes)
  state = StreamState(
    jnp.array([5, 2**31, 2**32 - 2], jnp.uint32), jnp.array([2**31 - 5, 2**31 - 3, 0], jnp.uint32)
  )
  groups, indices, after = take(streams)(KEY, state, jnp.array([8, 8, 1]), batch=17)
  start = np.array([5 * (2**31 - 1) + 2**31 - 5, 2**62 + 2**31 - 3, 2**32 - 2])
  rank = np.concatenate([np.arange(8), np.arange(8), [0]])
  expected = host_item(WORDS, sizes, np.asarray(groups), 0, start[np.asarray(groups)] + rank)
  np.testing.assert_array_equal(indices, expected)
  assert after.epoch.tolist() == [6, 2**31 + 1, 2**32 - 1]
  assert after.offset.tolist() == [4, 5, 0]


def test_item_broadcasts():
  streams = GroupStreams([9, 20])
  items = streams.item(KEY, np.array([[0], [1]]), 3, np.arange(9)[None, :])
  assert items.shape == (2, 9)
  assert int(streams.item(KEY, 1, 3, 4)) == int(items[1, 4])
  assert host_item(WORDS, [9, 20], 1, 3, 4).shape == ()
  assert host_item(WORDS, [9], 0, 0, np.zeros((0, 2), int)).shape == (0, 2)


@pytest.mark.parametrize("sizes", [[], [0], [2**31 + 1], [1.5], [[1, 2]], [True], [3, -1]])
def test_bad_sizes(sizes):
  with pytest.raises(ValueError, match="sizes must be"):
    GroupStreams(sizes)


def test_sizes_are_fixed():
  with pytest.raises(ValueError, match="read-only"):
    GroupStreams([3]).sizes[0] = 4
  with pytest.raises(ValueError, match="sizes must be known"):
    jax.jit(lambda sizes: GroupStreams(sizes).init())(jnp.array([3]))
  with pytest.raises(ValueError, match="sizes must be in"):
    host_item(WORDS, [2**40 + 1], 0, 0, 0)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"counts": jnp.array([1, 1, 1])}, "counts has shape"),
    ({"counts": jnp.array([3, 3])}, "counts must be >= 0 with sum 4"),
    ({"counts": jnp.array([5, -1])}, "counts must be >= 0 with sum 4"),
    ({"batch": 0}, "batch must be"),
    ({"batch": 4.0}, "batch must be"),
    ({"state": StreamState(jnp.zeros(1), jnp.zeros(2))}, "epoch has shape"),
    ({"key": jax.random.split(jax.random.key(0))}, "key must be one PRNG key"),
    ({"key": 0}, "key must be one PRNG key"),
  ],
)
def test_bad_take(changes, message):
  streams = GroupStreams([3, 4])
  good = {"key": KEY, "state": streams.init(), "counts": jnp.array([1, 3]), "batch": 4}
  with pytest.raises(ValueError, match=message):
    streams.take(**good | changes)


@pytest.mark.parametrize(
  ("position", "message"),
  [
    ((2, 0, 0), "group must be in"),
    ((0, -1, 0), "epoch must be in"),
    ((0, 0, 2**63), "k must be in"),
    ((0, 0.5, 0), "epoch must be int"),
  ],
)
def test_bad_position(position, message):
  with pytest.raises(ValueError, match=message):
    host_item(WORDS, [3, 4], *position)
  with pytest.raises(ValueError, match=message):
    GroupStreams([3, 4]).item(KEY, *position)


def test_bad_key_words():
  with pytest.raises(ValueError, match="key_words must be uint32"):
    host_item(np.zeros(2), [3], 0, 0, 0)
