"""The experiment's scripts at a tiny size; its verdicts and its README against its results."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import data
from balance_jax.distillation import init_mtard_state, mtard_update
from balance_jax.training import stack_cells
from balance_jax.training.evidence import VERDICTS

FOLDER = Path(__file__).parents[2] / "experiments" / "two_teachers"
SCRIPTS = ("claims", "table", "train")


def test_accuracies_by_hand(scripts):
  # Margins of the label 0.8, 0.1 and -0.2; the attack takes 0.2 of them.
  image = np.array([[0.9, 0.1], [0.55, 0.45], [0.4, 0.6]], np.float32)
  split = {"image": image, "label": np.zeros(3, np.int32)}
  measured = jax.jit(lambda split: scripts["train"].measure(lambda x: x, 0.1, split))(split)
  np.testing.assert_allclose(measured["clean"], 200 / 3, rtol=1e-6)
  np.testing.assert_allclose(measured["robust"], 100 / 3, rtol=1e-6)
  np.testing.assert_allclose(measured["w_robust"], 50.0, rtol=1e-6)


def softmax(x):
  exp = np.exp(x - x.max(axis=-1, keepdims=True))
  return exp / exp.sum(axis=-1, keepdims=True)


def network(params, x):
  """A perceptron with one hidden layer in float64."""
  layers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
  x = x.reshape(len(x), -1) @ layers["dense_0"]["kernel"] + layers["dense_0"]["bias"]
  return np.maximum(x, 0) @ layers["head"]["kernel"] + layers["head"]["bias"]


def divergence(student, teacher, eps, tau=1.0):
  p = softmax(teacher / tau)
  return (p * (np.log(p + eps) - np.log(softmax(student / tau)))).mean(axis=-1)


def test_losses_of_all_arms_against_numpy(scripts):
  """At radius 0 the attacked digits are the clean ones, and every loss can be written down."""
  train = scripts["train"]
  settings = train.Settings(eps=0.0, batch=4, epochs=10, student=(5,), teacher=(6,))
  rng = np.random.default_rng(0)
  image = rng.random((4, 8, 8, 1)).astype(np.float32)
  told = {k: (2 * rng.standard_normal((4, 2, 10))).astype(np.float32) for k in ("robust", "clean")}
  rows = {"image": image, "label": np.array([3, 1, 9, 0], np.int32), **told}
  keys = jax.random.split(jax.random.key(1), 2)
  robust = jax.vmap(lambda key: train.MLP((6,)).init(key, image[:1]))(keys)
  table = data.GroupTable.from_rows({"all": rows})
  students = train.Students(settings, train.Teachers(robust, told, {}), table)
  arms = train.ARMS.values()
  cells = [train.cells(arm, 0.1, 0.5, seeds=(7, 8))[1] for arm in arms]

  def one(cell):
    step = students.build(cell)
    state = students.init(cell, step)
    # Not the first step, in which all losses are as large as the first ones.
    seen = state.carried._replace(step=jnp.array(1), init_adv=1.0, init_nat=1.0)
    state = dataclasses.replace(state, carried=seen)
    losses, observed = step.losses(state, table.rows, jax.random.key(2))
    after = step.carried.update(seen, observed.carried, state.step)
    return losses, observed.means["gap"][0], after, state.params

  losses, gap, after, params = jax.jit(jax.vmap(one))(stack_cells(cells))

  student = network(jax.tree.map(lambda leaf: leaf[0], params), image)
  attacked = network(jax.tree.map(lambda leaf: leaf[1], robust), image)  # the seed's own pair
  robust_label, clean_label = (told[k][:, 1].astype(float) for k in ("robust", "clean"))
  adv, nat = divergence(student, attacked, 1e-5), divergence(student, clean_label, 1e-5)
  target = adv.mean() / (adv.mean() + nat.mean())
  p_adv, p_nat = softmax(attacked), softmax(clean_label)
  entropies = [-(p * np.log(p + 1e-5)).mean() for p in (p_adv, p_nat)]
  np.testing.assert_allclose(gap, abs(entropies[0] - entropies[1]), rtol=1e-4)
  warmer = "tau_nat" if entropies[0] > entropies[1] else "tau_adv"
  for i, (name, arm) in enumerate(train.ARMS.items()):
    w = arm.w_adv - train.WEIGHT_RATE * arm.nlb * (arm.w_adv - target)
    expected = {
      "RSLAD": divergence(student, robust_label, 1e-5),
      "ARD": 900 * divergence(student, robust_label, 0.0, tau=30.0),
    }.get(name, w * adv + (1 - w) * nat)
    # ARD: 30^2 times the small difference of two nearly uniform distributions, in float32.
    np.testing.assert_allclose(
      losses[i], expected, rtol=2e-3 if name == "ARD" else 2e-5, err_msg=name
    )
    np.testing.assert_allclose(after.w_adv[i], w, rtol=1e-5)
    assert getattr(after, warmer)[i] == (1.5 if arm.ebb else 1.0)


def test_the_conference_form_is_nlb_alone():
  """Which is why it has no arm of its own."""
  state, other = init_mtard_state(), init_mtard_state()
  for observed in ((1.0, 2.0, 0.1, 0.2), (0.5, 1.9, 0.2, 0.1)):
    state = mtard_update(state, *observed, temp_lr=0.0)
    other = mtard_update(other, *observed, variant="mtard")
  assert state.w_adv != 0.5
  assert [float(x) for x in state] == [float(x) for x in other]


def test_rates_fall_as_published(scripts):
  train = scripts["train"]
  table = data.GroupTable.from_rows({"all": {"image": np.zeros((300, 1), np.uint8)}})
  students = train.Students(train.Settings(batch=1, epochs=1), None, table)
  factors = [float(students.decay(step)) for step in (0, 214, 215, 260, 285, 299)]
  np.testing.assert_allclose(factors, [1, 1, 0.1, 0.01, 1e-3, 1e-3], rtol=1e-5)


def test_the_best_candidate_is_chosen(scripts):
  rows = [{"rate": rate, "w_robust": value} for rate, value in ((0.1, 1.0), (1.0, 3.0), (3.0, 2.0))]
  choose = scripts["train"].choose
  assert choose(rows) == {"rate": 1.0, "w_robust": 3.0, "at_edge": False}
  assert choose(rows[:2])["at_edge"]


@pytest.mark.slow
def test_runs_at_a_tiny_size(scripts, tmp_path):
  train = scripts["train"]
  settings = train.Settings(
    teacher_epochs=1, epochs=2, student=(8,), teacher=(8,), rates=(0.1,), temp_rates=(0.05,),
    search_seeds=(9,), seeds=(0, 1),
  )  # fmt: skip
  saved = train.main({"tiny": settings}, tmp_path)
  assert json.loads((tmp_path / "two_teachers.json").read_text()) == saved
  results = saved["tiny"]
  assert set(results["arms"]) == set(train.ARMS)
  assert np.shape(results["teachers"]["clean"]["w_robust"]) == (2,)
  for name, arm in train.ARMS.items():
    record = results["arms"][name]
    np.testing.assert_allclose(
      record["w_robust"], np.add(record["clean"], record["robust"]) / 2, rtol=1e-4
    )
    assert np.shape(record["course"]["gap"]) == (2,)
    assert np.shape(record["last"]["tau_nat"]) == np.shape(record["first_gap"]) == (2,)
    assert (np.max(record["last"]["tau_nat"]) > 1) == arm.ebb
    assert (record["last"]["w_nat"] == [1 - arm.w_adv] * 2) == (not arm.nlb)
  # The same students: arms of the same seed differ in what they learn from alone.
  assert results["arms"]["fixed"]["first_gap"] == results["arms"]["NLB"]["first_gap"]
  table = scripts["table"]
  table.draw(results, tmp_path / "two_teachers.png")
  assert (tmp_path / "two_teachers.png").stat().st_size < 200_000


def test_readme_holds_the_tables_of_the_results(scripts, committed):
  table = scripts["table"]
  readme = table.README.read_text(encoding="utf-8")
  assert table.insert(readme, table.render(committed)) == readme


def test_every_row_has_a_verdict(scripts, committed):
  verdicts = [
    row["verdict"]
    for heading in scripts["claims"].rows(committed["radius 0.1"])
    for part in committed.values()
    for row in scripts["claims"].rows(part)[heading]
  ]
  assert set(verdicts) <= set(VERDICTS)
  rendered = scripts["table"].render(committed)
  printed = re.findall(r"\*\*(reproduces|does not|not established)\*\*", rendered)
  assert printed == verdicts


def made_up(**changes):
  """Results in which every claim holds: three seeds that all say the same, but for a little."""
  noise = np.array([-0.01, 0.0, 0.01])
  arms = {}
  for name, clean, robust, gap, tau in (
    ("RSLAD", 90, 60, 0.1, 1), ("ARD", 90, 60, 0.1, 1), ("robust teacher", 90, 60, 0.1, 1),
    ("fixed", 92, 60, 0.1, 1), ("NLB", 93, 60, 0.1, 1), ("EBB", 93, 60, 0.01, 5),
    ("NLB + EBB", 95, 60, 0.01, 5),
  ):  # fmt: skip
    clean, robust, gap, tau = changes.get(name, (clean, robust, gap, tau))
    arms[name] = {
      "clean": clean + noise, "robust": robust + noise[::-1],
      "w_robust": (clean + robust) / 2 + noise, "first_gap": 0.1 + noise / 100,
      "last": {"gap": gap + noise[::-1] / 100, "tau_nat": tau + noise, "tau_adv": 1 + noise},
    }  # fmt: skip
  return {"arms": arms}


@pytest.mark.parametrize(
  ("changes", "fails"),
  [
    ({}, ()),
    ({"NLB": (90.9, 62, 0.1, 1)}, ("NLB − RSLAD",)),
    ({"robust teacher": (91.5, 60, 0.1, 1)}, ("fixed − robust teacher",)),
    ({"NLB + EBB": (98, 58, 0.01, 5)}, ("NLB + EBB − RSLAD, PGD-20",)),
    ({"ARD": (90, 68, 0.1, 1)}, ("NLB + EBB − each other arm",)),
    (
      {"fixed": (92, 62.5, 0.1, 1)},
      ("NLB + EBB − fixed", "NLB − fixed, W-Robust", "EBB − fixed, W-Robust"),
    ),
    ({"EBB": (93, 60, 0.06, 5)}, ("EBB, log2 of first / last",)),
    ({"NLB": (93, 60, 0.04, 1)}, ("NLB, log2 of last / first",)),
    ({"EBB": (93, 60, 0.01, 1.2)}, ("EBB, last epoch",)),
  ],
)
def test_verdicts_follow_the_results(scripts, changes, fails):
  rows = [row for rows in scripts["claims"].rows(made_up(**changes)).values() for row in rows]
  failed = [row["setting"] for row in rows if row["verdict"] != "reproduces"]
  assert len(failed) == len(fails)
  assert all(map(str.startswith, failed, fails))
