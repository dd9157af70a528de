"""Functions that are bounded better as a whole than operation by operation.

Each is recognised by what it is made of, never by its name alone: a nested program must read as
that of the JAX function it claims to be.
"""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from balance_jax.bounds import rounding
from balance_jax.bounds.affine_rules import affine, is_node, spread
from balance_jax.bounds.curved_rules import reduce_max
from balance_jax.bounds.elementwise_rules import increasing, leaky_relu, reciprocal, softplus
from balance_jax.bounds.interval import Interval
from balance_jax.bounds.relaxations import choose_lines, constant_lines, convex_lines
from balance_jax.bounds.tape import Node, Tape

# Stands for minus infinity in the padding of a pooling window; a real infinity times 0 is NaN.
_LOW = -1e30


def recognize(tape: Tape, eqn, program, operands) -> Node | None:
  """The result of a nested program with a rule of its own, or None."""
  name = eqn.params.get("name", "")
  custom = eqn.primitive.name == "custom_jvp_call" and len(operands) == 2
  if custom and _reads_as(program, jnp.logaddexp, operands):
    return _logaddexp(tape, operands)
  if name == "leaky_relu":
    # The slope is a number inside of the program where it is the default, else an operand.
    x, *slope = operands
    slope = slope[0] if slope else 0.01
    function = jax.nn.leaky_relu if len(operands) == 2 else lambda x: jax.nn.leaky_relu(x)
    if is_node(x) and not is_node(slope) and _reads_as(program, function, operands):
      return leaky_relu(tape, x, slope)
  return None


def _reads_as(program, function: Callable, operands) -> bool:
  """Whether the program is what JAX makes of `function` for these operands."""
  samples = [v.interval.lower if is_node(v) else v for v in operands]
  try:
    (eqn,) = jax.make_jaxpr(function)(*samples).eqns
  except (TypeError, ValueError):  # these are no operands of that function
    return False
  inner = next((p for key, p in eqn.params.items() if key in ("jaxpr", "call_jaxpr")), None)
  return inner is not None and str(inner) == str(program)


def _logaddexp(tape: Tape, operands) -> Node:
  """log(exp(x) + exp(y)) = y + softplus(x - y), which increases in both."""
  x, y = operands
  ends = [[v.interval.lower, v.interval.upper] if is_node(v) else [v, v] for v in operands]
  interval = Interval(*(jnp.logaddexp(*pair) for pair in zip(*ends, strict=True)))
  gap = affine(tape, [x, y], jnp.subtract, signs=(1, -1), terms=1, pulled=spread(operands))
  if not is_node(y) and jnp.ndim(y) == 0:
    y = jnp.broadcast_to(y, gap.shape)
  return affine(
    tape, [y, softplus(tape, gap)], jnp.add, interval=interval, terms=2 * rounding.FUNCTION_ULPS
  )


def reduce_window_max(tape: Tape, params, operands, call) -> Node:
  """The largest of the shifted, strided copies of the operand."""
  del call
  (node,) = operands
  if any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"])):
    return NotImplemented
  pads = [(low, high, 0) for low, high in params["padding"]]
  if any(map(any, pads)):
    low = jnp.asarray(_LOW, node.dtype)
    node = affine(tape, [node, low], lambda x, value: jax.lax.pad(x, value, pads))
  shifted = affine(tape, [node], functools.partial(_windows, params))
  return reduce_max(tape, {"axes": (len(node.shape),)}, [shifted], lambda x: jnp.max(x, axis=-1))


