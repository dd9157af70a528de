"""Bounds of margins: float64 references by hand, what must agree, order, soundness, gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.bounds import Interval, UnsupportedPrimitive
from balance_jax.robust.margin_bounds import bound_margins, loss_fusion_bound, margin_bounds
from balance_jax.robust.margins import margin_cross_entropy, margins

LABELS = np.array([0, 2, 1, 2])


def dense_layers(sizes=(5, 7, 6, 3), seed=0):
  rng = np.random.default_rng(seed)
  return [
    (rng.normal(0, 1.5 / n**0.5, (n, m)).astype(np.float32), rng.normal(0, 0.3, m).astype("f"))
    for n, m in itertools.pairwise(sizes)
  ]


def dense(layers, x):
  for weight, bias in layers[:-1]:
    x = jax.nn.relu(x @ weight + bias[None])
  return x @ layers[-1][0] + layers[-1][1][None]


def images(shape=(5,), seed=1):
  return np.random.default_rng(seed).uniform(0, 1, (len(LABELS), *shape)).astype(np.float32)


# The references, in float64 and one example at a time.
def margin_rows(label, num_classes=3):
  eye = np.eye(num_classes)
  return np.stack([eye[label] - eye[j] for j in range(num_classes) if j != label])


def box_of(x, eps):
  x = np.asarray(x, np.float64)
  return np.clip(x - eps, 0, 1), np.clip(x + eps, 0, 1)


def least(rows, bias, lower, upper):
  """min of rows @ x + bias over the box."""
  return rows @ (lower + upper) / 2 - np.abs(rows) @ (upper - lower) / 2 + bias


def pulled_back(layers, inner, rows, lower, upper, choice):
  """CROWN's lower bound of rows @ (output of the last layer), ReLUs before it in boxes `inner`."""
  bias = 0.0
  for i in reversed(range(len(layers))):
    bias, rows = bias + rows @ layers[i][1], rows @ layers[i][0].T
    if i:
      low, high = inner[i - 1]
      active, open_ = low >= 0, (low < 0) & (high > 0)
      chord = np.where(open_, high / np.where(open_, high - low, 1), active)
      slope = {"adaptive": high > -low, "same-slope": chord, "zero": 0, "one": 1}[choice]
      slope = np.where(open_, slope, active)
      positive, negative = np.maximum(rows, 0), np.minimum(rows, 0)
      bias = bias + negative @ np.where(open_, -low * chord, 0)
      rows = positive * slope + negative * chord
  return least(rows, bias, lower, upper)


def reference(layers, x, label, eps, method, choice="adaptive"):
  """Bounds of one example's margins."""
  layers = [(w.astype(np.float64), b.astype(np.float64)) for w, b in layers]
  lower, upper = box_of(x, eps)
  low, high, inner = lower, upper, []
  for i, (weight, bias) in enumerate(layers[:-1]):
    ends = least(weight.T, bias, low, high), -least(-weight.T, -bias, low, high)
    if method == "crown":
      eye = np.eye(len(bias))
      bound = functools.partial(
        pulled_back, layers[: i + 1], inner, lower=lower, upper=upper, choice=choice
      )
      ends = np.maximum(ends[0], bound(rows=eye)), np.minimum(ends[1], -bound(rows=-eye))
    inner.append(ends)
    low, high = np.maximum(ends[0], 0), np.maximum(ends[1], 0)
  rows = margin_rows(label)
  if method == "ibp":
    weight, bias = layers[-1]
    return least(rows @ weight.T, rows @ bias, low, high), inner
  return pulled_back(layers, inner, rows, lower, upper, choice), inner


