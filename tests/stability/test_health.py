import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.models.decoder import LayerNorm
from balance_jax.stability import health
from balance_jax.stability.health import (
  StabilityReport,
  global_rms,
  spike_score,
  tree_rms,
  update_to_eps_ratio,
)


def random_tree(seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  tree = {"a": rng.normal(0, 3, (4, 5)), "b": [rng.normal(1, 1e-3, (7,)), rng.normal(0, 1, ())]}
  return jax.tree.map(lambda x: np.asarray(x, dtype), tree)


def reference_rms(*arrays):
  flat = np.concatenate([np.ravel(np.asarray(array, np.float64)) for array in arrays])
  return np.sqrt(np.mean(flat**2))


def test_rms_by_hand():
  tree = {"a": jnp.array([[3.0, 4.0], [0.0, 0.0]]), "b": jnp.array(-7.0), "c": jnp.zeros((0, 3))}
  found = tree_rms(tree)
  assert {name: float(x) for name, x in found.items()} == pytest.approx({"a": 2.5, "b": 7, "c": 0})
  assert all(x.dtype == jnp.float32 and x.shape == () for x in found.values())
  assert float(global_rms(tree)) == pytest.approx(np.sqrt((25 + 49) / 5))
  assert float(tree_rms(jnp.array([3, -4]))) == pytest.approx(np.sqrt(12.5))
  assert float(global_rms({})) == float(global_rms([jnp.zeros(0)])) == 0


def test_rms_equals_reference_also_under_jit_and_vmap():
  tree = random_tree()
  both = jax.jit(lambda tree: (tree_rms(tree), global_rms(tree)))
  leaf_rms, total = both(tree)
  for found, leaf in zip(jax.tree.leaves(leaf_rms), jax.tree.leaves(tree), strict=True):
    np.testing.assert_allclose(found, reference_rms(leaf), rtol=1e-6)
  np.testing.assert_allclose(total, reference_rms(*jax.tree.leaves(tree)), rtol=1e-6)
  pair = jax.tree.map(lambda x, y: jnp.stack([x, 2 * y]), tree, random_tree(1))
  batched = jax.jit(jax.vmap(lambda tree: (tree_rms(tree), global_rms(tree))))(pair)
  second = both(jax.tree.map(lambda x: x[1], pair))
  for i, alone in ((0, (leaf_rms, total)), (1, second)):
    jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-6), batched, alone)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e30])
def test_squares_stay_in_range(scale):
  tree = [jnp.array([3.0, 0.0, -4.0]) * scale, jnp.array([12.0]) * scale]
  leaf_rms, total = jax.jit(lambda tree: (tree_rms(tree), global_rms(tree)))(tree)
  np.testing.assert_allclose(leaf_rms, np.array([np.sqrt(25 / 3), 12.0]) * scale, rtol=1e-5)
  np.testing.assert_allclose(total, np.sqrt(169 / 4) * scale, rtol=1e-5)


def test_low_precision_is_lifted():
  # 4096 squares of 1.0 cannot be summed in bfloat16, and 300^2 not be held in float16.
  for dtype, value in ((jnp.bfloat16, 1.0), (jnp.float16, 300.0)):
    tree = [jnp.full((4096,), value, dtype)]
    found = jax.jit(lambda tree: (tree_rms(tree)[0], global_rms(tree)))(tree)
    assert all(x.dtype == jnp.float32 for x in found)
    np.testing.assert_allclose(found, value, rtol=1e-6)
  with jax.enable_x64(True):
    assert tree_rms(np.ones(3)).dtype == jnp.float64


def test_rms_gradients():
  tree = random_tree()
  tree["zero"] = np.zeros(3, np.float32)
  weights = jax.tree.map(lambda x: float(x.size), tree)

  def objective(tree):
    rms = jax.tree.map(lambda w, r: w * r, weights, tree_rms(tree))
    return sum(jax.tree.leaves(rms)) + 10 * global_rms(tree)

  def float64(tree):
    leaves = jax.tree.leaves(tree)
    return sum(x.size * reference_rms(x) for x in leaves) + 10 * reference_rms(*leaves)

  grads = jax.jit(jax.grad(objective))(tree)
  np.testing.assert_array_equal(grads["zero"], 0)
  leaves, structure = jax.tree.flatten(jax.tree.map(np.float64, tree))
  for place, grad in enumerate(jax.tree.leaves(grads)):
    if not np.any(leaves[place]):
      continue
    for index in np.ndindex(grad.shape):
      ends = []
      for step in (1e-5, -1e-5):
        moved = [np.array(leaf) for leaf in leaves]
        moved[place][index] += step
        ends.append(float64(jax.tree.unflatten(structure, moved)))
      np.testing.assert_allclose(grad[index], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-4)
  at_zero = jax.jit(jax.grad(global_rms))(jax.tree.map(np.zeros_like, random_tree()))
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(at_zero))


