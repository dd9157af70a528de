"""2-d convolution whose gradient is as fast as its value on a CPU, inside loops too.

XLA's CPU compiler turns a convolution into its fast kernel only if images are NHWC and kernels
HWIO. Outside of loops a compiler pass brings others into that form; inside `lax.scan` it does not
run, and the gradients, which JAX writes in transposed forms, take 20 to 70 times as long. Here they
are written in the fast form, the transposes spelled out.
"""

import functools

import jax
import jax.numpy as jnp

_NUMBERS = ("NHWC", "HWIO", "NHWC")


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

  Where the default backend is no CPU, it is that function. On CPUs it has reverse-mode derivatives
  only, of any order; a forward-mode derivative raises TypeError unless both tangents are zero.

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
  convolve = _conv2d if jax.default_backend() == "cpu" else _value
  return convolve(x, kernel, strides, padding, groups, precision)


def conv2d_transpose(
  rows: jax.Array,
  kernel: jax.Array,
  shape: tuple[int, ...],
  *,
  strides: tuple[int, int] = (1, 1),
  padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
  groups: int = 1,
  precision=None,
) -> jax.Array:
  """The transpose of `conv2d` as a linear map of images, its gradients written for CPUs as well.

  Args:
    rows: float (B, H', W', F), of the shape of the map's results.
    kernel: as in `conv2d`.
    shape: (B, H, W, C), of the images.
    strides: as in `conv2d`, and so are the others.

  Returns:
    float `shape`.
  """
  transpose = _conv2d_transpose if jax.default_backend() == "cpu" else _transposed
  return transpose(rows, kernel, shape, strides, padding, groups, precision)


def _transposed(rows, kernel, shape, *options):
  return _input_gradient(shape, kernel, rows, *options)


_conv2d_transpose = jax.custom_vjp(_transposed, nondiff_argnums=(2, 3, 4, 5, 6))


def _transpose_forward(rows, kernel, *options):
  return _transposed(rows, kernel, *options), (rows, kernel)


def _transpose_backward(shape, strides, padding, groups, precision, residuals, cotangent):
  del shape
  rows, kernel = residuals
  options = (strides, padding, groups, precision)
  kernel_gradient = _kernel_gradient(cotangent, kernel.shape, rows, *options)
  return _value(cotangent, kernel, *options), kernel_gradient


_conv2d_transpose.defvjp(_transpose_forward, _transpose_backward)


def _value(x, kernel, strides, padding, groups, precision):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    strides,
    padding,
    dimension_numbers=_NUMBERS,
    feature_group_count=groups,
    precision=precision,
  )


_conv2d = jax.custom_vjp(_value, nondiff_argnums=(2, 3, 4, 5))


def _forward(x, kernel, *options):
  return _value(x, kernel, *options), (x, kernel)


def _backward(strides, padding, groups, precision, residuals, cotangent):
  x, kernel = residuals
  options = (cotangent, strides, padding, groups, precision)
  return _input_gradient(x.shape, kernel, *options), _kernel_gradient(x, kernel.shape, *options)


_conv2d.defvjp(_forward, _backward)


def _input_gradient(shape, kernel, cotangent, strides, padding, groups, precision):
  """Convolution of the cotangent, zeros between its entries, with the kernel turned around."""
  height, width, channels, features = kernel.shape
  turned = jnp.flip(kernel, (0, 1)).reshape(height, width, channels, groups, features // groups)
  turned = turned.transpose(0, 1, 4, 3, 2).reshape(height, width, features // groups, -1)
  pads = []
  for axis in (0, 1):
    before = kernel.shape[axis] - 1 - padding[axis][0]
    spread = (cotangent.shape[1 + axis] - 1) * strides[axis] + 1
    pads.append((before, shape[1 + axis] + kernel.shape[axis] - 1 - spread - before))
  return jax.lax.conv_general_dilated(
    cotangent,
    turned,
    (1, 1),
    pads,
    lhs_dilation=strides,
    dimension_numbers=_NUMBERS,
    feature_group_count=groups,
    precision=precision,
  )


def _kernel_gradient(x, shape, cotangent, strides, padding, groups, precision):
  """Convolution of the input with the cotangent, examples in the place of channels."""
  pads = []
  for axis in (0, 1):
    # Rows and columns that the window reaches; strides may leave some out at the end.
    before, size = padding[axis][0], x.shape[1 + axis]
    reached = (cotangent.shape[1 + axis] - 1) * strides[axis] + shape[axis] - before
    x = jax.lax.slice_in_dim(x, 0, min(size, reached), axis=1 + axis)
    pads.append((before, max(0, reached - size)))
  gradient = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1, 1),
    padding=pads,
    rhs_dilation=strides,
    dimension_numbers=_NUMBERS,
    precision=precision,
  )
  images = jnp.split(x.transpose(3, 1, 2, 0), groups, axis=0)
  windows = jnp.split(cotangent.transpose(1, 2, 0, 3), groups, axis=3)
  parts = [gradient(*pair) for pair in zip(images, windows, strict=True)]
  return jnp.concatenate(parts, axis=3).transpose(1, 2, 0, 3)
