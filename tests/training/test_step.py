"""The training step against a float64 NumPy step written from the formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balance_jax import mixing, training
from tests.training.problems import (
  CLASSES,
  flops,
  init_params,
  make_problem,
  make_table,
  per_example_loss,
)


def reference_gradient(w, rows, weights):
  """float64: gradient of (1/B) sum_b weight_b * cross entropy of a linear softmax, and the loss."""
  x, y, w = np.asarray(rows["x"], np.float64), np.asarray(rows["y"]), np.asarray(w, np.float64)
  scores = x @ w
  scores -= scores.max(axis=1, keepdims=True)
  probs = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
  losses = -np.log(probs[np.arange(len(y)), y])
  error = probs - np.eye(CLASSES)[y]
  weights = np.asarray(weights, np.float64)
  return x.T @ (weights[:, None] * error) / len(y), (weights * losses).mean()


def draw(step, state):
  return jax.jit(step.draw)(state, step.table)


def take(step, state, batch):
  return jax.jit(step)(state, batch, step.table)


def test_one_step_is_weighted_sgd():
  step, state = make_problem()
  drawn, batch = draw(step, state)
  grad, loss = reference_gradient(state.params["w"], batch.rows, batch.weights)
  after, metrics = take(step, drawn, batch)
  np.testing.assert_allclose(
    after.params["w"], state.params["w"] - 0.3 * grad, rtol=2e-5, atol=1e-6
  )
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(grad), rtol=1e-5)
  assert int(after.step) == 1


def test_drawn_rows_belong_to_their_groups_and_carry_p_over_r():
  table = make_table()
  step, state = make_problem(table=table)
  _, batch = draw(step, state)
  all_rows = np.asarray(table.rows["x"])
  group_of_row = np.repeat([0, 1], table.sizes)
  for x, group in zip(np.asarray(batch.rows["x"]), np.asarray(batch.groups), strict=True):
    assert group_of_row[np.flatnonzero((all_rows == x).all(axis=1))[0]] == group
  weights = np.asarray(mixing.scalarization_weights(table.sizes, 5.0))
  np.testing.assert_allclose(batch.weights, weights[batch.groups], rtol=1e-6)


@pytest.mark.parametrize("draw", ["target", "natural", 0.5])
def test_the_objective_is_p_whatever_is_drawn(draw):
  """Monte Carlo over many draws: the mean gradient is the gradient of sum_g p_g L_g."""
  table = make_table((60, 6))
  mixer = mixing.temperature(table.sizes, 5.0, draw=draw)
  step, state = make_problem(mixer, table=table, allocation="multinomial")
  groups = np.repeat([0, 1], table.sizes)
  per_row = np.asarray(mixing.temperature_probs(table.sizes, 5.0))[groups] / table.sizes[groups]
  expected, _ = reference_gradient(state.params["w"], table.rows, per_row * len(groups))

  def gradient(key):
    drawn, batch = step.draw(dataclasses.replace(state, key=key), table)
    return step.share(drawn, batch, batch.count()).grads["w"]

  grads = np.asarray(jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(5), 4000)))
  error = grads.mean(axis=0) - expected
  spread = grads.std(axis=0) / np.sqrt(len(grads))
  assert np.all(np.abs(error) < 4.5 * spread + 1e-6)


def test_micro_batches_and_masks_add_up_with_unequal_weights():
  step, state = make_problem()
  micro = dataclasses.replace(step, micro_batches=4)
  drawn, batch = draw(step, state)
  where = jnp.arange(16) % 3 > 0  # an unequal number of valid rows in every part
  batch = dataclasses.replace(batch, where=where)
  whole, metrics = take(step, drawn, batch)
  parts, part_metrics = take(micro, drawn, batch)
  np.testing.assert_allclose(whole.params["w"], parts.params["w"], atol=1e-6)
  np.testing.assert_allclose(metrics["group_loss"].den, part_metrics["group_loss"].den)
  subset = jax.tree.map(lambda x: x[np.asarray(where)], dataclasses.replace(batch, where=None))
  alone, _ = take(step, drawn, subset)
  np.testing.assert_allclose(whole.params["w"], alone.params["w"], atol=1e-6)


def test_a_loss_may_observe_means_and_maxima_of_valid_examples():
  def loss(params, rows, key):
    losses = per_example_loss(params, rows, key)
    bad = jnp.isnan(rows["x"][:, 0])  # a masked row may hold anything
    return jnp.where(bad, 1.0, losses), training.Observed({"x": rows["x"]}, {"x_max": rows["x"]})

  step, state = make_problem(loss=loss)
  drawn, batch = draw(step, state)
  where = np.arange(16) % 3 > 0
  poisoned = jnp.where(where[:, None], batch.rows["x"], jnp.nan)
  poisoned_batch = dataclasses.replace(
    batch, rows={**batch.rows, "x": poisoned}, where=jnp.asarray(where)
  )
  valid = np.asarray(batch.rows["x"])[where]
  for parts in (1, 4):
    split = dataclasses.replace(step, micro_batches=parts)
    _, metrics = take(split, drawn, poisoned_batch)
    np.testing.assert_allclose(metrics["observed"]["x"], valid.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(metrics["observed"]["x_max"], valid.max(axis=0))
  _, plain = take(dataclasses.replace(step, metrics=("loss",)), drawn, batch)
  assert set(plain) == {"loss"}


def test_sizes_of_gradients_and_updates_by_tensor_come_on_request():
  step, state = make_problem(optimizer=optax.sgd(0.5), metrics=["grad_rms", "update_rms"])
  drawn, batch = draw(step, state)
  grad, _ = reference_gradient(state.params["w"], batch.rows, batch.weights)
  _, metrics = take(step, drawn, batch)
  np.testing.assert_allclose(metrics["grad_rms"]["w"], np.sqrt((grad**2).mean()), rtol=1e-5)
  np.testing.assert_allclose(metrics["update_rms"]["w"], 0.5 * np.sqrt((grad**2).mean()), rtol=1e-5)
  step, _ = make_problem()
  assert "grad_rms" not in step.metrics


def test_masked_rows_leave_no_trace_even_when_not_finite():
  step, state = make_problem()
  drawn, batch = draw(step, state)
  where = jnp.arange(16) < 10
  poisoned = jnp.where(where[:, None], batch.rows["x"], jnp.nan)

  def masked_loss(params, rows, key):
    x = jnp.where(jnp.isnan(rows["x"]), 0.0, rows["x"])  # masked on the input side
    losses = per_example_loss(params, {"x": x, "y": rows["y"]}, key)
    return jnp.where(jnp.isnan(rows["x"][:, 0]), jnp.nan, losses)

  step = dataclasses.replace(step, per_example_loss=masked_loss)
  batch = dataclasses.replace(batch, rows={**batch.rows, "x": poisoned}, where=where)
  after, metrics = take(step, drawn, batch)
  assert np.all(np.isfinite(after.params["w"]))
  assert np.isfinite(metrics["loss"])


def test_group_loss_and_mixture_metrics():
  step, state = make_problem()
  drawn, batch = draw(step, state)
  _, metrics = take(step, drawn, batch)
  losses = np.asarray(per_example_loss(state.params, batch.rows, None))
  for group in (0, 1):
    member = np.asarray(batch.groups) == group
    np.testing.assert_allclose(metrics["group_loss"].den[group], member.sum())
    if member.any():
      np.testing.assert_allclose(
        metrics["group_loss"].mean()[group], losses[member].mean(), rtol=1e-5
      )
  np.testing.assert_allclose(
    metrics["mixture"]["p"], mixing.temperature_probs(step.table.sizes, 5.0), rtol=1e-6
  )
  np.testing.assert_allclose(metrics["mixture"]["r"], mixing.natural_probs(step.table.sizes))
  counts = np.bincount(np.asarray(batch.groups), minlength=2)
  np.testing.assert_allclose(metrics["epochs"], counts / step.table.sizes, rtol=1e-6)


def test_what_nobody_asks_for_costs_nothing():
  table = make_table()
  step, state = make_problem(table=table, metrics=())
  drawn, batch = draw(step, state)

  def plain(state, batch):
    """The same update written by hand: no group statistics, no norms."""

    def objective(params):
      return jnp.sum(batch.weights * per_example_loss(params, batch.rows, None)) / 16

    grads = jax.grad(objective)(state.params)
    updates, opt_state = step.optimizer.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)

  by_hand = flops(plain, drawn, batch)
  assert flops(lambda s, b: step(s, b, table)[0], drawn, batch) <= 1.02 * by_hand
  everything, _ = make_problem(table=table)
  assert flops(lambda s, b: everything(s, b, table), drawn, batch) > 1.02 * by_hand
  optimal = mixing.temperature(table.sizes, 5.0, draw="optimal")
  measuring, measured_state = make_problem(optimal, table=table, metrics=())
  assert flops(lambda s, b: measuring(s, b, table)[0], measured_state, batch) > 2.0 * by_hand


def test_optimal_draw_uses_the_moments_measured_every_few_steps():
  table = make_table()
  mixer = mixing.temperature(table.sizes, 5.0, draw="optimal")
  step, state = make_problem(mixer, table=table, measure_every=3, measure_examples=4)
  moments = step.measure(state, table).second_moment
  states = [state]
  for _ in range(4):
    drawn, batch = draw(step, states[-1])
    states.append(take(step, drawn, batch)[0])
  assert [int(s.mixer.measurements) for s in states] == [0, 1, 1, 1, 2]
  np.testing.assert_allclose(states[1].mixer.second_moment, moments, rtol=1e-6)
  p, r = step.mixer.weights(states[1].mixer, 1)
  best = np.asarray(mixing.optimal_sampling(p, moments))
  np.testing.assert_allclose(r, 0.9 * best + 0.1 * np.asarray(p), rtol=1e-5)


def test_observed_losses_reach_the_mixer():
  """A mixer that remembers its last observation sees the batch's means and counts."""
  table = make_table()

  def remember(state, observation):
    return jnp.stack([observation["group_loss"], observation["group_count"]])

  mixer = mixing.make_mixer(
    lambda state, step: jnp.array([0.5, 0.5]), table.sizes,
    init=lambda key: jnp.zeros((2, 2)), update=remember, needs={"group_loss", "group_count"},
  )  # fmt: skip
  step, state = make_problem(mixer, table=table)
  drawn, batch = draw(step, state)
  after, metrics = take(step, drawn, batch)
  np.testing.assert_allclose(after.mixer[0], metrics["group_loss"].mean())
  np.testing.assert_allclose(after.mixer[1], [8, 8])


