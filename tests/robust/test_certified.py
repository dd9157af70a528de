"""Certified losses: hand values, ends and order of the mixtures, small boxes inside of large."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance_jax.bounds import Interval
from balance_jax.robust.certified import (
  SABR_VARIANTS,
  cc_ibp_loss,
  exp_ibp_loss,
  l1_penalty,
  mixed_loss,
  mtl_ibp_loss,
  sabr_box,
)
from balance_jax.robust.margins import margin_cross_entropy


def random_losses(size=200):
  """(certified, adversarial) margins, the first below the second, over many magnitudes."""
  rng = np.random.default_rng(0)
  adversarial = rng.normal(0, 1, (size, 3)) * 10 ** rng.uniform(-2, 1.5, (size, 1))
  gap = np.abs(rng.normal(0, 1, (size, 3))) * 10 ** rng.uniform(-2, 1, (size, 1))
  return (adversarial - gap).astype(np.float32), adversarial.astype(np.float32)


def test_by_hand():
  pair = jnp.array([4.0, 1.0]), jnp.array([1.0, 3.0])
  np.testing.assert_allclose(mtl_ibp_loss(*pair, 0.25), [1.75, 2.5])
  np.testing.assert_allclose(exp_ibp_loss(*pair, 0.5), [2, np.sqrt(3)], rtol=1e-6)
  np.testing.assert_allclose(exp_ibp_loss(*pair, 0.25), [4**0.25, 3**0.75], rtol=1e-6)
  np.testing.assert_allclose(mixed_loss(*pair, 0.25), [3.25, 1.5])
  margins = jnp.array([[-1.0, 2.0]]), jnp.array([[1.0, 4.0]])
  want = np.log(1 + np.exp(0.5) + np.exp(-2.5))
  np.testing.assert_allclose(cc_ibp_loss(*margins, 0.75), [want], rtol=1e-6)


def test_ends_and_order():
  margins = random_losses()
  losses = [np.asarray(margin_cross_entropy(m)) for m in margins]
  assert losses[0].max() > 30
  assert losses[1].min() == 0  # both corners of the power are reached

  @jax.jit
  def all_three(alpha):
    mixtures = mtl_ibp_loss(*losses, alpha), exp_ibp_loss(*losses, alpha)
    return *mixtures, cc_ibp_loss(*margins, alpha), mixed_loss(*losses, alpha)

  for alpha, end in ((1.0, 0), (0.0, 1)):
    *found, mixed = all_three(alpha)
    for got in found:
      np.testing.assert_allclose(got, losses[end], rtol=1e-5)
    np.testing.assert_array_equal(mixed, losses[1 - end])
  for alpha in (0.01, 0.3, 0.9):
    mtl, exp, cc, _ = all_three(alpha)
    assert np.all(exp <= mtl * (1 + 1e-5))
    assert np.all(cc <= mtl * (1 + 1e-5) + 1e-6)
    assert np.mean(exp < 0.999 * mtl) > 0.1
    assert np.mean(cc < 0.999 * mtl) > 0.1


def test_power_of_losses_that_are_zero():
  pairs = jnp.array([[0.0, 2.0], [2.0, 0.0], [0.0, 0.0], [1e-30, 1e-30], [3.0, 0.5]])

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(None, 0))
  @functools.partial(jax.vmap, in_axes=(0, None))
  def value_and_grad(pair, alpha):
    return jax.value_and_grad(lambda p: exp_ibp_loss(p[0], p[1], alpha))(pair)

  values, grads = value_and_grad(pairs, jnp.array([0.01, 0.5, 0.0, 1.0]))
  np.testing.assert_array_equal(values[:2, :3], 0)
  np.testing.assert_allclose(values[2:, :3], [[2, 0, 0], [0, 2, 0]], rtol=1e-6)
  np.testing.assert_allclose(values[:2, 3], 1e-30, rtol=1e-4)
  assert np.all(np.isfinite(grads))
  np.testing.assert_array_equal(grads[:2, :3], 0)
  want = values[1, 4] * 0.5 / pairs[4]
  np.testing.assert_allclose(grads[1, 4], want, rtol=1e-5)


def small_reference(x, lower, upper, lam, variant):
  """Float64, entry by entry."""
  widest = max(b - a for a, b in zip(lower, upper, strict=True)) / 2
  ends = []
  for value, a, b in zip(x, lower, upper, strict=True):
    half = lam * (widest if variant == "original" else (b - a) / 2)
    middle = (a + b) / 2 if 2 * half > b - a else min(max(value, a + half), b - half)
    ends.append((max(middle - half, a), min(middle + half, b)))
  return np.array(ends).T


compiled = jax.jit(sabr_box, static_argnames="variant")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  x=st.lists(st.sampled_from([0.0, 1.0, 0.02, 0.5, 0.97]), min_size=4, max_size=4),
  share=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
  eps=st.sampled_from([0.0, 0.05, 0.4, 2.0]),
  lam=st.sampled_from([0.0, 0.1, 0.4, 0.9, 1.0]) | st.floats(0, 1, width=32),
  variant=st.sampled_from(SABR_VARIANTS),
)
def test_small_boxes_lie_inside(x, share, eps, lam, variant):
  box = Interval.from_linf(jnp.array([x]), eps)
  x_adv = jnp.clip(box.lower + jnp.array([share]) * (box.upper - box.lower), box.lower, box.upper)
  small = compiled(x_adv, box, jnp.float32(lam), variant=variant)
  assert np.all((box.lower <= small.lower) & (small.lower <= small.upper))
  assert np.all(small.upper <= box.upper)
  assert np.all((small.lower <= x_adv + 1e-6) | (lam == 1))
  want = small_reference(
    *(np.asarray(v[0], np.float64) for v in (x_adv, box.lower, box.upper)), lam, variant
  )
  np.testing.assert_allclose([small.lower[0], small.upper[0]], want, atol=1e-6)
  if variant == "ctbench":
    assert np.all((x_adv >= small.lower - 1e-6) & (x_adv <= small.upper + 1e-6))
    np.testing.assert_allclose(small.radius, lam * box.radius, atol=1e-6)
  if lam == 1:
    np.testing.assert_allclose(small.lower, box.lower, atol=1e-6)
    np.testing.assert_allclose(small.upper, box.upper, atol=1e-6)
  if lam == 0:
    np.testing.assert_array_equal(small.lower, x_adv)
    np.testing.assert_array_equal(small.upper, x_adv)


def test_no_gradient_passes_through_the_attack():
  box = Interval(jnp.zeros((1, 2)), jnp.ones((1, 2)))

  def total(x_adv, box, variant):
    small = sabr_box(x_adv, box, 0.5, variant)
    return (small.lower + 5 * small.upper).sum()

  for variant in SABR_VARIANTS:
    inner, outer = jax.grad(total, argnums=(0, 1))(jnp.array([[0.5, 0.9]]), box, variant)
    np.testing.assert_array_equal(inner, 0)
    assert np.all(outer.upper != 0)


def test_penalty_counts_kernels_only():
  params = {
    "conv": {"kernel": jnp.array([[[[-1.0, 2.0]]]]), "bias": jnp.full(2, 100.0)},
    "norm": {"scale": jnp.full(2, 100.0)},
    "dense": {"kernel": jnp.array([[0.5], [-0.25]])},
  }
  assert l1_penalty(params) == 3.75
  assert l1_penalty({}) == 0
  np.testing.assert_array_equal(jax.grad(l1_penalty)(params)["dense"]["kernel"], [[1], [-1]])


ONES = jnp.ones(2)
UNIT = Interval(jnp.zeros((1, 2)), jnp.ones((1, 2)))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: mixed_loss(ONES, ONES, 1.5), r"kappa is 1\.5; allowed: \[0, 1\]"),
    (lambda: mtl_ibp_loss(ONES, ONES, -0.1), r"alpha is -0\.1"),
    (lambda: exp_ibp_loss(ONES, ONES, np.nan), "alpha is nan"),
    (lambda: cc_ibp_loss(ONES[None], ONES[None], 2), "alpha is 2"),
    (lambda: sabr_box(ONES[None], UNIT, 1.1), r"lam is 1\.1"),
    (lambda: sabr_box(ONES, UNIT, 0.5), r"x_adv has shape \(2,\); expected \(1, 2\)"),
    (lambda: sabr_box(ONES[None], UNIT, 0.5, "orig"), "variant is 'orig'.*'original'"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
