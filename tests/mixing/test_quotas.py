import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance_jax.mixing.quotas import METHODS, allocate_counts

# Compiled once a shape: op by op, most of the time here would go into dispatch.
allocate = jax.jit(allocate_counts, static_argnames=("batch", "method"))


def random_r(rng, num_groups, zeros=0.0):
  r = rng.pareto(1.0, num_groups) + 1e-3
  r[rng.random(num_groups) < zeros] = 0
  r[rng.integers(num_groups)] += 0.1
  return (r / r.sum()).astype(np.float32)


def run(r_by_step, batch, method="stratified", key=None):
  """Counts int (T, K) and carries (T, K) of successive calls."""
  keys = jax.random.split(jax.random.key(0) if key is None else key, len(r_by_step))

  def step(carry, inputs):
    counts, carry = allocate(inputs[0], inputs[1], batch, method, carry)
    return carry, (counts, carry)

  start = jnp.zeros(r_by_step.shape[1], jnp.float32)
  scan = jax.jit(lambda keys, r: jax.lax.scan(step, start, (keys, r))[1])
  return tuple(np.asarray(x) for x in scan(keys, jnp.asarray(r_by_step)))


def greedy(wanted, drawable, batch):
  """Reference: the next row goes to whoever is furthest behind, one row at a time."""
  left = np.where(drawable, wanted, -np.inf).astype(np.float64)
  counts = np.zeros(len(left), int)
  for _ in range(batch):
    i = int(np.argmax(left))
    counts[i] += 1
    left[i] -= 1
  return counts


def test_stratified_by_hand():
  r = jnp.array([0.5, 0.3, 0.2])
  expected = [[2, 1, 1], [2, 1, 1], [2, 2, 0], [2, 1, 1], [2, 1, 1]]
  carry = None
  for row in expected:
    counts, carry = allocate(None, r, 4, carry=carry)
    assert counts.tolist() == row
    assert counts.dtype == jnp.int32
    assert carry.dtype == jnp.float32
  np.testing.assert_allclose(carry, 0, atol=1e-6)  # 5 steps of 4 rows are exactly 10, 6 and 4


@pytest.mark.parametrize(
  ("num_groups", "batch", "zeros"),
  [(2, 1, 0), (10, 64, 0.3), (64, 8, 0.2), (64, 128, 0)],
)
def test_stratified_is_greedy_service_one_row_at_a_time(num_groups, batch, zeros):
  rng = np.random.default_rng(num_groups)
  r = np.stack([random_r(rng, num_groups, zeros) for _ in range(60)])
  counts, carries = run(r, batch)
  carry = np.zeros(num_groups)
  for t in range(len(r)):
    wanted = r[t].astype(np.float64) / r[t].astype(np.float64).sum() * batch + carry
    np.testing.assert_array_equal(counts[t], greedy(wanted, r[t] > 0, batch), err_msg=f"step {t}")
    np.testing.assert_allclose(carries[t], wanted - counts[t], atol=1e-5)
    carry = carries[t].astype(np.float64)


@pytest.mark.parametrize(("num_groups", "batch"), [(3, 1), (8, 20), (40, 1)])
def test_stratified_bound_when_r_moves_against_it(num_groups, batch):
  # The adversary keeps feeding the groups not served so far, the worst case of the proof.
  r = np.full((300, num_groups), 1e-6, np.float32)
  rng = np.random.default_rng(0)
  alive, carry = np.arange(num_groups), jnp.zeros(num_groups)
  highest = lowest = 0.0
  for t in range(len(r)):
    r[t, alive] = 1
    r[t] /= r[t].sum()
    counts, carry = allocate(None, r[t], batch, carry=carry)
    highest, lowest = max(highest, float(carry.max())), min(lowest, float(carry.min()))
    alive = alive[np.asarray(counts)[alive] == 0]
    if not alive.size:
      alive = rng.permutation(num_groups)[: rng.integers(2, num_groups + 1)]
  bound = sum(1 / j for j in range(2, num_groups + 1))
  assert lowest > -1
  assert highest <= bound + 1e-5
  if batch == 1:
    assert highest > 0.9 * bound  # the bound is close to sharp


def test_stratified_does_not_drift_in_1e5_steps():
  r = random_r(np.random.default_rng(3), 7)
  r[0] += 3e-6  # r sums to 1 only within rounding
  batch, steps = 48, 100_000

  @jax.jit
  def total(r):
    def step(state, _):
      counts, carry = allocate(None, r, batch, carry=state[1])
      return (state[0] + counts, carry), jnp.abs(carry).max()

    start = jnp.zeros(7, jnp.int32), jnp.zeros(7)
    return jax.lax.scan(step, start, length=steps)

  (counts, carry), largest = total(jnp.asarray(r))
  exact = r.astype(np.float64) / r.astype(np.float64).sum() * batch * steps
  # The product r * batch is rounded to float32: half a unit in the last place, every step.
  rounding = steps * np.spacing((r * batch).astype(np.float32)) / 2 + 0.1
  assert np.all(np.abs(np.asarray(counts) - exact) < 1 + rounding)
  assert float(largest.max()) < 1
  assert abs(float(carry.sum())) < 1e-5


