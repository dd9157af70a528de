"""Weights for which the width of interval bounds neither explodes nor vanishes with depth.

Through an affine layer with n inputs and a ReLU behind it, the mean width of the bounds grows by
the difference gain (n / 2) E|W| (centres symmetric about 0). Common initialisations make it about
sqrt(n) / 4, some 45 at n = 32768; sigma = sqrt(2 pi) / n makes it 1. Tightness is thus balanced
against the scale of the features, which usual initialisations keep and this one lets shrink.

Source: Shi et al., "Fast Certified Robust Training with Short Warmup", NeurIPS 2021
(arXiv 2103.17268), "IBP initialization"; what is redrawn and halved follows the authors' code.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from balance_jax import _checks

Initializer = Callable[..., jax.Array]


def ibp_normal(scale: float = 1.0) -> Initializer:
  """Kernels from N(0, sigma^2), sigma = scale * sqrt(2 pi) / fan_in: difference gain `scale`.

  An initializer like those of `jax.nn.initializers`, for all layers but the last. The fan-in is the
  product of all axes but the last: (in, out) of dense layers, (height, width, in / groups, out) of
  convolutions, grouped ones included.

  Args:
    scale: > 0; the published method takes 0.5 for a layer whose input is relu(a + b), the end of
      a residual block, because the widths of the two branches add up.

  Returns:
    init(key, shape, dtype=float32) -> array; shape of two axes or more.

  Raises:
    ValueError: scale <= 0, or, when called, a shape with fewer than two axes.

  >>> kernel = ibp_normal()(jax.random.key(0), (3, 3, 100, 200))
  >>> round(float(kernel.std()) * 900 / math.sqrt(2 * math.pi), 2)
  1.0
  """
  _checks.check_number("scale", scale, low=0.0, open_low=True)

  def init(key, shape, dtype=jnp.float32):
    sigma = scale * math.sqrt(2 * math.pi) / _fan_in(shape)
    return (sigma * jax.random.normal(key, shape, dtype)).astype(dtype)

  return init


def fan_in_uniform(fan_in: int | None = None) -> Initializer:
  """U(-1/sqrt(n), 1/sqrt(n)), n the fan-in: the default of PyTorch, which the paper starts from.

  Args:
    fan_in: n, >= 1; None takes it from the shape, as in `ibp_normal`. A bias needs it given, as its
      own shape does not tell.

  Returns:
    init(key, shape, dtype=float32) -> array.

  Raises:
    ValueError: fan_in < 1, or, when called, a shape with fewer than two axes and no fan_in.

  >>> bias = fan_in_uniform(fan_in=100)(jax.random.key(0), (1000,))
  >>> 0.09 < float(abs(bias).max()) <= 0.1
  True
  """
  if fan_in is not None:
    _checks.check_number("fan_in", fan_in, low=1, integer=True)

  def init(key, shape, dtype=jnp.float32):
    bound = 1 / math.sqrt(_fan_in(shape) if fan_in is None else fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def ibp_init_params(
  key: jax.Array,
  params: Any,
  *,
  last_layer: str | Collection[str],
  after_sum: Collection[str] = (),
) -> Any:
  """Redraws the kernels of a network by `ibp_normal`; for networks that cannot do it themselves.

  Every leaf with two axes or more is redrawn, but for those of the last layer, whose size sets the
  scale of the logits. Biases and the parameters of normalisation stay as they are.

  Args:
    key: random key.
    params: pytree of named leaves, such as the "params" of a Flax model; kernels (..., in, out).
    last_layer: name of the classifier, or names, slashes between levels ("tail/head"). Leaves under
      that name are kept.
    after_sum: names of the layers whose input is relu(a + b), drawn at scale 0.5.

  Returns:
    Like params.

  Raises:
    ValueError: a name that no leaf lies under.

  >>> params = {"first": {"kernel": jnp.zeros((4, 3))}, "head": {"kernel": jnp.zeros((3, 2))}}
  >>> drawn = ibp_init_params(jax.random.key(0), params, last_layer="head")
  >>> bool((drawn["first"]["kernel"] != 0).all()), bool((drawn["head"]["kernel"] == 0).all())
  (True, True)
  """
  last_layer = (last_layer,) if isinstance(last_layer, str) else tuple(last_layer)
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  for argument, wanted in (("last_layer", last_layer), ("after_sum", tuple(after_sum))):
    for name in wanted:
      if not any(_lies_under(leaf, name) for leaf in names):
        raise ValueError(f"{argument} names {name!r}; leaves of params: {', '.join(names)}")

  def draw(key, name, leaf):
    if jnp.ndim(leaf) < 2 or any(_lies_under(name, last) for last in last_layer):
      return leaf
    scale = 0.5 if any(_lies_under(name, layer) for layer in after_sum) else 1.0
    return ibp_normal(scale)(key, jnp.shape(leaf), jnp.result_type(leaf))

  keys = jax.random.split(key, len(leaves))
  drawn = [draw(*args) for args in zip(keys, names, (leaf for _, leaf in leaves), strict=True)]
  return jax.tree.unflatten(structure, drawn)


def _lies_under(leaf: str, layer: str) -> bool:
  return leaf == layer or leaf.startswith(layer + "/")


def _fan_in(shape) -> int:
  if len(shape) < 2:
    raise ValueError(f"shape is {tuple(shape)}; expected two axes or more, the last one the output")
  return math.prod(shape[:-1])
