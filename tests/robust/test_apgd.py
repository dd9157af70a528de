import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance_jax.bounds.interval import Interval
from balance_jax.robust.apgd import apgd, checkpoints
from balance_jax.robust.attacks import attack_succeeds
from tests.robust.test_attacks import KEY, SineNet, awkward_box, broken_net, sine_batch


def reference_checkpoints(steps):
  window, shrink, least = max(22 * steps // 100, 1), max(3 * steps // 100, 1), steps * 6 // 100
  found = [window]
  while found[-1] + max(window - shrink, least, 1) <= steps:
    window = max(window - shrink, least, 1)
    found.append(found[-1] + window)
  return [mark for mark in found if mark <= steps]


def test_checkpoints():
  assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
  assert checkpoints(1) == (1,)
  assert checkpoints(5) == (1, 2, 3, 4, 5)
  assert checkpoints(50) == (11, 21, 30, 38, 45)
  for steps in range(1, 120):
    assert list(checkpoints(steps)) == reference_checkpoints(steps)


def reference_apgd(net, start, center, lower, upper, label, steps, rho, code):
  """All points, the best one, the last step size, (too few rises, stuck) at each checkpoint."""
  radius = np.maximum(upper - center, center - lower)
  x = before = start
  loss, grad, _ = net.cross_entropy(x, label)
  path, best = [x], (loss, x, grad)
  step, losses, best_at_mark, halved_at_mark = 2.0, [], loss, True
  reasons, last_mark = [], 0
  current = 0.0 if code else loss
  for k in range(steps):
    z = np.clip(x + step * radius * np.sign(grad), lower, upper)
    share = 1.0 if k == 0 else 0.75
    x_new = np.clip(x + share * (z - x) + (1 - share) * (x - before), lower, upper)
    before, x = x, x_new
    loss, grad, _ = net.cross_entropy(x, label)
    path.append(x)
    losses.append(loss > current)
    current = loss
    if loss > best[0]:
      best = loss, x, grad
    if k + 1 in reference_checkpoints(steps):
      rises, asked = sum(losses[last_mark:]), rho * (k + 1 - last_mark)
      few = rises <= asked if code else rises < asked
      stuck = not halved_at_mark and best[0] == best_at_mark
      reasons.append((few, stuck))
      if few or stuck:
        step /= 2
        current, x, grad = current if code else best[0], *best[1:]
      halved_at_mark, best_at_mark, last_mark = few or stuck, best[0], k + 1
  return np.stack(path), best[1], step, reasons


# With rho .4 a checkpoint passes now and then, so that the second condition is asked as well.
# With rho 0 and windows of one step, the first condition never holds and the second waits.
@pytest.mark.parametrize(
  ("variant", "rho", "steps", "eps"),
  [
    ("paper", 0.75, 40, 0.15),
    ("paper", 0.4, 40, 0.15),
    ("paper", 0.0, 6, 0.6),
    ("code", 0.75, 40, 0.15),
    ("code", 0.4, 40, 0.15),
  ],
)
def test_path_equals_reference(variant, rho, steps, eps):
  with jax.enable_x64(True):
    # Never broken. Some other seeds end in a cycle whose loss rises by its last digit, so that the
    # two sides may disagree on whether it rose.
    net = SineNet(label_bias=8.0, dtype=np.float64, seed=1)
    x, box, labels = sine_batch(dtype=np.float64, eps=eps)
    found = jax.jit(
      lambda box: apgd(
        net.recorded, KEY, box, labels, center=x, steps=steps, rho=rho, variant=variant
      )
    )(box)
    visited, outcomes = net.visits()[1:], set()
  assert len(visited) == steps + 1
  for i in range(len(x)):
    lower, upper = np.asarray(box.lower[i]), np.asarray(box.upper[i])
    path, best, step, reasons = reference_apgd(
      net, visited[0, i], x[i], lower, upper, labels[i], steps, rho, variant == "code"
    )
    np.testing.assert_allclose(visited[:, i], path, atol=1e-12)
    np.testing.assert_allclose(found[i], best, atol=1e-12)
    assert not any(net.cross_entropy(point, 0)[2] for point in path)
    assert step < 2.0 or rho == 0
    outcomes.update(reasons)
  # (too few rises, stuck) at each checkpoint: what the cases are there for.
  assert (False, False) in outcomes
  assert ((True, False) if rho == 0.75 else (False, True)) in outcomes


def test_start_lies_on_the_ball_around_the_center():
  net, (x, box, labels) = SineNet(), sine_batch(batch=12, eps=0.1)
  jax.jit(lambda x: apgd(net.recorded, KEY, box, labels, center=x, steps=1, restarts=2))(x)
  starts = net.visits()[[1, 3]]  # two visits a restart, behind the one of the center
  assert all(np.all((start >= box.lower) & (start <= box.upper)) for start in starts)
  assert not np.allclose(starts[0], starts[1])
  cut = np.asarray(box.radius) < 0.0999
  reach = np.abs(starts - x[None]).max(axis=(2, 3))
  whole = ~cut.any(axis=(1, 2))
  assert 0 < whole.sum() < 12
  np.testing.assert_allclose(reach[:, whole], 0.1, rtol=1e-5)
  # Where the range cuts one side, the radius is still eps: the other side is reached beyond the
  # half-width of the box.
  assert np.any(np.abs(starts - x[None])[:, cut] > np.asarray(box.radius)[None][:, cut] * 1.2)


@functools.partial(jax.jit, static_argnames=("loss", "steps"))
def linear_attack(w, box, labels, **options):
  return apgd(lambda x: (x.reshape(len(x), -1) - 0.5) @ w, KEY, box, labels, **options)


def test_finds_the_worst_corner_of_a_linear_classifier():
  _, box, labels = sine_batch(batch=5)
  w = np.random.default_rng(2).normal(0, 1, (6, 2)).astype(np.float32)
  # Far from broken, so that the search goes on; the margin falls along w_1 - w_0 at every x.
  shift = np.array([20.0, 0.0], np.float32)[None]
  found = jax.jit(
    lambda box: apgd(lambda x: (x.reshape(5, 6) @ w) + shift * 0.25, KEY, box, labels, steps=20)
  )(box)
  corner = np.where((w[:, 1] - w[:, 0]).reshape(1, 2, 3) > 0, box.upper, box.lower)
  # The point is x + (z - x), one rounding away from the corner z.
  np.testing.assert_allclose(found, corner, atol=1e-6)


def test_targets_find_every_corner_that_is_worse():
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
  # Nine targets are asked for, and the four that there are taken.
  found = linear_attack(w, box, labels, loss="targeted-dlr", steps=20)
  success = attack_succeeds(lambda x: (x.reshape(64, 6) - 0.5) @ w, found, labels)
  np.testing.assert_array_equal(success, breakable)
  assert 10 < breakable.sum() < 54


def targeted_dlr(logits, label, target):
  first, _, third, fourth = np.sort(logits)[::-1][:4]
  return -(logits[label] - logits[target]) / (first - (third + fourth) / 2)


def test_the_first_target_is_the_runner_up():
  x, box, labels = sine_batch(batch=3)
  w = np.random.default_rng(6).normal(0, 1, (6, 5)).astype(np.float32)
  bias = np.array([30, 0, 6, 3, 0], np.float32)[None]

  def logits(x):
    return (x.reshape(3, 6) - 0.5) @ w + bias

  attack = jax.jit(
    lambda: apgd(logits, KEY, box, labels, center=x, loss="targeted-dlr", steps=6, num_targets=1)
  )
  found, clean = np.asarray(logits(attack())), logits(x)
  assert np.all(np.argsort(clean, axis=1)[:, ::-1][:, :3] == [0, 2, 3])
  for i in range(3):
    # Closer to class 2, relative to the spread, than any random point of the box.
    reached = targeted_dlr(found[i], 0, 2)
    points = np.random.default_rng(i).uniform(box.lower[i], box.upper[i], (50, 2, 3))
    random = [targeted_dlr(logits(np.stack([point] * 3))[i], 0, 2) for point in points]
    assert reached > max(random)


def test_successes_are_kept_and_clean_mistakes_come_back():
  x, box, labels = sine_batch(batch=6)
  net = SineNet(label_bias=4.0)
  found = np.asarray(jax.jit(lambda x: apgd(net, KEY, box, labels, center=x, steps=30))(x))
  clean = [net.cross_entropy(point, 0)[2] for point in x]
  attacked = [net.cross_entropy(point, 0)[2] for point in found]
  assert 0 < sum(clean) < sum(attacked)
  np.testing.assert_array_equal(found[clean], x[clean])
  assert np.all(np.array(attacked) >= np.array(clean))


def test_more_restarts_are_never_worse():
  net, (_, box, labels) = SineNet(label_bias=12.0, seed=5), sine_batch()
  attack = jax.jit(lambda n: apgd(net, KEY, box, labels, steps=4, restarts=n), static_argnums=0)
  one, four = (
    np.array([net.cross_entropy(np.asarray(point), 0)[0] for point in attack(n)]) for n in (1, 4)
  )
  assert np.all(four >= one * (1 - 1e-3))  # equal points, losses of 1e-6 in float32
  assert np.any(four > one * 1.1)


def test_vmap_equals_single_calls():
  net = SineNet(label_bias=6.0)
  x, _, labels = sine_batch(batch=6)
  x, labels, keys = x.reshape(2, 3, 2, 3), labels.reshape(2, 3), jax.random.split(KEY, 2)

  def attack(key, x, labels):
    box = Interval.from_linf(x, 0.1)
    return apgd(net, key, box, labels, center=x, steps=5, loss="targeted-dlr", num_targets=2)

  batched, single = jax.jit(jax.vmap(attack))(keys, x, labels), jax.jit(attack)
  for i in range(2):
    np.testing.assert_allclose(batched[i], single(keys[i], x[i], labels[i]), atol=1e-6)


def test_no_gradient_and_no_differentiated_loop():
  x, _, labels = sine_batch()
  net = SineNet()

  def objective(w, x):
    x_adv = apgd(lambda x: net(x) * w, KEY, Interval.from_linf(x, 0.1), labels, steps=3)
    return jnp.sum(x_adv) + w**2

  loops = [
    str(jax.make_jaxpr(f)(2.0, x)).count("= scan[") for f in (objective, jax.grad(objective))
  ]
  assert loops[0] == loops[1] > 0


@jax.jit
def attack_broken_net(box, seed):
  return apgd(
    broken_net, jax.random.key(seed), box, jnp.full(3, 5), steps=6, restarts=2, loss="dlr"
  )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0, 0.6), st.floats(0, 10))
