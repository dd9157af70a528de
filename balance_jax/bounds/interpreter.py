"""The one interpreter: a function is traced to a jaxpr, whose operations are carried out on boxes.

Operations without a bounded operand are evaluated as they are. Nested programs (jit, custom
derivatives, remat) are entered, a scan of fixed length is unrolled, and everything else is looked
up in `RULES`, one small rule an operation.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from balance_jax import _checks
from balance_jax.bounds import composites
from balance_jax.bounds.affine_rules import AFFINE_RULES, is_node
from balance_jax.bounds.curved_rules import CURVED_RULES
from balance_jax.bounds.elementwise_rules import ELEMENTWISE_RULES
from balance_jax.bounds.interval import Interval, check_interval
from balance_jax.bounds.tape import INTERMEDIATE, RELU_LOWER, Node, Options, Tape

# primitive name -> rule(tape, params, operands, call) -> Node, list of Nodes, or NotImplemented.
RULES: dict[str, Callable] = {
  **AFFINE_RULES,
  **CURVED_RULES,
  **ELEMENTWISE_RULES,
  "reduce_window_max": composites.reduce_window_max,
}

# Operations that stand for the program they carry, and the parameter it lies in. No others are
# entered: a program may also be what a reduction joins two numbers with, or one device's share.
_NESTED = {
  **dict.fromkeys(("jit", "pjit", "checkpoint", "remat2"), "jaxpr"),
  **dict.fromkeys(("closed_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
}
# What there is for truths and whole numbers, which no slope belongs to.
_DISCRETE = {
  *("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice", "gather"),
  *("optimization_barrier", "reshape", "rev", "select_n", "slice", "split", "squeeze", "stack"),
  *("stop_gradient", "tile", "transpose", "unstack"),
  *("and", "eq", "ge", "gt", "le", "lt", "ne", "not", "or", "reduce_and", "reduce_or"),
}
# The user's line is not in a frame of these; they are the libraries in between.
_LIBRARIES = (os.path.dirname(jax.__file__), os.path.dirname(__file__))
_STANDARD = os.path.dirname(os.__file__)


class UnsupportedPrimitive(NotImplementedError):
  """The function uses an operation without a rule for boxes.

  Attributes:
    primitive: name of the JAX primitive.
    source: "file:line (function)" of the user's code that called it, or "unknown place".
  """

  def __init__(self, primitive: str, source: str, reason: str = "no bound is known for it"):
    self.primitive, self.source = primitive, source
    super().__init__(f"operation {primitive!r} at {source} cannot be bounded: {reason}")


def record(fn: Callable, args: Sequence[Any], options: Options) -> tuple[Tape, Any]:
  """Evaluates fn(*args) on boxes.

  Args:
    fn: a function of arrays that JAX can trace.
    args: pytrees of arrays and `Interval`s.
    options: see `Options`.

  Returns:
    (tape, outputs): outputs has the structure of fn's result; a leaf is a `Node` where it depends
    on an interval and an array otherwise.

  Raises:
    UnsupportedPrimitive: names the operation and the line of code.
    ValueError: an option outside its range, an interval that is none.
  """
  _check_options(options)
  leaves, tree = jax.tree.flatten(args, is_leaf=lambda x: isinstance(x, Interval))
  for i, leaf in enumerate(leaves):
    if isinstance(leaf, Interval):
      check_interval(f"interval argument {i}" if len(leaves) > 1 else "the interval", leaf)
  samples = [x.lower if isinstance(x, Interval) else x for x in leaves]

  def flat(*values):
    return fn(*jax.tree.unflatten(tree, values))

  closed, shape = jax.make_jaxpr(flat, return_shape=True)(*samples)
  tape = Tape(options)
  operands = [
    tape.node(jax.tree.map(jnp.asarray, x)) if isinstance(x, Interval) else x for x in leaves
  ]
  outputs = _walk(tape, closed.jaxpr, closed.consts, operands)
  return tape, jax.tree.unflatten(jax.tree.structure(shape), outputs)


def _walk(tape: Tape, jaxpr, consts, operands, caller: str = "an unknown place") -> list:
  """Carries out a jaxpr; returns its outputs. `caller` is the line that called it."""
  values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
  values.update(zip(jaxpr.invars, operands, strict=True))

  def read(variable):
    return variable.val if isinstance(variable, core.Literal) else values[variable]

  for eqn in jaxpr.eqns:
    results = _step(tape, eqn, [read(variable) for variable in eqn.invars], caller)
    values.update(zip(eqn.outvars, results, strict=True))
  return [read(variable) for variable in jaxpr.outvars]


def _step(tape: Tape, eqn, operands, caller: str) -> list:
  if not any(map(is_node, operands)):
    result = _evaluate(eqn, eqn.params, operands)
    return result if eqn.primitive.multiple_results else [result]
  name = eqn.primitive.name
  if name == "scan":
    return _scan(tape, eqn, operands, _source(eqn, caller))
  if name in _NESTED:
    program = eqn.params[_NESTED[name]]
    found = composites.recognize(tape, eqn, program, operands)
    if found is not None:
      return [found]
    return _walk(tape, *_open(program), operands, _source(eqn, caller))
  if name not in RULES:
    raise UnsupportedPrimitive(name, _source(eqn, caller))
  discrete = any(is_node(v) and not jnp.issubdtype(v.dtype, jnp.floating) for v in operands)
  if discrete and name not in _DISCRETE:
    reason = "bounded truths and whole numbers are only moved, compared, joined and converted"
    raise UnsupportedPrimitive(name, _source(eqn, caller), reason)
  params = eqn.params
  if tape.options.precision is not None and "precision" in params:
    params = {**params, "precision": jax.lax.Precision(tape.options.precision)}

  def call(*values):
    return _evaluate(eqn, params, values)

  # Literals stay on the host: rules look at them, as max(x, 0) is a ReLU and max(x, 1) is not.
  operands = [v if is_node(v) or isinstance(v, jax.Array) else np.asarray(v) for v in operands]
  result = composites.softmax(tape, name, operands)
  if result is None:
    result = RULES[name](tape, params, operands, call)
  if result is NotImplemented:
    reason = "no bound is known where these of its operands are bounded, or for these parameters"
    raise UnsupportedPrimitive(name, _source(eqn, caller), reason)
  results = result if isinstance(result, list) else [result]
  for node in filter(is_node, results):
    if not node.primitive:
      node.primitive, node.params, node.operands = name, params, tuple(operands)
  return results


def _evaluate(eqn, params, values):
  return eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))


def _open(program) -> tuple[Any, Sequence]:
  """(jaxpr, constants) of a program that is closed or not."""
  return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def _scan(tape: Tape, eqn, operands, caller: str) -> list:
  """A loop of fixed length, unrolled."""
  params = eqn.params
  body, consts = _open(params["jaxpr"])
  length = params["length"]
  # What is one axis shorter inside is a row of a column; versions of JAX name the counts otherwise.
  rank = lambda variable: len(variable.aval.shape)  # noqa: E731
  carries = sum(rank(a) == rank(b) for a, b in zip(eqn.outvars, body.outvars, strict=True))
  whole = sum(rank(a) == rank(b) for a, b in zip(eqn.invars, body.invars, strict=True))
  constants = whole - carries
  fixed, carry = operands[:constants], operands[constants : constants + carries]
  columns, rows = operands[constants + carries :], [None] * length
  order = reversed(range(length)) if params["reverse"] else range(length)
  for i in order:
    entries = [_nested(tape, lambda x, i=i: x[i], column) for column in columns]
    results = _walk(tape, body, consts, [*fixed, *carry, *entries], caller)
    carry, rows[i] = results[:carries], results[carries:]
  if not length:
    return [*carry, *(jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars[carries:])]
  stacked = [
    _nested(tape, lambda *parts: jnp.stack(parts), *parts) for parts in zip(*rows, strict=True)
  ]
  return [*carry, *stacked]


def _nested(tape: Tape, fn: Callable, *operands):
  """fn of nodes and arrays, recorded on the same tape; one output."""
  if not any(map(is_node, operands)):
    return fn(*operands)
  samples = [v.interval.lower if is_node(v) else v for v in operands]
  closed = jax.make_jaxpr(fn)(*samples)
  return _walk(tape, closed.jaxpr, closed.consts, list(operands))[0]


def _source(eqn, caller: str) -> str:
  """Where the user's code called the operation; of a cached inner program, where that was."""
  traceback = eqn.source_info.traceback
  for frame in traceback.frames if traceback is not None else ():
    folder = os.path.dirname(frame.file_name)
    library = any(folder == root or folder.startswith(root + os.sep) for root in _LIBRARIES)
    if not library and folder != _STANDARD and f"{os.sep}flax{os.sep}" not in frame.file_name:
      return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
  return caller


def _check_options(options: Options) -> None:
  _checks.check_choice("intermediate", options.intermediate, INTERMEDIATE)
  _checks.check_choice("relu_lower", options.relu_lower, RELU_LOWER)
  if options.chunk is not None:
    _checks.check_number("chunk", options.chunk, low=1, integer=True)
  if options.relu_shrinkage is not None:
    _checks.check_number("relu_shrinkage", options.relu_shrinkage, low=0.0, high=1.0)
  if options.precision not in (None, "default", "high", "highest"):
    raise ValueError(
      f"precision is {options.precision!r}; allowed: None, 'default', 'high', 'highest'"
    )
  if options.directed and options.precision != "highest":
    raise ValueError(
      f"precision is {options.precision!r}; directed=True allows for rounding at 'highest' only"
    )


def as_interval(value: Node | jax.Array) -> Interval:
  """The interval of a node; of an exact array, the array twice."""
  return value.interval if is_node(value) else Interval(value, value)