@functools.partial(jax.jit, static_argnames="choices")
def everything(layers, x, labels, eps, mix, choices=("adaptive", "same-slope", "zero")):
  """All methods in one program."""
  box = Interval.from_linf(x, eps)
  bound = functools.partial(bound_margins, functools.partial(dense, layers), box, labels)
  found = {("ibp", "adaptive"): bound()}
  for method in ("crown-ibp", "crown"):
    for choice in choices:
      found[method, choice] = bound(method, relu_lower=choice)
    found[method, "mix"] = bound(method, mix=mix)
  found["fusion", "adaptive"] = loss_fusion_bound(functools.partial(dense, layers), box, labels)[0]
  found["chunk", "adaptive"] = bound("crown-ibp", chunk=1)
  found["directed", "adaptive"] = bound(directed=True)
  return found


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_against_numpy(eps):
  layers, x = dense_layers(), images()
  found = everything(layers, x, LABELS, eps, 0.3)
  for name, bounds in found.items():
    method, choice = name
    if method == "fusion":
      continue
    method = {"directed": "ibp", "chunk": "crown-ibp"}.get(method, method)
    choice = "adaptive" if choice == "mix" else choice
    for i, label in enumerate(LABELS):
      want, inner = reference(layers, x[i], label, eps, method, choice)
      if "mix" in name:
        want = 0.3 * want + 0.7 * reference(layers, x[i], label, eps, "ibp")[0]
      if "directed" in name:
        # Below the ideal bound without any tolerance, and by no more than rounding can explain.
        assert np.all(bounds.lower[i] <= want)
      tolerance = 2e-4 if "directed" in name else 2e-5
      np.testing.assert_allclose(bounds.lower[i], want, tolerance, tolerance, err_msg=str(name))
      for preact, ends in zip(bounds.preacts, inner, strict=True):
        assert preact.shape[0] == len(LABELS)
        got = np.stack([preact.lower[i].ravel(), preact.upper[i].ravel()])
        np.testing.assert_allclose(got, ends, rtol=2e-5, atol=2e-5)


def test_mixture_ends_at_its_parts():
  layers, x = dense_layers(), images()
  for mix in (0.0, 1.0):
    found = everything(layers, x, LABELS, 0.2, mix)
    for method in ("crown-ibp", "crown"):
      want = found[method, "adaptive"] if mix else found["ibp", "adaptive"]
      for got, part in zip(*map(jax.tree.leaves, (found[method, "mix"], want)), strict=True):
        np.testing.assert_allclose(got, part, rtol=1e-6, atol=1e-6)


def test_order_of_methods_and_radii():
  layers, x = dense_layers(seed=3), images()
  previous = None
  for eps in (0.0, 0.02, 0.1, 0.4):
    found = everything(layers, x, LABELS, eps, 0.5)
    exact = margins(dense(layers, x), LABELS)
    # With 0 below open ReLUs every line is at least as tight as IBP's two constants.
    loose, middle = found["ibp", "adaptive"].lower, found["crown-ibp", "zero"].lower
    tight = found["crown", "zero"].lower
    assert np.all(loose <= middle + 1e-5)
    assert np.all(middle <= tight + 1e-5)
    assert np.all(tight <= exact + 1e-5)
    # The fused bound is one of the loss, above the exact one.
    assert np.all(found["fusion", "adaptive"] >= margin_cross_entropy(exact) - 1e-5)
    if previous is None:
      for name in (("ibp", "adaptive"), ("crown", "zero"), ("crown-ibp", "same-slope")):
        np.testing.assert_allclose(found[name].lower, exact, rtol=1e-5, atol=1e-5)
      np.testing.assert_allclose(
        found["fusion", "adaptive"], margin_cross_entropy(exact), rtol=1e-5
      )
    else:
      assert np.all(loose < previous["ibp", "adaptive"].lower)
      assert np.all(middle <= previous["crown-ibp", "zero"].lower + 1e-6)
      assert np.all(tight <= previous["crown", "zero"].lower + 1e-6)
    previous = found
  # And the differences are there to be seen.
  assert np.all(middle > loose + 0.1)


def test_no_point_of_the_box_is_below():
  layers, x, eps = dense_layers(seed=5), images(), 0.15
  found = everything(layers, x, LABELS, eps, 0.5)
  lower, upper = box_of(x, eps)
  rng = np.random.default_rng(0)
  share = rng.uniform(0, 1, (4000, *x.shape))
  share[::2] = np.round(share[::2])  # corners
  points = lower + share * (upper - lower)
  layers = [(w.astype(np.float64), b.astype(np.float64)) for w, b in layers]
  hidden = points
  for weight, bias in layers[:-1]:
    hidden = np.maximum(hidden @ weight + bias, 0)
  logits = hidden @ layers[-1][0] + layers[-1][1]
  rows = np.stack([margin_rows(label) for label in LABELS])
  values = np.einsum("bjk,nbk->nbj", rows, logits)
  for name, bounds in found.items():
    if name[0] == "fusion":
      worst = np.log1p(np.exp(-values).sum(-1)).max(0)
      assert np.all(worst <= bounds + 1e-5)
      assert np.all(bounds <= worst + 3)
    else:
      assert np.all(bounds.lower <= values.min(0) + 1e-5), name


