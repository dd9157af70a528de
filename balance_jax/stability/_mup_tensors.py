"""Tensors of a model against those of its base model: which axes are infinite, and who reads out.

Source of the classification: Yang et al., "Tensor Programs V", 2022 (arXiv 2203.03466).
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np


class Tensor(NamedTuple):
  """A tensor against its base: r over its input axes and over its output axes, 1 where finite."""

  path: str
  kind: str
  fan_in: float
  fan_out: float
  embedding: bool
  kernel: bool

  @property
  def width(self) -> float:
    """r of the one infinite axis; for a readout or a tied embedding, that of the model's width."""
    return self.fan_in * self.fan_out


# (an infinite input axis, an infinite output axis) -> kind
_KINDS = {
  (False, False): "fixed",
  (False, True): "input",
  (True, False): "readout",
  (True, True): "hidden",
}


def path_matches(path: str, pattern: str) -> bool:
  """Whether the glob fits the path "a/b/c", or one of its parts."""
  return any(fnmatch.fnmatchcase(part, pattern) for part in (path, *path.split("/")))


def compare(params, base_params, embedding: str, overrides: Mapping[str, Sequence[int]]):
  """The tensors of params in order, and the tree they come from."""
  (leaves, treedef), (base, base_treedef) = (
    jax.tree_util.tree_flatten_with_path(tree) for tree in (params, base_params)
  )
  paths, base_paths = (
    [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    for found in (leaves, base)
  )
  if treedef != base_treedef:
    odd = sorted(set(paths) ^ set(base_paths))
    where = f"only one of them has {', '.join(odd)}" if odd else f"{base_treedef} and {treedef}"
    raise ValueError(f"base_params has not the tree structure of params: {where}")
  tensors = [
    _tensor(path, np.shape(leaf), np.shape(base_leaf), embedding, overrides)
    for path, (_, leaf), (_, base_leaf) in zip(paths, leaves, base, strict=True)
  ]
  return tensors, treedef


def _tensor(path: str, shape, base, embedding: str, overrides) -> Tensor:
  where = f"{path} has shape {shape} in params and {base} in base_params"
  if len(shape) != len(base) or 0 in (*shape, *base):
    raise ValueError(f"{where}; expected as many axes, none of them empty")
  infinite = {axis for axis, (n, m) in enumerate(zip(shape, base, strict=True)) if n != m}
  if len(infinite) > 2:
    raise ValueError(f"{where}; {len(infinite)} axes differ, at most 2 can grow with the width")
  is_embedding = path_matches(path, embedding)
  given = next((axes for glob, axes in overrides.items() if path_matches(path, glob)), None)
  if given is not None:
    inputs = _normalized(path, given, len(shape))
  elif len(shape) < 2 or is_embedding or path.rsplit("/", 1)[-1] in ("bias", "scale"):
    inputs = set()
  else:
    inputs = set(range(len(shape) - 1))
    if len(infinite & inputs) > 1:
      raise ValueError(
        f"{where}; which axes are inputs cannot be told. Name them, for instance "
        f"fan_in_axes={{{path!r}: (0,)}}"
      )

  def ratio(axes):
    return float(np.prod([shape[axis] / base[axis] for axis in sorted(axes)]))

  outputs = infinite - inputs
  kind = _KINDS[bool(infinite & inputs), bool(outputs)]
  return Tensor(path, kind, ratio(infinite & inputs), ratio(outputs), is_embedding, len(inputs) > 0)


def _normalized(path: str, axes: Sequence[int], rank: int) -> set[int]:
  if any(not isinstance(axis, int) or not -rank <= axis < rank for axis in axes):
    raise ValueError(f"fan_in_axes gives {tuple(axes)} for {path}, which has {rank} axes")
  return {axis % rank for axis in axes}


def find_readouts(tensors: list[Tensor], glob: str | None, multiplied: bool) -> list[Tensor]:
  """The tensors whose output is the model's."""
  if glob is None or all(tensor.kind == "fixed" for tensor in tensors):
    return []
  candidates = [tensor for tensor in tensors if tensor.kind == "readout"]
  named = [tensor for tensor in candidates if path_matches(tensor.path, glob)]
  tied = [t for t in tensors if t.kind == "input" and t.embedding and path_matches(t.path, glob)]
  if not named and tied:
    if not multiplied:
      raise ValueError(
        f"readout {glob!r} is the embedding {tied[0].path}, which cannot start as a readout as "
        "well; with tied embeddings use variant 'tensor_programs', readout_form 'multiplier'"
      )
    named = tied
  if not named and len(candidates) != 1:
    found = ", ".join(tensor.path for tensor in candidates) or "none"
    raise ValueError(
      f"readout is {glob!r}, which matches no tensor with an infinite input axis only (these are: "
      f"{found}); name the readout, the embedding if it is tied, or give None"
    )
  chosen = named or candidates
  if multiplied and len({tensor.width for tensor in chosen}) > 1:
    widths = ", ".join(f"{tensor.path} {tensor.width:g}" for tensor in chosen)
    raise ValueError(
      f"readout {glob!r} matches tensors that grow differently ({widths}), so there is no one "
      "multiplier; use readout_form 'equivalent'"
    )
  return chosen
