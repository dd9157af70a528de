"""Lower bounds of all margins over a box, the affine tail of the network elided.

The linear operations behind the last nonlinearity are merged with the margins and pulled back to
it once, so that the bound is one of `z_y - z_j` and not a difference of two bounds. One example is
bounded at a time and mapped over the batch, so networks are any functions of a batch that treat its
examples one by one (batch normalisation with fixed statistics).

Sources: IBP with elision, Gowal et al., 2018 (arXiv 1810.12715); CROWN-IBP, Zhang et al., 2020
(arXiv 1906.06316); loss fusion, Xu et al., 2020 (arXiv 2002.12920), section 3.3.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.bounds import Interval, Node, Options, Tape, record
from balance_jax.bounds.interval import check_interval
from balance_jax.robust.margins import margin_matrix

METHODS = ("crown", "crown-ibp", "ibp")
# Below this weight the CROWN half of a mixture is not computed, as in the authors' code.
_NEGLIGIBLE = 1e-5


class MarginBounds(NamedTuple):
  """What one bounding pass gives.

  Attributes:
    lower: float (B, K - 1), lower bounds of z_y - z_j for j != y, j ascending.
    preacts: the `Interval` (B, ...) of every ReLU's input, in order.
  """

  lower: jax.Array
  preacts: list[Interval]


def margin_bounds(
  apply_fn: Callable,
  variables: Any,
  x,
  labels,
  eps,
  method: str = "ibp",
  *,
  lo=0.0,
  hi=1.0,
  **options,
) -> jax.Array:
  """Lower bounds of the margins in the l_inf ball of radius eps, cut to the valid range.

  Args:
    apply_fn: apply_fn(variables, x) -> logits (B, K), in inference mode.
    variables: its parameters and fixed statistics.
    x: float (B, ...), in [lo, hi].
    labels: int (B,), each in [0, K).
    eps: radius, >= 0, in the units of x.
    method: "ibp", "crown-ibp" or "crown"; from loose and fast to tight and slow.
    lo: lowest valid input.
    hi: highest valid input.
    **options: those of `bound_margins`.

  Returns:
    float (B, K - 1); see `verified`.

  Raises:
    ValueError: as `Interval.from_linf` and `bound_margins`.
    UnsupportedPrimitive: the network has an operation without a rule.

  >>> x, labels = jnp.array([[0.9, 0.1]]), jnp.array([0])
  >>> apply = lambda w, x: jax.nn.relu(x @ w)
  >>> round(float(margin_bounds(apply, jnp.eye(2), x, labels, 0.1)[0, 0]), 4)
  0.6
  """
  box = Interval.from_linf(x, eps, lo, hi)
  return bound_margins(lambda v: apply_fn(variables, v), box, labels, method, **options).lower


def bound_margins(
  logits_fn: Callable,
  box: Interval,
  labels,
  method: str = "ibp",
  *,
  mix=None,
  relu_lower: str = "adaptive",
  relu_shrinkage=None,
  chunk: int | None = None,
  directed: bool = False,
  precision: str | None = "highest",
) -> MarginBounds:
  """Lower bounds of the margins over a box.

  Args:
    logits_fn: logits_fn(x (B, ...)) -> (B, K), example by example.
    box: `Interval` (B, ...).
    labels: int (B,), each in [0, K).
    method: "ibp"; "crown-ibp", a backward pass on IBP's inner bounds; "crown", inner bounds by
      backward passes as well.
    mix: w in [0, 1], may be traced: w times the bound of `method` plus 1 - w times IBP's. None for
      1. With w at 0 the backward pass is skipped, not only multiplied by 0.
    relu_lower: see `bounds.crown`.
    relu_shrinkage: q in [0, 1]: multiplies the upper end of undecided ReLU inputs. The result is
      then no bound; a training device of SABR.
    chunk: see `bounds.crown`; rows are the K - 1 margins.
    directed: see `bounds.ibp`; use it to certify.
    precision: see `bounds.ibp`.

  Returns:
    `MarginBounds`.

  Raises:
    ValueError: an argument outside its range, logits of another shape, logits that do not depend on
      the input; UnsupportedPrimitive as `bounds.ibp`.
  """
  _checks.check_choice("method", method, METHODS)
  check_interval("box", box)
  if mix is not None:
    _checks.check_number("mix", mix, low=0.0, high=1.0)
  options = Options(
    intermediate="crown" if method == "crown" else "ibp",
    relu_lower=relu_lower,
    relu_shrinkage=relu_shrinkage,
    chunk=chunk,
    directed=directed,
    precision=precision,
  )
  matrix = _matrix(logits_fn, box, labels)

  def plain(box, rows):
    tape, logits = _record(logits_fn, box, dataclasses.replace(options, intermediate="ibp"))
    return _found(tape, tape.lower(rows, logits, tail_only=True))

  def linear(box, rows):
    tape, logits = _record(logits_fn, box, options)
    lower = tape.lower(rows, logits)
    if mix is not None:
      # With IBP's inner bounds one record does for both; CROWN's are not those of IBP.
      shared = options.intermediate == "ibp"
      loose = tape.lower(rows, logits, tail_only=True) if shared else plain(box, rows).lower
      lower = mix * lower + (1 - mix) * loose
    return _found(tape, lower)

  plain_batch, linear_batch = jax.vmap(plain), jax.vmap(linear)
  if method == "ibp":
    return plain_batch(box, matrix)
  if mix is None:
    return linear_batch(box, matrix)
  return jax.lax.cond(mix > _NEGLIGIBLE, linear_batch, plain_batch, box, matrix)


def loss_fusion_bound(
  logits_fn: Callable,
  box: Interval,
  labels,
  *,
  relu_lower: str = "adaptive",
  precision: str | None = "highest",
) -> tuple[jax.Array, MarginBounds]:
  """An upper bound of the worst cross entropy in the box by ONE backward pass instead of K - 1.

  The loss is log S with S = 1 + sum_j exp(-m_j). With IBP's margins in [l, u], convexity gives
  exp(-m) <= exp(-l) + k (m - l), k the slope of the chord; the sum of these lines is one linear
  form of the logits, bounded by CROWN-IBP. It bounds no margin but those of IBP, which it
  starts from: verify without fusion.

  Args:
    logits_fn: as in `bound_margins`.
    box: `Interval` (B, ...).
    labels: int (B,).
    relu_lower: see `bounds.crown`.
    precision: see `bounds.ibp`.

  Returns:
    (float (B,), upper bounds of the loss in nats; IBP's `MarginBounds`).
  """
  options = Options(relu_lower=relu_lower, precision=precision)
  matrix = _matrix(logits_fn, box, labels)

  def one(box, rows):
    tape, logits = _record(logits_fn, box, options)
    low = tape.lower(rows, logits, tail_only=True)
    high = -tape.lower(-rows, logits, tail_only=True)
    # Everything is divided by exp(shift), so that early, wide boxes do not overflow.
    shift = jax.lax.stop_gradient(jnp.maximum(0.0, jnp.max(-low)))
    at_low, at_high = jnp.exp(-low - shift), jnp.exp(-high - shift)
    width = high - low
    flat = width < 1e-6
    slope = jnp.where(flat, -at_low, (at_high - at_low) / jnp.where(flat, 1.0, width))
    upper = -tape.lower(-(slope @ rows)[None], logits)[0]
    total = jnp.exp(-shift) + jnp.sum(at_low - slope * low) + upper
    # S is at least 1; rounding may have its bound below, or even below 0 where exp underflows.
    least = jnp.maximum(jnp.exp(-shift), jnp.finfo(total.dtype).tiny)
    return shift + jnp.log(jnp.maximum(total, least)), _found(tape, low)

  return jax.vmap(one)(box, matrix)


def _matrix(logits_fn, box, labels) -> jax.Array:
  """`margin_matrix` in the dtype of the box, with the shapes checked."""
  if len(box.shape) < 2:
    raise ValueError(
      f"box has shape {box.shape}; expected (B, ...) with one axis or more per example"
    )
  logits = jax.eval_shape(logits_fn, jax.ShapeDtypeStruct(box.shape, box.dtype))
  if logits.ndim != 2 or logits.shape[0] != box.shape[0] or logits.shape[1] < 2:
    raise ValueError(f"logits have shape {logits.shape}; expected ({box.shape[0]}, K) with K >= 2")
  _checks.check_shape("labels", labels, box.shape[:1])
  return margin_matrix(labels, logits.shape[1]).astype(box.dtype)


def _found(tape: Tape, lower) -> MarginBounds:
  return MarginBounds(lower, [node.interval for node in tape.relus])


def _record(logits_fn, box: Interval, options: Options) -> tuple[Tape, Node]:
  """The tape of one example and its logits (K,)."""
  tape, logits = record(lambda x: logits_fn(x[None])[0], (box,), options)
  if not isinstance(logits, Node):
    raise ValueError("the logits do not depend on the input, so there is nothing to bound")
  return tape, logits
