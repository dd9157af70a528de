"""The objective of a step: every method at every radius, its limits, and a float64 replay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import robust
from balance_jax.losses import cross_entropy
from balance_jax.models import CNN7
from balance_jax.robust import objective as objectives
from balance_jax.robust.objective import METHODS, Network, Objective
from tests.robust.test_regularizers import balance, tightness

TARGET = 0.1
LABELS = np.array([0, 1, 2, 1])
KEY = jax.random.key(0)
# Programs that run a few times on small arrays need no fast code.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OPTIONS = {
  "eps": TARGET,
  "kappa_start": 1.0,
  "kappa_end": 1.0,
  "lambda_0": 0.5,
  "l1": 0.0,
  "alpha": 0.4,
  "shrinkage": 0.4,
  "taps_weight": 2.0,
  "beta": 6.0,
}


@functools.cache
def images():
  return np.random.default_rng(0).uniform(0, 1, (4, 6, 6, 1)).astype(np.float32)


@functools.cache
def cnn():
  model = CNN7(width=2, dense=8, convs=((2, 2),), num_classes=3)
  variables = jax.jit(model.init)(KEY, jnp.zeros((1, 6, 6, 1)))
  # Running statistics that no batch has.
  stats = jax.tree.map(lambda s: s + 0.5, variables["batch_stats"])

  def apply(variables, x, train):
    mutable = ["batch_stats"] if train else False
    return model.apply(variables, x, train=train, mutable=mutable)

  parts = (functools.partial(model.apply, part=part) for part in ("prefix", "suffix"))
  return Network(apply, *parts), variables["params"], stats


@functools.cache
def compiled(method):
  """(params, eps, options) -> (result, gradient of its mean loss); one program a method."""
  network, _, stats = cnn()

  def mean(params, eps, options):
    # That of ReLU states is the same for all, and slow to compile.
    regularizer = "both" if method == "ibp" else "tight"
    objective = Objective(method, attack_steps=2, regularizer=regularizer, **options)
    result = objective(network, params, stats, images(), LABELS, KEY, eps)
    return result.losses.mean(), result

  def run(params, eps, options):
    (_, result), grads = jax.value_and_grad(mean, has_aux=True)(params, eps, options)
    return result, grads

  return jax.jit(run, compiler_options=QUICK)


def step(method, eps, **options):
  result, grads = compiled(method)(cnn()[1], jnp.float32(eps), OPTIONS | options)
  return result, grads


@functools.cache
def clean():
  network, params, stats = cnn()
  logits, new = jax.jit(functools.partial(network.apply, train=True))(
    {"params": params, "batch_stats": stats}, images()
  )
  return cross_entropy(logits, LABELS), new["batch_stats"]


def assert_equal(one, other, rtol=1e-5, atol=1e-6):
  for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_every_radius(method):
  natural, running = clean()
  for eps in (0.0, 0.4 * TARGET, TARGET):
    result, grads = step(method, eps)
    assert result.losses.shape == (4,)
    for leaf in jax.tree.leaves((result, grads)):
      assert np.all(np.isfinite(leaf))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    for name, value in result.observed.items():
      assert value.shape[0] == 4, name
    if method != "pgd-at":  # whose training pass is that of the attacked batch
      assert_equal(result.running, running)
      np.testing.assert_allclose(result.observed["natural_loss"], natural, rtol=1e-5)
  if method in objectives.BOUNDED:
    assert result.observed["radius"].shape == (4, 2)
    np.testing.assert_allclose(result.observed["relu_states"].sum(-1), 1, rtol=1e-6)
    assert set(result.observed) == {"natural_loss", "margin", "verified", "radius", "relu_states"}
    # Regularisers only at radius 0, on top of the natural loss.
    ended = step(method, 0.0, lambda_0=0.0)[0]
    np.testing.assert_array_equal(ended.losses, ended.observed["natural_loss"])
    extra = step(method, 0.0)[0].losses - natural
    np.testing.assert_allclose(extra, extra[0], rtol=1e-4)
    assert extra[0] > 0.01
    # Not at the target, whatever their weight.
    assert_equal(step(method, TARGET, lambda_0=9.0)[0].losses, result.losses)
  else:
    assert_equal(step(method, 0.0)[0].losses, natural)


def test_kappa_mixes_with_the_natural_loss():
  natural, _ = clean()
  for eps, kappa in ((0.4 * TARGET, 0.6 * 0.2 + 0.4 * 0.7), (TARGET, 0.7)):
    robust_losses = step("ibp", eps, lambda_0=0.0)[0].losses
    mixed = step("ibp", eps, lambda_0=0.0, kappa_start=0.2, kappa_end=0.7)[0].losses
    np.testing.assert_allclose(mixed, (1 - kappa) * natural + kappa * robust_losses, rtol=1e-5)
    assert np.all(robust_losses > natural)


def test_limits_are_ibp():
  for eps in (0.4 * TARGET, TARGET):
    want = step("ibp", eps)
    for method, options in (
      ("sabr", {"shrinkage": 1.0}),
      ("mtl-ibp", {"alpha": 1.0}),
      ("exp-ibp", {"alpha": 1.0}),
      ("cc-ibp", {"alpha": 1.0}),
    ):
      # Biases in front of a normalisation have a gradient of 0, computed up to 1e-5.
      assert_equal(step(method, eps, **options), want, rtol=2e-4, atol=5e-5)
    attacked = [step(name, eps, alpha=0.0)[0].losses for name in ("mtl-ibp", "exp-ibp", "cc-ibp")]
    assert_equal(attacked[1:], [attacked[0]] * 2)
    crown = [step(name, eps) for name in ("crown-ibp", "crown-ibp-fusion")]
    if eps == TARGET:
      assert_equal(crown, [want, want], atol=5e-5)
    else:
      for result, _ in crown:
        assert np.all(np.abs(result.losses - want[0].losses) > 1e-4)
    # TAPS is IBP until the target is reached, and a product from then on.
    taps = step("taps", eps)[0]
    np.testing.assert_allclose(taps.observed["margin"], want[0].observed["margin"], rtol=1e-5)
    assert np.allclose(taps.losses, want[0].losses, rtol=1e-5) == (eps < TARGET)
    assert_equal(step("staps", eps, shrinkage=1.0)[0].losses, taps.losses, rtol=1e-4)


def test_small_boxes_and_attacks_are_easier_than_bounds():
  ibp = step("ibp", TARGET)[0]
  sabr, point = (step("sabr", TARGET, shrinkage=s)[0] for s in (0.4, 0.0))
  assert np.all(sabr.losses < ibp.losses)
  assert np.all(point.losses < sabr.losses)
  # A box of no width is the attack alone.
  attacked = step("mtl-ibp", TARGET, alpha=0.0)[0].losses
  np.testing.assert_allclose(point.losses, attacked, rtol=1e-4)
  assert np.all(sabr.observed["radius"] < ibp.observed["radius"])
  assert np.all(step("staps", TARGET)[0].losses < step("taps", TARGET)[0].losses)


def test_penalty_of_kernels():
  params = cnn()[1]
  plain, with_l1 = (step("natural", TARGET, l1=l1)[0].losses for l1 in (0.0, 0.01))
  np.testing.assert_allclose(with_l1 - plain, 0.01 * robust.l1_penalty(params), rtol=1e-4)


# A network of plain functions for the replay: dense, batch normalisation, ReLU, dense.
def init(seed=0, sizes=(5, 8, 3), dtype=np.float32):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(0, 0.6, shape).astype(dtype)  # noqa: E731
  n, m, k = sizes
  params = {"first": draw(n, m), "gamma": draw(m), "beta": draw(m), "last": draw(m, k)}
  stats = {"mean": draw(m), "var": 1 + draw(m) ** 2}
  return params, stats, rng.uniform(0, 1, (4, n)).astype(dtype)


def plain_apply(variables, x, train, normalize=True):
  p, stats = variables["params"], variables["batch_stats"]
  hidden = x @ p["first"]
  if train:
    batch = {"mean": hidden.mean(0), "var": hidden.var(0)}
    new = jax.tree.map(lambda old, b: 0.9 * old + 0.1 * b, stats, batch)
    stats = batch
  if normalize:
    scale = p["gamma"] / jnp.sqrt(stats["var"] + 1e-5)
    hidden = (hidden - stats["mean"][None]) * scale[None]
  logits = jax.nn.relu(hidden + p["beta"][None]) @ p["last"]
  return (logits, new) if train else logits


def replay(params, x, eps, regularizer, kappa, lam=0.5):
  """Losses of one IBP step in float64."""
  p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
  hidden = x @ p["first"]
  mean, scale = hidden.mean(0), p["gamma"] / np.sqrt(hidden.var(0) + 1e-5)
  rows = np.stack([[np.eye(3)[y] - np.eye(3)[j] for j in range(3) if j != y] for y in LABELS])
  rows = rows @ p["last"].T

  def loss(margins):
    return np.log1p(np.exp(-margins).sum(-1))

  natural = loss(np.einsum("bjn,bn->bj", rows, np.maximum((hidden - mean) * scale + p["beta"], 0)))
  radius = max(eps, 1e-6)
  low, high = np.clip(x - radius, 0, 1), np.clip(x + radius, 0, 1)
  center = ((low + high) / 2 @ p["first"] - mean) * scale + p["beta"]
  spread = (high - low) / 2 @ np.abs(p["first"]) * np.abs(scale)
  layer = center - spread, center + spread
  ends = np.maximum(layer[0], 0), np.maximum(layer[1], 0)
  margins = np.einsum("bjn,bn->bj", rows, (ends[0] + ends[1]) / 2)
  margins -= np.einsum("bjn,bn->bj", np.abs(rows), (ends[1] - ends[0]) / 2)
  losses = (1 - kappa) * natural + kappa * loss(margins) if eps > 0 else natural
  terms = {"tight": tightness((low, high), [layer]), "relu": balance([layer])}
  terms |= {"both": sum(terms.values()), "none": 0.0}
  return losses + lam * (1 - eps / TARGET) * terms[regularizer], margins, layer


def test_replay_in_float64():
  params, stats, x = init()

  @jax.jit
  def run(eps):
    def one(regularizer):
      objective = Objective("ibp", eps=TARGET, kappa_start=0.3, regularizer=regularizer)
      return objective(Network(plain_apply), params, stats, x, LABELS, KEY, eps)

    return {name: one(name) for name in objectives.REGULARIZERS}

  for eps in (0.0, 0.3 * TARGET, TARGET):
    for name, result in run(jnp.float32(eps)).items():
      kappa = 0.3 + 0.7 * eps / TARGET
      want, margins, layer = replay(params, x, eps, name, kappa)
      # At radius 0 the regularisers' box of 1e-6 has its ends rounded to multiples of 6e-8.
      np.testing.assert_allclose(result.losses, want, rtol=2e-5 if eps else 1e-3)
      np.testing.assert_allclose(result.observed["margin"], margins.min(-1), rtol=1e-4, atol=1e-5)
      assert result.observed["verified"].tolist() == (margins.min(-1) > 0).tolist()
      radius = (layer[1] - layer[0]).mean() / 2
      np.testing.assert_allclose(
        result.observed["radius"], np.full((4, 1), radius), rtol=1e-4 if eps else 0.03
      )
  batch = {"mean": (x @ params["first"]).mean(0), "var": (x @ params["first"]).var(0)}
  want = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, batch)
  assert_equal(result.running, want)


def test_gradient_passes_through_the_moments_of_the_batch():
  with jax.enable_x64(True):
    params, stats, x = jax.tree.map(jnp.asarray, init(dtype=np.float64))
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: rng.normal(0, 1, a.shape), params)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
      objective = Objective("ibp", eps=TARGET, kappa_start=0.3)
      network = Network(plain_apply)
      return objective(network, params, stats, x, LABELS, KEY, 0.5 * TARGET).losses.mean()

    def moved(h):
      return loss(jax.tree.map(lambda a, d: a + h * d, params, direction))[0]

    value, grads = loss(params)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), grads, direction)))
    np.testing.assert_allclose(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-6)
    want = replay(params, x, 0.5 * TARGET, "both", 0.3 + 0.7 * 0.5)[0].mean()
    # The radius passes through float32 in the schedules of kappa and lambda.
    np.testing.assert_allclose(value, want, rtol=1e-7)


def test_padded_rows_leave_no_trace_in_the_regularizers():
  params, _, x = init()
  keep = np.array([True, True, False, True])

  def apply(variables, x, train):
    variables = variables | {"batch_stats": {"mean": jnp.zeros(8), "var": jnp.zeros(8)}}
    found = plain_apply(variables, x, train, normalize=False)
    return (found[0], {}) if train else found

  @jax.jit
  def run(x, where):
    objective = Objective("ibp", eps=TARGET, tau=1.0)
    return objective(Network(apply), params, {}, x, LABELS, KEY, 0.3 * TARGET, where)

  junk = x.copy()
  junk[2] = np.random.default_rng(9).uniform(0, 1, 5)
  one, other = run(x, keep), run(junk, keep)
  assert_equal(one.losses[keep], other.losses[keep])
  assert_equal(one.observed["relu_states"], other.observed["relu_states"])
  everyone = run(x, np.ones(4, bool)).losses
  assert np.all(np.abs(everyone - run(junk, np.ones(4, bool)).losses)[keep] > 1e-4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"method": "ipb"}, "method is 'ipb'.*'ibp'"),
    ({"regularizer": "l2"}, "regularizer is 'l2'; allowed: both, none, relu, tight"),
    ({"eps": 0.0}, r"eps is 0\.0; allowed: \(0, inf\]"),
    ({"kappa_end": 1.5}, r"kappa_end is 1\.5"),
    ({"alpha": -0.1}, r"alpha is -0\.1"),
    ({"shrinkage": 2}, "shrinkage is 2"),
    ({"relu_shrinkage": np.nan}, "relu_shrinkage is nan"),
    ({"lambda_0": -1.0}, r"lambda_0 is -1\.0"),
    ({"tau": 0.0}, r"tau is 0\.0"),
    ({"l1": -1e-6}, "l1 is -1e-06"),
    ({"taps_weight": 0.0}, r"taps_weight is 0\.0"),
    ({"attack_steps": 0}, "attack_steps is 0"),
    ({"attack_steps": 1.0}, r"attack_steps is 1\.0; expected an integer"),
    ({"attack_scale": 0.0}, r"attack_scale is 0\.0"),
    ({"beta": -1.0}, r"beta is -1\.0"),
    ({"relu_lower": "sloped"}, "relu_lower is 'sloped'"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    Objective(**options)


def test_bad_batches():
  params, stats, x = init()
  network = Network(plain_apply)
  with pytest.raises(ValueError, match="method 'taps' needs a network with prefix and suffix"):
    Objective("taps")(network, params, stats, x, LABELS, KEY, 0.1)
  with pytest.raises(ValueError, match="outside the valid range"):
    Objective("ibp")(network, params, stats, 2 * x, LABELS, KEY, 0.1)
  with pytest.raises(ValueError, match=r"eps is -0\.1"):
    Objective("pgd-at")(network, params, stats, x, LABELS, KEY, -0.1)


def test_cost_is_that_of_three_passes():
  model = CNN7(width=8, dense=128)
  shape = jax.eval_shape(model.init, KEY, jnp.zeros((1, 16, 16, 1)))
  network = Network(
    lambda v, x, train: model.apply(v, x, train=train, mutable=["batch_stats"] if train else False)
  )
  x, labels = jnp.zeros((64, 16, 16, 1)), jnp.zeros(64, int)

  def flops(method):
    def loss(variables, x, eps):
      result = Objective(method, eps=TARGET)(network, *variables, x, labels, KEY, eps)
      return result.losses.mean(), (result.running, result.observed)

    variables = shape["params"], shape["batch_stats"]
    program = jax.jit(jax.grad(loss, has_aux=True)).lower(variables, x, 0.05).compile()
    return program.cost_analysis()["flops"]

  # Three times for clean, centre and radius; the rest is entry by entry.
  assert flops("ibp") <= 3.2 * flops("natural")
