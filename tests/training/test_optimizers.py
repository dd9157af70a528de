"""The optimizer of configs: schedule by hand, AdamW in float64, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.training.optimizers import adamw, warmup_cosine


def test_schedule_at_its_corners():
  schedule = warmup_cosine(0.5, warmup_steps=10, total_steps=110, end_fraction=0.1)
  steps = jnp.array([0, 5, 10, 60, 110, 200])
  expected = [0.0, 0.25, 0.5, 0.5 * (0.1 + 0.9 * 0.5), 0.05, 0.05]
  np.testing.assert_allclose(jax.vmap(schedule)(steps), expected, rtol=1e-6)
  constant = warmup_cosine(0.5, warmup_steps=0, total_steps=10, end_fraction=1.0)
  np.testing.assert_allclose([constant(0), constant(9)], [0.5, 0.5])


def test_updates_are_adamw_with_clipping():
  """Three steps in float64 NumPy from the formulas of AdamW behind a clip of the norm."""
  rng = np.random.default_rng(0)
  w, grads = rng.normal(size=5), 3.0 * rng.normal(size=(3, 5))
  optimizer = adamw(0.1, total_steps=4, warmup_fraction=0.25, weight_decay=0.01, clip_norm=1.0)
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


def test_numbers_may_be_traced():
  def total(rate):
    optimizer = adamw(rate, total_steps=10, clip_norm=rate * 10)
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
  ],
)
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    adamw(**({"learning_rate": 0.1, "total_steps": 10} | kwargs))
