"""Rules of operations on several values: products, maxima, comparisons, selections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax._convolution import CONV2D_OPTIONS, conv2d, conv2d_transpose
from balance_jax.bounds import relaxations, rounding
from balance_jax.bounds.affine_rules import (
  affine,
  conv_terms,
  dot_terms,
  is_node,
  matrix_product,
  scale,
  sub,
)
from balance_jax.bounds.elementwise_rules import (
  ELEMENTWISE_RULES,
  elementwise,
  reciprocal,
  relu,
  square,
)
from balance_jax.bounds.interval import Interval
from balance_jax.bounds.tape import Choice, Node, Product, Tape


def mul(tape, params, operands, call):
  del params
  if not all(map(is_node, operands)):
    return scale(tape, operands, call)
  x, y = operands
  if x is y:
    return square(tape, {}, [x], None)
  tape.tighten(x)
  tape.tighten(y)
  corners = [
    call(a, b)
    for a in (x.interval.lower, x.interval.upper)
    for b in (y.interval.lower, y.interval.upper)
  ]
  interval = Interval(
    functools.reduce(jnp.minimum, corners), functools.reduce(jnp.maximum, corners)
  )
  if tape.options.directed:
    interval = rounding.widen(interval, 0 * interval.lower, 0 * interval.upper)
  spread = max(1, max(interval.lower.size // max(1, node.interval.lower.size) for node in operands))
  return tape.node(interval, Product(tape, [x, y], call, spread))


def div(tape, params, operands, call):
  """x / k is linear; k / y and x / y go through 1 / y."""
  x, y = operands
  if not is_node(y):
    return scale(tape, operands, call)
  return mul(tape, params, [x, reciprocal(tape, y)], jnp.multiply)


def dot_general(tape, params, operands, call):
  terms = dot_terms(params, *(operand.shape for operand in operands))
  if not all(map(is_node, operands)):
    return matrix_product(tape, operands, call, terms)
  for node in operands:
    tape.tighten(node)
  x, y = (node.interval for node in operands)
  # Midpoint and radius (Rump, 1999): at most 1.5 times as wide as the exact range.
  center = call(x.center, y.center)
  far = call(jnp.abs(x.center) + x.radius, y.radius)
  radius = far + call(x.radius, jnp.abs(y.center))
  interval = Interval(center - radius, center + radius)
  if tape.options.directed:
    reach = call(rounding.magnitude(x), rounding.magnitude(y))
    error = 4 * rounding.gamma(terms[0] + 4, reach.dtype) * reach
    interval = rounding.widen(interval, error, error)
  return tape.node(interval, Product(tape, operands, call, max(terms)))


def conv_general_dilated(tape, params, operands, call):
  if all(map(is_node, operands)):
    return NotImplemented
  if is_node(operands[0]) and _of_plain_images(params):
    # Gradients of the usual form are very slow inside of loops on CPUs; see `_convolution`.
    names = {"strides": "window_strides", "groups": "feature_group_count"}
    options = {key: params[names.get(key, key)] for key in CONV2D_OPTIONS}
    return _conv2d(tape, operands, options)
  samples = [v.interval.lower if is_node(v) else v for v in operands]
  out = jax.eval_shape(call, *samples)
  terms = conv_terms(params, *(operand.shape for operand in operands), out.shape)
  return matrix_product(tape, operands, call, terms)


def conv2d_rule(tape, params, operands, call):
  """The library's own convolution of images."""
  options = params["geometry"]._asdict()
  if tape.options.precision is not None:
    options["precision"] = jax.lax.Precision(tape.options.precision)
  if is_node(operands[0]) and not is_node(operands[1]):
    return _conv2d(tape, operands, options)
  # The kernel is bounded, or both are: the rules of the operation it stands for.
  numbers = jax.lax.conv_dimension_numbers(*(v.shape for v in operands), ("NHWC", "HWIO", "NHWC"))
  return conv_general_dilated(
    tape, {"dimension_numbers": numbers}, operands, functools.partial(conv2d, **options)
  )