def test_permuted_batches_give_permuted_bounds():
  layers, x, order = dense_layers(), images(), np.array([2, 0, 3, 1])
  straight = everything(layers, x, LABELS, 0.2, 0.5)
  mixed = everything(layers, x[order], LABELS[order], 0.2, 0.5)
  for got, want in zip(jax.tree.leaves(mixed), jax.tree.leaves(straight), strict=True):
    np.testing.assert_allclose(got, want[order], rtol=1e-5, atol=1e-6)


def test_linear_classifiers_are_exact():
  layers, x = dense_layers((5, 3)), images()
  x[0] = [0.0, 1.0, 0.05, 0.95, 0.5]  # so that the range cuts the box
  found = everything(layers, x, LABELS, 0.2, 0.5, choices=("adaptive",))
  inside = 0
  for i, label in enumerate(LABELS):
    rows = margin_rows(label) @ layers[0][0].T.astype(np.float64)
    bias = margin_rows(label) @ layers[0][1]
    lower, upper = box_of(x[i], 0.2)
    want = np.minimum(rows * lower, rows * upper).sum(-1) + bias
    for name in ("ibp", "crown-ibp", "crown"):
      bounds = found[name, "adaptive"]
      np.testing.assert_allclose(bounds.lower[i], want, rtol=1e-5, atol=1e-6)
      assert bounds.preacts == []
    if np.all(upper - lower > 0.399):
      inside += 1
      np.testing.assert_allclose(want, rows @ x[i] + bias - 0.2 * np.abs(rows).sum(-1), rtol=1e-6)
  unbounded = margin_bounds(dense, layers, x, LABELS, 0.2, lo=-np.inf, hi=np.inf)
  rows = np.einsum("bjk,nk->bjn", [margin_rows(label) for label in LABELS], layers[0][0])
  want = margins(dense(layers, x), LABELS) - 0.2 * np.abs(rows).sum(-1)
  np.testing.assert_allclose(unbounded, want, rtol=1e-5, atol=1e-6)


# A network whose affine tail is long: residual convolution, average, normalisation, two layers.
def test_fused_loss_against_numpy():
  layers, x, eps = dense_layers((5, 6, 3)), images(), 0.2
  found, bounds = jax.jit(
    lambda x: loss_fusion_bound(
      functools.partial(dense, layers), Interval.from_linf(x, eps), LABELS
    )
  )(x)
  float64 = [(w.astype(np.float64), b.astype(np.float64)) for w, b in layers]
  for i, label in enumerate(LABELS):
    low, inner = reference(layers, x[i], label, eps, "ibp")
    np.testing.assert_allclose(bounds.lower[i], low, rtol=1e-5, atol=1e-5)
    rows = margin_rows(label)
    ends = np.maximum(inner[0], 0)
    high = -least(-rows @ float64[1][0].T, -rows @ float64[1][1], *ends)
    slope = (np.exp(-high) - np.exp(-low)) / (high - low)
    top = -pulled_back(float64, inner, -(slope @ rows), *box_of(x[i], eps), "adaptive")
    want = np.log(1 + (np.exp(-low) - slope * low).sum() + top)
    np.testing.assert_allclose(found[i], want, rtol=2e-5)
  assert bounds.preacts[0].shape[0] == len(LABELS)


def test_fused_loss_of_huge_boxes_is_finite():
  layers = dense_layers()
  x = images()

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(None, 0))
  def value_and_grad(layers, scale):
    def total(layers):
      box = Interval(-scale * jnp.ones_like(x), scale * (1 + x))
      return loss_fusion_bound(functools.partial(dense, layers), box, LABELS)[0].sum()

    return jax.value_and_grad(total)(layers)

  values, grads = value_and_grad(layers, jnp.array([0.0, 1e-7, 1.0, 1e3, 1e6]))
  assert np.all(np.isfinite(values))
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
  assert np.all(np.diff(values) >= -1e-4)
  assert values[-1] > 1e5


