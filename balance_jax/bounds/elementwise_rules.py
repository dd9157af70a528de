"""Rules of functions of one operand, entry by entry: an interval, and lines for CROWN."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax.bounds import relaxations, rounding
from balance_jax.bounds.interval import Interval
from balance_jax.bounds.tape import Elementwise, Node, Tape


def elementwise(
  tape: Tape, node: Node, result: Callable, lines: Callable | None, *, exact: bool = False
) -> Node:
  """Adds y = f(node).

  Args:
    tape: the record.
    node: the operand.
    result: result(lower, upper) -> (lower, upper) of y.
    lines: lines(lower, upper) -> `Lines`; None for constant ones.
    exact: whether f is computed without rounding.
  """
  tape.tighten(node)
  interval = Interval(*result(node.interval.lower, node.interval.upper))
  if tape.options.directed and not exact:
    interval = rounding.widen_function(interval)
  if lines is None:
    lines = lambda lower, upper: relaxations.constant_lines(interval.lower, interval.upper)  # noqa: E731
  return tape.node(interval, Elementwise(tape, [node], lines, interval))


def relu(tape: Tape, node: Node) -> Node:
  """max(node, 0), recorded as a ReLU."""
  tape.relus.append(node)
  shrinkage = tape.options.relu_shrinkage

  def result(lower, upper):
    if shrinkage is not None:
      upper = jnp.where((lower < 0) & (upper > 0), shrinkage * upper, upper)
    # Not maximum: its gradient at 0 would be a half.
    return jax.nn.relu(lower), jax.nn.relu(upper)

  def lines(lower, upper):
    return relaxations.relu_lines(lower, upper, tape.options.relu_lower)

  return elementwise(tape, node, result, lines, exact=True)


def increasing(function: Callable, lines: Callable | None) -> Callable:
  """Rule of an increasing function of one operand."""

  def rule(tape, params, operands, call):
    del params, call
    (node,) = operands
    chosen = None if lines is None else functools.partial(lines, function)
    return elementwise(tape, node, lambda *ends: tuple(map(function, ends)), chosen)

  return rule


def softplus(tape: Tape, node: Node) -> Node:
  """log(1 + exp(node))."""
  return increasing(jax.nn.softplus, relaxations.convex_lines)(tape, {}, [node], None)


def leaky_relu(tape: Tape, node: Node, slope) -> Node:
  """node where it is positive, else slope * node, of any exact slope."""
  function = lambda x: jnp.where(x >= 0, x, slope * x)  # noqa: E731

  def result(lower, upper):
    ends = function(lower), function(upper)
    least = jnp.where(
      (lower < 0) & (upper > 0), jnp.minimum(0, jnp.minimum(*ends)), jnp.minimum(*ends)
    )
    return least, jnp.maximum(*ends)

  def lines(lower, upper):
    # slope x + (1 - slope) relu(x).
    rest = relaxations.relu_lines(lower, upper, tape.options.relu_lower)
    positive, scaled = slope <= 1, [(1 - slope) * part for part in rest]
    low_slope, low, high_slope, high = scaled
    return relaxations.Lines(
      slope + jnp.where(positive, low_slope, high_slope),
      jnp.where(positive, low, high),
      slope + jnp.where(positive, high_slope, low_slope),
      jnp.where(positive, high, low),
    )

  return elementwise(tape, node, result, lines)


def _right_of(start: float, function: Callable, at_start: float, lines: Callable):
  """Rule of a monotone function of numbers >= start; NaN where the box holds smaller ones."""
  decreasing = at_start == np.inf

  def rule(tape, params, operands, call):
    del params, call
    (node,) = operands

    def value(x):
      inside = x > start
      return jnp.where(inside, function(jnp.where(inside, x, 1)), at_start)

    def result(lower, upper):
      ends = [jnp.where(lower >= start, value(x), jnp.nan) for x in (lower, upper)]
      return ends[::-1] if decreasing else ends

    def chosen(lower, upper):
      inside = lower > start
      found = lines(function, jnp.where(inside, lower, 1), jnp.where(inside, upper, 1))
      flat = relaxations.constant_lines(*result(lower, upper))
      return relaxations.choose_lines(inside, found, flat)

    return elementwise(tape, node, result, chosen)

  return rule


def absolute(tape, params, operands, call):
  del params, call
  (node,) = operands

  def lines(lower, upper):
    # |x| = 2 relu(x) - x.
    rest = relaxations.relu_lines(lower, upper, tape.options.relu_lower)
    return relaxations.Lines(
      2 * rest.lower_slope - 1,
      2 * rest.lower_offset,
      2 * rest.upper_slope - 1,
      2 * rest.upper_offset,
    )

  return elementwise(tape, node, functools.partial(_even, jnp.abs), lines, exact=True)


def _even(function, lower, upper):
  """The interval of a function of |x| that increases with it."""
  ends = function(lower), function(upper)
  least = jnp.where((lower < 0) & (upper > 0), function(jnp.zeros_like(lower)), jnp.minimum(*ends))
  return least, jnp.maximum(*ends)


def square(tape, params, operands, call):
  return integer_pow(tape, {"y": 2}, operands, call)


def integer_pow(tape, params, operands, call):
  del call
  power, (node,) = params["y"], operands
  if power < 0:
    node = integer_pow(tape, {"y": -power}, [node], None) if power != -1 else node
    return reciprocal(tape, node)
  function = lambda x: x**power  # noqa: E731
  if power % 2 == 0:
    return elementwise(
      tape,
      node,
      functools.partial(_even, function),
      functools.partial(relaxations.convex_lines, function),
    )

  def lines(lower, upper):
    one_sided = relaxations.choose_lines(
      lower >= 0,
      relaxations.convex_lines(function, lower, upper),
      relaxations.concave_lines(function, lower, upper),
    )
    flat = relaxations.constant_lines(function(lower), function(upper))
    return relaxations.choose_lines((lower < 0) & (upper > 0), flat, one_sided)

  return elementwise(tape, node, lambda *ends: tuple(map(function, ends)), lines)


def reciprocal(tape: Tape, node: Node) -> Node:
  """1 / node; NaN where the box holds 0, as 0 times that is no number either."""

  def safe(x, inside):
    return jnp.where(inside, x, 1)

  def result(lower, upper):
    inside = (lower > 0) | (upper < 0)
    low, high = 1 / safe(upper, inside), 1 / safe(lower, inside)
    return jnp.where(inside, low, jnp.nan), jnp.where(inside, high, jnp.nan)

  def lines(lower, upper):
    positive, negative = lower > 0, upper < 0
    inverse = lambda x: 1 / x  # noqa: E731
    above = relaxations.convex_lines(inverse, safe(lower, positive), safe(upper, positive))
    below = relaxations.concave_lines(inverse, -safe(-lower, negative), -safe(-upper, negative))
    flat = relaxations.constant_lines(*result(lower, upper))
    return relaxations.choose_lines(
      positive, above, relaxations.choose_lines(negative, below, flat)
    )

  return elementwise(tape, node, result, lines)


def stepwise(tape, params, operands, call):
  """An increasing function that jumps, computed without rounding."""
  del params
  return elementwise(tape, *operands, lambda *ends: tuple(map(call, ends)), None, exact=True)


ELEMENTWISE_RULES = {
  "abs": absolute,
  "asinh": increasing(jnp.arcsinh, relaxations.s_shaped_lines),
  "atan": increasing(jnp.arctan, relaxations.s_shaped_lines),
  **dict.fromkeys(("ceil", "floor", "round", "sign"), stepwise),
  "erf": increasing(jax.lax.erf, relaxations.s_shaped_lines),
  "exp": increasing(jnp.exp, relaxations.convex_lines),
  "expm1": increasing(jnp.expm1, relaxations.convex_lines),
  "integer_pow": integer_pow,
  "log": _right_of(0, jnp.log, -np.inf, relaxations.concave_lines),
  "log1p": _right_of(-1, jnp.log1p, -np.inf, relaxations.concave_lines),
  "logistic": increasing(jax.nn.sigmoid, relaxations.s_shaped_lines),
  "rsqrt": _right_of(0, jax.lax.rsqrt, np.inf, relaxations.convex_lines),
  "sqrt": _right_of(0, jnp.sqrt, 0.0, relaxations.concave_lines),
  "square": square,
  "tanh": increasing(jnp.tanh, relaxations.s_shaped_lines),
}