def test_online_unimax_drops_a_group_after_its_epochs():
  table = make_table((64, 8))
  mixer = mixing.unimax(table.sizes, 1.0, mode="online")
  step, state = make_problem(mixer, table=table, batch_size=8)
  _, history = training.run(step, state, 4, chunk=4)
  np.testing.assert_allclose(history["mixture"]["p"][:, 1], [0.5, 0.5, 0.0, 0.0])
  np.testing.assert_allclose(history["epochs"][-1, 1], 1.0)


def test_host_batches_need_no_table():
  table = make_table()
  mixer = mixing.temperature(table.sizes, 5.0, draw="natural")
  step = training.make_step(per_example_loss, optax.sgd(0.3), mixer, batch_size=4, num_groups=2)
  state = training.init_state(jax.random.key(0), init_params(), step)
  groups = jnp.array([0, 0, 1, 1])
  rows = table.take(groups, jnp.array([0, 1, 0, 1]))
  batch = training.Batch(rows, groups, step.example_weights(state, groups))
  after, metrics = jax.jit(step)(state, batch)
  grad, _ = reference_gradient(state.params["w"], rows, batch.weights)
  np.testing.assert_allclose(after.params["w"], state.params["w"] - 0.3 * grad, atol=1e-6)
  assert "epochs" not in metrics
  with pytest.raises(ValueError, match="no table to draw from"):
    training.run(step, state, 1)


