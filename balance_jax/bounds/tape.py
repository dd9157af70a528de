"""The record of a function on boxes: every intermediate value with its interval and its origin.

Forward, each operation computes the interval of its result (IBP). Backward, linear forms of a value
are pulled through the operations to the inputs (CROWN), or only through the linear operations
behind the last nonlinearity (the affine tail). Both directions read the one record, and what nobody
pulls back costs nothing, as XLA removes it.

Linear forms are rows: A (R, *shape) stands for the R functions x -> sum A[r] * x; what is computed
is a lower bound of each. Upper bounds are minus the lower bounds of -A.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from balance_jax.bounds import rounding
from balance_jax.bounds.interval import Interval

INTERMEDIATE = ("ibp", "crown")
RELU_LOWER = ("adaptive", "same-slope", "zero", "one")


class Operation(Protocol):
  """Where a value comes from: `inputs`, and `pull(rows) -> (rows of every input, bias, noise)`.

  `linear` says whether the operation is affine in its inputs. Bias (R,) and noise (R,) are such
  that rows . output >= sum of input rows . inputs + bias - noise.
  """

  inputs: Sequence["Node"]
  linear: bool

  def pull(self, rows: jax.Array) -> tuple[Sequence[jax.Array], Any, Any]: ...


@dataclasses.dataclass(eq=False)
class Node:
  """A value that is only known to lie in `interval`; `origin` is None for an input."""

  interval: Interval
  index: int
  origin: Operation | None = None
  # What the interpreter saw, so that a later rule can recognise a pattern such as a softmax.
  primitive: str = ""
  params: dict = dataclasses.field(default_factory=dict)
  operands: tuple = ()
  # Centre and radius, where the interval was made of them: the next linear operation takes them as
  # they are, which costs less than the way by the ends, forward and in the gradient.
  ball: tuple[jax.Array, jax.Array] | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    return self.interval.shape

  @property
  def dtype(self):
    return self.interval.dtype


@dataclasses.dataclass(frozen=True)
class Options:
  """How bounds are computed; see `ibp` and `crown` for the meaning of each."""

  intermediate: str = "ibp"
  relu_lower: str = "adaptive"
  chunk: int | None = None
  directed: bool = False
  precision: Any = "highest"
  relu_shrinkage: Any = None


class Tape:
  """The values of one evaluation in the order they were computed.

  Attributes:
    options: `Options`.
    nodes: all bounded values.
    relus: the pre-activation of every ReLU, in order.
  """

  def __init__(self, options: Options):
    self.options = options
    self.nodes: list[Node] = []
    self.relus: list[Node] = []

  def node(self, interval: Interval, origin: Operation | None = None) -> Node:
    """Adds a value."""
    self.nodes.append(Node(interval, len(self.nodes), origin))
    return self.nodes[-1]

  def tighten(self, node: Node) -> None:
    """Before a nonlinearity: with intermediate="crown" its input gets bounds of its own."""
    if self.options.intermediate == "crown" and node.origin is not None:
      node.interval, node.ball = self.bound(node), None

  def bound(self, node: Node) -> Interval:
    """CROWN's interval of a value, cut with the one it has."""
    if not jnp.issubdtype(node.dtype, jnp.floating):
      return node.interval
    size = math.prod(node.shape)
    eye = jnp.eye(size, dtype=node.dtype).reshape(size, *node.shape)
    # Both ends in one pass: half the operations to compile.
    lower, upper = jnp.split(self.lower(jnp.concatenate([eye, -eye]), node), 2)
    old = node.interval
    lower, upper = lower.reshape(node.shape), -upper.reshape(node.shape)
    # NaN here is infinity times a slope of 0 on the way back: nothing was learned. One that says
    # that the network has no bound is in the old interval too, where maximum and minimum keep it.
    return Interval(
      jnp.where(jnp.isnan(lower), old.lower, jnp.maximum(old.lower, lower)),
      jnp.where(jnp.isnan(upper), old.upper, jnp.minimum(old.upper, upper)),
    )

  def lower(self, rows: jax.Array, node: Node, *, tail_only: bool = False) -> jax.Array:
    """Lower bounds of linear forms of a value.

    Args:
      rows: float (R, *node.shape).
      node: the value.
      tail_only: stop at the results of nonlinear operations and take their intervals, which is IBP
        with the affine tail elided; otherwise go on to the inputs, which is CROWN.

    Returns:
      float (R,); NaN where the interval of the value is none.
    """
    pull = functools.partial(self._lower, node=node, tail_only=tail_only)
    chunk = self.options.chunk
    if chunk is None or chunk >= rows.shape[0]:
      found = pull(rows)
    else:
      found = jax.lax.map(lambda row: pull(row[None])[0], rows, batch_size=chunk)
    # A slope of 0 must not hide that some value has no bound, as with weights that are NaN.
    ends = node.interval
    return jnp.where(jnp.any(jnp.isnan(ends.lower) | jnp.isnan(ends.upper)), jnp.nan, found)

  def _lower(self, rows, node, tail_only):
    total = noise = size = jnp.zeros(rows.shape[0], rows.dtype)
    pending = {node.index: rows}
    for current in reversed(self.nodes[: node.index + 1]):
      rows = pending.pop(current.index, None)
      if rows is None:
        continue
      origin = current.origin
      if origin is None or (tail_only and not origin.linear):
        value, error = self._concretize(rows, current.interval)
      else:
        pulled, value, error = origin.pull(rows)
        for source, part in zip(origin.inputs, pulled, strict=True):
          # Two ways back to one value add up, which keeps their correlation.
          if source.index in pending:
            part = pending[source.index] + part
            noise = noise + self.dot_noise(part, rounding.magnitude(source.interval))
          pending[source.index] = part
      total, noise, size = total + value, noise + error, size + jnp.abs(value)
    if not self.options.directed:
      return total
    count = len(self.nodes)
    noise = noise + rounding.gamma(count + 4, size.dtype) * size
    return rounding.down(total - rounding.inflate(noise, count))

  def _concretize(self, rows, interval):
    """The least value over the box, (R,), and how far rounding may have it off."""
    value = self.dot(rows, interval.center) - self.dot(jnp.abs(rows), interval.radius)
    return value, self.dot_noise(rows, rounding.magnitude(interval))

  def dot(self, rows, value) -> jax.Array:
    """sum rows[r] * value over everything but r: (R, *shape), (*shape) -> (R,)."""
    # A product of matrices also in the gradient, where a sum would write the rows once more.
    value = jnp.broadcast_to(value, rows.shape[1:]).ravel()
    return jnp.matmul(rows.reshape(rows.shape[0], -1), value, precision=self.options.precision)

  def dot_noise(self, rows, size, operations: int = 0) -> jax.Array | float:
    """Rounding error of `dot` with values of absolute size <= `size`, plus `operations` more."""
    if not self.options.directed:
      return 0.0
    return rounding.gamma(size.size + operations + 4, size.dtype) * self.dot(jnp.abs(rows), size)


