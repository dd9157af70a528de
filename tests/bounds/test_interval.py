import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.bounds import Interval, crown, ibp
from balance_jax.bounds.interval import check_interval


def test_ball_is_cut_to_the_valid_range():
  x = jnp.array([0.0, 0.4, 1.0])
  box = Interval.from_linf(x, 0.25)
  np.testing.assert_allclose(box.lower, [0, 0.15, 0.75], rtol=1e-6)
  np.testing.assert_allclose(box.upper, [0.25, 0.65, 1], rtol=1e-6)
  np.testing.assert_allclose(box.center, (box.lower + box.upper) / 2, rtol=1e-6)
  np.testing.assert_allclose(box.radius, (box.upper - box.lower) / 2, rtol=1e-6)
  free = Interval.from_linf(x, jnp.array([0.0, 1.0, 2.0]), -jnp.inf, jnp.inf)
  np.testing.assert_allclose(free.lower, [0, -0.6, -1], rtol=1e-6)
  assert box.shape == (3,)
  assert box.dtype == jnp.float32


def test_is_a_pytree():
  box = Interval(jnp.zeros((2, 3)), jnp.ones((2, 3)))
  widths = jax.jit(jax.vmap(lambda b: b.radius.sum()))(box)
  np.testing.assert_allclose(widths, [1.5, 1.5])
  grad = jax.grad(lambda b: b.center.sum())(box)
  assert isinstance(grad, Interval)
  np.testing.assert_allclose(grad.lower, 0.5)


def test_values_under_jit_are_not_looked_at():
  low, high = jax.jit(lambda x, e: jax.tree.leaves(Interval.from_linf(x, e)))(2 * jnp.ones(2), 0.1)
  assert np.all(low <= high)  # outside of the range, the box does not turn over


BOX = Interval(jnp.zeros(2), jnp.ones(2))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: Interval.from_linf(jnp.ones(2), -0.1), r"eps is -0\.1; allowed: finite and >= 0"),
    (lambda: Interval.from_linf(jnp.ones(2), np.nan), "eps is nan"),
    (lambda: Interval.from_linf(jnp.ones(2), 0.1, 1.0, 0.0), "lo is 1.0 and hi is 0.0"),
    (lambda: Interval.from_linf(jnp.full(2, 1.5), 0.1), "outside the valid range"),
    (lambda: Interval.from_linf(jnp.array([np.nan]), 0.1), "x holds values that are not finite"),
    (lambda: Interval.from_linf(jnp.ones(2, int), 0.1), "x has dtype int32"),
    (lambda: check_interval("box", Interval(jnp.ones(2), jnp.zeros(2))), r"box has lower 1.0 > up"),
    (lambda: ibp(jnp.sin)(Interval(jnp.ones(2), jnp.ones(3))), r"shape \(2,\) and an upper"),
    (lambda: ibp(jnp.abs)(Interval(jnp.ones(2, int), jnp.ones(2, int))), "dtype int32"),
    (lambda: ibp(jnp.abs)(Interval(jnp.array(np.nan), jnp.array(1.0))), "the interval holds"),
    (lambda: ibp(jnp.add)(BOX, Interval(-np.inf, 1.0)), "interval argument 1 holds values"),
    (lambda: crown(jnp.abs, relu_lower="adaptve")(BOX), "did you mean 'adaptive'"),
    (lambda: crown(jnp.abs, intermediate="no")(BOX), "intermediate is 'no'"),
    (lambda: crown(jnp.abs, chunk=0)(BOX), "chunk is 0"),
    (lambda: ibp(jnp.abs, precision="low")(BOX), "precision is 'low'"),
    (lambda: ibp(jnp.abs, directed=True, precision=None)(BOX), "at 'highest' only"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
