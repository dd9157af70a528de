import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.distillation import (
  MTARDState,
  entropy_balance,
  init_mtard_state,
  mtard_loss,
  mtard_update,
  normalization_loss_balance,
)

STEPS = 30
OBSERVED = ("kl_adv", "kl_nat", "entropy_adv", "entropy_nat")
FAST = {"weight_lr": 0.2, "temp_lr": 0.3}


def random_logits(seed=0, batch=5, classes=4):
  """Student on attacked and clean inputs, robust teacher (flat), clean teacher (sharp)."""
  rng = np.random.default_rng(seed)
  shape, scales = (batch, classes), (1.0, 1.5, 1.0, 4.0)
  return [rng.normal(0, scale, shape).astype(np.float32) for scale in scales]


def softmax(x):
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


def replay_update(state, kl_adv, kl_nat, ent_adv, ent_nat, weight_lr, temp_lr, temp_range=(1, 10)):
  """The published algorithm in Python floats; entropies are negative, as published."""
  tau_adv, tau_nat, w_adv, w_nat, init_adv, init_nat, step = state
  if step == 0:
    init_adv, init_nat = kl_adv, kl_nat
  slow_adv, slow_nat = kl_adv / init_adv, kl_nat / init_nat
  w_adv -= weight_lr * (w_adv - slow_adv / (slow_adv + slow_nat))
  w_nat -= weight_lr * (w_nat - slow_nat / (slow_adv + slow_nat))
  w_adv, w_nat = max(w_adv, 0), max(w_nat, 0)
  w_adv, w_nat = w_adv / (w_adv + w_nat), w_nat / (w_adv + w_nat)
  tau_adv -= temp_lr * np.sign(ent_adv / ent_nat - 1)
  tau_nat -= temp_lr * np.sign(ent_nat / ent_adv - 1)
  tau_adv, tau_nat = np.clip([tau_adv, tau_nat], *temp_range)
  return tau_adv, tau_nat, w_adv, w_nat, init_adv, init_nat, step + 1


def observe(state, logits):
  """Mean losses and negative entropies of a batch in float64."""
  s_adv, s_nat, t_adv, t_nat = (np.asarray(x, np.float64) for x in logits)
  kls, entropies = [], []
  for student, teacher, tau in ((s_adv, t_adv, state[0]), (s_nat, t_nat, state[1])):
    p = softmax(teacher / tau)
    kls.append(np.mean(p * (np.log(p + 1e-5) - np.log(softmax(student)))))
    entropies.append(np.mean(p * np.log(p + 1e-5)))
  return *kls, *entropies


def replay_loss(state, logits, weight_lr, temp_lr):
  observed = observe(state, logits)
  after = replay_update(state, *observed, weight_lr, temp_lr)
  return after[2] * observed[0] + after[3] * observed[1], after


@functools.cache
def training_step(**settings):
  """One SGD step on the student's logits themselves, with state; compiled."""
  update = functools.partial(mtard_update, **settings)

  @jax.jit
  def step(state, students, teachers):
    def objective(students):
      losses, observation = mtard_loss(state, *students, *teachers, update=update)
      return losses.mean(), observation

    (loss, observation), grads = jax.value_and_grad(objective, has_aux=True)(students)
    students = jax.tree.map(lambda x, g: x - 5.0 * g, students, grads)
    return update(state, **observation), students, loss

  return step


def replay_training(logits, steps, weight_lr, temp_lr):
  """The same steps in float64, with the gradient by hand: w (q - p) / (B K)."""
  s_adv, s_nat, t_adv, t_nat = (np.asarray(x, np.float64) for x in logits)
  state, states, values = (1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0), [], []
  for _ in range(steps):
    loss, after = replay_loss(state, (s_adv, s_nat, t_adv, t_nat), weight_lr, temp_lr)
    s_adv = s_adv - 5.0 * after[2] * (softmax(s_adv) - softmax(t_adv / state[0])) / s_adv.size
    s_nat = s_nat - 5.0 * after[3] * (softmax(s_nat) - softmax(t_nat / state[1])) / s_nat.size
    states.append(after)
    values.append(loss)
    state = after
  return np.array(states), np.array(values)


def train(logits, steps, **settings):
  state, students, values, states = init_mtard_state(), tuple(logits[:2]), [], []
  for _ in range(steps):
    state, students, loss = training_step(**settings)(state, students, tuple(logits[2:]))
    states.append([float(x) for x in state])
    values.append(float(loss))
  return np.array(states), np.array(values)


