import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance_jax.bounds.interval import Interval
from balance_jax.robust import attacks
from balance_jax.robust.attacks import attack_succeeds, pgd

KEY = jax.random.key(0)


class SineNet:
  """logits = sin(x V) W + b for an x of (B, 2, 3): many local maxima, in JAX and in NumPy."""

  def __init__(self, num_classes=5, label_bias=0.0, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    self.v = rng.normal(0, 4, (6, 8)).astype(dtype)
    self.w = rng.normal(0, 1, (8, num_classes)).astype(dtype)
    self.b = np.zeros(num_classes, dtype)
    self.b[0] = label_bias
    self.visited = []

  def __call__(self, x):
    return jnp.sin(x.reshape(len(x), 6) @ self.v) @ self.w + self.b[None]

  def recorded(self, x):
    # In order: a loop waits for the callbacks of one round before the next.
    jax.debug.callback(lambda x: self.visited.append(np.asarray(x)), x)
    return self(x)

  def visits(self):
    jax.effects_barrier()
    return np.stack(self.visited)

  def cross_entropy(self, x, label):
    """(loss, gradient, broken) of one x (2, 3), in float64."""
    hidden = x.reshape(6).astype(np.float64) @ self.v
    logits = np.sin(hidden) @ self.w + self.b
    p = np.exp(logits - logits.max())
    p /= p.sum()
    grad = self.v @ (np.cos(hidden) * (self.w @ (p - np.eye(len(p))[label])))
    broken = np.any(np.delete(logits, label) >= logits[label])
    return -np.log(p[label]), grad.reshape(2, 3), broken


def sine_batch(batch=4, dtype=np.float32, eps=0.15):
  x = np.random.default_rng(1).uniform(0, 1, (batch, 2, 3)).astype(dtype)
  return x, Interval.from_linf(x, eps), np.zeros(batch, int)


def reference_pgd(net, x, center, lower, upper, label, sizes, goal):
  """Best point and all points of one example."""
  path, best, best_loss, broken = [], center, -np.inf, False
  if goal == "success":
    best_loss, _, broken = net.cross_entropy(center, label)
  for size in (*sizes, None):
    path.append(x)
    loss, grad, success = net.cross_entropy(x, label)
    success = success and goal == "success"
    if not broken and (success or loss > best_loss):
      best, best_loss, broken = x, loss, success
    if size is not None:
      x = np.clip(x + size * (upper - lower) / 2 * np.sign(grad), lower, upper)
  return best, path


@pytest.mark.parametrize("goal", ["success", "loss"])
def test_path_equals_reference(goal):
  sizes = 0.25 * np.repeat([1, 0.1], [14, 6])
  with jax.enable_x64(True):
    # At this bias some examples break at the center, some on the way and some never.
    net = SineNet(label_bias=4.0, dtype=np.float64)
    x, box, labels = sine_batch(batch=6, dtype=np.float64)
    attack = jax.jit(lambda x: pgd(net.recorded, KEY, box, labels, center=x, steps=20, goal=goal))
    found, visited = attack(x), net.visits()
  visited = visited[1:] if goal == "success" else visited
  assert len(visited) == 21
  first_breaks = []
  for i in range(len(x)):
    lower, upper = np.asarray(box.lower[i]), np.asarray(box.upper[i])
    best, path = reference_pgd(net, visited[0, i], x[i], lower, upper, labels[i], sizes, goal)
    # The sizes are float32, and so agree to 1e-8 of a half-width.
    np.testing.assert_allclose(visited[:, i], np.stack(path), atol=1e-7)
    np.testing.assert_allclose(found[i], best, atol=1e-7)
    broken = [bool(net.cross_entropy(point, 0)[2]) for point in (x[i], *path)]
    first_breaks.append(broken.index(True) if True in broken else None)
  kinds = {"center" if k == 0 else "never" if k is None else "later" for k in first_breaks}
  assert kinds == {"center", "later", "never"}


@pytest.mark.parametrize(
  ("steps", "expected"),
  [
    (1, [2.0]),
    (10, [0.25] * 10),
    (19, [0.25] * 19),
    (20, [0.25] * 14 + [0.025] * 6),
    (50, [0.25] * 25 + [0.025] * 15 + [0.0025] * 5 + [0.00025] * 5),
  ],
)
def test_default_step_sizes(steps, expected):
  np.testing.assert_allclose(attacks.step_sizes(steps), expected, rtol=1e-6)


def test_given_step_size_is_constant():
  np.testing.assert_allclose(attacks.step_sizes(60, 0.035), np.full(60, 0.035), rtol=1e-6)


@functools.partial(jax.jit, static_argnames=("loss", "steps", "init", "goal"))
def linear_attack(w, box, labels, **options):
  return pgd(lambda x: (x.reshape(len(x), -1) - 0.5) @ w, KEY, box, labels, **options)


def test_finds_the_worst_corner_of_a_linear_classifier():
  x, box, labels = sine_batch(batch=5)
  labels = labels + np.arange(5) % 2
  w = np.random.default_rng(2).normal(0, 1, (6, 2)).astype(np.float32)
  # The margin falls fastest along w_other - w_label, the same direction at every x.
  up = (w[:, 1 - labels] - w[:, labels]).T.reshape(x.shape) > 0
  corner = np.where(up, box.upper, box.lower)
  for loss in ("ce", "margin"):
    found = linear_attack(w, box, labels, loss=loss, steps=8, goal="loss")
    np.testing.assert_array_equal(found, corner)
  fgsm = linear_attack(w, box, labels, steps=1, step_size=1.0, init="center", goal="loss")
  np.testing.assert_allclose(fgsm, corner, atol=1e-7)


def test_succeeds_only_where_a_corner_is_worse():
  rng = np.random.default_rng(3)
  x = rng.uniform(0, 1, (64, 2, 3)).astype(np.float32)
  box, w = Interval.from_linf(x, 0.1), rng.normal(0, 1, (6, 5)).astype(np.float32)
  labels = np.argmax((x.reshape(64, 6) - 0.5) @ w, axis=1)
  center, radius = (
    np.asarray(a, np.float64).reshape(64, 6) for a in (box.center - 0.5, box.radius)
  )
  apart = w[:, labels].T[:, :, None] - w[None].astype(np.float64)
  worst = np.einsum("bd,bdk->bk", center, apart) - np.einsum("bd,bdk->bk", radius, np.abs(apart))
  breakable = np.any((worst <= 0) & (np.arange(5) != labels[:, None]), axis=1)
  found = np.asarray(linear_attack(w, box, labels, loss="dlr", steps=20))
  success = np.asarray(attack_succeeds(lambda x: (x.reshape(64, 6) - 0.5) @ w, found, labels))
  # Another class may be the easier one, so a gradient attack may miss a few.
  assert not np.any(success & ~breakable)
  assert np.mean(success[breakable]) > 0.8
  assert 10 < breakable.sum() < 54


def reference_loss(name, z, y, target):
  z = np.asarray(z, np.float64)
  ordered = np.sort(z)[::-1]
  others = np.delete(z, y).max()
  if name == "ce":
    return np.log(np.exp(z - z.max()).sum()) + z.max() - z[y]
  if name == "margin":
    return others - z[y]
  if name == "dlr":
    return -(z[y] - others) / (ordered[0] - ordered[2] + 1e-12)
  return -(z[y] - z[target]) / (ordered[0] - (ordered[2] + ordered[3]) / 2 + 1e-12)


def test_losses_equal_reference():
  rng = np.random.default_rng(4)
  logits = rng.normal(0, 3, (12, 4)).astype(np.float32)
  labels, targets = np.arange(12) % 4, (np.arange(12) + 1) % 4
  names = (*attacks.LOSSES, "targeted-dlr")

  @jax.jit
  def losses_and_gradients(logits, low):
    losses = [lambda z, n=name: attacks.attack_loss(n, z, labels, targets) for name in names]
    grads = [jax.grad(lambda z, f=f: f(z).sum())(logits) for f in losses]
    return [f(logits) for f in losses], grads, [f(low) for f in losses]

  results = losses_and_gradients(logits, jnp.asarray(logits, jnp.bfloat16))
  for name, found, grad, low in zip(names, *results, strict=True):
    expected = [reference_loss(name, *args) for args in zip(logits, labels, targets, strict=True)]
    assert found.dtype == low.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(low, expected, rtol=0.1, atol=0.1)  # bfloat16 has 8 bits
    slopes = np.zeros((12, 4))
    for b, k in np.ndindex(12, 4):
      shift = 1e-6 * (np.arange(4) == k)
      above, below = (
        reference_loss(name, logits[b] + s, labels[b], targets[b]) for s in (shift, -shift)
      )
      slopes[b, k] = (above - below) / 2e-6
    np.testing.assert_allclose(grad, slopes, rtol=1e-4, atol=1e-5)


def test_ties_and_nan_are_successes():
  nan, inf = np.nan, np.inf
  logits = [[2, 1, 0], [1, 1, 0], [1, 2, 0], [nan, 0, 0], [1, nan, 0], [inf, 0, 0], [inf, inf, 0]]
  labels = np.zeros(7, np.uint8)
  found = attack_succeeds(lambda x: x, jnp.array(logits, jnp.float32), labels)
  assert found.tolist() == [False, True, True, True, True, False, True]
  one = attack_succeeds(lambda x: x, jnp.array([[1.0, 0.0]] * 2), np.array([-1, 2]))
  assert one.tolist() == [True, True]


def test_more_restarts_are_never_worse_and_no_start_is():
  net, (_, box, labels) = SineNet(seed=5), sine_batch()

  @jax.jit
  def attack():
    found = [pgd(net, KEY, box, labels, steps=3, restarts=n, goal="loss") for n in (1, 3)]
    keys = jax.vmap(lambda r: jax.random.fold_in(KEY, r))(jnp.arange(3))
    shares = jax.vmap(lambda key: jax.random.uniform(key, box.shape))(keys)
    return found, [box.lower + share * (box.upper - box.lower) for share in shares]

  def losses(x):
    return np.array([net.cross_entropy(np.asarray(point), 0)[0] for point in x])

  found, starts = attack()
  one, three = losses(found[0]), losses(found[1])
  assert np.all(one >= losses(starts[0]) - 1e-6)
  assert np.all(three >= np.max([losses(start) for start in starts], axis=0) - 1e-6)
  assert np.all(three >= one)
  assert np.any(three > one + 1e-3)


def test_vmap_equals_single_calls():
  net = SineNet()
  x, _, labels = sine_batch(batch=6)
  x, labels, keys = x.reshape(2, 3, 2, 3), labels.reshape(2, 3), jax.random.split(KEY, 2)

  def attack(key, x, labels):
    return pgd(net, key, Interval.from_linf(x, 0.1), labels, steps=3, init="center")

  batched, single = jax.jit(jax.vmap(attack))(keys, x, labels), jax.jit(attack)
  for i in range(2):
    np.testing.assert_allclose(batched[i], single(keys[i], x[i], labels[i]), atol=1e-6)


def test_no_gradient_and_no_differentiated_loop():
  x, _, labels = sine_batch()
  net = SineNet()

  def objective(w, x):
    x_adv = pgd(lambda x: net(x) * w, KEY, Interval.from_linf(x, 0.1), labels, steps=3)
    return jnp.sum(x_adv**2) + w**2

  grads = jax.jit(jax.grad(objective, argnums=(0, 1)))(2.0, jnp.asarray(x))
  assert grads[0] == 4.0
  assert not np.any(grads[1])
  loops = [
    str(jax.make_jaxpr(f)(2.0, x)).count("= scan[") for f in (objective, jax.grad(objective))
  ]
  assert loops[0] == loops[1] > 0


def broken_net(x):
  """Class 5 wins but for NaN; gradients are undefined at 0, and a logit is NaN at some x."""
  features = jnp.sqrt(jnp.abs(x.reshape(len(x), 6)))
  sixth = jnp.log(features[:, :1] - 0.2)
  return jnp.concatenate([features[:, :5], 20 + features[:, 5:], sixth], axis=1)


def awkward_box(seed, eps, scale):
  rng = np.random.default_rng(seed)
  x = rng.uniform(-scale, scale, (3, 2, 3)).astype(np.float32)
  x[:, 1] = 0.0
  radius = eps * rng.integers(0, 2, x.shape)  # often 0, so that x stays where it is
  return Interval.from_linf(x, radius.astype(np.float32), -scale, scale)


@jax.jit
def attack_broken_net(box, seed):
  return pgd(broken_net, jax.random.key(seed), box, jnp.full(3, 5), steps=4, restarts=2, loss="dlr")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0, 0.6), st.floats(0, 10))
