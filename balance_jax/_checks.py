"""Argument checks shared by the method families: one clear message, static facts only.

A check looks at shapes, at Python numbers and at host arrays. A traced value passes unchecked, so
every function stays usable under `jax.jit`, `jax.vmap` and inside a sweep.
"""

import difflib
from collections.abc import Collection, Iterable
from typing import Any

import jax
import numpy as np


def is_concrete(value: Any) -> bool:
  """True where `value`, an array, a number or a list of them, can be read on the host now."""
  return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def check_known(argument: str, value: Any) -> None:
  """Raises ValueError for a traced value, where the host has to know it."""
  if not is_concrete(value):
    raise ValueError(f"{argument} must be known when the function is traced; pass a host value")


def nearest(name: str, known: Iterable[str]) -> str:
  """ " (did you mean 'x' or 'y'?)", or an empty string where nothing is close."""
  close = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
  return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def check_choice(argument: str, value: Any, allowed: Collection[str]) -> None:
  """Raises ValueError unless `value` is one of the strings in `allowed`."""
  if not isinstance(value, str) or value not in allowed:
    hint = nearest(value, allowed)
    raise ValueError(f"{argument} is {value!r}{hint}; allowed: {', '.join(sorted(allowed))}")


def check_sizes(sizes: Any, argument: str = "sizes") -> np.ndarray:
  """Group sizes as float64 (K,): finite, not negative, at least one above zero."""
  check_known(argument, sizes)
  try:
    array = np.asarray(sizes, dtype=np.float64)
  except (TypeError, ValueError):
    raise ValueError(f"{argument} is {sizes!r}; expected K numbers") from None
  if array.ndim != 1 or array.size == 0:
    raise ValueError(f"{argument} has shape {array.shape}; expected (K,) with K >= 1")
  if not np.all(np.isfinite(array)):
    raise ValueError(f"{argument} must be finite, got {array.tolist()}")
  if np.any(array < 0):
    worst = int(np.argmin(array))
    raise ValueError(f"{argument} must be >= 0, got {array[worst]:g} at {worst}")
  if not np.any(array > 0):
    raise ValueError(f"{argument} must hold at least one group above zero, got {array.tolist()}")
  return array


def check_number(
  argument: str,
  value: Any,
  *,
  low: float = -np.inf,
  high: float = np.inf,
  open_low: bool = False,
  integer: bool = False,
) -> None:
  """Raises ValueError unless a concrete scalar lies in [low, high], or (low, high] if `open_low`.

  With `integer`, its type must be an integer one as well; a bool is no number.
  """
  if not is_concrete(value):
    return
  # Of a jax array, a comparison would be traced where it is a constant of a jitted function.
  number = np.asarray(value)
  if number.ndim != 0:
    raise ValueError(f"{argument} has shape {number.shape}; expected one number")
  # The issubdtype of JAX, because NumPy does not count bfloat16 as floating.
  kinds = (np.integer,) if integer else (np.integer, np.floating)
  if not any(jax.dtypes.issubdtype(number.dtype, kind) for kind in kinds):
    raise ValueError(f"{argument} is {value!r}; expected {'an integer' if integer else 'a number'}")
  inside = (low < number if open_low else low <= number) and number <= high
  if not inside:  # also catches NaN
    bracket = "(" if open_low else "["
    raise ValueError(f"{argument} is {value}; allowed: {bracket}{low:g}, {high:g}]")


def check_shape(argument: str, array: Any, expected: tuple[int | None, ...]) -> None:
  """Raises ValueError unless the shape matches; None in `expected` admits any length."""
  shape = np.shape(array)
  matches = len(shape) == len(expected) and all(
    want is None or want == got for want, got in zip(expected, shape, strict=True)
  )
  if not matches:
    wanted = ", ".join("any" if want is None else str(want) for want in expected)
    raise ValueError(f"{argument} has shape {shape}; expected ({wanted})")