def test_training_trajectory_equals_the_float64_replay():
  logits = random_logits()
  states, losses = train(logits, STEPS, **FAST)
  expected, expected_losses = replay_training(logits, STEPS, **FAST)
  # Thirty steps of float32, where the weights divide by first losses of about 0.3.
  np.testing.assert_allclose(states, expected, rtol=2e-5)
  np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
  # The balances did something: the sharp teacher was heated, the weights moved.
  assert states[-1, 1] > 2 > states[-1, 0]
  assert np.ptp(states[:, 2]) > 0.02
  np.testing.assert_allclose(states[:, 2] + states[:, 3], 1, rtol=1e-6)


def random_observations(seed=3, steps=STEPS):
  rng = np.random.default_rng(seed)
  return rng.uniform(0.05, 2, (steps, 4)) * [1, 1, -1, -1]  # negative entropies


@jax.jit
def scan_updates(observed, weight_lr, temp_lr):
  def body(state, row):
    state = mtard_update(state, *row, weight_lr=weight_lr, temp_lr=temp_lr, temp_range=(1.0, 2.0))
    return state, jnp.stack([x.astype(jnp.float32) for x in state])

  return jax.lax.scan(body, init_mtard_state(), observed)[1]


@pytest.mark.parametrize("sign", [1, -1])  # entropies, or negative entropies
def test_update_alone_equals_the_replay_with_all_ablations_in_one_program(sign):
  observed = random_observations()
  rates = np.array([(0.025, 0.1), (0.9, 0.3), (0.0, 0.2), (0.4, 0.0), (0.0, 0.0), (3.0, 0.1)])
  signed = jnp.asarray(observed * [1, 1, sign, sign], jnp.float32)
  found = jax.vmap(scan_updates, in_axes=(None, 0, 0))(signed, *jnp.asarray(rates.T, jnp.float32))
  for trajectory, (weight_lr, temp_lr) in zip(found, rates, strict=True):
    state = (1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0)
    for row, computed in zip(observed, trajectory, strict=True):
      state = replay_update(state, *row, weight_lr, temp_lr, temp_range=(1, 2))
      # The rate of 3 multiplies a difference of weights, and its rounding, by 2 in every step.
      np.testing.assert_allclose(computed, state, rtol=1e-4 if weight_lr <= 1 else 1e-3, atol=1e-5)
  np.testing.assert_array_equal(found[2, :, 2:4], 0.5)  # EBB alone
  np.testing.assert_array_equal(found[3, :, :2], 1.0)  # NLB alone
  np.testing.assert_array_equal(found[4, :, :4], np.tile([1, 1, 0.5, 0.5], (STEPS, 1)))  # fixed
  np.testing.assert_array_equal(found[:, -1, 6], STEPS)


def test_conference_form_is_normalization_alone():
  """It moves the clean weight only, and the other is what is left of 1."""
  update = jax.jit(functools.partial(mtard_update, weight_lr=0.2, variant="mtard", exponent=1.5))
  state, w_nat = init_mtard_state(), 0.5
  observed = random_observations()
  for kl_adv, kl_nat, *entropies in observed:
    state = update(state, kl_adv, kl_nat, *entropies)
    slow_adv, slow_nat = (kl_adv / observed[0, 0]) ** 1.5, (kl_nat / observed[0, 1]) ** 1.5
    w_nat -= 0.2 * (w_nat - slow_nat / (slow_adv + slow_nat))
    np.testing.assert_allclose(state[2:4], [1 - w_nat, w_nat], rtol=1e-5)
  assert (state.tau_adv, state.tau_nat) == (1.0, 1.0)


def test_state_keeps_its_types():
  state = jax.eval_shape(mtard_update, init_mtard_state(), *[0.5] * 4)
  for name, before, after in zip(state._fields, init_mtard_state(), state, strict=True):
    expected = jnp.int32 if name == "step" else jnp.float32
    assert before.dtype == after.dtype == expected
    assert before.shape == after.shape == ()


def test_first_losses_may_be_the_mean_of_several_batches():
  update = jax.jit(functools.partial(mtard_update, init_steps=3))
  state, seen = init_mtard_state(), []
  for kl in (2.0, 4.0, 9.0, 100.0):
    state = update(state, kl, 2 * kl, 1.0, 1.0)
    seen.append(float(state.init_adv))
    np.testing.assert_allclose(state.init_nat, 2 * state.init_adv, rtol=1e-6)
  np.testing.assert_allclose(seen, [2, 3, 5, 5], rtol=1e-6)


def test_entropy_balance():
  move = jax.jit(functools.partial(entropy_balance, lr=0.25))
  # The larger entropy is sharpened, the smaller softened, whatever the convention of the sign.
  for sign in (1.0, -1.0):
    np.testing.assert_allclose(move(3.0, 3.0, sign * 2.0, sign * 0.5), (2.75, 3.25))
    np.testing.assert_allclose(move(3.0, 3.0, sign * 0.5, sign * 2.0), (3.25, 2.75))
  np.testing.assert_array_equal(move(3.0, 4.0, 1.5, 1.5), (3.0, 4.0))
  np.testing.assert_array_equal(move(3.0, 4.0, 0.0, 0.0), (3.0, 4.0))  # the ratio would be NaN
  np.testing.assert_allclose(move(1.1, 9.9, 2.0, 1.0), (1.0, 10.0))


