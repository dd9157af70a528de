"""Moments of the clean batch, running and precise statistics."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.models import CNN7, MLP
from balance_jax.robust.statistics import clean_pass, precise_statistics


def training_form(model):
  return functools.partial(model.apply, mutable=["batch_stats"])


@functools.cache
def mlp():
  """(model, params, batch_stats that are not the initial ones, x)."""
  model = MLP(features=(6, 5), num_classes=3, batch_norm=True)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(1.0, 2.0, (16, 4)), jnp.float32)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  stats = jax.tree.map(
    lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32), variables["batch_stats"]
  )
  return model, variables["params"], stats, x


def first_layer(params, x):
  dense = jax.tree.map(np.float64, params["dense_0"])
  return np.float64(x) @ dense["kernel"] + dense["bias"]


def test_moments_running_and_logits():
  model, params, stats, x = mlp()
  apply = training_form(model)
  logits, moments, running = jax.jit(functools.partial(clean_pass, apply))(params, stats, x)
  expected, new = jax.jit(functools.partial(apply, train=True))(
    {"params": params, "batch_stats": stats}, x
  )
  np.testing.assert_array_equal(logits, expected)
  hidden = first_layer(params, x)
  np.testing.assert_allclose(moments["norm_0"]["mean"], hidden.mean(0), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(moments["norm_0"]["var"], hidden.var(0), rtol=1e-5)
  for found, flax in zip(
    jax.tree.leaves(running), jax.tree.leaves(new["batch_stats"]), strict=True
  ):
    np.testing.assert_allclose(found, flax, rtol=1e-6)
  # The bound passes: inference mode with the moments is the training mode.
  again = model.apply({"params": params, "batch_stats": moments}, x)
  np.testing.assert_allclose(again, logits, rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_moments_but_not_through_running_statistics():
  model, params, stats, x = mlp()
  apply = training_form(model)

  def bound_pass(params, stop):
    """Inference at other points, normalised by the clean batch."""
    logits, moments, running = clean_pass(apply, params, stats, x)
    moments = jax.lax.stop_gradient(moments) if stop else moments
    others = model.apply({"params": params, "batch_stats": moments}, x[::-1] + 0.3)
    return jnp.sum(jnp.sin(others)) + jnp.sum(jnp.square(logits)), running

  with jax.enable_x64(True):
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, stats, x))
    params, stats, x = wide
    value = jax.jit(lambda params: bound_pass(params, False)[0])
    grad = jax.jit(jax.grad(lambda params: bound_pass(params, False)[0]))(params)
    stopped = jax.jit(jax.grad(lambda params: bound_pass(params, True)[0]))(params)
    running = jax.jit(
      jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(bound_pass(p, False)[1]))))
    )(params)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    direction = jax.tree.unflatten(
      structure,
      [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)],
    )
    # A small step: kinks of the ReLUs are then not crossed.
    ahead, behind = (
      value(jax.tree.map(lambda p, d, sign=sign: p + sign * 1e-6 * d, params, direction))
      for sign in (1, -1)
    )
    slope = (ahead - behind) / 2e-6

    def along(grad):
      return sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), grad, direction)))

    np.testing.assert_allclose(along(grad), slope, rtol=1e-6)
    assert abs(along(stopped) - slope) > 0.01 * abs(slope)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(running))


def test_costs_nothing_beside_the_training_pass():
  model = CNN7(width=4, dense=8)
  x = jnp.zeros((8, 8, 8, 1))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  params, stats = variables["params"], variables["batch_stats"]
  apply = training_form(model)

  def plain(params, stats, x):
    return apply({"params": params, "batch_stats": stats}, x, train=True)

  both = (functools.partial(clean_pass, apply), plain)
  flops = [jax.jit(f).lower(params, stats, x).compile().cost_analysis()["flops"] for f in both]
  # What is new is a division and a subtraction for every statistic, and nothing per example.
  assert flops[0] - flops[1] <= 4 * sum(leaf.size for leaf in jax.tree.leaves(stats))


class TwoMomenta(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    for i, momentum in enumerate((0.0, 0.9, 0.999)):
      x = x + nn.BatchNorm(not train, momentum=momentum, name=f"norm_{i}")(x)
    return x


def test_every_layer_may_have_a_momentum_of_its_own():
  x = jnp.asarray(np.random.default_rng(1).normal(3, 2, (8, 4)), jnp.float32)
  variables = TwoMomenta().init(jax.random.key(0), x)
  stats = variables["batch_stats"]
  _, moments, running = clean_pass(training_form(TwoMomenta()), variables["params"], stats, x)
  value = np.float64(x)
  for i, momentum in enumerate((0.0, 0.9, 0.999)):
    mean, var = value.mean(0), value.var(0)
    found = moments[f"norm_{i}"]
    # 1 - 0.999 in float32 is wrong by 5e-5 of itself.
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4)
    np.testing.assert_allclose(found["var"], var, rtol=1e-4)
    expected = momentum * np.float64(stats[f"norm_{i}"]["var"]) + (1 - momentum) * var
    np.testing.assert_allclose(running[f"norm_{i}"]["var"], expected, rtol=1e-5)
    value = value + (value - mean) / np.sqrt(var + 1e-5)


def test_without_normalisation_there_are_no_statistics():
  model = MLP(features=(4,), num_classes=3)
  x = jnp.ones((2, 5))
  params = model.init(jax.random.key(0), x)["params"]
  logits, moments, running = clean_pass(training_form(model), params, {}, x)
  np.testing.assert_array_equal(logits, model.apply({"params": params}, x))
  assert moments == running == {}
  grad = jax.grad(lambda p: clean_pass(training_form(model), p, {}, x).logits.sum())(params)
  assert np.abs(grad["dense_0"]["kernel"]).max() > 0
  assert precise_statistics(training_form(model), params, {}, x[None]) == {}


def test_precise_statistics_are_those_of_the_data():
  model, params, stats, _ = mlp()
  rng = np.random.default_rng(2)
  # Batches that differ in mean and spread; far from 0, where E[x^2] - E[x]^2 would lose digits.
  batches = rng.normal(rng.normal(100, 3, (5, 1, 4)), 0.5, (5, 8, 4)).astype(np.float32)
  found = jax.jit(functools.partial(precise_statistics, training_form(model)))(
    params, stats, batches
  )
  hidden = first_layer(params, batches.reshape(40, 4))
  np.testing.assert_allclose(found["norm_0"]["mean"], hidden.mean(0), rtol=1e-5)
  # Values of about 100 carry an error of 1e-5, beside a deviation of 0.5; E[x^2] would carry 1e-3.
  np.testing.assert_allclose(found["norm_0"]["var"], hidden.var(0), rtol=5e-4)
  # One layer further on, against a pass over the batches one by one.
  passes = [clean_pass(training_form(model), params, stats, x).moments["norm_1"] for x in batches]
  means, variances = (np.stack([np.float64(p[name]) for p in passes]) for name in ("mean", "var"))
  np.testing.assert_allclose(found["norm_1"]["mean"], means.mean(0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    found["norm_1"]["var"], variances.mean(0) + means.var(0), rtol=1e-4, atol=1e-5
  )


def test_other_leaves_are_averaged():
  def apply(variables, x, train):
    del train
    old = variables["batch_stats"]
    return x, {"var": 0.5 * old["var"] + 0.5 * x.var(0), "top": 0.25 * old["top"] + 0.75 * x.max()}

  batches = jnp.array([[[0.0], [2.0]], [[4.0], [8.0]], [[1.0], [1.0]]])
  found = precise_statistics(apply, {}, {"var": jnp.ones(1), "top": jnp.ones(())}, batches)
  np.testing.assert_allclose(found["var"], [(1 + 4 + 0) / 3], rtol=1e-6)
  np.testing.assert_allclose(found["top"], (2 + 8 + 1) / 3, rtol=1e-6)


def frozen(variables, x, train):
  del train
  return x, variables["batch_stats"]


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: clean_pass(frozen, {}, {"norm": {"mean": jnp.ones(2)}}, jnp.ones((1, 2))),
      r"batch_stats\['norm'\]\['mean'\] has momentum 1",
    ),
    (
      lambda: clean_pass(frozen, {}, {"count": jnp.array(1)}, jnp.ones((1, 2))),
      r"batch_stats\['count'\] has dtype int32; expected floating",
    ),
    (
      lambda: precise_statistics(frozen, {}, {}, jnp.ones((0, 2, 2))),
      r"batches has shape \(0, 2, 2\)",
    ),
    (lambda: precise_statistics(frozen, {}, {}, jnp.ones(3)), r"batches has shape \(3,\)"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