@dataclasses.dataclass(eq=False)
class Affine:
  """y = L(inputs) + offset.

  Attributes:
    tape: for its options.
    inputs: the bounded operands.
    apply: the linear part L.
    magnitude: the same with absolute coefficients.
    offset: array of the shape of y, or None.
    terms: how many rounded products or summands at most make one entry of y; 0 for operations
      that only move values about.
    pulled: as many of an input's row when pulled back.
    transpose: row -> rows of the inputs; None for what JAX makes of `apply`.
  """

  tape: Tape
  inputs: Sequence[Node]
  apply: Callable
  magnitude: Callable
  offset: jax.Array | None
  terms: int
  pulled: int
  transpose: Callable | None = None
  linear = True

  def pull(self, rows):
    shapes = [jax.ShapeDtypeStruct(node.shape, node.dtype) for node in self.inputs]
    pulled = jax.vmap(self.transpose or jax.linear_transpose(self.apply, *shapes))(rows)
    bias = 0.0 if self.offset is None else self.tape.dot(rows, self.offset)
    return pulled, bias, self._noise(rows)

  def _noise(self, rows):
    if not self.tape.options.directed:
      return 0.0
    if not self.terms + self.pulled and self.offset is None:
      return 0.0
    # What the rounding of the pulled rows can do, for values as large as these can be, what that of
    # the operation itself, and what that of the offset's product.
    reach = self.magnitude(*(rounding.magnitude(node.interval) for node in self.inputs))
    coarse = max((rows.dtype, *(n.dtype for n in self.inputs)), key=lambda d: jnp.finfo(d).eps)
    once = rounding.gamma(self.terms + 4, coarse) if self.terms else 0.0
    back = rounding.gamma(self.pulled + 4, coarse) if self.pulled else 0.0
    noise = (once + back) * self.tape.dot(jnp.abs(rows), reach)
    if self.offset is not None:
      size = jnp.abs(self.offset)
      noise = noise + self.tape.dot_noise(rows, size) + once * self.tape.dot(jnp.abs(rows), size)
    return noise