def test_normalization_loss_balance_of_three_teachers():
  weights, losses, first = (
    np.array(x) for x in ([0.2, 0.3, 0.5], [0.4, 3.0, 0.1], [0.5, 2.0, 1.0])
  )
  relative = losses / first
  expected = 0.7 * weights + 0.3 * relative / relative.sum()
  balance = jax.jit(normalization_loss_balance)
  np.testing.assert_allclose(balance(weights, losses, first, 0.3), expected, rtol=1e-6)
  full = balance(weights, losses, first, 1.0, 2.0)
  np.testing.assert_allclose(full, relative**2 / np.sum(relative**2), rtol=1e-6)
  np.testing.assert_array_equal(balance(weights, losses, first, 0.0), weights.astype(np.float32))
  # As many tasks as one likes; equal progress leads to equal weights; sum 1 throughout.
  many = balance(np.eye(8)[0], np.arange(1.0, 9.0), np.arange(1.0, 9.0), 1.0)
  np.testing.assert_allclose(many, np.full(8, 1 / 8), rtol=1e-6)


@pytest.mark.parametrize(
  ("losses", "first", "expected"),
  [
    ([0.0, 0.0], [0.0, 0.0], [0.5, 0.5]),  # the student is both teachers: nothing moves
    ([0.0, 0.0], [1.0, 1.0], [0.5, 0.5]),
    ([0.1, 0.1], [0.0, 1.0], [1.0, 0.0]),  # all progress on the first was lost
    ([-1e-9, 0.1], [1.0, 1.0], [0.0, 1.0]),  # rounding below zero
    ([1e20, 1e20], [1e-30, 1.0], [1.0, 0.0]),
  ],
)
def test_degenerate_losses_leave_finite_weights(losses, first, expected):
  found = normalization_loss_balance(
    jnp.array([0.5, 0.5]), jnp.array(losses), jnp.array(first), 1.0, exponent=3.0
  )
  np.testing.assert_allclose(found, expected, atol=1e-6)


def middle_state():
  return MTARDState(*(jnp.float32(x) for x in (1.5, 3.0, 0.7, 0.3, 0.2, 0.6)), jnp.int32(4))


def loss_of(students, teachers, state, **kwargs):
  update = functools.partial(mtard_update, **FAST)
  losses, observation = mtard_loss(state, *students, *teachers, update=update, **kwargs)
  return losses.mean(), (losses, observation)


grad_of_all = jax.jit(jax.grad(loss_of, argnums=(0, 1, 2), has_aux=True, allow_int=True))


def test_gradient_holds_the_weights_and_the_teachers_fixed():
  s_adv, s_nat, t_adv, t_nat = random_logits()
  state = middle_state()
  (students, teachers, in_state), (losses, observation) = grad_of_all(
    (s_adv, s_nat), (t_adv, t_nat), state
  )
  before = tuple(float(x) for x in state)
  value, after = replay_loss(before, random_logits(), **FAST)
  np.testing.assert_allclose(losses.mean(), value, rtol=1e-5)
  for name, expected in zip(OBSERVED, observe(before, random_logits()), strict=True):
    np.testing.assert_allclose(observation[name], abs(expected), rtol=1e-5)
  # Nothing passes through the teachers, nor through the temperatures and weights.
  assert not any(np.any(g) for g in teachers)
  assert not any(np.any(g) for g in in_state[2:6])

  logits = random_logits()
  for which, grad in enumerate(students):
    for index in np.ndindex(s_adv.shape):
      moved = [[x.astype(np.float64) for x in logits] for _ in range(2)]
      moved[0][which][index] += 1e-5
      moved[1][which][index] -= 1e-5
      up, down = (np.dot(after[2:4], observe(before, x)[:2]) for x in moved)  # weights held
      np.testing.assert_allclose(grad[index], (up - down) / 2e-5, rtol=1e-4, atol=1e-6)


def test_loss_uses_this_step_s_weights_and_the_last_temperatures():
  logits = random_logits()
  state = middle_state()
  after = mtard_update(state, **loss_of(logits[:2], logits[2:], state)[1][1], **FAST)
  assert after.tau_nat != state.tau_nat
  assert abs(after.w_adv - state.w_adv) > 0.01
  stopped = functools.partial(mtard_update, weight_lr=0.0, temp_lr=0.0)
  # What the new weights give at the old temperatures, with no update of their own.
  frozen = state._replace(w_adv=after.w_adv, w_nat=after.w_nat)
  expected, _ = mtard_loss(frozen, *logits, update=stopped)
  np.testing.assert_allclose(loss_of(logits[:2], logits[2:], state)[1][0], expected, rtol=1e-5)