def _conv2d(tape, operands, options):
  """Bounded images, an exact kernel."""
  image, kernel = operands
  height, width, channels, features = kernel.shape

  def transpose(row):
    return (conv2d_transpose(row, kernel, image.shape[1:3], **options),)

  terms = (height * width * channels, height * width * features, 0)
  call = functools.partial(conv2d, **options)
  return matrix_product(tape, operands, call, terms, transpose=transpose)


def _of_plain_images(params) -> bool:
  """A 2-d convolution of NHWC images with HWIO kernels, neither dilated."""
  numbers = params["dimension_numbers"]
  plain = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
  return (
    numbers == plain
    and set(params["lhs_dilation"]) | set(params["rhs_dilation"]) == {1}
    and params["batch_group_count"] == 1
    and params["preferred_element_type"] is None
    and all(low >= 0 and high >= 0 for low, high in params["padding"])
  )


def maximum(tape, params, operands, call):
  """max(x, k) is k + relu(x - k), and max(x, y) is y + relu(x - y)."""
  del params
  x, y = operands if is_node(operands[0]) else operands[::-1]
  if not is_node(y):
    if _all_equal(y, -np.inf) and jnp.broadcast_shapes(x.shape, jnp.shape(y)) == x.shape:
      return x
    if _all_equal(y, 0) and jnp.broadcast_shapes(x.shape, jnp.shape(y)) == x.shape:
      return relu(tape, x)
  ends = Interval(*(call(*pair) for pair in zip(_ends(x), _ends(y), strict=True)))
  gap = affine(tape, [x, y], jnp.subtract, signs=(1, -1), terms=2)

  def lines(lower, upper):
    return relaxations.relu_lines(lower, upper, tape.options.relu_lower)

  excess = elementwise(tape, gap, lambda *ends: tuple(map(jax.nn.relu, ends)), lines, exact=True)
  return affine(tape, [y, excess], jnp.add, interval=ends, terms=2)


def minimum(tape, params, operands, call):
  """min(x, y) = -max(-x, -y)."""
  del call
  negated = [affine(tape, [v], jnp.negative, signs=(-1,)) if is_node(v) else -v for v in operands]
  return _negate(tape, maximum(tape, params, negated, jnp.maximum))


def clamp(tape, params, operands, call):
  """min(max(x, low), high)."""
  del call
  low, x, high = operands
  if is_node(low) or is_node(x):
    raised = maximum(tape, params, [x, low], jnp.maximum)
  else:
    raised = jnp.maximum(x, low)
  return minimum(tape, params, [raised, high], None)


def reduce_max(tape, params, operands, call):
  """The largest entry: at least that with the largest lower end, and that one where it is sure."""
  (node,), axes = operands, tuple(params["axes"])
  tape.tighten(node)
  lower, upper = node.interval.lower, node.interval.upper
  result = Interval(call(lower), call(upper))
  flat = jnp.moveaxis(lower, axes, _last(axes))
  shape = flat.shape[: flat.ndim - len(axes)]
  flat = flat.reshape(*shape, -1)
  mask = jax.nn.one_hot(jnp.argmax(flat, -1), flat.shape[-1], dtype=lower.dtype)
  others = jnp.moveaxis(upper, axes, _last(axes)).reshape(*shape, -1)
  sure = result.lower >= jnp.max(jnp.where(mask > 0, -jnp.inf, others), -1)
  ordered = tuple(lower.shape[i] for i in axes)
  mask = jnp.moveaxis(mask.reshape(*shape, *ordered), _last(axes), axes)

  def gather(rows, mask):
    spread = jnp.expand_dims(rows, tuple(axis + 1 for axis in axes))
    return spread * jax.lax.stop_gradient(mask)[None]

  choice = Choice(tape, [node], [mask], gather, jnp.ones_like(sure), sure, result)
  return tape.node(result, choice)


