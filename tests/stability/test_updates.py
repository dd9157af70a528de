"""Relative steps, skipped steps, QK-Clip and the soft cap against NumPy, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balance_jax.models import Decoder, DecoderConfig
from balance_jax.models.decoder import rotary, rotary_tables
from balance_jax.stability.updates import (
  param_rms,
  qk_clip,
  scale_by_param_rms,
  skip_unstable_steps,
  soft_cap,
)


def test_param_rms_by_hand_and_against_optax():
  params = {"w": jnp.array([[3.0, -4.0], [0.0, 5.0]]), "zero": jnp.zeros(3), "none": jnp.zeros(0)}
  rms = param_rms(params, min_rms=1e-2)
  np.testing.assert_allclose(rms["w"], np.sqrt(50 / 4), rtol=1e-6)
  np.testing.assert_allclose(rms["zero"], 1e-2)
  np.testing.assert_allclose(rms["none"], 1e-2)
  del params["none"]
  updates = {"w": jnp.ones((2, 2)), "zero": jnp.array([1.0, -2.0, 3.0])}
  ours, theirs = scale_by_param_rms(), optax.scale_by_param_block_rms()
  got, _ = jax.jit(ours.update)(updates, ours.init(params), params)
  want, _ = theirs.update(updates, theirs.init(params), params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
  np.testing.assert_allclose(got["zero"], [1e-3, -2e-3, 3e-3], rtol=1e-6)


def test_param_rms_is_traced_and_in_float32():
  params = {"w": jnp.full(4096, 1e-2, jnp.bfloat16)}
  swept = jax.vmap(lambda low: param_rms(params, low)["w"])(jnp.array([1e-3, 0.5]))
  np.testing.assert_allclose(swept, [1e-2, 0.5], rtol=2e-3)  # bfloat16 holds 1e-2 that well
  assert swept.dtype == param_rms(params)["w"].dtype == jnp.float32
  updates, _ = scale_by_param_rms(2.0).update(params, optax.EmptyState(), params)
  assert updates["w"].dtype == jnp.bfloat16


def numpy_skip(norms, losses, window, n_std, min_history):
  """Which steps are skipped, from lists; the loss None where there is none."""
  past_norms, past_losses, skips = [], [], []

  def spike(x, past):
    if len(past) < min_history:
      return False
    past = np.array(past, np.float64)
    return x > past.mean() + n_std * max(past.std(), 1e-4 * abs(past.mean()))

  for norm, loss in zip(norms, losses, strict=True):
    seen = [norm] if loss is None else [norm, loss]
    finite = bool(np.all(np.isfinite(seen)))
    skip = not finite or spike(norm, past_norms)
    if loss is not None:
      skip = skip or spike(loss, past_losses)
    skips.append(skip)
    if finite:
      past_norms = [*past_norms, norm][-window:]
      if loss is not None:
        past_losses = [*past_losses, loss][-window:]
  return np.array(skips)


def skips_of(optimizer, grads, losses=None):
  """(skipped so far, parameters) after each step, by a scan."""

  def step(carry, x):
    params, state = carry
    gradient, loss = x if losses is not None else (x, None)
    updates, state = optimizer.update(gradient, state, params, loss=loss)
    params = optax.apply_updates(params, updates)
    return (params, state), (state.skipped, params)

  start = jnp.zeros(grads.shape[1:])
  xs = grads if losses is None else (grads, losses)
  _, (skipped, params) = jax.lax.scan(step, (start, optimizer.init(start)), xs)
  return skipped, params


def noisy_run(seed, steps=60):
  rng = np.random.default_rng(seed)
  grads = rng.normal(size=(steps, 5)).astype(np.float32)
  losses = (3 + 0.1 * rng.normal(size=steps)).astype(np.float32)
  grads[[4, 25, 26, 50]] *= 40  # step 4 comes before there is a history
  losses[[30, 55]] = 6.0, np.nan
  grads[[7, 40], 2] = np.inf, np.nan
  return grads, losses


@pytest.mark.parametrize("with_loss", [True, False])
@pytest.mark.parametrize(("window", "n_std", "least"), [(16, 3.0, 8), (10, 1.5, 10), (7, 4.0, 2)])
def test_skips_against_numpy(window, n_std, least, with_loss):
  grads, losses = noisy_run(0)
  optimizer = skip_unstable_steps(optax.adam(0.1), window, n_std, least)
  skipped, params = jax.jit(lambda *xs: skips_of(optimizer, *xs))(
    grads, *([losses] if with_loss else [])
  )
  norms = np.sqrt(np.sum(np.square(grads.astype(np.float64)), axis=1))
  want = numpy_skip(norms, losses if with_loss else [None] * len(losses), window, n_std, least)
  assert 3 < want.sum() < 30
  np.testing.assert_array_equal(skipped, np.cumsum(want))
  # What is left is the inner optimizer on the other steps, its state included.
  plain, state, p = optax.adam(0.1), optax.adam(0.1).init(jnp.zeros(5)), jnp.zeros(5)
  update = jax.jit(plain.update)
  for t, skip in enumerate(want):
    if not skip:
      updates, state = update(jnp.asarray(grads[t]), state)
      p = p + updates
    np.testing.assert_allclose(params[t], p, rtol=1e-5, atol=1e-6)


def test_a_lasting_rise_is_accepted_after_a_while():
  grads = jnp.concatenate([jnp.ones(20), jnp.full(20, 3.0)])[:, None]
  skipped, _ = skips_of(skip_unstable_steps(optax.sgd(0.1), 8, 2.0, 4), grads)
  # Recorded though skipped: 3.0 no longer stands out once it is a fifth or more of the window.
  assert 1 <= int(skipped[-1]) <= 3
  assert int(skipped[-1]) == int(skipped[25])


def test_rounding_noise_on_a_constant_history_is_no_spike():
  grads = np.ones((20, 1), np.float32)
  grads[10], grads[15] = 1 + 1e-6, 1.01
  skipped, _ = skips_of(skip_unstable_steps(optax.sgd(0.1), 8, 6.0, 4), jnp.asarray(grads))
  assert int(skipped[10]) == 0
  assert int(skipped[15]) == 1


def test_value_reaches_the_decision_and_the_inner_optimizer():
  seen = []

  def spy(updates, state, params=None, *, value=None, other=None):
    seen.append((value, other))
    return updates, state

  inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), spy)
  optimizer = skip_unstable_steps(inner, 4, 6.0, 2)
  state = optimizer.init(jnp.zeros(2))
  updates, state = optimizer.update(jnp.ones(2), state, value=jnp.inf, other="x")
  assert seen == [(jnp.inf, "x")]
  np.testing.assert_array_equal(updates, 0)
  assert int(state.skipped) == 1
  assert int(state.recorded) == 0


def test_values_that_are_not_finite_leave_the_history():
  optimizer = skip_unstable_steps(optax.sgd(1.0), 3, 6.0, 2)
  state = optimizer.init(jnp.zeros(1))
  for norm in (1.0, 2.0, 3.0, 4.0):
    _, state = optimizer.update(jnp.array([norm]), state, loss=norm + 10)
  for norm, loss in ((jnp.nan, 1.0), (1.0, jnp.inf)):
    _, new = optimizer.update(jnp.array([norm]), state, loss=loss)
    np.testing.assert_array_equal(new.norms, [4.0, 2.0, 3.0])
    np.testing.assert_array_equal(new.losses, [14.0, 12.0, 13.0])
    assert int(new.recorded) == 4
    assert int(new.skipped) == int(state.skipped) + 1


def test_threshold_may_be_traced_and_swept():
  grads, losses = noisy_run(1)

  def total(n_std):
    return skips_of(skip_unstable_steps(optax.sgd(0.1), 16, n_std, 8), grads, losses)[0][-1]

  rates = jnp.array([1.0, 3.0, 1e9])
  swept = jax.jit(jax.vmap(total))(rates)
  assert [int(x) for x in swept] == [int(total(float(r))) for r in rates]
  assert int(swept[0]) > int(swept[1]) > int(swept[2]) == 3  # only what is not finite


def attention_maxima(params, x, heads):
  """Largest q.k / sqrt(head_dim) of each head, rotary positions included."""
  query, key = (x @ params[name] for name in ("query", "key"))
  split = (1, x.shape[0], heads, query.shape[-1] // heads)
  tables = rotary_tables(x.shape[0], split[-1], jnp.float32)
  query, key = (rotary(a.reshape(split), tables)[0] for a in (query, key))
  return jnp.einsum("qhd,khd->hqk", query, key).max((1, 2)) / np.sqrt(split[-1])


def qk_params(seed=0, blocks=3, width=6, inner=8, scale=6.0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

  names = ("query", "key", "value")
  return {
    "params": {
      f"block_{i}": {
        "attention": {name: draw(width, inner) for name in names} | {"out": draw(inner, width)},
        "attention_norm": {"scale": draw(width)},
      }
      for i in range(blocks)
    }
  }


def test_after_qk_clip_no_head_is_above_tau():
  params, heads = qk_params(), 4
  x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 6)), jnp.float32)
  blocks = [params["params"][f"block_{i}"]["attention"] for i in range(3)]
  maxima = jnp.stack([attention_maxima(block, x, heads) for block in blocks])
  tau = float(np.median(maxima))
  clipped = jax.jit(qk_clip)(params, maxima, tau)
  after = jnp.stack(
    [attention_maxima(clipped["params"][f"block_{i}"]["attention"], x, heads) for i in range(3)]
  )
  assert np.all(after <= tau * (1 + 1e-5))
  np.testing.assert_allclose(after, np.minimum(maxima, tau), rtol=1e-4)
  # Nothing but the columns of the heads above tau has changed.
  before, now = params["params"]["block_1"], clipped["params"]["block_1"]
  for name in ("value", "out"):
    np.testing.assert_array_equal(now["attention"][name], before["attention"][name])
  np.testing.assert_array_equal(now["attention_norm"]["scale"], before["attention_norm"]["scale"])
  g = np.minimum(1, tau / np.asarray(maxima[1], np.float64))
  want = np.asarray(before["attention"]["query"], np.float64) * np.repeat(np.sqrt(g), 2)
  np.testing.assert_allclose(now["attention"]["query"], want, rtol=1e-5)


def test_qk_clip_leaves_small_negative_and_broken_maxima_alone():
  params = qk_params(blocks=1)
  maxima = jnp.array([[100.0, -500.0, jnp.nan, jnp.inf]])
  jax.tree.map(np.testing.assert_array_equal, qk_clip(params, maxima), params)
  jax.tree.map(np.testing.assert_array_equal, qk_clip(params, jnp.zeros((1, 4))), params)


def test_qk_clip_counts_blocks_by_number():
  params, maxima = qk_params(blocks=11), np.zeros((11, 4))
  maxima[10], maxima[2, 0] = 400.0, 1e4
  clipped = qk_clip(params, maxima, heads=4)["params"]

  def key(tree, i):
    return np.asarray(tree[f"block_{i}"]["attention"]["key"])

  before = params["params"]
  np.testing.assert_allclose(key(clipped, 10), 0.5 * key(before, 10), rtol=1e-6)
  np.testing.assert_allclose(key(clipped, 2)[:, :2], 0.1 * key(before, 2)[:, :2], rtol=1e-6)
  np.testing.assert_array_equal(key(clipped, 2)[:, 2:], key(before, 2)[:, 2:])
  for i in (0, 1, 3, 9):
    np.testing.assert_array_equal(key(clipped, i), key(before, i))


def test_qk_clip_by_name_equals_by_order():
  params = qk_params(blocks=3)
  maxima = np.random.default_rng(2).uniform(50, 800, (3, 4)).astype(np.float32)
  by_order = qk_clip(params, maxima)
  for front in ("", "params/"):
    named = {f"{front}block_{i}/attention": maxima[i] for i in range(3)}
    jax.tree.map(np.testing.assert_array_equal, qk_clip(params, named), by_order)
  one = qk_clip(params, {"block_1/attention": maxima[1]})["params"]
  jax.tree.map(np.testing.assert_array_equal, one["block_1"], by_order["params"]["block_1"])
  jax.tree.map(np.testing.assert_array_equal, one["block_0"], params["params"]["block_0"])


def test_qk_clip_of_flax_kernels_and_biases():
  rng = np.random.default_rng(3)
  flat = {
    name: {"kernel": rng.normal(size=(5, 6)), "bias": rng.normal(size=6)}
    for name in ("q", "k", "query")
  }
  split = {
    name: {"kernel": leaf["kernel"].reshape(5, 3, 2), "bias": leaf["bias"].reshape(3, 2)}
    for name, leaf in flat.items()
  }
  maxima = jnp.array([[400.0, 1.0, 900.0]])
  for tree, shape in ((flat, (6,)), (split, (3, 2))):
    clipped = qk_clip({"attn": tree}, maxima, query="q", key="k")["attn"]
    scale = np.repeat([0.5, 1.0, 1 / 3], 2).reshape(shape)
    for name in ("q", "k"):
      for leaf in ("kernel", "bias"):
        np.testing.assert_allclose(clipped[name][leaf], tree[name][leaf] * scale, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, clipped["query"], tree["query"])


def test_qk_clip_swept_by_vmap():
  params, maxima = qk_params(blocks=1), jnp.array([[150.0, 20.0, 800.0, 3.0]])
  taus = jnp.array([10.0, 100.0])
  swept = jax.jit(jax.vmap(lambda tau: qk_clip(params, maxima, tau)))(taus)
  for i, tau in enumerate(taus):
    one = qk_clip(params, maxima, float(tau))
    jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), swept, one)


def test_qk_clip_does_nothing_behind_layer_norm():
  tokens = jnp.arange(6)[None] % 5
  outputs, rng = {}, np.random.default_rng(0)
  for norm in ("none", "per_head"):
    model = Decoder(DecoderConfig(vocab_size=5, width=8, depth=1, heads=2, qk_norm=norm))
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    # Entries near 1: the norms of q and k are far above the eps of the layer norm.
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), shapes)
    clipped = qk_clip(params, jnp.array([[400.0, 900.0]]))
    apply = jax.jit(model.apply)
    outputs[norm] = np.max(np.abs(apply(params, tokens) - apply(clipped, tokens)))
  assert outputs["per_head"] < 1e-4
  assert outputs["none"] > 1e-2


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"tau": 0.0}, r"tau is 0.0; allowed: \(0, inf\]"),
    ({"query": "wq"}, "params holds no module with 'wq' and 'key'"),
    ({"max_logits": jnp.ones((2, 4))}, r"max_logits has shape \(2, 4\); expected \(1, any\)"),
    ({"max_logits": jnp.ones(4)}, r"max_logits has shape \(4,\); expected \(1, any\)"),
    ({"heads": 2}, r"max_logits has shape \(1, 4\); expected \(1, 2\)"),
    ({"max_logits": jnp.ones((1, 3))}, r"block_0/attention/\w+'\] has shape \(6, 8\).*3 heads"),
    ({"max_logits": {"block_7/attention": jnp.ones(4)}}, "names 'block_7/attention'; modules"),
    ({"max_logits": {"block_0/attention": jnp.ones((1, 4))}}, r"has shape \(1, 4\)"),
  ],
)
def test_qk_clip_bad_input(kwargs, message):
  with pytest.raises(ValueError, match=message):
    qk_clip(**({"params": qk_params(blocks=1), "max_logits": jnp.ones((1, 4))} | kwargs))


def test_soft_cap():
  z = np.array([-1e4, -50.0, -1e-3, 0.0, 3.0, 40.0, np.inf], np.float32)
  got = jax.jit(soft_cap)(z, 50.0)
  np.testing.assert_allclose(got, 50 * np.tanh(z.astype(np.float64) / 50), rtol=1e-6)
  assert np.all(np.abs(got) <= 50)
  np.testing.assert_allclose(soft_cap(z[2:5], 1e6), z[2:5], rtol=1e-6)
  swept = jax.vmap(lambda cap: soft_cap(jnp.asarray(z), cap))(jnp.array([30.0, 50.0]))
  np.testing.assert_allclose(swept[1], got, rtol=1e-6)
  half = soft_cap(jnp.array([3.0, 64.0], jnp.bfloat16), 50.0)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(np.float32), 50 * np.tanh([0.06, 1.28]), rtol=4e-3)


def test_soft_cap_gradients():
  z, cap, h = np.array([-80.0, 0.5, 20.0]), 50.0, 1e-4
  grad_z, grad_cap = jax.grad(lambda z, cap: jnp.sum(soft_cap(z, cap)), (0, 1))(
    jnp.asarray(z, jnp.float32), cap
  )

  def value(z, cap):
    return cap * np.tanh(z / cap)

  np.testing.assert_allclose(grad_z, (value(z + h, cap) - value(z - h, cap)) / (2 * h), rtol=1e-4)
  want = np.sum(value(z, cap + h) - value(z, cap - h)) / (2 * h)
  np.testing.assert_allclose(grad_cap, want, rtol=1e-4)
  # Far outside the cap the gradient vanishes, and stays finite.
  assert float(jax.grad(lambda z: soft_cap(z, 1.0))(1e30)) == 0.0


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: soft_cap(jnp.ones(2), 0.0), r"cap is 0.0; allowed: \(0, inf\]"),
    (lambda: soft_cap(jnp.ones(2), jnp.ones(2)), r"cap has shape \(2,\)"),
    (lambda: scale_by_param_rms(0.0), "min_rms is 0.0"),
    (lambda: param_rms({}, -1.0), "min_rms is -1.0"),
    (lambda: scale_by_param_rms().update({}, optax.EmptyState()), "params is None"),
    (lambda: skip_unstable_steps(optax.sgd(1.0), window=1), "window is 1"),
    (lambda: skip_unstable_steps(optax.sgd(1.0), window=8.0), "expected an integer"),
    (
      lambda: skip_unstable_steps(optax.sgd(1.0), window=8),
      r"min_history is 64; allowed: \[2, 8\]",
    ),
    (lambda: skip_unstable_steps(optax.sgd(1.0), n_std=0.0), "n_std is 0.0"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_skip_needs_one_loss():
  optimizer = skip_unstable_steps(optax.sgd(1.0))
  with pytest.raises(ValueError, match=r"loss has shape \(3,\)"):
    optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), loss=jnp.ones(3))
