"""Rules of the operations that are affine in their bounded operands.

A rule is `rule(tape, params, operands, call) -> Node`: operands are `Node`s (bounded) or arrays
(exact), and `call(*values)` evaluates the operation on arrays.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from balance_jax.bounds import rounding
from balance_jax.bounds.interval import Interval
from balance_jax.bounds.tape import Affine, Node, Tape

ALL = None  # every operand enters linearly


def is_node(value) -> bool:
  return isinstance(value, Node)


def affine(
  tape: Tape,
  operands: Sequence,
  call: Callable,
  *,
  positions: Sequence[int] | None = ALL,
  signs: Sequence[int] | None = None,
  magnitude: Callable | None = None,
  interval: Interval | None = None,
  terms: int = 0,
  pulled: int | None = None,
  transpose: Callable | None = None,
) -> Node:
  """Adds y = call(*operands), affine in the bounded operands together.

  Args:
    tape: the record.
    operands: nodes and arrays.
    call: call(*arrays) -> array.
    positions: operands that enter as terms of a sum; the exact ones among them are the offset.
      Exact operands elsewhere, such as factors and indices, are part of the linear map.
    signs: of the coefficients by operand, +1 or -1, where all of one sign; None for all +1.
    magnitude: call with absolute coefficients; needed where a sign is not known.
    interval: of the result, where the caller knows it; None to derive it, as centre and radius if
      the operands have these or `magnitude` is given.
    terms: see `Affine`.
    pulled: see `Affine`; None for `terms`.
    transpose: see `Affine`.
  """
  bounded = [i for i, value in enumerate(operands) if is_node(value)]
  nodes = [operands[i] for i in bounded]
  positions = range(len(operands)) if positions is ALL else positions
  pulled = terms if pulled is None else pulled
  fixed = [i for i in positions if i not in bounded]

  def fill(values, exact):
    full = list(exact)
    for i, value in zip(bounded, values, strict=True):
      full[i] = value
    return full

  zeros = [jnp.zeros_like(v) if i in fixed else v for i, v in enumerate(operands)]
  apply = lambda *values: call(*fill(values, zeros))  # noqa: E731
  with_offset = lambda *values: call(*fill(values, operands))  # noqa: E731
  offset = None
  if fixed:
    offset = with_offset(*(jnp.zeros(node.shape, node.dtype) for node in nodes))
  if magnitude is None:
    absolute = lambda *values: _unsigned(call, signs)(*fill(values, zeros))  # noqa: E731
  else:
    absolute = lambda *values: magnitude(*fill(values, zeros))  # noqa: E731
  low = high = [rounding.magnitude(node.interval) for node in nodes]
  ball, known = None, all(node.ball for node in nodes)
  if interval is None and (known or magnitude is not None):
    balls = [n.ball if known else (n.interval.center, n.interval.radius) for n in nodes]
    centers, radii = zip(*balls, strict=True)
    ball = with_offset(*centers), absolute(*radii)
    interval = Interval(ball[0] - ball[1], ball[0] + ball[1])
  elif interval is None:
    ends = [1] * len(operands) if signs is None else signs
    low = [
      n.interval.lower if ends[i] > 0 else n.interval.upper
      for i, n in zip(bounded, nodes, strict=True)
    ]
    high = [
      n.interval.upper if ends[i] > 0 else n.interval.lower
      for i, n in zip(bounded, nodes, strict=True)
    ]
    interval = Interval(with_offset(*low), with_offset(*high))
  if tape.options.directed and terms:
    # Where y increases in x, so does y minus an error e |x|: every end is moved by its own size.
    reach = [
      absolute(*map(jnp.abs, end)) + (0 if offset is None else abs(offset)) for end in (low, high)
    ]
    coarse = max((interval.dtype, *(n.dtype for n in nodes)), key=lambda d: jnp.finfo(d).eps)
    error = 2 * rounding.gamma(terms + 4, coarse)
    interval = rounding.widen(interval, *(error * part for part in reach))
  origin = Affine(tape, nodes, apply, absolute, offset, terms, pulled, transpose)
  node = tape.node(interval, origin)
  node.ball = None if tape.options.directed else ball
  return node


def _unsigned(call, signs):
  """The operation with absolute coefficients, given the sign by operand."""
  if signs is None or all(sign > 0 for sign in signs):
    return call
  return lambda *values: jnp.abs(call(*(s * v for s, v in zip(signs, values, strict=True))))


def moving(*positions: int) -> Callable:
  """Rule of operations that copy, move or select entries of the operands at `positions`."""

  def rule(tape, params, operands, call):
    del params
    if positions and any(is_node(v) for i, v in enumerate(operands) if i not in positions):
      return NotImplemented  # where things are taken from would itself be open
    return affine(tape, operands, call, positions=positions or ALL)

  return rule


def copying(*positions: int) -> Callable:
  """As `moving`, where one entry may be copied many times; the copies add up when pulled back."""

  def rule(tape, params, operands, call):
    del params
    if any(is_node(v) for i, v in enumerate(operands) if i not in positions):
      return NotImplemented
    out = jax.eval_shape(call, *(v.interval.lower if is_node(v) else v for v in operands))
    smallest = min(math.prod(operands[i].shape) for i in positions if is_node(operands[i]))
    copies = out.size if len(operands) > 1 else out.size // max(1, smallest)
    return affine(tape, operands, call, positions=positions, pulled=copies if copies > 1 else 0)

  return rule


def summing(count: Callable, *, overlap: bool = True) -> Callable:
  """Rule of sums; count(params, shape) gives the number of terms, some in several if `overlap`."""

  def rule(tape, params, operands, call):
    (node,) = operands
    terms = count(params, node.shape)
    return affine(tape, operands, call, terms=terms, pulled=terms if overlap else 0)

  return rule


def add(tape, params, operands, call):
  return affine(tape, operands, call, terms=1, pulled=spread(operands))


def sub(tape, params, operands, call):
  return affine(tape, operands, call, signs=(1, -1), terms=1, pulled=spread(operands))


def neg(tape, params, operands, call):
  return affine(tape, operands, call, signs=(-1,))


def scale(tape, operands, call):
  """A bounded operand times (or divided by) an exact one, either first or second."""
  first = is_node(operands[0])
  node, factor = operands if first else operands[::-1]
  interval = None
  if node.ball is None:  # by the ends, which is exact; by centre and radius if there are any
    order = (lambda x, k: call(x, k)) if first else (lambda x, k: call(k, x))
    one, two = (order(end, factor) for end in (node.interval.lower, node.interval.upper))
    interval = Interval(jnp.minimum(one, two), jnp.maximum(one, two))
  return affine(
    tape,
    operands,
    call,
    positions=(),
    magnitude=absolute_factors(operands, call),
    interval=interval,
    terms=1,
    pulled=1 + spread(operands),
  )


def absolute_factors(operands, call):
  """The operation with absolute exact operands, for bounded ones that are radii or sizes, >= 0."""
  exact = [not is_node(value) for value in operands]
  return lambda *values: call(
    *(jnp.abs(v) if fixed else v for v, fixed in zip(values, exact, strict=True))
  )


def matrix_product(tape, operands, call, terms: tuple[int, int, int], transpose=None):
  """A product with an exact matrix or kernel, or an exact array with a bounded one.

  `terms` are the products in an entry of the result, and of the first and of the second operand
  when rows are pulled back.
  """
  magnitude, first = absolute_factors(operands, call), is_node(operands[0])
  return affine(
    tape,
    operands,
    call,
    positions=(),
    magnitude=magnitude,
    terms=terms[0],
    pulled=terms[1] if first else terms[2],
    transpose=transpose,
  )


def dot_terms(params, left, right) -> tuple[int, int, int]:
  """Products in one entry of a dot_general, and of what is pulled back to its operands."""
  (contract, contract_right), (batch, batch_right) = params["dimension_numbers"]
  inner = math.prod(left[i] for i in contract)
  rows = math.prod(left) // max(1, inner * math.prod(left[i] for i in batch))
  other = math.prod(right[i] for i in (*contract_right, *batch_right))
  return inner, math.prod(right) // max(1, other), rows


def conv_terms(params, left, right, out) -> tuple[int, int, int]:
  """As `dot_terms`, for a convolution: at most all of one kernel's entries, or all places."""
  numbers = params["dimension_numbers"]
  out_channels, in_channels = (right[i] for i in numbers.rhs_spec[:2])
  window = math.prod(right) // max(1, out_channels * in_channels)
  places = math.prod(out) // max(1, out_channels)
  return window * in_channels, window * out_channels, places