def reduce_min(tape, params, operands, call):
  """The smallest entry is minus the largest of the negated ones."""
  del call
  negated = affine(tape, operands, jnp.negative, signs=(-1,))
  return _negate(
    tape, reduce_max(tape, params, [negated], lambda x: jnp.max(x, axis=params["axes"]))
  )


def compare(tape, params, operands, call):
  """x > y, x >= y, x < y, x <= y: a truth that may be open; bool intervals, False < True."""
  del params
  (low_x, high_x), (low_y, high_y) = map(_ends, operands)
  one, two = call(low_x, high_y), call(high_x, low_y)
  # Every comparison with NaN is false, but a bound that is NaN says nothing.
  open_ = _any_nan(low_x, high_x, low_y, high_y)
  return constant(tape, Interval(one & two & ~open_, one | two | open_))


def equal(tape, params, operands, call):
  """x == y and x != y: sure where the boxes do not meet, or are the same point."""
  del params
  (low_x, high_x), (low_y, high_y) = map(_ends, operands)
  apart = (high_x < low_y) | (high_y < low_x)
  same = (low_x == high_x) & (low_y == high_y) & (low_x == low_y)
  if operands[0] is operands[1]:  # the test for NaN
    same = jnp.isfinite(low_x) & jnp.isfinite(high_x)
  # What the operation says of one number, and of two that differ.
  zero = jnp.zeros(apart.shape, jnp.result_type(low_x))
  if_same, if_apart = call(zero, zero), call(zero, jnp.ones_like(zero))
  sure_true = apart & if_apart | same & if_same
  sure_false = apart & ~if_apart | same & ~if_same
  return constant(tape, Interval(sure_true, ~sure_false))


def logical(tape, params, operands, call):
  """and, or, not, all, any of truths."""
  del params
  if any(_ends(value)[0].dtype != bool for value in operands):
    return NotImplemented
  one, two = (call(*values) for values in zip(*map(_ends, operands), strict=True))
  return constant(tape, Interval(one & two, one | two))


def is_finite(tape, params, operands, call):
  """Sure where both ends are finite; a box with an infinite end may hold either."""
  del params
  low, high = (call(end) for end in _ends(operands[0]))
  return constant(tape, Interval(low & high, jnp.ones_like(low)))


def constant(tape: Tape, interval: Interval) -> Node:
  """A value of which nothing is kept but its interval."""
  nothing = jnp.zeros(interval.shape, bool)
  return tape.node(
    interval, Choice(tape, [], [], lambda rows, mask: rows, nothing, nothing, interval)
  )


def convert(tape, params, operands, call):
  """A change of dtype; of truths only the interval is kept."""
  (node,), new = operands, params["new_dtype"]
  if jnp.issubdtype(node.dtype, jnp.floating) and jnp.issubdtype(new, jnp.floating):
    # To fewer digits is rounding, which counts as one operation of the narrower type; so it is on
    # the way back, where the rows get the type of the operand.
    fewer, more = (
      jnp.finfo(a).eps > jnp.finfo(b).eps for a, b in ((new, node.dtype), (node.dtype, new))
    )
    return affine(tape, operands, call, terms=int(fewer), pulled=int(more))
  if jnp.issubdtype(new, bool):
    zero = jnp.zeros((), node.dtype)
    return equal(tape, {}, [node, zero], jnp.not_equal)
  if node.dtype == bool or jnp.issubdtype(new, jnp.floating):
    return constant(tape, Interval(*map(call, _ends(node))))
  return NotImplemented  # to integers: NaN and what is out of range would become some number


