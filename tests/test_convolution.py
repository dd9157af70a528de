"""The convolution with gradients of its own: against XLA's, and that its form is the fast one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax._convolution import conv2d

CASES = {
  "3x3": {"kernel": (3, 3, 2, 4), "padding": ((1, 1), (1, 1))},
  "stride 2, grouped": {
    "kernel": (3, 3, 1, 4),
    "strides": (2, 2),
    "padding": ((1, 1), (1, 1)),
    "groups": 2,
  },
  "1x1, stride 2": {"kernel": (1, 1, 2, 3), "strides": (2, 2)},
  "uneven": {"kernel": (3, 2, 2, 3), "strides": (2, 3), "padding": ((0, 1), (2, 0))},
}


def arrays(kernel_shape, seed=0):
  rng = np.random.default_rng(seed)
  shapes = ((3, 6, 7, 2), kernel_shape)
  return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def reference(x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), groups=1):
  return jax.lax.conv_general_dilated(
    x, kernel, strides, padding, None, None, ("NHWC", "HWIO", "NHWC"), groups
  )


def derivatives(convolve, options):
  """Value, gradients and a derivative of the gradient, as one program."""

  def value(x, kernel):
    return jnp.sin(convolve(x, kernel, **options)).sum()

  def both(x, kernel):
    value_and_grad = jax.value_and_grad(value, (0, 1))(x, kernel)
    second = jax.grad(lambda x: jnp.square(jax.grad(value, 1)(x, kernel)).sum())(x)
    return convolve(x, kernel, **options), value_and_grad, second

  return jax.jit(both)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_derivatives_equal_those_of_xla(case):
  options = {name: value for name, value in case.items() if name != "kernel"}
  x, kernel = arrays(case["kernel"])
  found = derivatives(conv2d, options)(x, kernel)
  expected = derivatives(reference, options)(x, kernel)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_vmap_over_images_and_kernels():
  x, kernel = arrays((3, 3, 2, 4))
  kernels = jnp.stack([kernel, -2.0 * kernel])

  def grad(convolve):
    return jax.grad(lambda k: jnp.sin(convolve(x, k, padding=((1, 1), (1, 1)))).sum())

  found = jax.jit(jax.vmap(grad(conv2d)))(kernels)
  for one, alone in zip(found, kernels, strict=True):
    np.testing.assert_allclose(one, grad(reference)(alone), rtol=1e-4, atol=1e-4)


def labels_in_loop(convolve):
  """Forms of all convolutions in the compiled gradient steps of a scan."""
  x, kernel = arrays((3, 3, 2, 4))

  def loss(x, kernel):
    x = jnp.sin(convolve(x, kernel, padding=((1, 1), (1, 1))))
    return jnp.sin(convolve(x, jnp.tile(kernel, (1, 1, 2, 1)), padding=((1, 1), (1, 1)))).sum()

  def step(kernel, _):
    return kernel - jax.grad(loss, 1)(x, kernel), None

  run = jax.jit(lambda kernel: jax.lax.scan(step, kernel, None, length=3)[0])
  return set(re.findall(r"dim_labels=(\S+_\S+->[^\s,]+)", run.lower(kernel).compile().as_text()))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the CPU compiler")
def test_convolutions_in_a_loop_have_the_fast_form():
  assert labels_in_loop(conv2d) == {"b01f_01io->b01f"}
  # The reason for this module; once the compiler rewrites loops as well, it can go.
  assert labels_in_loop(reference) != {"b01f_01io->b01f"}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends use XLA's function")
def test_forward_mode_raises_unless_tangents_are_zero():
  x, kernel = arrays((3, 3, 2, 4))
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(lambda x: conv2d(x, kernel), (x,), (x,))
  scale = jnp.ones(())
  _, slope = jax.jvp(lambda c: (c, conv2d(x, kernel))[0], (scale,), (scale,))
  assert slope == 1
