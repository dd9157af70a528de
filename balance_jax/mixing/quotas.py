"""How many rows of a batch each group gets: integer counts from draw probabilities.

A mixer says which share `r` (K,) of the rows to draw from each group; a batch has a whole number of
rows. `allocate_counts` turns one into the other, always summing to the batch size:

- "stratified": no randomness. Every group carries what it is still owed and the rows go, one by
  one, to the group that is furthest behind. Over any number of steps a group is never more than
  one row ahead of `sum_t batch * r_t`, nor more than `1/2 + 1/3 + ... + 1/K` rows behind it.
- "systematic": one uniform offset (Madow, 1949). Unbiased; each count is `batch * r` rounded up or
  down.
- "multinomial": independent draws, as in most training loops. Unbiased, variance `batch * r (1-r)`.
"""

import numbers

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks

METHODS = ("stratified", "multinomial", "systematic")
MAX_BATCH = 2**24  # Above this float32 no longer holds every whole number of rows.

# "stratified" compares lags as integers, in units of 2^-20 rows, and looks for a level within 128
# rows of 0; carries stay below 1/2 + ... + 1/K, which is 20 for 1e9 groups.
_LAG_BITS = 20
_LEVEL_BITS = 28


def allocate_counts(
  key, r, batch: int, method: str = "stratified", carry=None
) -> tuple[jax.Array, jax.Array]:
  """Splits a batch among groups: counts that sum to `batch` and follow the probabilities `r`.

  "stratified" keeps `carry = sum_t (batch * r_t - counts_t)`, which sums to 0. While all of `r` is
  positive it lies in (-1, 1/2 + ... + 1/K], for any sequence of `r` and `batch`, so long-run
  frequencies equal `r`. (Greedy service: the group served has a lag above 0, so it ends above -1;
  the mean of the k largest carries is at most 1/(k+1) + ... + 1/K, by induction from k = K down.)
  A group with `r = 0` is never drawn, because its importance weight p/r would be infinite: what it
  is owed or has had in advance stays in its carry, and counts again when `r` becomes positive.
  For the same reason prefer "systematic" if `r` may jump to nearly 0: it owes nothing.

  Args:
    key: PRNG key (typed or raw); "stratified" ignores it and accepts None.
    r: float (K,), draw probabilities on the simplex; zeros are allowed. Divided by its sum.
    batch: static int in [1, 2^24], the number of rows; may be smaller than K.
    method: one of `METHODS`.
    carry: float32 (K,) from the call before, in rows, or None for zeros. "multinomial" and
      "systematic" have no memory and return it unchanged.

  Returns:
    counts: int32 (K,), each >= 0, sum exactly `batch`, 0 where `r` is 0.
    carry: float32 (K,).

  Raises:
    ValueError: for an unknown method, a wrong shape, type or batch, a missing key, or an `r` off
      the simplex by more than 1e-3 (seen only outside of jit).

  Example:
    >>> r = jnp.array([0.5, 0.3, 0.2])
    >>> counts, carry = allocate_counts(None, r, 2)
    >>> counts.tolist()
    [1, 1, 0]
    >>> counts, carry = allocate_counts(None, r, 2, carry=carry)
    >>> counts.tolist()
    [1, 0, 1]
  """
  r, carry = _check(key, r, batch, method, carry)
  if method == "stratified":
    return _stratified(r, int(batch), carry)
  draw = _multinomial if method == "multinomial" else _systematic
  return draw(key, r / jnp.sum(r), int(batch)), carry


def _check(key, r, batch, method, carry) -> tuple[jax.Array, jax.Array]:
  _checks.check_choice("method", method, METHODS)
  if isinstance(batch, bool) or not isinstance(batch, numbers.Integral):
    raise ValueError(f"batch must be a static int, got {batch!r} ({type(batch).__name__})")
  _checks.check_number("batch", batch, low=1, high=MAX_BATCH)
  _checks.check_shape("r", r, (None,))
  if np.size(r) == 0 or not jnp.issubdtype(jnp.result_type(r), jnp.floating):
    raise ValueError(f"r must be float (K,), K >= 1, got {jnp.result_type(r)} {np.shape(r)}")
  if _checks.is_concrete(r):
    values = np.asarray(r, np.float64)
    if not (np.all(values >= 0) and abs(values.sum() - 1) < 1e-3):
      raise ValueError(f"r must be >= 0 with sum 1, got {values.tolist()}")
  if key is None and method != "stratified":
    raise ValueError(f"key must be a PRNG key for method {method!r}, got None")
  if carry is None:
    carry = jnp.zeros(np.shape(r), jnp.float32)
  _checks.check_shape("carry", carry, np.shape(r))
  return jnp.asarray(r, jnp.float32), jnp.asarray(carry, jnp.float32)