def select_n(tape, params, operands, call):
  """With an exact predicate linear in the cases; with an open one the hull of both."""
  del params
  which, *cases = operands
  if not is_node(which):
    return affine(tape, operands, call, positions=range(1, len(operands)))
  if len(cases) != 2 or which.dtype != bool:
    return NotImplemented
  shape = cases[0].shape
  sure, possible = (jnp.broadcast_to(end, shape) for end in _ends(which))
  (low0, high0), (low1, high1) = map(_ends, cases)
  low = jnp.where(sure, low1, jnp.where(possible, jnp.minimum(low0, low1), low0))
  high = jnp.where(sure, high1, jnp.where(possible, jnp.maximum(high0, high1), high0))
  result = Interval(low, high)
  known = sure | ~possible
  masks = {0: ~possible, 1: sure}
  bounded = [i for i, case in enumerate(cases) if is_node(case)]
  for i, case in enumerate(cases):
    if not is_node(case):  # then only its value is known, which the interval says
      known = known & ~masks[i]
  choice = Choice(
    tape,
    [cases[i] for i in bounded],
    [masks[i].astype(low.dtype) for i in bounded],
    lambda rows, mask: rows * mask[None],
    known,
    known,
    result,
  )
  return tape.node(result, choice)


def stop_gradient(tape, params, operands, call):
  """The value as it is; only gradients of the bounds end here."""
  del params, call
  (node,) = operands
  interval = Interval(*map(jax.lax.stop_gradient, _ends(node)))
  return affine(tape, operands, lambda x: x, interval=interval)


def exp2(tape, params, operands, call):
  """2 ** x = exp(x log 2): its rounding error, too, grows with x."""
  del params, call
  scaled = scale(tape, [*operands, jnp.asarray(np.log(2), operands[0].dtype)], jnp.multiply)
  return ELEMENTWISE_RULES["exp"](tape, {}, [scaled], None)


def erfc(tape, params, operands, call):
  """1 - erf(x): where it is nearly 0, what is computed has a small error, but of many units."""
  del params, call
  erf = ELEMENTWISE_RULES["erf"](tape, {}, operands, None)
  return sub(tape, {}, [jnp.ones(erf.shape, erf.dtype), erf], jnp.subtract)


def power(tape, params, operands, call):
  """x ** k for positive x and exact k: exp(k log x)."""
  del params, call
  node, exponent = operands
  if not is_node(node) or is_node(exponent) or not jnp.issubdtype(exponent.dtype, jnp.floating):
    return NotImplemented
  (log, exp) = (ELEMENTWISE_RULES[name] for name in ("log", "exp"))
  return exp(tape, {}, [scale(tape, [log(tape, {}, [node], None), exponent], jnp.multiply)], None)


def _any_nan(*values):
  """Where one of them is NaN; nowhere, if they cannot be."""
  found = jnp.zeros((), bool)
  for value in values:
    if jnp.issubdtype(value.dtype, jnp.floating):
      found = found | jnp.isnan(value)
  return found


def _last(axes) -> tuple[int, ...]:
  return tuple(range(-len(axes), 0))


def _negate(tape, node):
  return affine(tape, [node], jnp.negative, signs=(-1,))


def _ends(value):
  """(lower, upper) of a node or of an exact array."""
  return (value.interval.lower, value.interval.upper) if is_node(value) else (value, value)


def _all_equal(value, number) -> bool:
  return _checks.is_concrete(value) and bool(np.all(np.asarray(value) == number))


CURVED_RULES = {
  "clamp": clamp,
  "conv2d": conv2d_rule,
  "convert_element_type": convert,
  "conv_general_dilated": conv_general_dilated,
  "div": div,
  "dot_general": dot_general,
  "eq": equal,
  "erfc": erfc,
  "exp2": exp2,
  "is_finite": is_finite,
  "max": maximum,
  "min": minimum,
  "mul": mul,
  "ne": equal,
  "pow": power,
  "reduce_max": reduce_max,
  "reduce_min": reduce_min,
  "select_n": select_n,
  "stop_gradient": stop_gradient,
  **dict.fromkeys(("and", "not", "or", "reduce_and", "reduce_or"), logical),
  **dict.fromkeys(("ge", "gt", "le", "lt"), compare),
}
