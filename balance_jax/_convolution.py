"""2-d convolution whose gradient is as fast as its value on a CPU, inside loops too.

XLA's CPU compiler turns a convolution into its fast kernel only if images are NHWC and kernels
HWIO. Outside of loops a compiler pass brings others into that form; inside `lax.scan` it does not
run, and the gradients, which JAX writes in transposed forms, take 20 to 70 times as long.

So a convolution is three bilinear maps here, each the transpose of the others and each written in
the fast form: of images and kernel, of rows (what the results of the first are like) and kernel,
and of images and rows. They are JAX primitives of their own, so that all derivatives, transposes
and batches of them are such maps again.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_NUMBERS = ("NHWC", "HWIO", "NHWC")


class _Geometry(NamedTuple):
  """What does not depend on sizes; hashable, a parameter of the primitives."""

  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  groups: int
  precision: object


# Keyword arguments of `conv2d`.
CONV2D_OPTIONS = _Geometry._fields


def conv2d(
  x: jax.Array,
  kernel: jax.Array,
  *,
  strides: tuple[int, int] = (1, 1),
  padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
  groups: int = 1,
  precision=None,
) -> jax.Array:
  """`lax.conv_general_dilated` of NHWC images and HWIO kernels, with gradients written for CPUs.

  Where the default backend is no CPU, it is that function.

  Args:
    x: float (B, H, W, C).
    kernel: float (h, w, C / groups, F), dtype of x; not larger than the padded image.
    strides: of rows and columns.
    padding: zeros (before, after) the rows and the columns, each >= 0.
    groups: input channels are divided into that many groups; divides C and F.
    precision: as in `lax.conv_general_dilated`.

  Returns:
    (B, H', W', F), dtype of x.

  >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
  >>> conv2d(x, jnp.ones((2, 2, 1, 1)), padding=((0, 1), (0, 0))).ravel().tolist()
  [6.0, 5.0]
  """
  geometry = _geometry(strides, padding, groups, precision)
  return _call(_images_p, _images, x, kernel, geometry=geometry)


def conv2d_transpose(
  rows: jax.Array,
  kernel: jax.Array,
  size: tuple[int, int],
  *,
  strides: tuple[int, int] = (1, 1),
  padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
  groups: int = 1,
  precision=None,
) -> jax.Array:
  """The transpose of `conv2d` as a linear map of images.

  Args:
    rows: float (B, H', W', F), of the shape of that map's results.
    kernel: as in `conv2d`.
    size: (H, W) of its images.
    strides: as in `conv2d`, and so are the others.

  Returns:
    (B, H, W, C), dtype of rows.
  """
  geometry = _geometry(strides, padding, groups, precision)
  return _call(_rows_p, _rows, rows, kernel, size=tuple(size), geometry=geometry)


def _geometry(strides, padding, groups, precision) -> _Geometry:
  return _Geometry(tuple(strides), tuple(map(tuple, padding)), groups, precision)


def _call(primitive: Primitive, function: Callable, first, second, **params):
  """The primitive on CPUs, elsewhere what it stands for. So too inside of a `shard_map` that
  follows what varies over the devices, which JAX does for its own operations only."""
  if jax.default_backend() != "cpu" or _varies(first) or _varies(second):
    return function(first, second, **params)
  return primitive.bind(jnp.asarray(first), jnp.asarray(second), **params)


def _varies(array) -> bool:
  """Whether JAX knows that an array differs between the devices of a `shard_map`."""
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return False
  kind = getattr(jax.typeof(array), "manual_axis_type", None)
  return kind is None or bool(kind.varying)


def _convolve(x, kernel, geometry: _Geometry, **changes):
  """`lax.conv_general_dilated` in the fast form."""
  options = {
    "window_strides": geometry.strides,
    "padding": geometry.padding,
    "feature_group_count": geometry.groups,
    "precision": geometry.precision,
  }
  return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=_NUMBERS, **options | changes)


def _images(x, kernel, *, geometry):
  return _convolve(x, kernel, geometry)


def _rows(rows, kernel, *, size, geometry):
  """Convolution of the rows, zeros between their entries, with the kernel turned around."""
  height, width, channels, features = kernel.shape
  turned = jnp.flip(kernel, (0, 1))
  turned = turned.reshape(height, width, channels, geometry.groups, features // geometry.groups)
  turned = turned.transpose(0, 1, 4, 3, 2).reshape(height, width, features // geometry.groups, -1)
  pads = []
  for axis in (0, 1):
    before = kernel.shape[axis] - 1 - geometry.padding[axis][0]
    spread = (rows.shape[1 + axis] - 1) * geometry.strides[axis] + 1
    pads.append((before, size[axis] + kernel.shape[axis] - 1 - spread - before))
  changes = {"window_strides": (1, 1), "padding": pads, "lhs_dilation": geometry.strides}
  return _convolve(rows, turned, geometry, **changes)


def _kernels(x, rows, *, window, geometry):
  """Convolution of the images with the rows, examples in the place of channels."""
  pads = []
  for axis in (0, 1):
    # Rows and columns that the window reaches; strides may leave some out at the end.
    before, size = geometry.padding[axis][0], x.shape[1 + axis]
    reached = (rows.shape[1 + axis] - 1) * geometry.strides[axis] + window[axis] - before
    x = jax.lax.slice_in_dim(x, 0, min(size, reached), axis=1 + axis)
    pads.append((before, max(0, reached - size)))
  changes = {
    "window_strides": (1, 1),
    "padding": pads,
    "rhs_dilation": geometry.strides,
    "feature_group_count": 1,
  }
  images = jnp.split(_turned(x), geometry.groups, axis=0)
  windows = jnp.split(rows.transpose(1, 2, 0, 3), geometry.groups, axis=3)
  parts = [_convolve(*pair, geometry, **changes) for pair in zip(images, windows, strict=True)]
  return jnp.concatenate(parts, axis=3).transpose(1, 2, 0, 3)


@jax.jit
def _reversed(x):
  return x.transpose(3, 1, 2, 0)


def _turned(x):
  """(C, H, W, B), as a call of its own: merged with what computes x, as XLA would have it, that is
  done in the order of the result, far apart in memory, and takes up to ten times as long."""
  with set_xla_metadata(inlineable="false"):
    return _reversed(x)


def _primitive(name: str, function: Callable, *, merges: bool) -> Primitive:
  """A primitive that does what `function` does.

  Args:
    name: as it shows in jaxprs.
    function: of two arrays and static parameters.
    merges: whether several first operands for one second are one larger batch.
  """
  primitive = Primitive(name)
  statics = tuple(inspect.signature(function).parameters)[2:]
  primitive.def_impl(jax.jit(function, static_argnames=statics))

  def shape_of(first, second, **params):
    out = jax.eval_shape(functools.partial(function, **params), *map(_struct, (first, second)))
    return jax.core.ShapedArray(out.shape, out.dtype)

  primitive.def_abstract_eval(shape_of)
  mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))

  def batch(operands, axes, **params):
    if not merges or axes[1] is not None:
      return jax.vmap(functools.partial(function, **params), in_axes=tuple(axes))(*operands), 0
    stacked = jnp.moveaxis(operands[0], axes[0], 0)
    merged = stacked.reshape(-1, *stacked.shape[2:])
    out = primitive.bind(merged, operands[1], **params)
    return out.reshape(*stacked.shape[:2], *out.shape[1:]), 0

  batching.primitive_batchers[primitive] = batch
  return primitive


def _struct(array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(array.shape, array.dtype)


_images_p = _primitive("conv2d", _images, merges=True)
_rows_p = _primitive("conv2d_rows", _rows, merges=True)
_kernels_p = _primitive("conv2d_kernels", _kernels, merges=False)


def _to_images(rows, kernel, image, geometry):
  return _rows_p.bind(rows, kernel, size=image.shape[1:3], geometry=geometry)


def _to_kernel(image, rows, kernel, geometry):
  return _kernels_p.bind(image, rows, window=kernel.shape[:2], geometry=geometry)


def _to_rows(image, kernel, geometry):
  return _images_p.bind(image, kernel, geometry=geometry)


# The unknown operand of a transpose rule has an aval and no value.
ad.defbilinear(
  _images_p,
  lambda ct, x, kernel, *, geometry: _to_images(ct, kernel, x.aval, geometry),
  lambda ct, x, kernel, *, geometry: _to_kernel(x, ct, kernel.aval, geometry),
)
ad.defbilinear(
  _rows_p,
  lambda ct, rows, kernel, *, size, geometry: _to_rows(ct, kernel, geometry),
  lambda ct, rows, kernel, *, size, geometry: _to_kernel(ct, rows, kernel.aval, geometry),
)
ad.defbilinear(
  _kernels_p,
  lambda ct, x, rows, *, window, geometry: _to_images(rows, ct, x.aval, geometry),
  lambda ct, x, rows, *, window, geometry: _to_rows(x, ct, geometry),
)
