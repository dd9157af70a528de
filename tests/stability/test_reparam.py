"""sigma-reparam: NumPy, finite differences with u and v frozen, training, what optimizers see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balance_jax.stability.optimizers import adamw
from balance_jax.stability.reparam import (
  SigmaKernel,
  materialize,
  sigma_of,
  sigma_reparam,
  with_power_iteration,
)
from balance_jax.stability.updates import skip_unstable_steps


def make(seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {"layer": {"kernel": draw(5, 7), "bias": draw(7)}, "head": draw(7, 3)}


def is_kernel(name, leaf):
  return name.endswith("kernel")


def top(kernel):
  return np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)[0]


def loss_of(params, x):
  params = materialize(params)
  hidden = jnp.tanh(x @ params["layer"]["kernel"] + params["layer"]["bias"][None])
  return jnp.mean(jnp.square(hidden @ params["head"] - 1.0))


def train(optimizer, params, x, steps):
  def step(carry, _):
    params, state = carry
    gradient = jax.grad(loss_of)(params, x)
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0]


def inputs(seed=1):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(4, 5)), jnp.float32)


def test_spectral_variant_changes_nothing_at_first():
  params = make()
  node = sigma_reparam(params, is_kernel)["layer"]["kernel"]
  np.testing.assert_allclose(node.gamma, top(params["layer"]["kernel"]), rtol=1e-5)
  np.testing.assert_allclose(sigma_of(node), node.gamma, rtol=1e-5)
  back = materialize(sigma_reparam(params, is_kernel))
  assert jax.tree.structure(back) == jax.tree.structure(params)
  np.testing.assert_allclose(back["layer"]["kernel"], params["layer"]["kernel"], rtol=1e-5)
  np.testing.assert_array_equal(back["head"], params["head"])


def test_paper_variant_has_spectral_norm_one_and_gamma_is_the_norm():
  new = sigma_reparam(make(), is_kernel, variant="paper")
  np.testing.assert_allclose(top(materialize(new)["layer"]["kernel"]), 1.0, rtol=1e-5)
  new["layer"]["kernel"] = new["layer"]["kernel"]._replace(gamma=jnp.array(2.5))
  np.testing.assert_allclose(top(materialize(new)["layer"]["kernel"]), 2.5, rtol=1e-5)


def test_hand_computed():
  kernel = SigmaKernel(
    jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array(10.0), jnp.array([0.0, 1.0]), jnp.array([1.0, 0])
  )
  assert float(sigma_of(kernel)) == 3.0
  np.testing.assert_allclose(materialize(kernel), np.array([[10, 20], [30, 40]]) / 3, rtol=1e-6)


def test_gradients_against_finite_differences_with_frozen_vectors():
  params, x = sigma_reparam(make(), is_kernel), inputs()
  # Off the singular vectors, where sigma is not stationary in u and v.
  tilt = np.random.default_rng(2).normal(size=(2, 7))
  node = params["layer"]["kernel"]
  params["layer"]["kernel"] = node = node._replace(
    u=node.u + 0.2 * jnp.asarray(tilt[0, :5], jnp.float32),
    v=node.v + 0.2 * jnp.asarray(tilt[1], jnp.float32),
  )
  wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  w, gamma, u, v = wide["layer"]["kernel"]

  def numpy_loss(w, gamma):
    effective = gamma * w / (u @ w @ v)
    hidden = np.tanh(np.asarray(x, np.float64) @ effective + wide["layer"]["bias"])
    return np.mean((hidden @ wide["head"] - 1) ** 2)

  np.testing.assert_allclose(loss_of(params, x), numpy_loss(w, gamma), rtol=1e-5)
  grads = jax.grad(loss_of)(params, x)["layer"]["kernel"]
  h, want = 1e-6, np.zeros_like(w)
  for i, j in np.ndindex(*w.shape):
    step = np.zeros_like(w)
    step[i, j] = h
    want[i, j] = (numpy_loss(w + step, gamma) - numpy_loss(w - step, gamma)) / (2 * h)
  np.testing.assert_allclose(grads.kernel, want, rtol=2e-3, atol=1e-5)
  want = (numpy_loss(w, gamma + h) - numpy_loss(w, gamma - h)) / (2 * h)
  np.testing.assert_allclose(grads.gamma, want, rtol=1e-3)
  np.testing.assert_array_equal(grads.u, 0)
  np.testing.assert_array_equal(grads.v, 0)
  # The scale of W has no effect on the model, so the gradient has no part along W.
  along = float(jnp.sum(grads.kernel * node.kernel))
  assert abs(along) < 1e-5 * float(jnp.linalg.norm(grads.kernel) * jnp.linalg.norm(node.kernel))


def numpy_power_iteration(w, u):
  v = w.T @ u
  v /= np.linalg.norm(v)
  u = w @ v
  return u / np.linalg.norm(u), v


def test_one_step_against_numpy():
  params, x = sigma_reparam(make(), is_kernel), inputs()
  optimizer = with_power_iteration(optax.sgd(0.5))
  gradient = jax.grad(loss_of)(params, x)
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  new = optax.apply_updates(params, updates)
  old, node = params["layer"]["kernel"], new["layer"]["kernel"]

  def plain(p, g):
    return p - 0.5 * g

  np.testing.assert_allclose(node.kernel, plain(old.kernel, gradient["layer"]["kernel"].kernel))
  np.testing.assert_allclose(node.gamma, plain(old.gamma, gradient["layer"]["kernel"].gamma))
  np.testing.assert_allclose(new["head"], plain(params["head"], gradient["head"]))
  # On the new kernel, not on the old one, whose singular vectors would stay.
  u, v = numpy_power_iteration(np.asarray(node.kernel, np.float64), np.asarray(old.u, np.float64))
  np.testing.assert_allclose(node.u, u, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(node.v, v, rtol=1e-4, atol=1e-6)
  assert np.max(np.abs(u - np.asarray(old.u))) > 1e-3


def test_sigma_follows_the_spectral_norm_along_training():
  params, x = sigma_reparam(make(), is_kernel), inputs()
  start = params["layer"]["kernel"].kernel
  optimizer = with_power_iteration(adamw(0.02, weight_decay=0.01))
  params, _ = jax.jit(lambda params: train(optimizer, params, x, 150))(params)
  node = params["layer"]["kernel"]
  assert abs(top(node.kernel) - top(start)) > 0.3
  np.testing.assert_allclose(sigma_of(node), top(node.kernel), rtol=1e-3)
  np.testing.assert_allclose(top(materialize(node)), node.gamma, rtol=1e-3)
  for vector in (node.u, node.v):
    np.testing.assert_allclose(np.linalg.norm(vector), 1.0, rtol=1e-5)


def test_power_iteration_converges_from_anywhere():
  node = sigma_reparam(make(), is_kernel)["layer"]["kernel"]
  # A fifth of the way towards the top pair, the sign of v wrong.
  node = node._replace(u=jnp.ones(5) / np.sqrt(5), v=-node.v)
  optimizer = with_power_iteration(optax.sgd(0.0))

  def step(node, _):
    updates, _ = optimizer.update(node, optimizer.init(node), node)
    return optax.apply_updates(node, updates), None

  node = jax.jit(lambda node: jax.lax.scan(step, node, length=60)[0])(node)
  np.testing.assert_allclose(sigma_of(node), top(node.kernel), rtol=1e-5)


def test_optimizers_and_masks_see_what_is_trained_only():
  params = sigma_reparam(make(), is_kernel)
  seen = []

  def mask(tree):
    seen.append(jax.tree.leaves(jax.tree.map(jnp.shape, tree), is_leaf=lambda x: x == ()))
    return jax.tree.map(lambda x: x.ndim >= 2, tree)

  optimizer = with_power_iteration(adamw(0.1, weight_decay=0.5, mask=mask))
  state = optimizer.init(params)
  assert state.mu["layer"]["kernel"].u is None
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, state = optimizer.update(zeros, state, params)
  new, old = optax.apply_updates(params, updates), params["layer"]["kernel"]
  node = new["layer"]["kernel"]
  np.testing.assert_allclose(node.kernel, 0.5 * old.kernel, rtol=1e-6)
  assert float(node.gamma) == float(old.gamma)
  # Halving W turns neither vector; decay would have shortened them.
  np.testing.assert_allclose(node.u, old.u, atol=1e-6)
  np.testing.assert_allclose(node.v, old.v, atol=1e-6)
  assert len(seen) == 1
  assert jax.tree.structure(new) == jax.tree.structure(params)


def test_many_runs_under_vmap_and_jit():
  x, seeds = inputs(), [0, 1]
  kernels = [make(seed) for seed in seeds]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kernels)

  def final(params, lr):
    optimizer = with_power_iteration(adamw(lr))
    return train(optimizer, sigma_reparam(params, is_kernel), x, 3)[0]

  rates = jnp.array([0.01, 0.1])
  swept = jax.jit(jax.vmap(final))(stacked, rates)
  one = jax.jit(final)
  for i, params in enumerate(kernels):
    alone = one(params, rates[i])
    # The sign of a singular pair is arbitrary: compare effective kernels.
    jax.tree.map(
      lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5),
      jax.vmap(materialize)(swept),
      materialize(alone),
    )


def test_a_skipped_step_leaves_the_vectors():
  params = sigma_reparam(make(), is_kernel)
  optimizer = skip_unstable_steps(with_power_iteration(optax.sgd(0.1)))
  bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
  updates, _ = optimizer.update(bad, optimizer.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(params, updates), params)


def test_bfloat16_kernel_keeps_its_dtype():
  params = sigma_reparam({"w": make()["head"].astype(jnp.bfloat16)}, lambda name, x: True)
  node = params["w"]
  assert node.kernel.dtype == materialize(params)["w"].dtype == jnp.bfloat16
  assert node.gamma.dtype == node.u.dtype == node.v.dtype == jnp.float32
  np.testing.assert_allclose(
    materialize(node).astype(np.float32), node.kernel.astype(np.float32), rtol=8e-3
  )


def test_a_kernel_at_zero_stays_finite():
  zero = SigmaKernel(jnp.zeros((2, 3)), jnp.array(1.0), jnp.array([1.0, 0]), jnp.array([1.0, 0, 0]))
  value, grads = jax.value_and_grad(lambda node: jnp.sum(materialize(node)))(zero)
  assert float(value) == 0.0
  assert np.all(np.isfinite(grads.kernel))
  optimizer = with_power_iteration(optax.sgd(0.0))
  updates, _ = optimizer.update(zero, optimizer.init(zero), zero)
  np.testing.assert_array_equal(optax.apply_updates(zero, updates).u, zero.u)
  # Squares of such entries would vanish in float32.
  tiny = zero._replace(kernel=jnp.full((2, 3), 1e-30))
  updates, _ = optimizer.update(tiny, optimizer.init(tiny), tiny)
  new = optax.apply_updates(tiny, updates)
  np.testing.assert_allclose(new.v, np.full(3, 3**-0.5), rtol=1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: sigma_reparam(make(), lambda name, x: False),
      "select picks no array of params; names: head, layer/bias, layer/kernel",
    ),
    (
      lambda: sigma_reparam(make(), lambda name, x: "bias" in name),
      r"params\['layer/bias'\] is float32 with shape \(7,\); expected floating \(d, f\)",
    ),
    (lambda: sigma_reparam({"w": jnp.ones((2, 2), int)}, lambda name, x: True), "is int32 with"),
    (lambda: sigma_reparam({"w": jnp.zeros((2, 2))}, lambda name, x: True), "spectral norm 0.0"),
    (
      lambda: sigma_reparam(make(), is_kernel, variant="spectal"),
      r"variant is 'spectal' \(did you mean 'spectral'.*allowed: paper, spectral",
    ),
    (lambda: with_power_iteration(optax.sgd(1.0)).update({}, ()), "params is None"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