def test_bad_arguments():
  table = make_table()
  mixer = mixing.uniform(table.sizes)

  def make(mixer=mixer, table=table, batch_size=8, **kwargs):
    optimizer = optax.sgd(0.1)
    return training.make_step(
      per_example_loss, optimizer, mixer, table, batch_size=batch_size, **kwargs
    )

  for kwargs, message in (
    ({"batch_size": 0}, "batch_size is 0"),
    ({"micro_batches": 3}, "must divide batch_size = 8"),
    ({"allocation": "stratifed"}, "did you mean 'stratified'"),
    ({"metrics": ("losss",)}, "did you mean 'loss'"),
    ({"measure_examples": 1}, "measure_examples is 1"),
    ({"table": None}, "num_groups is missing"),
    ({"table": None, "num_groups": 2, "metrics": ("epochs",)}, "metrics is 'epochs'"),
    ({"num_groups": 3}, "num_groups is 3; the table has 2"),
    ({"mixer": mixing.uniform([1, 2, 3])}, r"p has shape \(3,\); expected \(2,\)"),
  ):
    with pytest.raises(ValueError, match=message):
      make(**kwargs)
  step, state = make_problem(mixing.uniform(table.sizes, draw="optimal"), table=table)
  drawn, batch = draw(step, state)
  with pytest.raises(ValueError, match="give the table to the step"):
    step(drawn, batch)
  wrong = dataclasses.replace(step, per_example_loss=lambda params, rows, key: jnp.zeros(()))
  with pytest.raises(ValueError, match="result of per_example_loss has shape"):
    wrong(drawn, batch, table)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_bad_step_moves_on_in_the_data_and_changes_nothing_else(bad):
  def loss(params, rows, key, context):
    values = per_example_loss(params, rows, key)
    now = context.step == 2
    if bad == "loss":
      values = values * jnp.where(now, jnp.nan, 1.0)
    else:  # a finite loss with an infinite slope
      zero = jnp.sum((params["w"] - jax.lax.stop_gradient(params["w"])) ** 2)
      values = values + jnp.sqrt(zero + jnp.where(now, 0.0, 1.0))
    return values, training.Observed(carried={"mean": values.mean()})

  carried = training.Carried(
    init=lambda key: jnp.zeros(()), update=lambda state, seen, step: 0.5 * state + seen["mean"]
  )
  mixer = mixing.make_mixer(
    lambda state, step: jax.nn.softmax(state),
    (300, 20, 70),
    init=lambda key: jnp.zeros(3),
    update=lambda state, seen: 0.7 * state + seen["group_loss"],
    needs=("group_loss",),
  )
  kwargs = {"loss": loss, "carried": carried, "table": make_table((300, 20, 70))}
  step, state = make_problem(mixer, optimizer=optax.adam(0.1), skip_bad_steps=True, **kwargs)
  states = [state]
  for _ in range(5):
    state, metrics = step.advance(states[-1], step.table, 1)
    assert bool(jnp.isfinite(metrics["grad_norm"][0])) == (len(states) != 3)
    states.append(state)
  before, after = states[2], states[3]
  assert (int(after.step), int(states[5].step)) == (3, 5)
  for name in ("params", "opt_state", "mixer", "carried"):
    for x, y in zip(*(jax.tree.leaves(getattr(s, name)) for s in (before, after)), strict=True):
      np.testing.assert_array_equal(x, y)
  assert not np.array_equal(before.streams.offset, after.streams.offset)
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(states[5].params))
  assert not np.array_equal(states[3].params["w"], states[4].params["w"])
  # Without it, one such step ruins the rest.
  step, state = make_problem(mixer, optimizer=optax.adam(0.1), **kwargs)
  state, _ = step.advance(state, step.table, 5)
  assert not bool(jnp.isfinite(state.params["w"]).any())
