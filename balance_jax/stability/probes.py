"""Probes of any flax.linen model: outputs of its modules, what it sows, its attention logits.

A model is anything whose `apply` takes `capture_intermediates` and `mutable` as flax.linen's does,
and whose modules have a `path`; flax itself is not imported. What is measured is that of Wortsman
et al., "Small-scale proxies for large-scale Transformer training instabilities", 2023
(arXiv 2309.14322): attention logits (section 3.1.1) and the scale of block outputs (appendix C).

A module's path is its names from the top, joined by "/": "block_0/mlp". Globs are those of
`fnmatch`, "*" also stands for "/". Of nested modules that match one glob only the outermost counts,
so "block_*" means blocks and not what is in them; a glob with "**" takes all. The model itself is
matched by "" alone.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.stability.attention import AttentionStats, attention_stats

# The normalised vectors first: they are what enters the product.
_QUERY_NAMES = ("query_ln", "query")
_KEY_NAMES = ("key_ln", "key")


def capture_outputs(
  model: Any,
  variables: Any,
  *args: Any,
  paths: str | Sequence[str],
  method: Any = None,
  **kwargs: Any,
) -> dict[str, Any]:
  """Outputs of the modules whose path matches, from one application of the model.

  Works inside `jax.jit` (whose results come back with their names in alphabetical order).

  Args:
    model: a flax.linen module.
    variables: what `model.init` returns.
    *args: arguments of the model.
    paths: a glob or several, such as "block_*/mlp"; see the module's docstring.
    method: of the model to call instead of `__call__`.
    **kwargs: further arguments of `model.apply`; a `mutable` among them is kept.

  Returns:
    Outputs by path, block_2 before block_10; a tuple of them where a module is called repeatedly.

  Raises:
    ValueError: a glob matches no module that is called.
  """
  paths = (paths,) if isinstance(paths, str) else tuple(paths)
  if not paths:
    raise ValueError("paths is empty; expected a glob such as 'block_*' or several")
  outputs, _, modules = _apply(model, variables, args, kwargs, paths, method)
  for pattern in paths:
    if not any(_matches(path, pattern) for path in modules):
      raise ValueError(f"paths has {pattern!r}, which matches no module{_known(pattern, modules)}")
  return outputs


def sown(intermediates: Any, name: str) -> dict[str, Any]:
  """What modules sowed under a name, by path of the module.

  Args:
    intermediates: the "intermediates" collection, or the state that holds it as `apply` returns it.
    name: as given to `sow`.

  Returns:
    Values by path, block_2 before block_10, empty where nobody sowed that name. The tuple around a
    value is taken off, unless a module sowed more than once.

  >>> sown({"intermediates": {"block_0": {"mlp": {"rms": (1.5,)}}}}, "rms")
  {'block_0/mlp': 1.5}
  """
  if not isinstance(intermediates, Mapping):
    raise ValueError(f"intermediates is {type(intermediates).__name__}; expected a mapping")
  found = {}

  def visit(tree, path):
    for key, value in tree.items():
      if isinstance(value, Mapping):
        visit(value, (*path, key))
      elif key == name:
        # Not isinstance: a named tuple is a value, the tuple that `sow` makes is a plain one.
        single = type(value) is tuple and len(value) == 1
        found["/".join(path)] = value[0] if single else value

  visit(intermediates.get("intermediates", intermediates), ())
  return _in_natural_order(found)


def probe_attention(
  model: Any,
  variables: Any,
  *args: Any,
  query: str | None = None,
  key: str | None = None,
  heads: int | None = None,
  causal: bool = True,
  scale: Any = None,
  where: Any = None,
  soft_cap: Any = None,
  chunk: int = 128,
  method: Any = None,
  **kwargs: Any,
) -> dict[str, AttentionStats]:
  """Statistics of the attention logits of every attention module.

  A model that sows "attention_stats", as `balance_jax.models.Decoder` does, is asked for those;
  heads, causal, scale, where, soft_cap and chunk do not apply then. Of any other, and where `query`
  and `key` are given, the outputs of the modules that form queries and keys are multiplied here.
  What the model does to them between these modules and the product (rotary positions) is not seen.

  Args:
    model: a flax.linen module.
    variables: what `model.init` returns.
    *args: arguments of the model.
    query: glob of the modules that return queries, (B, T, H, D), or (B, T, H * D) with `heads`.
      None: modules named "query" as in flax's MultiHeadDotProductAttention, or "query_ln" where
      normalize_qk is on. A query and a key belong together by the path above their names.
    key: like query, for keys; give both or none.
    heads: H, for modules that return heads side by side.
    causal: as in `attention_stats`, and so are scale, where, soft_cap and chunk.
    scale: None is D ** -0.5.
    where: bool (B, T), or None.
    soft_cap: > 0, or None.
    chunk: queries at a time.
    method: of the model to call instead of `__call__`.
    **kwargs: further arguments of `model.apply`.

  Returns:
    AttentionStats of float32 (B, H), by path of the attention module, block_2 before block_10.

  Raises:
    ValueError: no attention is found, queries without keys, outputs of another shape.
  """
  if (query is None) != (key is None):
    raise ValueError(f"query is {query!r} and key is {key!r}; expected both or none")
  given = query is not None
  queries, keys = ((query,), (key,)) if given else (_anywhere(_QUERY_NAMES), _anywhere(_KEY_NAMES))
  outputs, state, modules = _apply(model, variables, args, kwargs, (*queries, *keys), method)
  stats = {} if given else sown(state, "attention_stats")
  if stats:
    return stats
  found = [_by_parent(outputs, patterns, given) for patterns in (queries, keys)]
  for name, patterns, side in zip(("query", "key"), (queries, keys), found, strict=True):
    if not side:
      sought = " or ".join(map(repr, patterns))
      also = "" if given else "'attention_stats' is not sown, and "
      raise ValueError(
        f"no attention found: {also}no {name} module matches {sought}{_known(patterns[0], modules)}"
      )
  if found[0].keys() != found[1].keys():
    alone = sorted(found[0].keys() ^ found[1].keys())
    raise ValueError(f"queries and keys do not pair up below {', '.join(map(repr, alone))}")
  options = {"scale": scale, "causal": causal, "where": where, "soft_cap": soft_cap, "chunk": chunk}
  return {
    path: attention_stats(*(_split(*side[path], heads) for side in found), **options)
    for path in _in_natural_order(found[0])
  }


def block_output_rms(
  model: Any,
  variables: Any,
  *args: Any,
  paths: str | Sequence[str] = "block_*",
  method: Any = None,
  **kwargs: Any,
) -> dict[str, jax.Array]:
  """Root mean square of the outputs of modules, over all their axes.

  It grows with the learning rate and with depth, and the gradient behind the final norm shrinks
  with its inverse (appendix C of the paper).

  Args:
    model: a flax.linen module.
    variables: what `model.init` returns.
    *args: arguments of the model.
    paths: globs of the modules, see `capture_outputs`.
    method: of the model to call instead of `__call__`.
    **kwargs: further arguments of `model.apply`.

  Returns:
    float32 scalars by path, without gradient. All arrays of an output count together.
  """
  outputs = capture_outputs(model, variables, *args, paths=paths, method=method, **kwargs)
  return {path: _rms(path, output) for path, output in outputs.items()}


def _apply(model, variables, args, kwargs, patterns, method):
  """One application: (outputs by path, returned state, paths of all modules called)."""
  kwargs = dict(kwargs)
  mutable = kwargs.pop("mutable", ())
  mutable = mutable or ()
  if mutable is not True:
    names = (mutable,) if isinstance(mutable, str) else tuple(mutable)
    mutable = [*(name for name in names if name != "intermediates"), "intermediates"]
  if isinstance(variables, Mapping):
    # What an earlier application left there would be returned in front of what this one sows.
    variables = {name: value for name, value in variables.items() if name != "intermediates"}
  modules = []

  def keep(module, method_name):
    # Only names: whether a parent matches, and so comes first, needs no second pass.
    path = "/".join(module.path)
    if method_name == "__call__" or not path:
      modules.append(path)
    return method_name == "__call__" and any(_is_outermost(path, each) for each in patterns)

  _, state = model.apply(
    variables, *args, method=method, mutable=mutable, capture_intermediates=keep, **kwargs
  )
  return sown(state, "__call__"), state, list(dict.fromkeys(modules))


def _matches(path, pattern):
  return path == pattern if "" in (path, pattern) else fnmatch.fnmatchcase(path, pattern)


def _is_outermost(path, pattern):
  if not _matches(path, pattern):
    return False
  names = path.split("/")
  above = ("/".join(names[:end]) for end in range(1, len(names)))
  return "**" in pattern or not any(_matches(each, pattern) for each in above)


def _anywhere(names):
  return tuple(pattern for name in names for pattern in (name, f"*/{name}"))


def _by_parent(outputs, patterns, given):
  """(path, output) by path of the parent module; of several a parent has, the first pattern's."""
  found = {}
  for pattern in patterns:
    for path, output in outputs.items():
      if not _is_outermost(path, pattern):
        continue
      parent = path.rpartition("/")[0]
      if given and parent in found:
        raise ValueError(
          f"{pattern!r} matches {found[parent][0]!r} and {path!r}; expected one below {parent!r}"
        )
      found.setdefault(parent, (path, output))
  return found


