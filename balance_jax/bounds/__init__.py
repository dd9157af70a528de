"""Sound bounds of any JAX function over a box, by one interpreter: intervals and linear bounds."""

from balance_jax.bounds.api import crown, ibp
from balance_jax.bounds.interpreter import RULES, UnsupportedPrimitive, record
from balance_jax.bounds.interval import Interval
from balance_jax.bounds.tape import Node, Options, Tape

__all__ = [
  "Interval",
  "Node",
  "Options",
  "RULES",
  "Tape",
  "UnsupportedPrimitive",
  "crown",
  "ibp",
  "record",
]
