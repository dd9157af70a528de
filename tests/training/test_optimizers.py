"""The optimizer of configs: AdamW on its schedule in float64, clipping, the end of the schedule."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.training.optimizers import SWEEPABLE, make_optimizer


def test_updates_are_adamw_with_clipping():
  """Three steps in float64 NumPy from the formulas of AdamW behind a clip of the norm."""
  rng = np.random.default_rng(0)
  w, grads = rng.normal(size=5), 3.0 * rng.normal(size=(3, 5))
  optimizer = make_optimizer(
    0.1,
    total_steps=4,
    warmup_fraction=0.25,
    end_fraction=0.1,
    weight_decay=0.01,
    weight_decay_mode="coupled",
    clip_norm=1.0,
  )
  params = jnp.asarray(w, jnp.float32)
  state = optimizer.init(params)
  rates = [0.0, 0.1, 0.1 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / 3)))]
  m = v = np.zeros(5)
  for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), 1):
    updates, state = optimizer.update(jnp.asarray(grad, jnp.float32), state, params)
    params = params + updates
    grad = grad * min(1.0, 1.0 / np.linalg.norm(grad))
    m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
    direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
    w = w - rate * (direction + 0.01 * w)
    np.testing.assert_allclose(params, w, rtol=1e-5, atol=1e-6)


def changes(optimizer, steps=4):
  """The parameters of one number under gradients of 1, before each step and after the last."""
  params = jnp.ones(())
  state, seen = optimizer.init(params), [1.0]
  for _ in range(steps):
    updates, state = optimizer.update(jnp.ones(()), state, params)
    params = params + updates
    seen.append(float(params))
  return np.diff(seen)


def test_the_schedule_ends_at_an_absolute_or_relative_rate():
  """Without decay and with gradients of 1, Adam moves by the learning rate."""
  fixed = {"total_steps": 2, "warmup_fraction": 0.0, "weight_decay": 0.0}
  for end, expected in (
    ({"end_learning_rate": 0.02}, 0.02),
    ({"end_fraction": 0.5}, 0.05),
    ({"end_learning_rate": 0.02, "end_fraction": 0.5}, 0.05),  # the larger one
    ({"end_learning_rate": 7.0}, 0.1),  # never above the peak
  ):
    moved = changes(make_optimizer(0.1, **fixed, **end))
    np.testing.assert_allclose(
      moved, [-0.1, -(0.1 + expected) / 2, -expected, -expected], rtol=1e-5
    )


@pytest.mark.parametrize("rule", ["stable_adamw", "adam_atan2"])
def test_other_rules_take_the_same_settings(rule):
  moved = changes(make_optimizer(0.1, total_steps=4, rule=rule, weight_decay=0.0))
  assert np.all(moved <= 0.0)
  assert moved[1] < -0.01


def test_what_may_be_swept_is_an_argument():
  names = inspect.signature(make_optimizer).parameters
  assert set(SWEEPABLE) < set(names)


def test_numbers_may_be_traced():
  def total(rate):
    optimizer = make_optimizer(rate, total_steps=10, clip_norm=rate * 10)
    params = jnp.ones(3)
    state = optimizer.init(params)
    for _ in range(3):
      updates, state = optimizer.update(jnp.ones(3), state, params)
      params = params + updates
    return params.sum()

  rates = jnp.array([0.01, 0.1])
  np.testing.assert_allclose(jax.vmap(total)(rates), [total(0.01), total(0.1)], rtol=1e-5)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"clip_norm": -1.0}, "clip_norm is -1.0"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ({"warmup_fraction": 1.0}, "warmup_fraction is 1.0"),
    ({"end_fraction": 2.0}, "end_fraction is 2.0"),
    ({"total_steps": 0}, "total_steps is 0"),
    ({"rule": "adamwe"}, r"rule is 'adamwe' \(did you mean 'adamw'"),
    ({"weight_decay_mode": "both"}, "weight_decay_mode is 'both'"),
  ],
)
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    make_optimizer(**({"learning_rate": 0.1, "total_steps": 10} | kwargs))