def _split(path, output, heads):
  """Queries or keys as (B, T, H, D)."""
  if isinstance(output, tuple):
    raise ValueError(f"{path!r} gives {len(output)} outputs; expected one array, from one call")
  if output.ndim == 4:
    return output
  if output.ndim != 3:
    raise ValueError(f"{path!r} returns shape {output.shape}; expected (B, T, H, D) or (B, T, H*D)")
  if heads is None:
    raise ValueError(f"{path!r} returns shape {output.shape}; give heads to split its last axis")
  _checks.check_number("heads", heads, low=1, integer=True)
  if output.shape[-1] % heads:
    raise ValueError(
      f"heads is {heads}; expected a divisor of {output.shape[-1]}, the last axis of {path!r}"
    )
  return output.reshape(*output.shape[:2], heads, -1)


def _rms(path, output):
  leaves = jax.tree.leaves(output)
  if not leaves or not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
    raise ValueError(f"{path!r} returns {output}; expected floating arrays")
  leaves = [jax.lax.stop_gradient(leaf).astype(jnp.float32) for leaf in leaves]
  count = max(sum(leaf.size for leaf in leaves), 1)
  return jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in leaves) / count)


def _in_natural_order(by_path):
  def natural(path):
    parts = re.split(r"(\d+)", path)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]

  return {path: by_path[path] for path in sorted(by_path, key=natural)}


def _known(pattern, modules):
  """What to say about the modules there are: the nearest names, then a list of them."""
  modules = list(_in_natural_order({path: None for path in modules if path}))
  shown = ", ".join(modules[:30]) + (", ..." if len(modules) > 30 else "")
  return f"{_checks.nearest(pattern, modules)}; modules: {shown or 'none below the model itself'}"