def test_stays_in_the_box(seed, eps, scale):
  box = awkward_box(seed, eps, scale)
  found = np.asarray(attack_broken_net(box, seed))
  assert np.all((found >= box.lower) & (found <= box.upper))


def call(box=None, labels=(0, 1), logits_fn=lambda x: x, **options):
  box = Interval.from_linf(jnp.full((2, 3), 0.5), 0.1) if box is None else box
  return pgd(logits_fn, KEY, box, jnp.array(labels), **{"steps": 1, **options})


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ({"steps": 0}, r"steps is 0; allowed: \[1"),
    ({"steps": 2.0}, "steps is 2.0; expected an integer"),
    ({"restarts": 0}, "restarts is 0"),
    ({"step_size": 0.0}, "step_size is 0.0"),
    ({"step_size": float("nan")}, "step_size is nan"),
    ({"loss": "cw"}, "loss is 'cw' .*; allowed: ce, dlr, margin"),
    ({"loss": "dlr"}, "loss is 'dlr', for 4 classes or more; logits_fn returns 3"),
    ({"init": "zero"}, "init is 'zero'"),
    ({"goal": "win"}, "goal is 'win'"),
    ({"init": "center", "restarts": 2}, "restarts is 2"),
    ({"labels": (0, 3)}, "labels holds 3; allowed: 0 to 2"),
    ({"labels": (-1, 0)}, "labels holds -1; allowed: 0 to 2"),
    ({"labels": (0, 1, 1)}, r"labels has shape \(3,\); expected \(2\)"),
    ({"labels": (0.0, 1.0)}, "labels has dtype float32; expected integers"),
    ({"center": np.full((2, 3), 0.7)}, "center has values outside of the box"),
    ({"center": np.full((2, 3), np.nan)}, "center has values outside of the box"),
    ({"center": np.full(3, 0.5)}, r"center has shape \(3,\)"),
    ({"box": Interval(np.ones((2, 3)), np.zeros((2, 3)))}, "box has lower 1.0 > upper 0.0"),
    ({"box": Interval(np.zeros((2, 3)), np.full((2, 3), np.nan))}, "box holds values that are not"),
    ({"box": Interval(np.zeros((2, 3), int), np.ones((2, 3), int))}, "floating-point dtype"),
    ({"logits_fn": lambda x: x.sum(axis=1)}, r"expected one array \(2, K\)"),
    ({"logits_fn": lambda x: (x, x)}, r"expected one array \(2, K\)"),
    ({"logits_fn": lambda x: x[:, :1]}, "logits_fn returns 1 class"),
  ],
)
def test_bad_input(bad, message):
  with pytest.raises(ValueError, match=message):
    call(**bad)
