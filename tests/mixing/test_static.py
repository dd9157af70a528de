import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import mixing

SIZES = [900, 90, 10, 0]


def mixture(mixer, step=0):
  p, r = mixer.weights(mixer.init(None), step)
  np.testing.assert_array_equal(p, r)  # draw="target"
  return np.asarray(p)


@pytest.mark.parametrize(
  ("mixer", "expected"),
  [
    (mixing.proportional(SIZES), [0.9, 0.09, 0.01, 0]),
    (mixing.uniform(SIZES), [1 / 3, 1 / 3, 1 / 3, 0]),
    (mixing.fixed([1, 1, 2, 0], SIZES), [0.25, 0.25, 0.5, 0]),
    (mixing.temperature(SIZES, 1.0), [0.9, 0.09, 0.01, 0]),
    (mixing.temperature(SIZES, 0.5), np.array([8100, 81, 1, 0]) / 8182),
    (mixing.capped(SIZES, 30), [3 / 7, 3 / 7, 1 / 7, 0]),
    # 10 rows twice give 20; the 580 left are more than two passes over the 90: 180, and 400.
    (mixing.unimax(SIZES, 2.0, 600), np.array([400, 180, 20, 0]) / 600),
  ],
)
def test_by_hand_and_constant(mixer, expected):
  for step in (0, 10**6):
    np.testing.assert_allclose(mixture(mixer, step), expected, rtol=1e-5)
  assert mixer.needs == frozenset()
  assert mixer.init(None) == ()
  assert mixer.update((), {"group_loss": 1.0}) == ()


def test_default_temperature_is_5():
  expected = np.array([900, 90, 10]) ** 0.2
  np.testing.assert_allclose(
    mixture(mixing.temperature(SIZES))[:3], expected / expected.sum(), 1e-5
  )


def test_temperature_drawn_naturally_is_scalarization():
  p, r = mixing.temperature(SIZES[:3], 5.0, draw="natural").weights((), 0)
  expected = mixing.scalarization_weights(SIZES[:3], 5.0)
  np.testing.assert_allclose(mixing.importance_weights(p, r), expected, rtol=1e-6)
  np.testing.assert_allclose(r, [0.9, 0.09, 0.01], rtol=1e-6)


def test_parameters_may_be_traced():
  def build(tau, cap, share):
    mixers = (
      mixing.temperature(SIZES, tau),
      mixing.capped(SIZES, cap),
      mixing.fixed([share, 1 - share, 0.0, 0.0], SIZES),
    )
    return [mixer.weights((), 0)[0] for mixer in mixers]

  found = jax.jit(jax.vmap(build))(*jnp.array([[2.0, 5.0], [30.0, 100.0], [0.25, 0.5]]))
  for i, arguments in enumerate([(2.0, 30.0, 0.25), (5.0, 100.0, 0.5)]):
    for stacked, expected in zip(found, build(*arguments), strict=True):
      np.testing.assert_allclose(stacked[i], expected, rtol=1e-5)


def test_online_unimax_drops_what_has_been_seen():
  mixer = mixing.unimax(SIZES, max_epochs=2.0, mode="online")
  assert mixer.needs == {"epochs_seen"}
  state = mixer.init(None)
  expected = [
    ([0.0, 0.5, 1.9, 0.0], [1 / 3, 1 / 3, 1 / 3, 0]),
    ([0.1, 1.0, 2.0, 0.0], [1 / 2, 1 / 2, 0, 0]),  # at the cap it leaves
    ([0.1, 2.5, 0.0, 0.0], [1, 0, 0, 0]),  # and never returns
    ([3.0, 3.0, 3.0, 0.0], [1 / 3, 1 / 3, 1 / 3, 0]),  # nothing left: uniform over what has data
    ([0.0, 0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3, 0]),
  ]
  for seen, p in expected:
    state = mixer.update(state, {"epochs_seen": jnp.array(seen)})
    np.testing.assert_allclose(mixer.weights(state, 0)[0], p, rtol=1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: mixing.proportional([]), r"sizes has shape \(0,\)"),
    (lambda: mixing.uniform([0, 0]), "sizes must hold"),
    (lambda: mixing.fixed([0.5, 0.5], SIZES), r"p has shape \(2,\); expected \(4\)"),
    (lambda: mixing.fixed([1, -1, 1, 0], SIZES), "p must be >= 0"),
    (lambda: mixing.fixed([1, 1, 1, 1], SIZES), "p is 1 at 3, a group of size 0"),
    (lambda: mixing.temperature(SIZES, 0), "tau is 0"),
    (lambda: mixing.capped(SIZES, -1), "cap is -1"),
    (lambda: mixing.unimax(SIZES, mode="dynamic"), "mode is 'dynamic'"),
    (lambda: mixing.unimax(SIZES), "budget is missing"),
    (lambda: mixing.unimax(SIZES, 2.0, 2001), "budget is 2001, more than"),
    (lambda: mixing.unimax(SIZES, 0.0, 10), "max_epochs is 0"),
    (lambda: mixing.unimax(SIZES, 1.0, 10, mode="online"), "budget is 10; .* takes none"),
    (lambda: mixing.unimax(SIZES, -1.0, mode="online"), r"max_epochs is -1\.0"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