def test_one_teacher_at_one_input_is_plain_distillation():
  student, _, teacher, _ = random_logits()
  losses, observation = mtard_loss(init_mtard_state(), student, student, teacher, teacher)
  p = softmax(teacher.astype(np.float64))
  expected = np.mean(p * (np.log(p + 1e-5) - np.log(softmax(student.astype(np.float64)))), axis=1)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  state = mtard_update(init_mtard_state(), **observation)
  assert [float(x) for x in state[:4]] == [1.0, 1.0, 0.5, 0.5]
  summed, _ = mtard_loss(
    init_mtard_state(), student, student, teacher, teacher, reduction="batchmean"
  )
  np.testing.assert_allclose(summed, 4 * losses, rtol=1e-6)


def test_mask_equals_the_subset():
  logits = random_logits()
  where = np.array([1, 0, 1, 1, 0], bool)
  kept = [x[where] for x in logits]
  expected = grad_of_all(tuple(kept[:2]), tuple(kept[2:]), middle_state())
  for x in logits:
    x[1], x[4] = np.nan, np.inf
  found = grad_of_all(tuple(logits[:2]), tuple(logits[2:]), middle_state(), where=where)
  losses, observation = found[1]
  np.testing.assert_allclose(losses[where], expected[1][0], rtol=1e-5)
  assert not np.any(losses[~where])
  for name in OBSERVED:
    np.testing.assert_allclose(observation[name], expected[1][1][name], rtol=1e-5)
  for grad, alone in zip(found[0][0], expected[0][0], strict=True):
    np.testing.assert_allclose(grad[where] * 5 / 3, alone, rtol=1e-4, atol=1e-7)
    assert not np.any(grad[~where])


def test_heating_brings_entropies_together():
  """Fixed teachers: with EBB the gap of their entropies shrinks to the size of a step."""
  logits = random_logits(batch=40)
  step = jax.jit(
    lambda state: mtard_update(state, **mtard_loss(state, *logits)[1], weight_lr=0.0, temp_lr=0.05)
  )
  state, gaps = init_mtard_state(), []
  for _ in range(100):
    observed = observe([float(x) for x in state], logits)
    gaps.append(abs(observed[2] - observed[3]))
    state = step(state)
  met = int(np.argmin(gaps))
  assert 10 < met < 100
  assert np.all(np.diff(gaps[: met - 1]) < 0)
  assert max(gaps[met:]) < 0.1 * gaps[0]


def call_loss(changed=None, **changes):
  logits = dict(
    zip(("student_adv", "student_nat", "teacher_adv", "teacher_nat"), random_logits(), strict=True)
  )
  return mtard_loss(init_mtard_state(), **(logits | (changed or {})), **changes)


def update_with(**settings):
  return mtard_update(init_mtard_state(), 1.0, 1.0, 1.0, 1.0, **settings)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: call_loss({"student_adv": np.ones(3)}), r"student_adv has shape \(3,\)"),
    (lambda: call_loss({"teacher_nat": np.ones((5, 3))}), r"teacher_nat has shape \(5, 3\)"),
    (lambda: call_loss(where=np.ones(4, bool)), r"where has shape \(4,\)"),
    (lambda: call_loss(reduction="sum"), "reduction is 'sum'"),
    (lambda: update_with(variant="mtrad"), r"variant is 'mtrad' \(did you mean 'mtard'"),
    (lambda: update_with(weight_lr=-0.1), r"weight_lr is -0\.1"),
    (lambda: update_with(temp_lr=-0.1), r"temp_lr is -0\.1"),
    (lambda: update_with(init_steps=0), "init_steps is 0"),
    (lambda: update_with(exponent=-1.0), r"exponent is -1\.0"),
    (lambda: update_with(temp_range=(0.0, 1.0)), r"low is 0\.0"),
    (lambda: update_with(temp_range=(2.0, 1.0)), r"high is 1\.0; allowed: \[2, inf\]"),
    (lambda: mtard_update(init_mtard_state(), np.ones(2), 1, 1, 1), r"kl_adv has shape \(2,\)"),
    (lambda: normalization_loss_balance(np.ones(2), np.ones(3), np.ones(2), 0.1), "losses has"),
    (lambda: normalization_loss_balance(1.0, 1.0, 1.0, 0.1), r"weights has shape \(\)"),
    (lambda: entropy_balance(1.0, 1.0, 1.0, 1.0, np.nan), "lr is nan"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
