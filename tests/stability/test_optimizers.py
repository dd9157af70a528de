"""AdamW and its relatives: optax, NumPy in float64, both decays, masks, multipliers, sweeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balance_jax.stability.optimizers import OPTIMIZERS, adam_atan2, adamw, stable_adamw
from balance_jax.stability.schedules import warmup_cosine
from balance_jax.stability.updates import param_rms

STEPS = 6
SHAPES = {"block": {"kernel": (3, 4), "scale": (4,)}, "head": (4, 2)}


def make(seed=0):
  """Parameters of every rank and a stack of gradients, one of them a spike."""
  rng = np.random.default_rng(seed)

  def draw(*leading):
    return jax.tree.map(
      lambda shape: rng.normal(size=(*leading, *shape)).astype(np.float32),
      SHAPES,
      is_leaf=lambda x: isinstance(x, tuple),
    )

  params, grads = draw(), draw(STEPS)
  grads["head"][STEPS // 2] *= 20
  return params, grads


def train(optimizer, params, grads):
  """Parameters after each gradient, stacked."""

  def step(carry, gradient):
    params, state = carry
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  return jax.lax.scan(step, (params, optimizer.init(params)), grads)[1]


run = jax.jit(train, static_argnums=0)


def numpy_direction(name, mean, second, gradient, eps):
  if name == "adam_atan2":
    return 1.27 * np.arctan2(mean, np.sqrt(second))
  direction = mean / (np.sqrt(second) + eps)
  if name == "stable_adamw":
    ratio = np.sqrt(np.mean(gradient**2 / np.maximum(second, eps**2)))
    direction /= max(1.0, ratio)
  return direction


def numpy_train(name, params, grads, *, lr, s, wd, mode, b1, b2, eps, m=1.0, decays=1.0):
  """One tensor in float64, from the formulas."""
  p = np.asarray(params, np.float64)
  mu, nu, out = np.zeros_like(p), np.zeros_like(p), []
  for t, g in enumerate(np.asarray(grads, np.float64)):
    mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
    mean, second = mu / (1 - b1 ** (t + 1)), nu / (1 - b2 ** (t + 1))
    direction = m * numpy_direction(name, mean, second, g, eps)
    if mode == "independent":
      p = p - s(t) * (lr * direction + wd * decays * p)
    else:
      p = p - s(t) * lr * (direction + wd * decays * p)
    out.append(p)
  return np.stack(out)


@pytest.mark.parametrize("mode", ["independent", "coupled"])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_against_numpy(name, mode):
  params, grads = make()
  numbers = dict(lr=0.05, wd=0.3, b1=0.8, b2=0.9, eps=1e-3)

  def schedule(step):
    return 1.0 / (1.0 + step)

  factors = {"block": {"kernel": 0.5, "scale": 1.0}, "head": 2.0}
  decay_factors = {"block": 3.0, "head": 1.0}
  mask = {"block": {"kernel": True, "scale": False}, "head": True}
  optimizer = OPTIMIZERS[name](
    numbers["lr"],
    schedule,
    weight_decay=numbers["wd"],
    weight_decay_mode=mode,
    **{key: numbers[key] for key in ("b1", "b2", "eps")},
    mask=mask,
    multipliers=factors,
    decay_multipliers=decay_factors,
  )
  got = run(optimizer, params, grads)
  for path, m, decays in (
    (("block", "kernel"), 0.5, 3.0),
    (("block", "scale"), 1, 0),
    (("head",), 2, 1),
  ):
    p, g, have = params, grads, got
    for part in path:
      p, g, have = p[part], g[part], have[part]
    want = numpy_train(name, p, g, s=schedule, mode=mode, m=m, decays=decays, **numbers)
    np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-6)


def test_hand_computed_first_step():
  params, gradient = {"w": jnp.array([2.0, -4.0])}, {"w": jnp.array([3.0, -0.1])}
  optimizer = adamw(0.1, lambda step: 0.5 + step, weight_decay=0.01, eps=1e-12)
  updates, state = optimizer.update(gradient, optimizer.init(params), params)
  # Adam's first direction is the sign; s_0 = 0.5: -0.5 * (0.1 * sign + 0.01 * theta).
  np.testing.assert_allclose(updates["w"], [-0.05 - 0.01, 0.05 + 0.02], rtol=1e-5)
  assert int(state.count) == 1


@pytest.mark.parametrize("schedule", [None, warmup_cosine(1.0, 2, 6, end=0.1)])
def test_coupled_mode_is_the_adamw_of_optax(schedule):
  params, grads = make()
  mask = {"block": {"kernel": True, "scale": False}, "head": True}
  rate = 0.03 if schedule is None else lambda step: 0.03 * schedule(step)
  ours = adamw(0.03, schedule, weight_decay=0.2, weight_decay_mode="coupled", b2=0.9, mask=mask)
  theirs = optax.adamw(rate, b1=0.9, b2=0.9, eps=1e-8, weight_decay=0.2, mask=mask)
  # Not under jit, where the compiler may contract the two programs differently.
  a, b = params, params
  a_state, b_state = ours.init(a), theirs.init(b)
  for t in range(4):
    gradient = jax.tree.map(lambda g, t=t: jnp.asarray(g[t]), grads)
    a_updates, a_state = ours.update(gradient, a_state, a)
    b_updates, b_state = theirs.update(gradient, b_state, b)
    a, b = optax.apply_updates(a, a_updates), optax.apply_updates(b, b_updates)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_independent_decay_is_coupled_decay_over_the_learning_rate():
  params, grads = make(1)
  schedule = warmup_cosine(1.0, 1, 5, end=0.2)
  for lr in (1e-3, 0.3):
    independent = run(adamw(lr, schedule, weight_decay=0.02), params, grads)
    coupled = run(
      adamw(lr, schedule, weight_decay=0.02 / lr, weight_decay_mode="coupled"), params, grads
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), independent, coupled)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("mode", ["independent", "coupled"])
def test_decay_shrinks_weights_and_the_printed_sign_grows_them(name, mode):
  theta = jnp.array([1.0, -3.0])
  grads = jnp.zeros((5, 2))
  lr, decay = 0.5, 0.1
  got = np.abs(run(OPTIMIZERS[name](lr, weight_decay=decay, weight_decay_mode=mode), theta, grads))
  factor = 1 - decay * (1 if mode == "independent" else lr)
  np.testing.assert_allclose(got[-1], factor**5 * np.abs(theta), rtol=1e-5)
  # As printed, theta - s (eta D - lambda theta) with D = 0.
  printed = np.array(theta)
  for _ in range(5):
    printed = printed - (0.0 - decay * printed)
  assert np.all(np.abs(printed) > np.abs(theta))
  assert np.all(got[-1] < np.abs(theta))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_multipliers_scale_the_direction_and_never_the_decay(name):
  params, grads = make(2)
  still = jax.tree.map(np.zeros_like, grads)
  build = OPTIMIZERS[name]
  plain, scaled = (build(0.1, weight_decay=0.1, multipliers=m) for m in (None, 7.0))
  jax.tree.map(np.testing.assert_array_equal, run(plain, params, still), run(scaled, params, still))
  # Without decay, a multiplier is a learning rate of its own.
  scaled = run(build(0.1, weight_decay=0.0, multipliers=0.25), params, grads)
  slower = run(build(0.025, weight_decay=0.0), params, grads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), scaled, slower)


def test_functions_of_params_as_mask_and_multipliers():
  params, grads = make(3)

  def by_rank(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)

  tree = {"block": {"kernel": True, "scale": False}, "head": True}
  one = run(adamw(0.1, weight_decay=0.5, mask=by_rank), params, grads)
  jax.tree.map(
    np.testing.assert_array_equal, one, run(adamw(0.1, weight_decay=0.5, mask=tree), params, grads)
  )
  # The relative step of Adafactor: of the current parameters, decay untouched.
  first = run(adamw(0.1, weight_decay=0.5, eps=1e-12, multipliers=param_rms), params, grads)["head"]
  p, sign = params["head"], np.sign(grads["head"][0])
  want = p - (0.1 * np.sqrt(np.mean(p**2)) * sign + 0.5 * p)
  np.testing.assert_allclose(first[0], want, rtol=1e-4, atol=1e-5)


def test_update_clipping_ends_at_adamw():
  params, grads = make(4)
  kwargs = dict(weight_decay=0.1, b2=0.9, eps=1e-6)
  plain = run(adamw(0.1, **kwargs), params, grads)
  unclipped = run(stable_adamw(0.1, clip_threshold=jnp.inf, **kwargs), params, grads)
  # Up to the order in which the compiler divides.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, unclipped
  )
  clipped = run(stable_adamw(0.1, **kwargs), params, grads)
  # R = 1 at the first step, where u = g^2; the spike then comes with R > 1.
  np.testing.assert_allclose(clipped["head"][0], plain["head"][0], rtol=1e-4)
  assert np.max(np.abs(clipped["head"] - plain["head"])) > 1e-2


def test_eps_as_small_as_the_square_root_of_the_smallest_float32():
  params, grads = {"w": jnp.ones(3)}, {"w": jnp.zeros((2, 3)).at[1, 0].set(1e-12)}
  for optimizer in (adamw(0.1, eps=1e-25), stable_adamw(0.1, eps=1e-25), adam_atan2(0.1)):
    assert np.all(np.isfinite(run(optimizer, params, grads)["w"]))


def test_atan2_ignores_the_scale_of_gradients():
  params, grads = make(5)
  small = jax.tree.map(lambda g: g * np.float32(2.0**-40), grads)
  a, b = (run(adam_atan2(0.1), params, x) for x in (grads, small))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)
  a, b = (run(adamw(0.1), params, x) for x in (grads, small))
  assert np.max(np.abs(a["head"] - b["head"])) > 1e-3
  # |D| < a pi / 2, and the scales do what they say.
  wide = run(adam_atan2(1.0, weight_decay=0.0, scale_a=2.0, scale_b=1e-6), params, grads)["head"]
  np.testing.assert_allclose(np.abs(wide[0] - params["head"]), np.pi, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_number_may_be_traced(name):
  params, grads = make(6)
  rows = np.array([(0.1, 0.3, 0.9, 0.95, 1e-8, 2.0), (0.01, 0.0, 0.5, 0.8, 1e-2, 0.5)], np.float32)

  def final(row):
    lr, decay, b1, b2, eps, m = row
    schedule = warmup_cosine(1.0, 2 * m, 6, end=0.1)
    optimizer = OPTIMIZERS[name](
      lr, schedule, weight_decay=decay, b1=b1, b2=b2, eps=eps, multipliers={"block": m, "head": 1.0}
    )
    return train(optimizer, params, grads)

  swept = jax.jit(jax.vmap(final))(rows)
  for i, row in enumerate(rows):
    alone = final([float(x) for x in row])
    jax.tree.map(
      lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-6), swept, alone
    )


def test_bfloat16_params_keep_float32_moments():
  params = {"w": jnp.ones(3, jnp.bfloat16)}
  gradient = {"w": jnp.array([1e-3, 2.0, -1.0], jnp.bfloat16)}
  optimizer = adamw(0.1)
  start = optimizer.init(params)
  updates, state = optimizer.update(gradient, start, params)
  assert jax.tree.map(jnp.result_type, start) == jax.tree.map(jnp.result_type, state)
  assert updates["w"].dtype == jnp.bfloat16
  assert state.mu["w"].dtype == state.nu["w"].dtype == jnp.float32
  # b2 = 0.95 leaves 0.05 g^2; bfloat16 would be off by up to 0.4 %.
  want = 0.05 * np.asarray(gradient["w"], np.float64) ** 2
  np.testing.assert_allclose(state.nu["w"], want, rtol=1e-5)


def test_float64_arrays_of_numpy_are_taken_as_jax_takes_them():
  params = {"w": np.ones(3)}
  optimizer = adamw(0.1)
  updates, state = optimizer.update(params, optimizer.init(params), params)
  assert updates["w"].dtype == state.nu["w"].dtype == jnp.float32


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"learning_rate": 0.0}, r"learning_rate is 0.0; allowed: \(0, inf\]"),
    ({"learning_rate": lambda step: 0.1}, "learning_rate is .*; expected a number"),
    ({"schedule": 0.1}, "schedule is 0.1; expected a function"),
    ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ({"weight_decay_mode": "decoupled"}, r"did you mean 'coupled'.*allowed: coupled, independent"),
    ({"b1": 1.0}, r"b1 is 1.0; allowed: \[0, 1\)"),
    ({"b2": 1.5}, "b2 is 1.5"),
    ({"b2": -0.1}, "b2 is -0.1"),
  ],
)
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_bad_numbers(name, kwargs, message):
  with pytest.raises(ValueError, match=message):
    OPTIMIZERS[name](**({"learning_rate": 0.1} | kwargs))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: adamw(0.1, eps=0.0), "eps is 0.0"),
    (lambda: stable_adamw(0.1, eps=-1.0), "eps is -1.0"),
    (lambda: stable_adamw(0.1, clip_threshold=0.0), "clip_threshold is 0.0"),
    (lambda: adam_atan2(0.1, scale_a=0.0), "scale_a is 0.0"),
    (lambda: adam_atan2(0.1, scale_b=-1.0), "scale_b is -1.0"),
  ],
)
def test_bad_numbers_of_one_optimizer(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"mask": {"v": True}}, "mask has the structure .*'v'.*expected that of params.*'w'"),
    ({"mask": {"w": 1}}, "mask holds 1; expected True or False"),
    ({"multipliers": {"w": 1.0, "v": 1.0}}, "multipliers has the structure"),
    ({"multipliers": lambda params: {"w": -1.0}}, "multipliers is -1.0"),
    ({"decay_multipliers": {"w": jnp.ones(2)}}, r"decay_multipliers has shape \(2,\)"),
  ],
)
def test_bad_trees(kwargs, message):
  params = {"w": jnp.ones(2)}
  optimizer = adamw(0.1, **kwargs)
  with pytest.raises(ValueError, match=message):
    optimizer.update(params, optimizer.init(params), params)


def test_params_are_needed():
  optimizer = adamw(0.1)
  with pytest.raises(ValueError, match="params is None"):
    optimizer.update({"w": jnp.ones(2)}, optimizer.init({"w": jnp.ones(2)}))