def scatter_add(tape, params, operands, call):
  """Entries added to at exact places."""
  del params
  target, places, updates = operands
  if is_node(places):
    return NotImplemented
  count = 1 + math.prod(updates.shape)
  return affine(tape, [target, updates], lambda x, y: call(x, places, y), terms=count, pulled=1)


def scatter(tape, params, operands, call):
  """Entries set at exact places; of two at one place, it is open which one stays."""
  del call
  target, places, updates = operands
  single = math.prod(places.shape[:-1]) == 1
  if is_node(places) or not (single or params["unique_indices"]):
    return NotImplemented

  def put(x, y):  # which has no transpose unless it says that places are unique
    numbers, mode = params["dimension_numbers"], params["mode"]
    return jax.lax.scatter(x, places, y, numbers, unique_indices=True, mode=mode)

  return affine(tape, [target, updates], put)


def unstack(tape, params, operands, call):
  """The slices along an axis."""
  del call
  (node,), axis = operands, params["axis"]
  take = lambda i: functools.partial(jax.lax.index_in_dim, index=i, axis=axis, keepdims=False)  # noqa: E731
  return [affine(tape, [node], take(i)) for i in range(node.shape[axis])]


def identity(tape, params, operands, call):
  """Several values as they are."""
  del tape, params, call
  return list(operands)


