"""TAPS: the link to the box by formula, exact corners of linear suffixes, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.bounds import Interval, ibp
from balance_jax.robust.margin_bounds import bound_margins
from balance_jax.robust.margins import margin_cross_entropy
from balance_jax.robust.taps import connect, taps_loss

LABELS = np.array([0, 2, 1])
KEY = jax.random.key(0)


def network(seed=0):
  rng = np.random.default_rng(seed)
  sizes = ((4, 6), (6, 5), (5, 3))
  return [
    (rng.normal(0, 0.8, shape).astype("f"), rng.normal(0, 0.3, shape[1]).astype("f"))
    for shape in sizes
  ]


def prefix(params, x):
  return jax.nn.relu(x @ params[0][0] + params[0][1][None])


def linear_suffix(params, hidden):
  for weight, bias in params[1:]:
    hidden = hidden @ weight + bias[None]
  return hidden


def curved_suffix(params, hidden):
  (weight, bias), (head, offset) = params[1:]
  return jax.nn.relu(hidden @ weight + bias[None]) @ head + offset[None]


def batch(eps=0.2):
  x = np.random.default_rng(1).uniform(0, 1, (3, 4)).astype(np.float32)
  return Interval.from_linf(x, eps)


@functools.partial(jax.jit, static_argnames=("suffix", "steps"))
def taps(params, box, weight, suffix=linear_suffix, steps=8):
  """The loss summed, with its parts, and the gradients of parameters and box."""

  def total(params, box):
    parts = functools.partial(prefix, params), functools.partial(suffix, params)
    found = taps_loss(*parts, KEY, box, LABELS, weight=weight, steps=steps)
    return found.losses.sum(), found

  return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, box)


def latent_box(params, box):
  """Float64, by hand."""
  weight, bias = (a.astype(np.float64) for a in params[0])
  lower, upper = (np.asarray(end, np.float64) for end in (box.lower, box.upper))
  center, radius = (lower + upper) / 2 @ weight + bias, (upper - lower) / 2 @ np.abs(weight)
  return np.maximum(center - radius, 0), np.maximum(center + radius, 0)


def exact_margins(params, low, high):
  """The least margins of the linear suffix over the latent box."""
  matrix = params[1][0].astype(np.float64) @ params[2][0]
  offset = params[1][1] @ params[2][0].astype(np.float64) + params[2][1]
  rows = np.stack([[np.eye(3)[y] - np.eye(3)[j] for j in range(3) if j != y] for y in LABELS])
  slopes = rows @ matrix.T
  low, high = low[:, None], high[:, None]
  return np.minimum(slopes * low, slopes * high).sum(-1) + rows @ offset


def test_linear_suffixes_are_attacked_exactly():
  params, box = network(), batch()
  (_, found), _ = taps(params, box, 1.0)
  want = exact_margins(params, *latent_box(params, box))
  np.testing.assert_allclose(found.attacked_margins, want, rtol=1e-4, atol=1e-5)
  # The tail is elided, so the bounds of a linear suffix are the same, and the loss is a square.
  np.testing.assert_allclose(found.margins, want, rtol=1e-4, atol=1e-5)
  loss = np.log1p(np.exp(-want).sum(-1))
  np.testing.assert_allclose(found.losses, loss**2, rtol=1e-4)
  (preact,) = found.preacts
  low, high = latent_box(params, box)
  np.testing.assert_allclose(np.maximum(preact.upper.reshape(3, -1), 0), high, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(np.maximum(preact.lower.reshape(3, -1), 0), low, rtol=1e-5, atol=1e-6)


def test_gradient_of_exact_corners_is_that_of_the_bounds():
  # At a corner the link gives all of the gradient to that end, so the product differentiates as the
  # square of the certified loss does.
  params, box = network(), batch()

  def squared(params, box):
    def net(x):
      return linear_suffix(params, prefix(params, x))

    return jnp.square(margin_cross_entropy(bound_margins(net, box, LABELS).lower)).sum()

  want = jax.jit(jax.grad(squared, argnums=(0, 1)))(params, box)
  _, got = taps(params, box, 1.0)
  for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_weight_changes_the_gradient_of_the_attacked_half_only():
  params, box = network(3), batch()
  run = functools.partial(taps, params, box, suffix=curved_suffix)
  values, grads = zip(*(run(w) for w in (1.0, 2.0, 5.0)), strict=True)
  for value, found in values[1:]:
    assert value == values[0][0]
    np.testing.assert_array_equal(found.losses, values[0][1].losses)
  attacked = jax.tree.map(jnp.subtract, grads[1], grads[0])
  for at_1, at_5, half in zip(*map(jax.tree.leaves, (grads[0], grads[2], attacked)), strict=True):
    np.testing.assert_allclose(at_5, at_1 + 4 * half, rtol=1e-4, atol=1e-5)
  # The half itself: the loss at the points that were found, weighted by the certified one.
  found = values[0][1]
  np.testing.assert_allclose(
    found.losses,
    margin_cross_entropy(found.margins) * margin_cross_entropy(found.attacked_margins),
    rtol=1e-6,
  )
  bias = attacked[0][2][1]
  share = np.exp(-found.attacked_margins)
  share = share / (1 + share.sum(-1, keepdims=True)) * margin_cross_entropy(found.margins)[:, None]
  want = np.zeros(3)
  for row, label in zip(share, LABELS, strict=True):
    for part, j in zip(row, [j for j in range(3) if j != label], strict=True):
      want[j] += part
      want[label] -= part
  np.testing.assert_allclose(bias, want, rtol=1e-4, atol=1e-5)


def test_attack_stays_between_bound_and_samples():
  params, box = network(3), batch()
  (_, found), _ = taps(params, box, 1.0, suffix=curved_suffix)
  assert np.all(found.margins <= found.attacked_margins + 1e-5)
  low, high = latent_box(params, box)
  points = low + np.random.default_rng(0).uniform(0, 1, (2000, *low.shape)) * (high - low)
  logits = curved_suffix(params, points.reshape(-1, points.shape[-1])).reshape(-1, 3, 3)
  for i, label in enumerate(LABELS):
    others = [j for j in range(3) if j != label]
    sampled = (logits[:, i, [label]] - logits[:, i, others]).min(0)
    assert np.all(found.attacked_margins[i] <= sampled + 1e-4)
  assert len(found.preacts) == 2
  assert all(preact.shape[0] == 3 for preact in found.preacts)


def test_bounds_are_those_of_the_whole_network():
  params, box = network(3), batch()

  @jax.jit
  def whole(box):
    net = lambda x: curved_suffix(params, prefix(params, x))  # noqa: E731
    return bound_margins(net, box, LABELS), ibp(functools.partial(prefix, params))(box)

  bounds, latent = whole(box)
  (_, found), _ = taps(params, box, 1.0, suffix=curved_suffix)
  np.testing.assert_allclose(found.margins, bounds.lower, rtol=1e-5, atol=1e-6)
  for got, want in zip(*map(jax.tree.leaves, (found.preacts, bounds.preacts)), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    jnp.stack([latent.lower, latent.upper]), latent_box(params, box), rtol=1e-5, atol=1e-6
  )


def test_points_have_one_step_and_zero_radius():
  params = network()
  (_, found), grads = taps(params, batch(eps=0.0), 1.0, suffix=curved_suffix)
  np.testing.assert_allclose(found.attacked_margins, found.margins, rtol=1e-5, atol=1e-5)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_link_to_the_ends_of_the_box():
  point = jnp.array([0.0, 0.25, 0.5, 0.75, 1.0, 2.0])
  box = Interval(jnp.array([0.0] * 5 + [2.0]), jnp.array([1.0] * 5 + [2.0]))
  value, pull = jax.vjp(connect, point, box)
  np.testing.assert_array_equal(value, point)
  to_point, to_box = pull(jnp.ones(6))
  np.testing.assert_array_equal(to_point, 0)
  np.testing.assert_allclose(to_box.upper, [0, 0, 0, 0.5, 1, 0.5])
  np.testing.assert_allclose(to_box.lower, [1, 0.5, 0, 0, 0, 0.5])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"weight": 0.0}, r"weight is 0\.0; allowed: \(0, inf\]"),
    ({"steps": 0}, "steps is 0"),
    ({"step_size": -1.0}, r"step_size is -1\.0"),
    ({"precision": "most"}, "precision is 'most'"),
    ({"labels": LABELS + 1}, "labels holds 3; allowed: 0 to 2"),
  ],
)
def test_bad_input(options, message):
  labels = options.pop("labels", LABELS)
  box = Interval(jnp.zeros((3, 3)), jnp.ones((3, 3)))
  with pytest.raises(ValueError, match=message):
    taps_loss(lambda x: x, lambda x: x, KEY, box, labels, **options)