def test_rms_shows_what_is_not_finite():
  tree = {"inf": jnp.array([1.0, jnp.inf]), "nan": jnp.array([1.0, jnp.nan])}
  found = tree_rms(tree)
  assert float(found["inf"]) == np.inf
  assert np.isnan(found["nan"])
  assert np.isnan(global_rms(tree))
  assert float(global_rms({"inf": tree["inf"]})) == np.inf


def test_update_to_eps_ratio():
  grads = {"a": jnp.array([3e-8, -4e-8]), "zero": jnp.zeros(2), "nan": jnp.array([jnp.nan, 1.0])}
  for eps in (1e-8, 1e-15):
    found = jax.jit(update_to_eps_ratio)(grads, eps)  # eps traced
    np.testing.assert_allclose(found["a"], np.sqrt(12.5) * 1e-8 / eps, rtol=1e-5)
    assert float(found["zero"]) == 0
    assert np.isnan(found["nan"])
    np.testing.assert_allclose(update_to_eps_ratio(grads, eps)["a"], found["a"], rtol=1e-6)
  without = update_to_eps_ratio(grads, 0.0)
  assert float(without["a"]) == np.inf
  assert float(without["zero"]) == 0
  many = jax.vmap(lambda eps: update_to_eps_ratio(grads, eps)["a"])(jnp.array([1e-8, 2e-8]))
  assert float(many[0] / many[1]) == pytest.approx(2)
  for eps in (-1e-8, np.nan, np.inf):
    with pytest.raises(ValueError, match="eps is "):
      update_to_eps_ratio(grads, eps)


def reference_spike_score(values, window, n_std):
  """The definition step by step."""
  spikes = judged = 0
  for t, value in enumerate(values):
    if not np.isfinite(value):
      spikes, judged = spikes + 1, judged + 1
      continue
    history = [v for v in values[max(0, t - window) : t] if np.isfinite(v)]
    if len(history) < 10:
      continue
    judged += 1
    mean, std = np.mean(history), np.std(history)
    spikes += bool(value >= mean + n_std * std and value - mean > 1e-9 * abs(mean))
  return spikes / judged if judged else 0.0


def test_spike_score_by_hand():
  curve = [1.0, 3.0] * 10  # mean 2, standard deviation 1
  assert spike_score([*curve, 8.9]) == 0
  assert spike_score([*curve, 9.0]) == pytest.approx(1 / 11)  # exactly at 7 deviations
  assert spike_score([*curve, -9.0]) == 0
  assert spike_score([*curve, 5.0], n_std=3.0) == pytest.approx(1 / 11)
  assert isinstance(spike_score(curve), float)
  # The window forgets: against the last 10 values alone, all equal, 5 is high; against all, not.
  late = [1.0, 9.0] * 10 + [4.0] * 10 + [5.0]
  assert spike_score(late, window=10) == pytest.approx(1 / 21)
  assert spike_score(late) == 0


def test_spike_score_counts_only_what_has_a_history():
  assert spike_score([1.0] * 10) == 0
  assert spike_score([1.0] * 9 + [50.0]) == 0
  assert spike_score([1.0] * 10 + [50.0]) == 1
  assert spike_score([]) == 0
  # Constant curves: no deviation and no rise, whatever the rounding of their mean.
  assert spike_score([0.1] * 40) == 0
  assert spike_score(np.linspace(5, 1, 100)) == 0


def test_non_finite_values_are_spikes_and_no_history():
  assert spike_score([1.0, np.nan, np.inf, 1.0]) == 1
  curve = [1.0, 3.0] * 10
  assert spike_score([*curve, np.nan, 5.0]) == pytest.approx(1 / 12)
  assert spike_score([*curve, None, 5.0]) == pytest.approx(1 / 12)
  broken = [*curve] + [np.nan] * 30
  assert spike_score(broken, window=10) == pytest.approx(30 / 40)


@pytest.mark.parametrize("window", [10, 25, 1000])
def test_spike_score_equals_reference(window, monkeypatch):
  rng = np.random.default_rng(window)
  values = rng.normal(2, 0.1, (2, 3, 150)) + np.linspace(3, 0, 150)
  values[rng.random(values.shape) < 0.03] *= 4
  values[rng.random(values.shape) < 0.03] = np.nan
  values[0, 0, 40] = 1e20  # running sums would lose all that follows
  expected = [[reference_spike_score(row, window, 3.0) for row in rows] for rows in values]
  assert 0 < np.min(expected) < np.max(expected) < 1
  found = spike_score(values, window, 3.0)
  assert found.shape == (2, 3)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  monkeypatch.setattr(health, "_CHUNK_ELEMENTS", 7 * window * 6)  # blocks of 7 steps
  np.testing.assert_array_equal(spike_score(values, window, 3.0), found)