def test_stratified_rare_group_appears_at_its_rate():
  r = np.array([0.995, 0.003, 0.002], np.float32)
  counts, _ = run(np.tile(r, (1000, 1)), 1)
  assert counts.sum(0).tolist() == [995, 3, 2]
  more_groups = np.full((50, 200), 1 / 200, np.float32)  # 50 steps of 4 rows: everyone once
  assert run(more_groups, 4)[0].sum(0).tolist() == [1] * 200


def test_group_with_r_zero_keeps_what_it_is_owed():
  on, off = jnp.array([0.3, 0.3, 0.4]), jnp.array([0.0, 0.5, 0.5])
  _, carry = allocate(None, on, 1)
  owed = float(carry[0])
  assert owed == pytest.approx(0.3)
  for _ in range(20):
    counts, carry = allocate(None, off, 1, carry=carry)
    assert counts[0] == 0
    assert float(carry[0]) == pytest.approx(owed, abs=1e-6)
    assert abs(float(carry.sum())) < 1e-6
  back, _ = allocate(None, jnp.array([0.8, 0.1, 0.1]), 1, carry=carry)
  assert back.tolist() == [1, 0, 0]


def test_all_drawn_from_the_only_group_left():
  # Everyone else is owed rows, and must not get them at r = 0.
  carry = jnp.array([2.5, 1.5, -4.0])
  counts, after = allocate(None, jnp.array([0.0, 0.0, 1.0]), 5, carry=carry)
  assert counts.tolist() == [0, 0, 5]
  np.testing.assert_allclose(after, carry, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
  weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1.0)), min_size=5, max_size=5),
  batch=st.sampled_from([3, 2**24]),
  method=st.sampled_from(METHODS[::2]),
  seed=st.integers(0, 2**32 - 1),
)
def test_counts_are_whole_shares(weights, batch, method, seed):
  r = np.array(weights) + np.array([0, 0, 0, 0, 1e-6])
  r = (r / r.sum()).astype(np.float32)
  counts, _ = allocate(jax.random.key(seed), jnp.asarray(r), batch, method)
  counts = np.asarray(counts)
  assert counts.sum() == batch
  assert np.all(counts[r == 0] == 0)
  assert counts.min() >= 0
  # Rounded up or down; beside it only float32's rounding of r * batch.
  assert np.all(np.abs(counts - r.astype(np.float64) * batch) < 1 + 3e-7 * batch)


def test_systematic_is_unbiased_floor_or_ceil():
  rng = np.random.default_rng(1)
  r, batch, repeats = random_r(rng, 12, zeros=0.3), 20, 20_000
  keys = jax.random.split(jax.random.key(5), repeats)
  counts, carry = jax.vmap(lambda key: allocate(key, r, batch, "systematic"))(keys)
  counts, quota = np.asarray(counts), r.astype(np.float64) * batch
  assert np.all(counts.sum(1) == batch)
  assert np.all((counts >= np.floor(quota - 1e-5)) & (counts <= np.ceil(quota + 1e-5)))
  part = quota - np.floor(quota)
  error = np.abs(counts.mean(0) - quota)
  assert np.all(error <= 4.5 * np.sqrt(part * (1 - part) / repeats) + 1e-5)
  assert not carry.any()


def test_systematic_counts_follow_the_cumulated_quotas():
  r, batch = np.array([0.13, 0.27, 0.05, 0.55], np.float32), 10
  seen = {
    tuple(allocate(jax.random.key(seed), r, batch, "systematic")[0].tolist()) for seed in range(60)
  }
  ends = np.round(np.cumsum([1.3, 2.7, 0.5, 5.5]), 6)
  offsets = np.linspace(0.005, 0.995, 100)
  expected = {tuple(np.diff(np.floor(ends + u), prepend=0.0).astype(int)) for u in offsets}
  assert seen == expected


