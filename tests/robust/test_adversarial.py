import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.bounds.interval import Interval
from balance_jax.losses import cross_entropy
from balance_jax.robust.adversarial import pgd_at_loss, trades_loss
from balance_jax.robust.attacks import pgd
from tests.robust.test_attacks import KEY, SineNet, sine_batch


def apply(params, x):
  return jnp.tanh(x.reshape(len(x), 6) @ params["v"]) @ params["w"]


def problem(batch=8, num_classes=3):
  rng = np.random.default_rng(0)
  params = {"v": rng.normal(0, 1, (6, 5)), "w": rng.normal(0, 1, (5, num_classes))}
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  x, box, _ = sine_batch(batch)
  return params, jnp.asarray(x), box, jnp.arange(batch) % num_classes


def log_softmax(z):
  z = z - z.max(axis=-1, keepdims=True)
  return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def float64_apply(params, x):
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  return np.tanh(np.asarray(x, np.float64).reshape(len(x), 6) @ params["v"]) @ params["w"]


def reference_trades(params, x, x_adv, labels, beta):
  clean, adv = (log_softmax(float64_apply(params, a)) for a in (x, x_adv))
  nll = -clean[np.arange(len(x)), np.asarray(labels)]
  return nll, np.sum(np.exp(clean) * (clean - adv), axis=1)


def bind(params):
  return lambda x: apply(params, x)