def test_spike_score_refuses():
  with pytest.raises(ValueError, match=r"values has shape \(\)"):
    spike_score(1.0)
  with pytest.raises(ValueError, match="window is 9"):
    spike_score([1.0], window=9)
  with pytest.raises(ValueError, match="n_std is 0"):
    spike_score([1.0], n_std=0)
  with pytest.raises(ValueError, match=r"values is .*; expected numbers"):
    spike_score(["a"])
  with pytest.raises(ValueError, match="values must be known"):
    jax.jit(spike_score)(jnp.ones(3))


LIMITS = [
  ("max_logit", 1e4, 1.1e4, "qk_norm"),
  ("log_z_mean", 20.0, 20.1, "z-loss"),
  ("log_z_mean", -20.0, -20.1, "z-loss"),
  ("attention_entropy", 0.01, 0.009, "qk_norm"),
  ("gradient_to_eps", 10.0, 9.9, "epsilon"),
  ("spike_score", 0.0, 0.001, "warm-up"),
]


@pytest.mark.parametrize(("field", "fine", "bad", "remedy"), LIMITS)
def test_limits_of_the_report(field, fine, bad, remedy):
  stable = StabilityReport(**{field: fine})
  assert stable.is_stable
  assert stable.warnings() == []
  assert "warning" not in stable.table()
  report = StabilityReport(**{field: bad})
  assert not report.is_stable
  (sentence,) = report.warnings()
  limit = f"{abs(fine):g}"
  assert f"{bad:.3g}" in sentence
  assert limit in sentence
  assert remedy in sentence
  (row,) = [line for line in report.table().splitlines() if line.endswith("warning")]
  assert f"{bad:.3g}" in row
  assert limit in row


def test_report_without_measurements():
  report = StabilityReport()
  assert report.is_stable
  assert sum(" -" in line for line in report.table().splitlines()) == 6
  assert StabilityReport(block_rms=1e9).is_stable
  with pytest.raises(dataclasses.FrozenInstanceError):
    report.max_logit = 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_means_diverged(value):
  for field in ("max_logit", "block_rms"):
    report = StabilityReport(**{field: value})
    assert report.diverged
    assert not report.is_stable
    (sentence,) = report.warnings()
    assert "diverged" in sentence
    assert report.table().splitlines()[-1].split() == ["diverged", "yes", "no", "warning"]


def make_history(steps=60):
  """Signs that differ by step, block, head and tensor, so that every reduction shows."""
  rng = np.random.default_rng(0)
  return {
    "max_logit": rng.uniform(1, 30, (steps, 3)).astype(np.float32),
    "log_z": np.linspace(5, 1, steps),
    "entropy": rng.uniform(0.5, 2, (steps, 3, 2)),
    "grad_rms": {"up": rng.uniform(1e-3, 1e-2, steps), "out": rng.uniform(1e-6, 2e-6, (steps, 3))},
    "block_rms": jnp.asarray(rng.uniform(1, 5, (steps, 3)), jnp.float32),
    "loss": list(1 + rng.uniform(0, 0.1, steps)),
    "learning_rate": np.ones(steps),
  }


def test_report_from_history():
  history = make_history()
  report = StabilityReport.from_history(history, eps=1e-8, tail=20)
  assert report.max_logit == pytest.approx(history["max_logit"].max())
  assert report.log_z_mean == pytest.approx(history["log_z"][-20:].mean())
  assert report.attention_entropy == pytest.approx(history["entropy"][-20:].mean(0).min())
  assert report.gradient_to_eps == pytest.approx(
    history["grad_rms"]["out"][-20:].mean(0).min() / 1e-8
  )
  assert report.block_rms == pytest.approx(float(history["block_rms"][-20:].mean(0).max()))
  assert report.spike_score == spike_score(history["loss"]) == 0
  assert report.is_stable
  assert json.loads(json.dumps(dataclasses.asdict(report))) == dataclasses.asdict(report)
  long = StabilityReport.from_history(history, eps=1e-8)
  assert long.log_z_mean == pytest.approx(3.0)
  spiky = StabilityReport.from_history({"loss": [1.0, 1.1] * 10 + [9.0]})
  assert spiky.spike_score == pytest.approx(1 / 11)
  negative = StabilityReport.from_history({"log_z": -np.full((5, 1), [30.0])})
  assert negative.log_z_mean == -30


def test_absent_keys_stay_none():
  report = StabilityReport.from_history({"loss": [1.0] * 20, "entropy": None})
  assert report == StabilityReport(spike_score=0.0)