def test_stays_in_the_box(seed, eps, scale):
  box = awkward_box(seed, eps, scale)
  found = np.asarray(attack_broken_net(box, seed))
  assert np.all((found >= box.lower) & (found <= box.upper))


def call(labels=(0, 1), num_classes=4, **options):
  box = Interval.from_linf(jnp.full((2, 4), 0.5), 0.1)
  return apgd(lambda x: x[:, :num_classes], KEY, box, jnp.array(labels), **{"steps": 1, **options})


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ({"steps": 0}, r"steps is 0; allowed: \[1"),
    ({"restarts": 0}, "restarts is 0"),
    ({"num_targets": 0}, "num_targets is 0"),
    ({"rho": 1.5}, "rho is 1.5"),
    ({"rho": math.nan}, "rho is nan"),
    ({"variant": "official"}, "variant is 'official'; allowed: code, paper"),
    ({"loss": "margin"}, "loss is 'margin'.*; allowed: ce, dlr, targeted-dlr"),
    ({"loss": "dlr", "num_classes": 3}, "loss is 'dlr', for 4 classes or more; logits_fn returns"),
    ({"loss": "targeted-dlr", "num_classes": 3}, "loss is 'targeted-dlr', for 4 classes or more"),
    ({"labels": (0, 4)}, "labels holds 4; allowed: 0 to 3"),
    ({"center": np.full((2, 4), 0.7)}, "center has values outside of the box"),
  ],
)
def test_bad_input(bad, message):
  with pytest.raises(ValueError, match=message):
    call(**bad)
