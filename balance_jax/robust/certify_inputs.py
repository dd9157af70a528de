"""Checks of what a certification is given: all that would make its verdicts meaningless."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax.bounds import Interval
from balance_jax.robust.attacks import check_labels

# Of the largest logit. Two programs round differently; batch statistics differ by far more.
_BATCH_TOLERANCE = 1e-3


def checked_variables(variables: Any) -> Any:
  """The variables on the device; raises ValueError for a leaf that is not finite."""
  variables = jax.tree.map(jnp.asarray, variables)
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.all(jnp.isfinite(leaf))):
      raise ValueError(
        f"variables{jax.tree_util.keystr(path)} holds values that are not finite; no bound of such "
        "a network means anything"
      )
  return variables


def digest(variables: Any) -> str:
  """Hexadecimal digest of all leaves and their places."""
  state = hashlib.blake2b(digest_size=16)
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    state.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
    state.update(np.asarray(leaf).tobytes())
  return state.hexdigest()


def check_range(eps, lo, hi) -> None:
  """Raises ValueError unless the three are numbers, eps finite and >= 0."""
  for name, value in (("eps", eps), ("lo", lo), ("hi", hi)):
    _checks.check_known(name, value)
  _checks.check_number("eps", eps, low=0.0, high=float(np.finfo(np.float32).max))
  _checks.check_number("lo", lo)
  _checks.check_number("hi", hi, low=lo)


def check_names(argument: str, names: Sequence[str], known: Iterable[str]) -> None:
  """Raises ValueError unless all names are known and different."""
  if isinstance(names, str):
    raise ValueError(f"{argument} is {names!r}; expected several names, as in ({names!r},)")
  for name in names:
    _checks.check_choice(argument, name, known)
  if len(set(names)) < len(names):
    raise ValueError(f"{argument} is {names!r}; expected each name once")


def open_data(
  apply_fn: Callable, variables: Any, data: Any, threat: tuple, batch_size: int
) -> tuple[Iterator, int]:
  """(iterator of checked batches, K); the network is checked on the first batch.

  Args:
    apply_fn: as in `certify`.
    variables: as there, checked.
    data: as there. Arrays are checked at once, batches when they are taken.
    threat: (eps, lo, hi).
    batch_size: length of the batches that arrays are cut into.
  """
  arrays = isinstance(data, tuple) and len(data) == 2 and hasattr(data[0], "shape")
  batches = _cut(*data, batch_size) if arrays else _pairs(data)
  first = next(batches, None)
  if first is None:
    raise ValueError("data holds no example; expected one or more")
  shape = np.shape(first[0])[1:]
  num_classes = _num_classes(apply_fn, variables, (batch_size, *shape), first[0])
  checked = _checked(itertools.chain([first], batches), shape, num_classes, threat)
  checked = iter(list(checked)) if arrays else checked
  first = next(checked)
  _check_one_by_one(apply_fn, variables, first[0])
  return itertools.chain([first], checked), num_classes


def _cut(images, labels, batch_size) -> Iterator[tuple]:
  images, labels = np.asarray(images), np.asarray(labels)
  if images.ndim < 2 or labels.shape != images.shape[:1]:
    raise ValueError(
      f"data has images of shape {images.shape} and labels of shape {labels.shape}; expected "
      "(N, ...) and (N,)"
    )
  for i in range(0, len(images), batch_size):
    yield images[i : i + batch_size], labels[i : i + batch_size]


def _pairs(data) -> Iterator[tuple]:
  """The batches of an iterable that are not empty."""
  for batch in data:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
      raise ValueError(
        f"data yields {type(batch).__name__}; expected (images, labels), or one such pair of arrays"
      )
    if np.size(batch[0]):
      yield batch[0], batch[1]


def _checked(batches, shape, num_classes, threat) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  begin = 0
  for images, labels in batches:
    images, labels = np.asarray(images), np.asarray(labels)
    where = f"data, examples from {begin} on"
    if images.shape[1:] != shape or len(shape) == 0 or labels.shape != images.shape[:1]:
      raise ValueError(
        f"{where}: images have shape {images.shape} and labels {labels.shape}; expected "
        f"(B, {', '.join(map(str, shape))}) and (B,)"
      )
    if images.dtype not in (np.float32, np.float64):
      raise ValueError(f"{where}: images have dtype {images.dtype}; expected float32 or float64")
    images = images.astype(jax.dtypes.canonicalize_dtype(images.dtype), copy=False)
    try:
      Interval.from_linf(images, *threat)
      check_labels(labels, (len(labels), num_classes))
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from error
    begin += len(images)
    yield images, labels


def _num_classes(apply_fn, variables, shape, images) -> int:
  """K of the logits (B, K), without running the network."""
  dtype = jax.dtypes.canonicalize_dtype(getattr(images, "dtype", np.float32))
  try:
    logits = jax.eval_shape(apply_fn, variables, jax.ShapeDtypeStruct(shape, dtype))
  except Exception as error:
    # By name, as methods do not import flax.
    if type(error).__module__.startswith("flax") and "batch_stats" in str(error):
      raise ValueError(
        "the network needs running statistics at certification time: pass batch_stats in "
        f"variables, and an apply_fn in inference mode ({error})"
      ) from error
    raise
  found = getattr(logits, "shape", None)
  if found is None or len(found) != 2 or found[0] != shape[0] or found[1] < 2:
    raise ValueError(f"apply_fn returns {logits}; expected logits ({shape[0]}, K) with K >= 2")
  return found[1]


def _check_one_by_one(apply_fn, variables, images) -> None:
  """Raises ValueError where the logits of an example change with the rest of the batch."""

  @jax.jit
  def difference(variables, x):
    together = apply_fn(variables, x)
    alone = jax.vmap(lambda image: apply_fn(variables, image[None])[0])(x)
    return jnp.abs(together - alone).max(), jnp.abs(together).max()

  # One more, with its values shifted by a place, in case that the batch is of one example.
  other = np.roll(images[:1], 1, axis=tuple(range(1, images.ndim)))
  images = np.concatenate([images, other])
  with jax.default_matmul_precision("highest"):
    apart, size = map(float, difference(variables, images))
  if apart > _BATCH_TOLERANCE * size:
    raise ValueError(
      f"the logits of an example change by {apart:g} with the rest of its batch; a certificate "
      "needs running statistics (batch_stats) and an apply_fn in inference mode"
    )