@pytest.mark.parametrize("key", ["max_logit", "log_z", "entropy", "grad_rms", "block_rms", "loss"])
def test_history_of_a_diverged_run(key):
  history = make_history()
  # Once in the middle: the figures come from what is finite.
  once = jax.tree.map(np.array, dict(history, loss=np.array(history["loss"])))
  jax.tree.map(lambda x: x[50:51].fill(np.nan), once[key])
  report = StabilityReport.from_history(once, eps=1e-8, tail=20)
  assert report.diverged
  assert "diverged" in report.warnings()[0]
  measured = [value for value in dataclasses.astuple(report) if value is not None]
  assert np.isfinite(measured).all()
  # From there to the end: still a report.
  jax.tree.map(lambda x: x.fill(np.inf), once[key])
  assert StabilityReport.from_history(once, eps=1e-8, tail=20).diverged


def test_logit_growth_before_a_divergence_is_reported():
  logits = [1e2, 1e3, 2e4, None, None]
  report = StabilityReport.from_history({"max_logit": logits, "loss": [1.0, 1.0, 2.0, None, None]})
  assert report.max_logit == 2e4
  assert [sentence.split()[1] for sentence in report.warnings()] == ["run", "largest", "share"]


@pytest.mark.parametrize(
  ("history", "eps", "message"),
  [
    ({}, None, r"history holds \[\]; expected at least one of: max_logit, log_z"),
    ({"logits": [1.0]}, None, r"history holds \['logits'\]"),
    ({"grad_rms": [1.0]}, None, "eps is None"),
    ({"grad_rms": [1.0]}, 0.0, "eps is 0"),
    ({"loss": 1.0}, None, r'history\["loss"\] has shapes \[\(\)\]; expected \(T, ...\)'),
    ({"loss": []}, None, r'history\["loss"\] has shapes \[\(0,\)\]'),
    ({"grad_rms": {}}, 1e-8, r'history\["grad_rms"\] has shapes \[\]'),
    ({"grad_rms": {"a": [1.0], "b": [1.0, 2.0]}}, 1e-8, r"arrays of \[1, 2\] steps"),
    ({"loss": ["x"]}, None, r'history\["loss"\] is .*; expected numbers'),
  ],
)
def test_from_history_refuses(history, eps, message):
  with pytest.raises(ValueError, match=message):
    StabilityReport.from_history(history, eps)
  with pytest.raises(ValueError, match="tail is 0"):
    StabilityReport.from_history({"loss": [1.0]}, tail=0)


def layer_norm_gradient(x, scale, grad_out, power):
  """Gradient of a centred, bias-free layer norm at x, with n * m^power below the second term.

  m^-1/2 * (a g - x <g, a x> / (n m^power)), m = mean(x^2) + eps, for x of mean zero; the centring
  itself takes the mean out of the gradient. Wortsman et al. (2023) print the power 1/2.
  """
  x = x - x.mean()
  mean_square = np.mean(x**2) + 1e-6
  inner = np.sum(grad_out * scale * x) / (x.size * mean_square**power)
  grad = (scale * grad_out - x * inner) / np.sqrt(mean_square)
  return grad - grad.mean()


def test_gradient_of_the_final_layer_norm():
  rng = np.random.default_rng(0)
  scale, grad_out = rng.uniform(0.5, 2, 16), rng.normal(0, 1, 16)
  x = rng.normal(0, 3, 16)  # the two powers agree where the mean square is 1

  def objective(x):
    centred = x - x.mean()
    return np.sum(grad_out * scale * centred / np.sqrt(np.mean(centred**2) + 1e-6))

  steps = 1e-5 * np.eye(16)
  slopes = np.array([(objective(x + h) - objective(x - h)) / 2e-5 for h in steps])
  corrected, printed = (layer_norm_gradient(x, scale, grad_out, power) for power in (1.0, 0.5))
  np.testing.assert_allclose(corrected, slopes, atol=1e-8)
  assert np.abs(printed - slopes).max() > 0.1 * np.abs(slopes).max()

  variables = {"params": {"scale": jnp.asarray(scale, jnp.float32)}}

  @jax.jit
  @jax.grad
  def library(x):
    return jnp.sum(jnp.asarray(grad_out, jnp.float32) * LayerNorm().apply(variables, x))

  np.testing.assert_allclose(library(jnp.asarray(x, jnp.float32)), corrected, atol=1e-5)
  # Gradients fall as the inverse of the size of the input: how large blocks starve a layer.
  ratio = global_rms(library(jnp.asarray(10 * x))) / global_rms(library(jnp.asarray(x)))
  assert float(ratio) == pytest.approx(0.1, rel=1e-4)
