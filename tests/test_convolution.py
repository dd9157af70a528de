"""The convolution with gradients of its own: against XLA's, and that its form is the fast one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax._convolution import conv2d, conv2d_transpose

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


def test_transpose_and_its_gradients_equal_those_of_xla():
  case = CASES["stride 2, grouped"]
  options = {name: value for name, value in case.items() if name != "kernel"}
  x, kernel = arrays(case["kernel"])
  rows = jnp.sin(reference(x, kernel, **options))

  def found(rows, kernel):
    return jnp.vdot(jnp.cos(x), conv2d_transpose(rows, kernel, x.shape[1:3], **options))

  def expected(rows, kernel):
    return jnp.vdot(reference(jnp.cos(x), kernel, **options), rows)

  for a, b in zip(
    *(jax.jit(jax.value_and_grad(f, (0, 1)))(rows, kernel) for f in (found, expected)), strict=True
  ):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_forward_mode_and_linear_transpose():
  x, kernel = arrays((3, 3, 2, 4))
  tangents = jnp.cos(x), jnp.sin(kernel)
  found, expected = (jax.jvp(f, (x, kernel), tangents)[1] for f in (conv2d, reference))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  rows = jnp.ones_like(expected)
  found, expected = (
    jax.linear_transpose(lambda v, f=f: f(v, kernel), x)(rows)[0] for f in (conv2d, reference)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_gradient_of_mapped_examples_is_that_of_the_batch():
  """The kernel's gradient is one convolution over all examples, not one for each."""
  x, kernel = arrays((3, 3, 2, 4))

  def mapped(kernel):
    each = jax.vmap(lambda image: jnp.sin(conv2d(image[None], kernel)[0]))
    return each(x).sum()

  program = jax.jit(jax.grad(mapped))
  text = str(jax.make_jaxpr(jax.grad(mapped))(kernel))
  # With an axis of examples in its result it would be one for each, summed afterwards.
  assert re.findall(r":f32\[([\d,]+)\] = conv2d_kernels", text) == ["3,3,2,4"]
  expected = jax.grad(lambda k: jnp.sin(reference(x, k)).sum())(kernel)
  np.testing.assert_allclose(program(kernel), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("varies", ["both", "images"])
def test_gradient_inside_of_shard_map(varies):
  """A kernel that all devices share gets the sum of their gradients."""
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  x, kernel = arrays((3, 3, 2, 4))
  x = jnp.concatenate([x, x[:1]])
  split, same = jax.P("data"), jax.P()

  def local(x, kernel):
    if varies == "both":
      kernel = jax.lax.pcast(kernel, "data", to="varying")
    grad = jax.grad(lambda k: jnp.sin(conv2d(x, k)).sum())(kernel)
    return jax.lax.psum(grad, "data") if varies == "both" else grad

  total = jax.shard_map(local, mesh=mesh, in_specs=(split, same), out_specs=same)
  expected = jax.grad(lambda k: jnp.sin(reference(x, k)).sum())(kernel)
  np.testing.assert_allclose(jax.jit(total)(x, kernel), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_runs_on_separate_devices_have_the_fast_gradients(how):
  """Where JAX does not follow what varies, as in sweeps, the maps stay what they are."""
  mesh = jax.make_mesh((2,), ("run",), axis_types=(jax.sharding.AxisType.Auto,))
  x, kernel = arrays((3, 3, 2, 4))
  kernels = jnp.stack([kernel, 2 * kernel])

  def local(x, kernels):
    return jax.lax.map(jax.grad(lambda k: jnp.sin(conv2d(x, k)).sum()), kernels)

  if how == "pmap":
    mapped = jax.pmap(local, in_axes=(None, 0), devices=jax.devices()[:2])
    arguments = x, kernels[:, None]
  else:
    specs = {"in_specs": (jax.P(), jax.P("run")), "out_specs": jax.P("run")}
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=False, **specs))
    arguments = x, kernels
  program = str(jax.make_jaxpr(mapped)(*arguments))
  assert "conv2d_kernels" in program
  assert "conv_general_dilated" not in program
  expected = jnp.stack([jax.grad(lambda k: jnp.sin(reference(x, k)).sum())(k) for k in kernels])
  found = mapped(*arguments).reshape(expected.shape)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