@dataclasses.dataclass(eq=False)
class Elementwise:
  """y = f(x), entry by entry, between two lines; see `relaxations`.

  Attributes:
    tape: for its options.
    inputs: the one bounded operand.
    lines: (lower, upper) -> `Lines`.
    result: the interval of y.
  """

  tape: Tape
  inputs: Sequence[Node]
  lines: Callable
  result: Interval
  linear = False

  def pull(self, rows):
    interval = self.inputs[0].interval
    lines = self.lines(interval.lower, interval.upper)
    if self.tape.options.directed:
      lines = rounding.widen_lines(lines, interval, self.result)
    # Flat: on a CPU the gradient's sums over the rows take far longer over many axes.
    flat, line = rows.reshape(rows.shape[0], -1), jax.tree.map(jnp.ravel, lines)
    positive, negative = jnp.maximum(flat, 0), jnp.minimum(flat, 0)
    pulled = positive * line.lower_slope[None] + negative * line.upper_slope[None]
    pulled = pulled.reshape(rows.shape)
    bias = self.tape.dot(positive, line.lower_offset)
    bias = bias + self.tape.dot(negative, line.upper_offset)
    if not self.tape.options.directed:
      return (pulled,), bias, 0.0
    slope = jnp.maximum(jnp.abs(lines.lower_slope), jnp.abs(lines.upper_slope))
    offset = jnp.maximum(jnp.abs(lines.lower_offset), jnp.abs(lines.upper_offset))
    reach = slope * rounding.magnitude(interval)
    noise = rounding.gamma(8, rows.dtype) * self.tape.dot(jnp.abs(rows), reach)
    return (pulled,), bias, noise + self.tape.dot_noise(rows, offset)


@dataclasses.dataclass(eq=False)
class Product:
  """z = call(x, y), bilinear in two bounded operands: a product of arrays or a matrix product.

  Between the planes of McCormick (1976): (x - lx)(y - ly) >= 0 and (x - ux)(y - ly) <= 0.
  """

  tape: Tape
  inputs: Sequence[Node]
  call: Callable
  terms: int
  linear = False

  def pull(self, rows):
    x, y = (node.interval for node in self.inputs)
    positive, negative = jnp.maximum(rows, 0), jnp.minimum(rows, 0)
    to_x = self._transpose(lambda a: self.call(a, y.lower), x)
    lower, upper = (
      self._transpose(functools.partial(self.call, end), y) for end in (x.lower, x.upper)
    )
    bias = -self.tape.dot(positive, self.call(x.lower, y.lower))
    bias = bias - self.tape.dot(negative, self.call(x.upper, y.lower))
    noise = 0.0
    if self.tape.options.directed:
      reach = self.call(rounding.magnitude(x), rounding.magnitude(y))
      noise = 6 * self.tape.dot_noise(rows, reach, self.terms)
    return (to_x(rows), lower(positive) + upper(negative)), bias, noise

  def _transpose(self, function, interval):
    shape = jax.ShapeDtypeStruct(interval.shape, interval.dtype)
    transposed = jax.linear_transpose(function, shape)
    return jax.vmap(lambda row: transposed(row)[0])


@dataclasses.dataclass(eq=False)
class Choice:
  """y = the sum of `masks[i] * inputs[i]` where `known`; elsewhere only its interval is known.

  Attributes:
    masks: for every input, bool or float arrays that broadcast to it, at most one of them 1.
    gather: (rows, mask) -> rows of the input.
    known_below: bool, of y's shape: where y >= that sum.
    known_above: bool: where y <= that sum.
    result: the interval of y.
  """

  tape: Tape
  inputs: Sequence[Node]
  masks: Sequence[jax.Array]
  gather: Callable
  known_below: jax.Array
  known_above: jax.Array
  result: Interval
  linear = False

  def pull(self, rows):
    positive, negative = jnp.maximum(rows, 0), jnp.minimum(rows, 0)
    below, above = self.known_below[None], self.known_above[None]
    kept = jnp.where(below, positive, 0) + jnp.where(above, negative, 0)
    pulled = tuple(self.gather(kept, mask) for mask in self.masks)
    ends = self.result
    bias = self.tape.dot(jnp.where(below, 0, positive), ends.lower)
    bias = bias + self.tape.dot(jnp.where(above, 0, negative), ends.upper)
    return pulled, bias, self.tape.dot_noise(rows, rounding.magnitude(ends))