def test_multinomial_mean_and_variance():
  r, batch, repeats = np.array([0.5, 0.3, 0.15, 0.05, 0.0], np.float32), 32, 20_000
  keys = jax.random.split(jax.random.key(7), repeats)
  counts, _ = jax.vmap(lambda key: allocate(key, r, batch, "multinomial"))(keys)
  counts = np.asarray(counts, np.float64)
  assert np.all(counts.sum(1) == batch)
  assert np.all(counts[:, 4] == 0)
  covariance = batch * (np.diag(r) - np.outer(r, r))
  variance = np.diag(covariance)
  assert np.all(np.abs(counts.mean(0) - batch * r) <= 4.5 * np.sqrt(variance / repeats) + 1e-6)
  # A covariance of nearly normal counts has standard error sqrt((c_ij^2 + c_ii c_jj) / N).
  error = np.sqrt((covariance**2 + np.outer(variance, variance)) / repeats)
  assert np.all(np.abs(np.cov(counts.T) - covariance) <= 5 * error + 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_zero_probability_among_many_groups_is_never_drawn(method):
  rng = np.random.default_rng(0)
  r = rng.random(2000).astype(np.float32)
  r[::2] = 0
  r /= r.sum()
  draw = jax.vmap(lambda key: allocate(key, r, 4096, method)[0])
  counts = np.asarray(draw(jax.random.split(jax.random.key(0), 20)))
  assert counts[:, ::2].sum() == 0
  assert np.all(counts.sum(1) == 4096)


@pytest.mark.parametrize("bits", [0, 2**32 - 1])
@pytest.mark.parametrize("method", ["multinomial", "systematic"])
def test_extreme_random_bits_stay_off_groups_with_r_zero(method, bits, monkeypatch):
  def constant(key, shape, dtype):
    return jnp.full(shape, bits, dtype)

  monkeypatch.setattr(jax.random, "bits", constant)
  # In units of 2^-31, eleven float32 elevenths fall 112 short of one: they go to no empty group.
  r = jnp.array([0.0, *[1 / 11] * 11, 0.0])
  counts = allocate_counts(jax.random.key(0), r, 7, method)[0].tolist()
  assert counts[0] == counts[-1] == 0
  assert sum(counts) == 7


def test_multinomial_draws_small_groups_of_a_long_table():
  # In float32 the partial sums of many small r round, and groups of the tail are never drawn.
  num_groups, batch = 2**17, 2**20
  r = jnp.full(num_groups, 1 / num_groups)
  counts = np.asarray(allocate(jax.random.key(2), r, batch, "multinomial")[0])
  blocks = counts.reshape(64, -1).sum(1)
  assert np.all(np.abs(blocks - batch / 64) < 5 * np.sqrt(batch / 64))
  assert (counts == 0).mean() == pytest.approx(np.exp(-8), abs=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_jit_vmap_and_memory(method):
  rng = np.random.default_rng(4)
  r = jnp.asarray(np.stack([random_r(rng, 9, 0.2) for _ in range(5)]))
  carry = jnp.asarray(rng.uniform(-0.5, 0.5, (5, 9)).astype(np.float32))
  keys = jax.random.split(jax.random.key(1), 5)

  def draw(key, r, carry):
    return allocate_counts(key, r, 13, method, carry)

  batched = jax.jit(jax.vmap(draw))(keys, r, carry)
  for i in range(2):
    for ours, other in zip(draw(keys[i], r[i], carry[i]), batched, strict=True):
      np.testing.assert_allclose(ours, other[i], atol=1e-6)
  if method != "stratified":
    np.testing.assert_array_equal(batched[1], carry)


@pytest.mark.parametrize("method", METHODS)
def test_types_do_not_depend_on_x64_or_key_style(method):
  r = np.array([0.2, 0.3, 0.5])
  raw = jax.random.PRNGKey(3)
  expected, _ = allocate(jax.random.key(3), jnp.asarray(r), 17, method)
  with jax.enable_x64(True):
    counts, carry = allocate(raw, jnp.asarray(r), 17, method)
  assert (counts.dtype, carry.dtype) == (jnp.int32, jnp.float32)
  np.testing.assert_array_equal(counts, expected)


def test_batch_of_one_and_single_group():
  for method in METHODS:
    assert allocate(jax.random.key(0), jnp.array([0.0, 1.0]), 1, method)[0].tolist() == [0, 1]
    batch = 5 if method == "multinomial" else 2**24
    assert allocate(jax.random.key(0), jnp.ones(1), batch, method)[0].tolist() == [batch]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"method": "exact"}, "method is 'exact'"),
    ({"batch": 0}, "batch is 0"),
    ({"batch": 2**24 + 1}, "batch is 16777217"),
    ({"batch": 4.0}, "batch must be a static int"),
    ({"batch": True}, "batch must be a static int"),
    ({"r": jnp.ones((2, 2)) / 4}, "r has shape"),
    ({"r": jnp.zeros(0)}, "r must be float"),
    ({"r": jnp.array([1, 0])}, "r must be float"),
    ({"r": jnp.array([0.7, 0.7])}, "r must be >= 0 with sum 1"),
    ({"r": jnp.array([1.5, -0.5])}, "r must be >= 0 with sum 1"),
    ({"r": jnp.array([jnp.nan, 1.0])}, "r must be >= 0 with sum 1"),
    ({"carry": jnp.zeros(3)}, "carry has shape"),
    ({"key": None, "method": "systematic"}, "key must be a PRNG key"),
    ({"key": None, "method": "multinomial"}, "key must be a PRNG key"),
  ],
)
def test_bad_input(changes, message):
  arguments = {"key": jax.random.key(0), "r": jnp.array([0.5, 0.5]), "batch": 4} | changes
  with pytest.raises(ValueError, match=message):
    allocate_counts(**arguments)