def _stratified(r, batch, carry) -> tuple[jax.Array, jax.Array]:
  """Serves the group that is furthest behind, `batch` times; see `allocate_counts`."""
  quota = r * batch
  whole = jnp.floor(quota)
  # Without the whole rows the lag is of order 1, and float32 keeps it to 1e-7 rows.
  lag = (quota - whole) + carry
  # float32 r sums to 1 only within rounding, which would add up to whole rows in 1e5 steps. Taking
  # the excess back in proportion to r normalises r and lets the carries sum to 0; computed from
  # the rows, it is more exact than dividing r by its sum, and leaves groups with r = 0 untouched.
  excess = jnp.sum(lag) + (jnp.sum(whole) - batch)
  lag = lag - r / jnp.sum(r) * excess
  whole, lag = whole + jnp.floor(lag), lag - jnp.floor(lag)
  counts = _serve(whole.astype(jnp.int32), lag, r > 0, batch)
  return counts, lag + (whole - counts.astype(jnp.float32))


def _serve(whole, lag, drawable, batch) -> jax.Array:
  """Counts of the greedy rule, by searching the lag that everyone is served down to.

  Giving the next row to the largest lag until `batch` rows are gone is to serve every group while
  its lag exceeds a common level, so only the level is searched: seven rounds of sixteen candidates,
  cheaper than sorting. With no group ahead of its quota this is the largest-remainder rule.

  Args:
    whole: int32 (K,), whole rows owed; may be negative.
    lag: float32 (K,), part of a row owed beyond them, in [0, 1].
    drawable: bool (K,), groups that may be served; at least one.
    batch: int, rows to give.

  Returns:
    int32 (K,), sum exactly `batch`.
  """
  lag = jnp.round(lag * float(1 << _LAG_BITS)).astype(jnp.int32)

  def served(level):  # level: int32 (L,) -> int32 (L, K)
    above = -((level[:, None] - lag[None, :]) >> _LAG_BITS)  # ceil((lag - level) / unit)
    return jnp.where(drawable[None, :], jnp.maximum(whole[None, :] + above, 0), 0)

  def narrow(i, low):  # Invariant: serving down to `low` gives too many rows.
    step = jnp.left_shift(jnp.int32(1), _LEVEL_BITS - 4 * (i + 1))
    too_many = jnp.sum(served(low + jnp.arange(1, 16, dtype=jnp.int32) * step), axis=1) > batch
    return low + jnp.sum(too_many, dtype=jnp.int32) * step

  low = jnp.full((1,), -(1 << (_LEVEL_BITS - 1)), jnp.int32)
  low = jax.lax.fori_loop(0, _LEVEL_BITS // 4, narrow, low)
  enough, more = served(jnp.concatenate([low + 1, low]))
  # Groups that tie at the level share what is left in index order.
  tied = more - enough
  left = batch - jnp.sum(enough, dtype=jnp.int32)
  return enough + jnp.where(jnp.cumsum(tied, dtype=jnp.int32) <= left, tied, 0)


def _multinomial(key, r, batch) -> jax.Array:
  """Independent draws by inverse CDF.

  The CDF is accumulated in integers (units of 2^-31): float32 partial sums are rounded, which
  loses small groups, gives groups with r = 0 a chance, and can end below 1.
  """
  share = jnp.round(r * float(1 << 31)).astype(jnp.uint32)
  rounding = jnp.uint32(1 << 31) - jnp.sum(share, dtype=jnp.uint32)
  share = share.at[jnp.argmax(r)].add(rounding)
  cdf = jnp.cumsum(share, dtype=jnp.uint32)
  uniform = jax.random.bits(key, (batch,), jnp.uint32) >> np.uint32(1)
  group = jnp.searchsorted(cdf, uniform, side="right")
  return jnp.zeros(r.shape, jnp.int32).at[group].add(1)


def _systematic(key, r, batch) -> jax.Array:
  """counts_i = floor(C_i + u) - floor(C_{i-1} + u), C the cumulated quotas, u one uniform offset.

  Quotas are whole rows plus a fraction in units of 2^-24. The fractions are cumulated modulo one
  row in integers, so a group's count is its whole rows, plus one if its fraction crosses a row.
  """
  one, mask = np.int32(1 << 24), np.int32((1 << 24) - 1)
  quota = r * batch
  whole = jnp.floor(quota).astype(jnp.int32)
  part = jnp.round((quota - jnp.floor(quota)) * float(one)).astype(jnp.int32)
  # The quotas must sum to batch exactly: the largest group takes the rounding. int32 sums wrap, and
  # the difference is right nonetheless, because it is small itself.
  rounding = (batch - jnp.sum(whole, dtype=jnp.int32)) * one - jnp.sum(part, dtype=jnp.int32)
  largest = jnp.argmax(r)
  moved = part[largest] + rounding
  whole = whole.at[largest].add(moved >> 24)
  part = part.at[largest].set(moved & mask)
  offset = (jax.random.bits(key, (), jnp.uint32) >> np.uint32(8)).astype(jnp.int32)
  before = (offset + jnp.cumsum(part, dtype=jnp.int32) - part) & mask
  return whole + (before + part >= one).astype(jnp.int32)