def test_gradients_equal_finite_differences():
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    layers = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), dense_layers((5, 6, 4, 3), 7))
    x = jnp.asarray(images(), jnp.float64)
    step = jax.tree.map(lambda a: rng.normal(0, 1, a.shape), layers), 0.3

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def total(layers, eps):
      net, box = functools.partial(dense, layers), Interval.from_linf(x, eps)
      mixed = bound_margins(net, box, LABELS, "crown", mix=0.5, relu_lower="same-slope").lower
      fused, bounds = loss_fusion_bound(net, box, LABELS)
      return jnp.sin(mixed).sum() + fused.sum() + jnp.cos(bounds.lower).sum()

    def moved(h):
      ends = jax.tree.map(lambda a, s: a + h * s, (layers, 0.1), step)
      return total(*ends)[0]

    grads = total(layers, 0.1)[1]
    parts = jax.tree.map(lambda g, s: np.sum(g * s), grads, step)
    # Of the layers, and of the radius.
    along = sum(jax.tree.leaves(parts[0])), parts[1]
    assert min(map(abs, along)) > 1e-2
    np.testing.assert_allclose(sum(along), (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-6)


def test_relu_shrinkage():
  layers, x, eps = dense_layers((5, 6, 3)), images(), 0.2
  bound = jax.jit(
    lambda q: (
      bound_margins(
        functools.partial(dense, layers), Interval.from_linf(x, eps), LABELS, relu_shrinkage=q
      ).lower
    )
  )
  for q in (1.0, 0.8):
    for i, label in enumerate(LABELS):
      _, ((low, high),) = reference(layers, x[i], label, eps, "ibp")
      high = np.where((low < 0) & (high > 0), q * high, high)
      rows = margin_rows(label)
      want = least(rows @ layers[1][0].T, rows @ layers[1][1], *np.maximum((low, high), 0))
      np.testing.assert_allclose(bound(q)[i], want, rtol=1e-5, atol=1e-5)


X = images()
BOX = Interval(0.9 * X, X)
NET = functools.partial(dense, dense_layers())


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (lambda: bound_margins(NET, BOX, LABELS + 1), ValueError, "labels holds 3; allowed: 0 to 2"),
    (lambda: bound_margins(NET, BOX, LABELS[:2]), ValueError, r"labels has shape \(2,\)"),
    (lambda: bound_margins(NET, BOX, LABELS, "crwn"), ValueError, "method is 'crwn'.*'crown'"),
    (lambda: bound_margins(NET, BOX, LABELS, mix=1.5), ValueError, "mix is 1.5"),
    (lambda: bound_margins(NET, BOX, LABELS, "crown", chunk=0), ValueError, "chunk is 0"),
    (lambda: bound_margins(NET, BOX, LABELS, relu_lower="x"), ValueError, "relu_lower is 'x'"),
    (lambda: bound_margins(NET, BOX, LABELS, relu_shrinkage=2.0), ValueError, "relu_shrinkage"),
    (lambda: bound_margins(NET, Interval(X, 0.9 * X), LABELS), ValueError, "box has lower"),
    (lambda: bound_margins(NET, Interval(X, X * np.nan), LABELS), ValueError, "not finite"),
    (lambda: bound_margins(NET, Interval(X[0], X[0]), LABELS), ValueError, r"box has shape \(5,\)"),
    (lambda: bound_margins(lambda x: x[:, :1], BOX, LABELS), ValueError, r"shape \(4, 1\)"),
    (lambda: bound_margins(lambda x: x.sum(), BOX, LABELS), ValueError, r"shape \(\); expected"),
    (lambda: loss_fusion_bound(lambda x: x[:2], BOX, LABELS), ValueError, r"\(2, 5\)"),
    (
      lambda: bound_margins(lambda x: jnp.ones((len(x), 3)), BOX, LABELS),
      ValueError,
      "logits do not depend on the input",
    ),
    (
      lambda: bound_margins(lambda x: jnp.sort(x, axis=-1), BOX, LABELS),
      UnsupportedPrimitive,
      "operation 'sort' at .*test_margin_bounds",
    ),
    (lambda: margin_bounds(dense, dense_layers(), X, LABELS, -0.1), ValueError, "eps is -0.1"),
    (lambda: margin_bounds(dense, dense_layers(), 2 * X, LABELS, 0.1), ValueError, "valid range"),
  ],
)
def test_bad_input(call, error, message):
  with pytest.raises(error, match=message):
    call()


def test_labels_out_of_range_that_are_traced_give_nan():
  found = jax.jit(lambda y: bound_margins(lambda x: x[:, :3], BOX, y).lower)(LABELS + 1)
  assert np.isnan(found[np.array([1, 3])]).all()
  assert np.isfinite(found[np.array([0, 2])]).all()