def test_pgd_at_is_cross_entropy_at_the_attack_and_nothing_more():
  params, _, box, labels = problem()

  @jax.jit
  def compare(params):
    def objective(params):
      losses, aux = pgd_at_loss(bind(params), bind(params), KEY, box, labels, steps=3)
      return losses.mean(), {"losses": losses, **aux}

    def expected(params):
      losses = cross_entropy(apply(params, x_adv), labels)
      return losses.mean(), {"losses": losses, "x_adv": x_adv, "logits": apply(params, x_adv)}

    x_adv = pgd(bind(params), KEY, box, labels, steps=3, goal="loss")
    return [jax.value_and_grad(f, has_aux=True)(params) for f in (objective, expected)]

  found, expected = compare(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
  losses = found[0][1]["losses"]
  assert losses.shape == (8,)
  assert losses.dtype == jnp.float32


def _mean(losses_and_aux):
  losses, aux = losses_and_aux
  return losses.mean(), aux


def test_pgd_at_goes_on_behind_a_mistake():
  params, _, box, _ = problem()
  net = bind(params)
  wrong = (jnp.argmax(net(box.center), axis=1) + 1) % 3
  losses, _ = jax.jit(lambda y: pgd_at_loss(net, net, KEY, box, y))(wrong)
  assert np.all(losses > cross_entropy(net(box.center), wrong) + 0.05)


def test_radius_zero_is_plain_training():
  params, x, _, labels = problem()
  net, point = bind(params), Interval.from_linf(x, 0.0)
  pgd_at, (trades, aux), plain = jax.jit(
    lambda: (
      pgd_at_loss(net, net, KEY, point, labels, steps=1)[0],
      trades_loss(net, net, KEY, x, point, labels, steps=1),
      cross_entropy(net(x), labels),
    )
  )()
  np.testing.assert_allclose(pgd_at, plain, rtol=1e-6)
  np.testing.assert_allclose(trades, plain + 6 * aux["kl"], rtol=1e-6)
  np.testing.assert_allclose(aux["kl"], 0.0, atol=3e-7)  # two compiled passes differ by rounding


@jax.jit
def trades(params, x, box, labels, beta=6.0):
  return trades_loss(bind(params), bind(params), KEY, x, box, labels, beta=beta, steps=5)


def test_trades_equals_reference_and_its_gradient_finite_differences():
  params, x, box, labels = problem()
  step = jax.jit(jax.value_and_grad(lambda *args: _mean(trades(*args)), has_aux=True))
  (loss, aux), grads = step(params, x, box, labels)
  x_adv = np.asarray(aux["x_adv"])
  nll, kl = reference_trades(params, x, x_adv, labels, 6.0)
  np.testing.assert_allclose(aux["cross_entropy"], nll, rtol=1e-5)
  np.testing.assert_allclose(aux["kl"], kl, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(loss, np.mean(nll + 6 * kl), rtol=1e-5)
  np.testing.assert_allclose(aux["logits"], apply(params, x), rtol=1e-5, atol=1e-6)
  for name in params:
    for index in ((0, 0), (2, 1), (4, 2)):
      values = []
      for shift in (1e-5, -1e-5):
        moved = {k: np.array(v, np.float64) for k, v in params.items()}
        moved[name][index] += shift
        nll, kl = reference_trades(moved, x, x_adv, labels, 6.0)
        values.append(np.mean(nll + 6 * kl))
      slope = (values[0] - values[1]) / 2e-5
      np.testing.assert_allclose(grads[name][index], slope, rtol=1e-3, atol=1e-5)


def test_trades_finds_more_than_random_points_and_leaves_the_flat_start():
  params, x, box, labels = problem()
  losses, aux = trades(params, x, box, labels)
  assert np.all((aux["x_adv"] >= box.lower) & (aux["x_adv"] <= box.upper))
  rng = np.random.default_rng(1)
  for _ in range(20):
    point = rng.uniform(box.lower, box.upper)
    assert np.mean(reference_trades(params, x, point, labels, 6.0)[1] <= aux["kl"]) > 0.9
  np.testing.assert_allclose(losses, aux["cross_entropy"] + 6 * aux["kl"], rtol=1e-6)


def test_beta_is_traced_and_vmap_equals_single_calls():
  params, x, box, labels = problem()
  betas = jnp.array([0.0, 6.0])
  losses, aux = jax.jit(jax.vmap(lambda beta: trades(params, x, box, labels, beta), in_axes=0))(
    betas
  )
  np.testing.assert_allclose(losses[0], aux["cross_entropy"][0], rtol=1e-6)
  single = trades(params, x, box, labels)[0]
  np.testing.assert_allclose(losses[1], single, rtol=1e-4)


def test_evaluation_mode_is_attacked_and_extras_come_from_clean_inputs():
  _, x, box, labels = problem()
  net, attacked = SineNet(num_classes=3), SineNet(num_classes=3, seed=7)

  def train(x):
    return net(x), {"mean": x.mean()}

  (losses, aux), expected, with_trades = jax.jit(
    lambda: (
      pgd_at_loss(train, attacked, KEY, box, labels, steps=2, has_aux=True),
      pgd(attacked, KEY, box, labels, steps=2, goal="loss"),
      trades_loss(train, attacked, KEY, x, box, labels, steps=2, has_aux=True),
    )
  )()
  np.testing.assert_allclose(aux["x_adv"], expected, atol=1e-6)
  np.testing.assert_allclose(aux["extra"]["mean"], aux["x_adv"].mean(), rtol=1e-6)
  np.testing.assert_allclose(losses, cross_entropy(net(aux["x_adv"]), labels), rtol=1e-5)

  _, aux = with_trades
  np.testing.assert_allclose(aux["extra"]["mean"], x.mean(), rtol=1e-6)
  clean, adv = (log_softmax(np.asarray(net(a), np.float64)) for a in (x, aux["x_adv"]))
  np.testing.assert_allclose(aux["kl"], np.sum(np.exp(clean) * (clean - adv), 1), rtol=1e-4)


def test_classes_of_probability_zero():
  x = jnp.array([[0.5, 0.5]])
  masked = jnp.array([[0.0, 0.0, -jnp.inf]])

  def net(w, x):
    return w * jnp.pad(x, ((0, 0), (0, 1))) + masked

  def loss(w):
    box = Interval.from_linf(x, 0.2)
    return _mean(trades_loss(lambda x: net(w, x), lambda x: net(w, x), KEY, x, box, jnp.array([0])))

  (value, aux), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(2.0)
  assert np.all(np.isfinite([value, grad]))
  assert aux["kl"][0] > 0.01


def test_nan_logits_give_nan_losses():
  _, x, box, labels = problem()

  def net(x):
    return jnp.full((len(x), 3), jnp.nan) * x.sum()

  (pgd_at, _), (_, aux) = jax.jit(
    lambda: (
      pgd_at_loss(net, net, KEY, box, labels, steps=1),
      trades_loss(net, net, KEY, x, box, labels, steps=1),
    )
  )()
  assert np.all(np.isnan(pgd_at))
  assert np.all(np.isnan(aux["kl"]))


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ({"beta": -1.0}, "beta is -1.0"),
    ({"steps": 0}, "steps is 0"),
    ({"labels": jnp.arange(8)}, "labels holds 3"),
    ({"x": jnp.full((8, 2, 3), 2.0)}, "center has values outside of the box"),
  ],
)
def test_bad_input(bad, message):
  params, x, box, labels = problem()
  options = {"x": x, "box": box, "labels": labels, **bad}
  with pytest.raises(ValueError, match=message):
    trades_loss(bind(params), bind(params), KEY, **options)