def split(tape, params, operands, call):
  """Several outputs, each a slice."""
  del call
  (node,) = operands
  axis, start, parts = params["axis"], 0, []
  for size in params["sizes"]:
    take = functools.partial(
      jax.lax.slice_in_dim, start_index=start, limit_index=start + size, axis=axis
    )
    parts.append(affine(tape, [node], take))
    start += size
  return parts


def spread(operands) -> int:
  """Entries that one entry of the smallest operand is broadcast to; they add up when pulled."""
  sizes = [math.prod(v.shape) for v in operands]
  return max(sizes) // max(1, min(sizes)) if min(sizes) != max(sizes) else 0


AFFINE_RULES = {
  **dict.fromkeys(
    (
      "copy",
      "reshape",
      "rev",
      "sharding_constraint",
      "slice",
      "squeeze",
      "transpose",
    ),
    moving(0),
  ),
  "broadcast_in_dim": copying(0),
  "tile": copying(0),
  **dict.fromkeys(("concatenate", "stack"), moving()),
  "pad": copying(0, 1),
  "dynamic_slice": moving(0),
  "gather": copying(0),
  "dynamic_update_slice": moving(0, 1),
  "scatter": scatter,
  "scatter-add": scatter_add,
  **dict.fromkeys(("name", "optimization_barrier"), identity),
  "split": split,
  "unstack": unstack,
  "add": add,
  "add_any": add,
  "sub": sub,
  "neg": neg,
  "reduce_sum": summing(
    lambda params, shape: math.prod(shape[i] for i in params["axes"]), overlap=False
  ),
  "cumsum": summing(lambda params, shape: shape[params["axis"]]),
  "reduce_window_sum": summing(lambda params, shape: math.prod(params["window_dimensions"])),
}
