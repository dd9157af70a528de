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
    interval: of the result, where the caller knows it.
    terms: see `Affine`.
  """
  bounded = [i for i, value in enumerate(operands) if is_node(value)]
  nodes = [operands[i] for i in bounded]
  positions = range(len(operands)) if positions is ALL else positions
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
  if interval is None and magnitude is None:
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
  elif interval is None:
    center = with_offset(*(node.interval.center for node in nodes))
    radius = absolute(*(node.interval.radius for node in nodes))
    interval = Interval(center - radius, center + radius)
  if tape.options.directed and terms:
    reach = absolute(*(rounding.magnitude(node.interval) for node in nodes))
    reach = reach if offset is None else reach + jnp.abs(offset)
    interval = rounding.widen(interval, rounding.gamma(terms + 4, reach.dtype) * reach)
  return tape.node(interval, Affine(tape, nodes, apply, absolute, offset, terms))


def _unsigned(call, signs):
  """The operation with absolute coefficients, given the sign by operand."""
  if signs is None or all(sign > 0 for sign in signs):
    return call
  return lambda *values: jnp.abs(call(*(s * v for s, v in zip(signs, values, strict=True))))


def moving(*positions: int) -> Callable:
  """Rule of operations that copy, move or select entries of the operands at `positions`."""

  def rule(tape, params, operands, call):
    del params
    return affine(tape, operands, call, positions=positions or ALL)

  return rule


def summing(count: Callable) -> Callable:
  """Rule of sums; count(params, shape) gives the number of terms."""

  def rule(tape, params, operands, call):
    (node,) = operands
    return affine(tape, operands, call, terms=count(params, node.shape))

  return rule


def add(tape, params, operands, call):
  return affine(tape, operands, call, terms=2 + _spread(operands))


def sub(tape, params, operands, call):
  node = affine(tape, operands, call, signs=(1, -1), terms=2 + _spread(operands))
  return node


def neg(tape, params, operands, call):
  return affine(tape, operands, call, signs=(-1,))


def scale(tape, operands, call):
  """A bounded operand times (or divided by) an exact one, either first or second."""
  first = is_node(operands[0])
  node, factor = operands if first else operands[::-1]
  order = (lambda x, k: call(x, k)) if first else (lambda x, k: call(k, x))
  one, two = (order(end, factor) for end in (node.interval.lower, node.interval.upper))
  interval = Interval(jnp.minimum(one, two), jnp.maximum(one, two))
  return affine(
    tape,
    operands,
    call,
    positions=(),
    magnitude=lambda *values: jnp.abs(call(*map(jnp.abs, values))),
    interval=interval,
    terms=1 + _spread(operands),
  )


def matrix_product(tape, operands, call, terms: int):
  """A product with an exact matrix or kernel, or an exact array with a bounded one."""

  def magnitude(*values):
    return call(*map(jnp.abs, values))

  return affine(tape, operands, call, positions=(), magnitude=magnitude, terms=terms)


def dot_terms(params, left, right) -> int:
  """Products in one entry of a dot_general, or of what is pulled back through it."""
  (contract, _), (batch, _) = params["dimension_numbers"]
  inner = math.prod(left[i] for i in contract)
  outer = math.prod(left) // max(1, inner * math.prod(left[i] for i in batch))
  (_, contract_right), (_, batch_right) = params["dimension_numbers"]
  other = math.prod(right[i] for i in (*contract_right, *batch_right))
  return max(inner, outer, math.prod(right) // max(1, other))


def conv_terms(params, left, right) -> int:
  """As `dot_terms`, for a convolution: at most all of one kernel's entries in either direction."""
  out_channels = right[params["dimension_numbers"].rhs_spec[0]]
  in_channels = right[params["dimension_numbers"].rhs_spec[1]]
  window = math.prod(right) // max(1, out_channels * in_channels)
  return window * max(in_channels, out_channels)


def broadcast(tape, params, operands, call):
  """Copies, which add up when they are pulled back."""
  del params
  (node,) = operands
  out = jax.eval_shape(call, node.interval.lower)
  copies = out.size // max(1, math.prod(node.shape))
  return affine(tape, operands, call, terms=copies if copies > 1 else 0)


def dynamic_slice_like(tape, params, operands, call):
  """dynamic_slice, gather and their like: only the first operand is moved, the rest are indices."""
  return affine(tape, operands, call, positions=(0,))


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


def _spread(operands) -> int:
  """Entries that one entry of the smallest operand is broadcast to; they add up when pulled."""
  sizes = [math.prod(v.shape) for v in operands]
  return max(sizes) // max(1, min(sizes)) if min(sizes) != max(sizes) else 0


AFFINE_RULES = {
  **dict.fromkeys(
    (
      "copy",
      "copy_p",
      "expand_dims",
      "reshape",
      "rev",
      "sharding_constraint",
      "slice",
      "squeeze",
      "transpose",
      "pvary",
    ),
    moving(0),
  ),
  "broadcast_in_dim": broadcast,
  **dict.fromkeys(("concatenate", "stack"), moving()),
  "pad": moving(0, 1),
  "dynamic_slice": dynamic_slice_like,
  "gather": dynamic_slice_like,
  "dynamic_update_slice": moving(0, 1),
  "split": split,
  "add": add,
  "add_any": add,
  "sub": sub,
  "neg": neg,
  "reduce_sum": summing(lambda params, shape: math.prod(shape[i] for i in params["axes"])),
  "cumsum": summing(lambda params, shape: shape[params["axis"]]),
  "reduce_window_sum": summing(lambda params, shape: math.prod(params["window_dimensions"])),
}
