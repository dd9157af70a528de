"""Random networks, and a million points in their boxes: random ones, corners, adversarial ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from balance_jax.bounds import Interval, crown
from tests.bounds import sampling

SIZE = 6


def dense(rng):
  weight, bias = rng.normal(size=(SIZE, SIZE)) / 2, rng.normal(size=SIZE) / 2
  return lambda x: x @ weight.astype(x.dtype) + bias.astype(x.dtype)


def convolution(rng):
  kernel = rng.normal(size=(2, 2, 1, 1)) / 2

  def layer(x):
    numbers = ("NHWC", "HWIO", "NHWC")
    image, weights = x.reshape(1, 2, 3, 1), kernel.astype(x.dtype)
    out = jax.lax.conv_general_dilated(image, weights, (1, 1), "SAME", dimension_numbers=numbers)
    return out.reshape(SIZE)

  return layer


def normalization(rng):
  mean, scale = rng.normal(size=SIZE), rng.normal(size=SIZE)
  return lambda x: (x - mean.astype(x.dtype)) * scale.astype(x.dtype) + 0.1


def activation(function):
  return lambda rng: function


def pooling(rng):
  op, init = [(jax.lax.max, -np.inf), (jax.lax.add, 0.0)][rng.integers(2)]
  return lambda x: jax.lax.reduce_window(x, np.array(init, x.dtype)[()], op, (3,), (1,), "SAME")


def residual(rng):
  inner = dense(rng)
  return lambda x: x - jnp.tanh(inner(x))


def product(rng):
  first, second = dense(rng), dense(rng)
  return lambda x: first(x) * second(x) / 2


def moves(rng):
  order = rng.integers(0, SIZE, SIZE)

  def layer(x):
    rows = jnp.concatenate([x[order[:4]], jnp.pad(x[:2], 1)[:2]]).reshape(2, 3)
    return jnp.where(jnp.arange(SIZE) % 3 == 0, rows.T.reshape(SIZE), x)

  return layer


def attention(rng):
  query, key = rng.normal(size=(2, 2, 2))

  def layer(x):
    x = x.reshape(3, 2)
    scores = (x @ query.astype(x.dtype)) @ (x @ key.astype(x.dtype)).T
    return (jax.nn.softmax(scores, axis=-1) @ x).reshape(SIZE)

  return layer


LAYERS = {
  "dense": dense,
  "convolution": convolution,
  "normalization": normalization,
  "pooling": pooling,
  "residual": residual,
  "product": product,
  "moves": moves,
  "attention": attention,
  "relu": activation(jax.nn.relu),
  "leaky_relu": activation(jax.nn.leaky_relu),
  "sigmoid": activation(jax.nn.sigmoid),
  "tanh": activation(jnp.tanh),
  "softplus": activation(jax.nn.softplus),
  "exp": activation(lambda x: jnp.exp(-jnp.abs(x))),
  "square": activation(lambda x: jnp.square(x) / 4),
  "gelu": activation(jax.nn.gelu),
  "log": activation(lambda x: jnp.log(1 + jnp.abs(x))),
  "clip": activation(lambda x: jnp.clip(x, -0.5, 0.7)),
}


def build(names, seed):
  rng = np.random.default_rng(seed)
  layers = [LAYERS[name](rng) for name in names]

  def network(x):
    for layer in layers:
      x = layer(x)
    return x

  return network, rng.normal(size=SIZE)


def check(names, seed, radius, directed, count):
  """All points of a box in the bounds of two methods, float64 or float32 without a tolerance."""
  network, center = build(names, seed)
  with jax.enable_x64(not directed):
    dtype = np.float32 if directed else np.float64
    center = center.astype(dtype)
    box = Interval(center - dtype(radius), center + dtype(radius))
    xs = sampling.points(box, count, seed)
    low, high = jax.jit(lambda xs: sampling.extremes(network, box, xs, adversarial=256))(xs)
    # float64 rounds by 1e-16 an operation; some hundred of them and slopes above 1 are in a bound.
    tolerance = 0.0 if directed else 1e-10
    for bounds in (  # cut with IBP's bounds, so these are checked as well
      crown(network, directed=directed),
      crown(network, directed=directed, intermediate="crown", relu_lower="same-slope"),
    ):
      sampling.assert_contains(bounds(box), low, high, tolerance)


NETWORKS = {
  "names": st.lists(st.sampled_from(sorted(LAYERS)), min_size=2, max_size=6),
  "seed": st.integers(0, 2**31 - 1),
  "radius": st.sampled_from([0.0, 1e-3, 0.05, 0.3, 1.0]),
  "directed": st.booleans(),
}
QUICK = {
  "deadline": None,
  "database": None,
  "derandomize": True,
  "suppress_health_check": list(HealthCheck),
}


# Wide softmaxes, whose sums are large at one end only: rounding there must not reach the other.
@example(names=["attention", "attention"], seed=0, radius=0.3, directed=True)
@settings(max_examples=5, **QUICK)
@given(**NETWORKS)
def test_random_networks(names, seed, radius, directed):
  check(names, seed, radius, directed, count=100_000)


@pytest.mark.slow
@settings(max_examples=200, **{**QUICK, "derandomize": False})
@given(**NETWORKS)
def test_many_random_networks(names, seed, radius, directed):
  check(names, seed, radius, directed, count=100_000)


def test_a_block_of_everything():
  names = ["normalization", "attention", "residual", "moves", "gelu", "dense", "pooling", "product"]
  check(names, 0, 0.02, directed=True, count=500_000)


def test_the_check_can_fail():
  """The ascent finds what a bound that is a little too narrow leaves out."""
  network, center = build(["dense", "relu", "dense", "tanh"], 1)
  with jax.enable_x64(True):
    box = Interval(center - 0.1, center + 0.1)
    exact = crown(network, intermediate="crown")(box)
    narrow = Interval(exact.lower + 0.2 * exact.radius, exact.upper)
    low, high = jax.jit(lambda xs: sampling.extremes(network, box, xs, adversarial=256))(
      sampling.points(box, 1000)
    )
    with pytest.raises(AssertionError):
      sampling.assert_contains(narrow, low, high, 1e-10)
