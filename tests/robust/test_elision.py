"""A convolutional network with a tail of several affine layers, against loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax.bounds import Interval, ibp
from balance_jax.robust.margin_bounds import bound_margins
from tests.robust.test_margin_bounds import LABELS, box_of, images, least, margin_rows


def conv_variables():
  rng = np.random.default_rng(2)
  draw = lambda *shape: rng.normal(0, 0.4, shape).astype(np.float32)  # noqa: E731
  return {
    "first": draw(3, 3, 2, 4),
    "bias": draw(4),
    "norm": (draw(4), rng.uniform(0.5, 2, 4).astype("f"), draw(4), draw(4)),
    "second": draw(3, 3, 4, 4),
    "tail_norm": (draw(4), rng.uniform(0.5, 2, 4).astype("f"), 2 * draw(4), draw(4)),
    "dense": (draw(4, 6), draw(6)),
    "head": (2 * draw(6, 3), draw(3)),
  }


def normalized(x, norm, xp):
  """Fixed statistics; the factors of some channels are negative."""
  mean, var, gamma, beta = (a.reshape((1,) * (x.ndim - 1) + (-1,)) for a in norm)
  return (x - mean) / xp.sqrt(var + 1e-5) * gamma + beta


def convolved(x, kernel, stride):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def convolved_by_loops(x, kernel, stride):
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  size = (x.shape[1] - 3) // stride + 1
  out = np.zeros((len(x), size, size, kernel.shape[-1]))
  for i, j in np.ndindex(size, size):
    window = x[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
    out[:, i, j] = np.einsum("bhwc,hwcf->bf", window, kernel)
  return out


def tail(v, hidden, convolve, xp):
  hidden = hidden + convolve(hidden, v["second"], 1)
  hidden = normalized(hidden, v["tail_norm"], xp).mean(axis=(1, 2))
  for weight, bias in (v["dense"], v["head"]):
    hidden = hidden @ weight + bias[None]
  return hidden


def conv_net(v, x):
  hidden = convolved(x, v["first"], 2) + v["bias"].reshape(1, 1, 1, -1)
  return tail(v, jax.nn.relu(normalized(hidden, v["norm"], jnp)), convolved, jnp)


def conv_reference(v, x, eps):
  v = jax.tree.map(lambda a: np.asarray(a, np.float64), v)
  lower, upper = box_of(x, eps)
  center = convolved_by_loops((lower + upper) / 2, v["first"], 2) + v["bias"]
  radius = convolved_by_loops((upper - lower) / 2, np.abs(v["first"]), 2)
  center = normalized(center, v["norm"], np)
  radius = radius * np.abs(v["norm"][2]) / np.sqrt(v["norm"][1] + 1e-5)
  low, high = np.maximum(center - radius, 0), np.maximum(center + radius, 0)
  shape, size = low.shape[1:], low[0].size
  # The tail as a matrix, column by column.
  offset = tail(v, np.zeros((1, *shape)), convolved_by_loops, np)[0]
  columns = tail(v, np.eye(size).reshape(size, *shape), convolved_by_loops, np) - offset
  found = []
  for i, label in enumerate(LABELS):
    rows = margin_rows(label)
    found.append(least(rows @ columns.T, rows @ offset, low[i].ravel(), high[i].ravel()))
  return np.array(found), center, radius


def test_affine_tails_of_several_layers_are_elided():
  v, x, eps = conv_variables(), images((6, 6, 2)), 0.1

  @jax.jit
  def both(x):
    box = Interval.from_linf(x, eps)
    bounds = bound_margins(functools.partial(conv_net, v), box, LABELS)
    return bounds, ibp(functools.partial(conv_net, v))(box)

  bounds, logits = both(x)
  want, center, radius = conv_reference(v, x, eps)
  np.testing.assert_allclose(bounds.lower, want, rtol=1e-5, atol=1e-5)
  (preact,) = bounds.preacts
  np.testing.assert_allclose(preact.center.reshape(center.shape), center, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(preact.radius.reshape(center.shape), radius, rtol=1e-4, atol=1e-5)
  for i, label in enumerate(LABELS):
    others = [j for j in range(3) if j != label]
    apart = logits.lower[i, label] - logits.upper[i, others]
    assert np.all(bounds.lower[i] > apart + 0.01)
