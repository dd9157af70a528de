"""IBP initialisation: standard deviations, and what it is for: widths of bounds over depth."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.models import CNN7, MLP, WideResNet8
from balance_jax.robust.initialization import fan_in_uniform, ibp_init_params, ibp_normal


@pytest.mark.parametrize(
  ("shape", "fan_in"),
  [((400, 300), 400), ((3, 3, 64, 128), 576), ((3, 3, 32, 256), 288)],
  ids=["dense", "conv", "grouped conv of 64 channels in 2 groups"],
)
def test_standard_deviations(shape, fan_in):
  kernel = np.asarray(jax.jit(ibp_normal(), static_argnums=1)(jax.random.key(0), shape))
  assert kernel.dtype == np.float32
  # A sample of n has a relative error of 1/sqrt(2n) in its standard deviation: 5 of those.
  slack = 5 / math.sqrt(2 * kernel.size)
  assert kernel.std() == pytest.approx(math.sqrt(2 * math.pi) / fan_in, rel=slack)
  # The difference gain of the paper is 1.
  assert fan_in / 2 * np.abs(kernel).mean() == pytest.approx(1.0, rel=slack)
  half = ibp_normal(0.5)(jax.random.key(0), shape, jnp.bfloat16)
  assert half.dtype == jnp.bfloat16
  # Rounded to 8 bits, which adds 1e-5 to the variance of one.
  assert np.float32(half).std() == pytest.approx(math.sqrt(math.pi / 2) / fan_in, rel=slack + 1e-3)


def test_default_is_uniform_in_one_over_root_of_fan_in():
  for init, shape in ((fan_in_uniform(), (3, 3, 11, 100)), (fan_in_uniform(99), (5000,))):
    values = np.asarray(init(jax.random.key(1), shape)) * math.sqrt(99)
    assert 0.999 < np.abs(values).max() <= 1 + 1e-6
    assert values.std() == pytest.approx(1 / math.sqrt(3), rel=0.05)


def key(seed):
  """A generator whose draws compile several times as fast as those of the default."""
  return jax.random.key(seed, impl="unsafe_rbg")


def conv(x, kernel, stride):
  """NumPy convolution, NHWC and HWIO, one row of zeros around."""
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::stride, ::stride]
  return np.einsum("bhwcij,ijcf->bhwf", windows, kernel, optimize=True)


def radius_growth(initialization, batch_norm=False, seed=0):
  """Mean radius of each pre-activation over that of the input, by interval arithmetic in NumPy."""
  digits = pytest.importorskip("sklearn.datasets").load_digits().images[:128, ..., None] / 16
  model = CNN7(width=32, batch_norm="none", initialization=initialization)
  init = jax.jit(model.init)(key(seed), jnp.zeros((1, 8, 8, 1)))
  params = jax.tree.map(np.asarray, init["params"])
  lower, upper = np.clip(digits - 0.01, 0, 1), np.clip(digits + 0.01, 0, 1)
  start = (upper - lower).mean() / 2
  clean, growth = digits, []
  for i, stride in enumerate((1, 1, 2, 1, 1, None)):
    layer = params["dense" if stride is None else f"conv_{i}"]
    kernel = layer["kernel"].astype(np.float64)

    def affine(x, kernel, stride=stride):
      return x.reshape(len(x), -1) @ kernel if stride is None else conv(x, kernel, stride)

    center = affine((lower + upper) / 2, kernel) + layer["bias"]
    radius = affine((upper - lower) / 2, np.abs(kernel))
    if batch_norm:
      clean = affine(clean, kernel) + layer["bias"]
      axes = tuple(range(clean.ndim - 1))
      mean, std = clean.mean(axes), np.sqrt(clean.var(axes) + 1e-5)
      clean, center, radius = (
        np.maximum((clean - mean) / std, 0),
        (center - mean) / std,
        radius / std,
      )
    growth.append(radius.mean() / start)
    lower, upper = np.maximum(center - radius, 0), np.maximum(center + radius, 0)
  return np.array(growth)


def test_difference_gain_of_the_default_explodes_and_of_ibp_stays_near_one():
  # Another implementation measured 1.28, 4.1, 16, 78, 351, 2816 and 1.90, 1.51, 1.48, 1.10, 0.78,
  # 0.87. The mean of a layer varies by some 10 % between seeds, and so does every factor: bounds
  # are a factor of 2 wide.
  default, ibp = radius_growth("default"), radius_growth("ibp")
  np.testing.assert_array_less(np.abs(np.log(default / [1.28, 4.1, 16, 78, 351, 2816])), np.log(2))
  np.testing.assert_array_less(np.abs(np.log(ibp / [1.9, 1.51, 1.48, 1.1, 0.78, 0.87])), np.log(2))
  assert default[-1] / ibp[-1] > 1000


def test_batch_norm_cancels_the_scale_of_the_weights():
  # Measured elsewhere: 6.1e6 and 4.2e6 at the last layer; initialisation hardly matters to bounds.
  default, ibp = (radius_growth(name, batch_norm=True)[-1] for name in ("default", "ibp"))
  assert 1e6 < ibp < 3e7
  assert 1 / 3 < default / ibp < 3


def test_params_of_any_network_are_redrawn_like_the_attribute_does():
  x = jnp.zeros((1, 8, 8, 3))
  sizes = {"widen": 1, "dense": 64}
  after_sum = [f"block_{i}_{layer}" for i in (1, 2) for layer in ("conv_0", "shortcut")] + ["dense"]
  params = jax.jit(WideResNet8(**sizes).init)(key(0), x)["params"]
  drawn = jax.jit(lambda key: ibp_init_params(key, params, last_layer="head", after_sum=after_sum))(
    key(1)
  )
  own = jax.jit(WideResNet8(**sizes, initialization="ibp").init)(key(2), x)["params"]
  for name, layer in params.items():
    for leaf in set(layer) - {"kernel"}:
      np.testing.assert_array_equal(drawn[name][leaf], layer[leaf])
    if name.endswith("_norm"):
      continue
    kernel, scale = drawn[name]["kernel"], 0.5 if name in after_sum else 1.0
    if name == "head":
      np.testing.assert_array_equal(kernel, layer["kernel"])
      assert float(own[name]["kernel"].std()) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.1)
      continue
    sigma = scale * math.sqrt(2 * math.pi) / math.prod(kernel.shape[:-1])
    # The smallest kernel has 432 entries: 5 / sqrt(2 * 432) is 0.17.
    assert float(kernel.std()) == pytest.approx(sigma, rel=0.17), name
    assert float(own[name]["kernel"].std()) == pytest.approx(sigma, rel=0.17), name


def test_layers_are_drawn_independently():
  params = MLP(features=(8, 8), num_classes=8).init(jax.random.key(0), jnp.zeros((1, 8)))["params"]
  drawn = ibp_init_params(jax.random.key(0), params, last_layer=["head"])
  assert float(jnp.abs(drawn["dense_0"]["kernel"] - drawn["dense_1"]["kernel"]).min()) > 0


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: ibp_normal(0.0), r"scale is 0\.0; allowed: \(0, inf\]"),
    (lambda: ibp_normal()(jax.random.key(0), (3,)), r"shape is \(3,\); expected two axes"),
    (lambda: fan_in_uniform()(jax.random.key(0), (3,)), r"shape is \(3,\); expected two axes"),
    (lambda: fan_in_uniform(0), r"fan_in is 0; allowed: \[1, inf\]"),
    (
      lambda: ibp_init_params(
        jax.random.key(0), {"a": {"kernel": jnp.ones((2, 2))}}, last_layer="b"
      ),
      r"last_layer names 'b'; leaves of params: a/kernel",
    ),
    (
      lambda: ibp_init_params(
        jax.random.key(0), {"a": jnp.ones((2, 2))}, last_layer="a", after_sum=("ab",)
      ),
      r"after_sum names 'ab'",
    ),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
