"""Bounds of any JAX function over a box: `ibp` forward, `crown` backward."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from balance_jax.bounds.affine_rules import is_node
from balance_jax.bounds.interpreter import as_interval, record
from balance_jax.bounds.tape import Options


def ibp(
  fn: Callable,
  *,
  record_relus: bool = False,
  directed: bool = False,
  precision: str | None = "highest",
) -> Callable[..., Any]:
  """Interval bound propagation: the function that maps boxes to boxes which hold all results.

  Every operation takes the interval of its operands to the interval of its result: exact for each
  one, loose for their composition, two forward passes in cost (Gowal et al., 2018, arXiv
  1810.12715).

  Args:
    fn: any function of arrays whose operations have a rule; see `RULES`.
    record_relus: return (outputs, list of the `Interval`s of every ReLU's input, in order).
    directed: widen every bound by what rounding can do, so that it holds for the computed network
      as well as for the ideal one. Costs one more pass.
    precision: of matrix products and convolutions: "highest" (also where the hardware rounds
      factors by default), "high", "default", or None for that of the function.

  Returns:
    bounded(*args): any argument, or leaf of one, may be an `Interval`. Returns fn's result with an
    `Interval` for every array. Works under jit, vmap and grad.

  Raises:
    UnsupportedPrimitive: an operation without a rule; names it and the line of code.
    ValueError: an interval with lower > upper or with values that are not finite.

  >>> import jax.numpy as jnp
  >>> from balance_jax.bounds import Interval
  >>> out = ibp(lambda x: jax.nn.relu(2 * x - 1))(Interval(jnp.array(0.0), jnp.array(1.0)))
  >>> float(out.lower), float(out.upper)
  (0.0, 1.0)
  """
  options = Options(directed=directed, precision=precision)

  @functools.wraps(fn)
  def bounded(*args):
    tape, outputs = record(fn, args, options)
    outputs = jax.tree.map(as_interval, outputs, is_leaf=is_node)
    return (outputs, [node.interval for node in tape.relus]) if record_relus else outputs

  return bounded


def crown(
  fn: Callable,
  *,
  intermediate: str = "ibp",
  relu_lower: str = "adaptive",
  chunk: int | None = None,
  directed: bool = False,
  precision: str | None = "highest",
) -> Callable[..., Any]:
  """CROWN: linear bounds of every output, pulled back to the inputs (arXiv 1811.00866).

  Exact for affine functions; never looser than `ibp`, with which the result is cut. All outputs
  are bounded together, a row each, so give it the function of *one* example and map it over a
  batch: `jax.vmap(crown(fn))(boxes)`.

  Args:
    fn: as in `ibp`.
    intermediate: where the bounds of inner values come from: "ibp" (CROWN-IBP, Zhang et al., 2020,
      arXiv 1906.06316) or "crown", a backward pass for each of them: tighter, quadratic in depth.
    relu_lower: slope of the line below an undecided ReLU: "adaptive", "same-slope" (Fast-Lin),
      "zero" or "one".
    chunk: rows pulled back at a time; bounds the memory, which is R times that of the forward pass
      for R rows, two for each output. None for all.
    directed: as in `ibp`.
    precision: as in `ibp`.

  Returns:
    bounded(*args) -> fn's result with an `Interval` for every array.

  Raises:
    UnsupportedPrimitive, ValueError: as `ibp`; an option outside its range.

  >>> import jax.numpy as jnp
  >>> from balance_jax.bounds import Interval
  >>> box = Interval(-jnp.ones(2), jnp.ones(2))
  >>> narrow = crown(lambda x: (x[0] + x[1]) - x[1])(box)
  >>> wide = ibp(lambda x: (x[0] + x[1]) - x[1])(box)
  >>> float(narrow.upper), float(wide.upper)
  (1.0, 3.0)
  """
  options = Options(
    intermediate=intermediate,
    relu_lower=relu_lower,
    chunk=chunk,
    directed=directed,
    precision=precision,
  )

  @functools.wraps(fn)
  def bounded(*args):
    tape, outputs = record(fn, args, options)
    return jax.tree.map(
      lambda out: tape.bound(out) if is_node(out) else as_interval(out), outputs, is_leaf=is_node
    )

  return bounded
