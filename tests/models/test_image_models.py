"""Image networks: parameter counts by hand, forward passes against NumPy, batch normalisation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.models import CNN7, MLP, Conv, ResNeXt, WideResNet8, count_params


def conv_count(inputs, outputs, size=3, groups=1):
  """Kernel and bias of a convolution, scale and bias of the norm behind it."""
  return size**2 * inputs // groups * outputs + outputs + 2 * outputs


def tail_count(inputs, classes, dense=512):
  return inputs * dense + dense + 2 * dense + dense * classes + classes


def cnn7_count(channels, pixels, classes, w=64):
  convs = ((channels, w), (w, w), (w, 2 * w), (2 * w, 2 * w), (2 * w, 2 * w))
  return sum(conv_count(*pair) for pair in convs) + tail_count(pixels**2 * 2 * w, classes)


def wide_resnet_count(channels, pixels, classes, widen):
  count, inputs = conv_count(channels, 16), 16
  for width in (16 * widen, 32 * widen, 64 * widen):
    count += conv_count(inputs, width) + conv_count(width, width) + conv_count(inputs, width, 1)
    inputs = width
  return count + tail_count(pixels**2 * inputs, classes)


def resnext_count(channels, pixels, classes):
  count, inputs = conv_count(channels, 64), 64
  for inner in (64, 128, 256):
    count += conv_count(inputs, inner, 1) + conv_count(inner, inner, groups=2)
    count += conv_count(inner, 2 * inner, 1) + conv_count(inputs, 2 * inner, 1)
    inputs = 2 * inner
  return count + tail_count(pixels**2 * inputs, classes)


TINY_CONVS = ((1, 1), (1, 1), (2, 2), (2, 1), (2, 2))


@pytest.mark.parametrize(
  ("model", "shape", "formula", "literal"),
  [
    (CNN7(), (32, 32, 3), cnn7_count(3, 16, 10), 17_192_650),
    (CNN7(), (28, 28, 1), cnn7_count(1, 14, 10), 13_259_338),
    (CNN7(num_classes=200, convs=TINY_CONVS), (64, 64, 3), cnn7_count(3, 16, 200), 17_290_120),
    (WideResNet8(), (32, 32, 3), wide_resnet_count(3, 8, 10, 8), 21_547_882),
    (ResNeXt(), (32, 32, 3), resnext_count(3, 8, 10), 17_611_018),
    (MLP(), (28, 28, 1), None, 784 * 128 + 128 + 128 * 128 + 128 + 1290),
  ],
  ids=["cnn7 cifar", "cnn7 mnist", "cnn7 tiny", "wide resnet", "resnext", "mlp"],
)
def test_parameter_counts(model, shape, formula, literal):
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
  assert count_params(variables) == literal
  assert formula in (literal, None)


@pytest.mark.parametrize(
  ("batch_norm", "layers"), [("all", 6), ("conv", 5), ("none", 0)], ids=["all", "conv", "none"]
)
def test_where_batch_norm_goes(batch_norm, layers):
  model = CNN7(width=4, dense=8, batch_norm=batch_norm)
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  names = sorted(name for name in variables["params"] if name.endswith("_norm"))
  assert len(names) == layers
  assert names == sorted(variables.get("batch_stats", {}))
  assert ("dense_norm" in names) == (batch_norm == "all")


class Numpy:
  """Layers in float64, inference mode, by the names of the parameters."""

  def __init__(self, variables):
    wide = jax.tree.map(np.float64, variables)
    self.params, self.stats = wide["params"], wide["batch_stats"]

  def norm(self, x, name):
    p, s = self.params[name], self.stats[name]
    return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

  def conv(self, x, name, stride=1, groups=1):
    kernel = self.params[name]["kernel"]
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    x = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
    parts = zip(np.split(x, groups, 3), np.split(kernel, groups, 3), strict=True)
    y = np.concatenate([np.einsum("bhwcij,ijcf->bhwf", *part) for part in parts], -1)
    return self.norm(y + self.params[name]["bias"], f"{name}_norm")

  def tail(self, x):
    dense, head = self.params["dense"], self.params["head"]
    x = x.reshape(len(x), -1) @ dense["kernel"] + dense["bias"]
    return np.maximum(self.norm(x, "dense_norm"), 0) @ head["kernel"] + head["bias"]


def relu(x):
  return np.maximum(x, 0)


def numpy_cnn(net, x):
  for i, stride in enumerate((1, 2, 1)):
    x = relu(net.conv(x, f"conv_{i}", stride))
  return net.tail(x)


def numpy_wide_resnet(net, x):
  x = relu(net.conv(x, "conv"))
  for i, stride in enumerate((1, 2, 2)):
    y = net.conv(relu(net.conv(x, f"block_{i}_conv_0", stride)), f"block_{i}_conv_1")
    # With widen 1 the first block keeps its shape, and has no convolution beside it.
    x = relu(y + (net.conv(x, f"block_{i}_shortcut", stride) if i else x))
  return net.tail(x)


def numpy_resnext(net, x):
  x = relu(net.conv(x, "conv"))
  for i, stride in enumerate((1, 2, 2)):
    y = relu(net.conv(x, f"block_{i}_conv_0"))
    y = net.conv(relu(net.conv(y, f"block_{i}_conv_1", stride, 2)), f"block_{i}_conv_2")
    x = relu(y + net.conv(x, f"block_{i}_shortcut", stride))
  return net.tail(x)


NETWORKS = {
  "cnn": (CNN7(width=4, convs=((1, 1), (2, 2), (2, 1)), dense=6), numpy_cnn),
  "wide resnet": (WideResNet8(widen=1, dense=6), numpy_wide_resnet),
  "resnext": (ResNeXt(base_width=4, dense=6), numpy_resnext),
}


@pytest.mark.parametrize(("model", "reference"), NETWORKS.values(), ids=NETWORKS)
def test_forward_equals_the_formulas(model, reference):
  rng = np.random.default_rng(0)
  mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
  model = model.clone(mean=mean, std=std, initialization="ibp")
  x = rng.random((2, 8, 8, 3)).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  # Numbers that leave no part of the formula out; scales may be negative.
  variables = jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      rng.uniform(0.5, 2.0, leaf.shape) if path[-1].key == "var" else rng.normal(0, 0.5, leaf.shape)
    ).astype(np.float32),
    shapes,
  )
  found = jax.jit(model.apply)(variables, x)
  expected = reference(Numpy(variables), (np.float64(x) - mean) / std)
  assert found.shape == (2, 10)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_training_mode_normalises_by_the_batch_and_updates_statistics():
  model = MLP(features=(5,), num_classes=2, batch_norm=True)
  x = np.random.default_rng(1).normal(2, 3, (32, 3)).astype(np.float32)
  variables = model.init(jax.random.key(0), x)
  logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
  params = jax.tree.map(np.float64, variables["params"])
  hidden = x @ params["dense_0"]["kernel"] + params["dense_0"]["bias"]
  new = updates["batch_stats"]["norm_0"]
  np.testing.assert_allclose(new["mean"], 0.1 * hidden.mean(0), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(new["var"], 0.9 + 0.1 * hidden.var(0), rtol=1e-5)
  hidden = relu((hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5))
  expected = hidden @ params["head"]["kernel"] + params["head"]["bias"]
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("kernel", "strides", "padding", "groups"),
  [((3, 3), 1, 1, 1), ((3, 3), 2, 1, 2), ((3, 3), 2, "SAME", 1), ((1, 1), 2, "VALID", 1)],
)
def test_conv_equals_that_of_flax(kernel, strides, padding, groups):
  x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 6, 7, 4)), jnp.float32)
  options = {"padding": padding, "kernel_size": kernel}
  flax = nn.Conv(6, strides=strides, feature_group_count=groups, **options)
  params = jax.jit(flax.init)(jax.random.key(0), x)

  def value(conv, params, x):
    y = conv.apply(params, x)
    return jnp.sin(y).sum(), y

  grads = []
  for conv in (
    flax,
    *(Conv(6, strides=strides, groups=groups, how=h, **options) for h in ("auto", "lax")),
  ):
    grads.append(jax.jit(jax.grad(functools.partial(value, conv), (0, 1), has_aux=True))(params, x))
  for found in grads[1:]:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(grads[0]), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  assert jax.tree.structure(jax.eval_shape(Conv(6).init, jax.random.key(0), x)) == (
    jax.tree.structure(params)
  )


@pytest.mark.parametrize(
  ("model", "shapes"),
  [
    (CNN7(width=2, dense=4), [(4, 4, 4), (4, 4, 4), (4, 4, 4), (8, 8, 2), (8, 8, 2)]),
    (WideResNet8(widen=1, dense=4), [(2, 2, 64), (4, 4, 32), (8, 8, 16), (8, 8, 16)]),
    (ResNeXt(base_width=2, dense=4), [(2, 2, 32), (4, 4, 16), (8, 8, 8), (8, 8, 64)]),
  ],
  ids=["cnn7", "wide resnet", "resnext"],
)
def test_the_two_halves_are_the_whole(model, shapes):
  x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
  variables = jax.jit(model.init)(jax.random.key(0), x)
  whole = model.apply(variables, x)
  for suffix_blocks, shape in enumerate(shapes):
    half = functools.partial(model.clone(suffix_blocks=suffix_blocks).apply, variables)
    latent = half(x, part="prefix")
    assert latent.shape == (2, *shape)
    assert float(latent.min()) >= 0
    np.testing.assert_array_equal(half(latent, part="suffix"), whole)


IMAGES = np.zeros((1, 8, 8, 3), np.float32)


@pytest.mark.parametrize(
  ("model", "x", "message"),
  [
    (CNN7(batch_norm="some"), IMAGES, "batch_norm is 'some'.*allowed: all, conv, none"),
    (CNN7(initialization="ibpp"), IMAGES, r"initialization is 'ibpp' \(did you mean 'ibp'"),
    (CNN7(suffix_blocks=5), IMAGES, r"suffix_blocks is 5; allowed: \[0, 4\]"),
    (CNN7(how="fft"), IMAGES, "how is 'fft'"),
    (CNN7(), IMAGES[0], r"x has shape \(8, 8, 3\)"),
    (CNN7(mean=(0.1, 0.2)), IMAGES, r"mean is \(0.1, 0.2\); expected one number or 3"),
    (CNN7(std=(0.0,)), IMAGES, r"std is 0.0; allowed: \(0, inf\]"),
    (MLP(initialization="x"), IMAGES, "initialization is 'x'"),
    (MLP(), IMAGES[0, 0, 0], r"x has shape \(3,\); expected \(B, ...\)"),
    (Conv(4, padding=0, kernel_size=(9, 9)), IMAGES, "expected at least the kernel"),
    (Conv(4, padding="FULL"), IMAGES, "padding is 'FULL'"),
    (Conv(4, groups=2), IMAGES, r"the channels of x are 3; expected a multiple of groups \(2\)"),
  ],
)
def test_bad_input(model, x, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), x)