def _windows(params, x):
  """(..., number of entries in a window): what each window sees, on a last axis."""
  window, strides = params["window_dimensions"], params["window_strides"]
  sizes = [(n - w) // s + 1 for n, w, s in zip(x.shape, window, strides, strict=True)]
  parts = []
  for start in itertools.product(*map(range, window)):
    last = [a + (n - 1) * s + 1 for a, n, s in zip(start, sizes, strides, strict=True)]
    parts.append(jax.lax.slice(x, start, last, strides))
  return jnp.stack(parts, axis=-1)


def softmax(tape: Tape, name: str, operands) -> Node | None:
  """exp(x) / sum(exp(x)) where that is what a division divides, else None.

  Entry i is 1 / (1 + sum_{j != i} exp(x_j - x_i)), which has the exact range over a box as its
  interval, where numerator and denominator on their own would count x_i twice.
  """
  if name != "div" or not all(map(is_node, operands)):
    return None
  numerator, denominator = operands
  axis = _summed_axis(numerator, denominator)
  if axis is None:
    return None
  (logits,) = numerator.operands
  if logits.primitive == "sub" and _constant_along(logits.operands[1], axis):
    logits = logits.operands[0]  # a shift of all entries changes nothing
  if not is_node(logits) or logits.shape != numerator.shape:
    return None
  return _softmax(tape, logits, axis)


def _summed_axis(numerator: Node, denominator: Node) -> int | None:
  """The axis over which the denominator sums the numerator, an exponential."""
  total = denominator
  if total.primitive in ("broadcast_in_dim", "reshape") and is_node(total.operands[0]):
    total = total.operands[0]
  if numerator.primitive != "exp" or total.primitive != "reduce_sum":
    return None
  axes = tuple(total.params["axes"])
  if total.operands[0] is not numerator or len(axes) != 1:
    return None
  rest = tuple(i for i in range(len(numerator.shape)) if i != axes[0])
  kept = tuple(1 if i in axes else n for i, n in enumerate(numerator.shape))
  if denominator.primitive == "broadcast_in_dim":
    placed = tuple(denominator.params["broadcast_dimensions"]) == rest
  else:
    placed = denominator.primitive == "reshape" and denominator.shape == kept
  return axes[0] if placed else None


def _constant_along(value, axis: int) -> bool:
  """Whether a value is known to be the same along an axis."""
  if jnp.ndim(value.interval.lower if is_node(value) else value) == 0 or value.shape[axis] == 1:
    return True
  if not is_node(value):
    return False
  if value.primitive == "stop_gradient":
    return _constant_along(value.operands[0], axis)
  if value.primitive != "broadcast_in_dim":
    return False
  dimensions, source = value.params["broadcast_dimensions"], value.operands[0]
  return axis not in dimensions or source.shape[dimensions.index(axis)] == 1


def _softmax(tape: Tape, logits: Node, axis: int) -> Node:
  logits = affine(tape, [logits], lambda x: jnp.moveaxis(x, axis, -1))
  count = logits.shape[-1]
  others = 1 - jnp.eye(count, dtype=logits.dtype)

  def gaps(ours, theirs, join):
    """(..., i, j): join(theirs_j, ours_i), and 0 for i = j."""
    gap = join(theirs[..., None, :], ours[..., :, None])
    # Not times 0, which is NaN where the gap is infinite.
    return jnp.where(jnp.broadcast_to(others, gap.shape) > 0, gap, 0)

  # A masked logit is minus infinity, or nearly.
  least = jnp.finfo(logits.dtype).min / 4
  ends = logits.interval
  low, high = jnp.maximum(ends.lower, least), jnp.maximum(ends.upper, least)
  gap = affine(
    tape,
    [logits],
    lambda x: gaps(x, x, jnp.subtract),
    magnitude=lambda x: gaps(x, x, jnp.add),
    interval=Interval(gaps(high, low, jnp.subtract), gaps(low, high, jnp.subtract)),
    terms=2 * count,
  )
  # Gaps above the limit are cut to it, which moves an entry by less than exp(-limit).
  limit = 0.5 * math.log(float(jnp.finfo(logits.dtype).max))
  powers = increasing(lambda x: jnp.exp(jnp.minimum(x, limit)), _cut_lines(limit))(
    tape, {}, [gap], None
  )
  total = affine(
    tape,
    [powers, jnp.ones(logits.shape, logits.dtype)],
    lambda e, one: (e * jnp.broadcast_to(others, e.shape)).sum(-1) + one,
    terms=count,
  )
  share = reciprocal(tape, total)
  rest = jnp.full(share.shape, jnp.exp(-limit), share.dtype)
  cut = tape.node(Interval(jnp.zeros_like(rest), rest))
  nothing = jnp.max(ends.upper, -1, keepdims=True) == -jnp.inf  # is NaN in the network
  inside = Interval(
    jnp.where(nothing, jnp.nan, jnp.maximum(share.interval.lower - rest, 0)),
    jnp.where(nothing, jnp.nan, share.interval.upper),
  )
  share = affine(tape, [share, cut], jnp.subtract, signs=(1, -1), interval=inside, terms=1)
  return affine(tape, [share], lambda x: jnp.moveaxis(x, -1, axis))


def _cut_lines(limit: float) -> Callable:
  """Lines of exp(min(x, limit))."""

  def lines(function, lower, upper):
    inside = upper <= limit
    found = convex_lines(jnp.exp, jnp.where(inside, lower, 0), jnp.where(inside, upper, 0))
    return choose_lines(inside, found, constant_lines(function(lower), function(upper)))

  return lines
