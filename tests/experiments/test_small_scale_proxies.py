"""The experiment's claims against its results, and its README against both."""

from pathlib import Path

import pytest

from balance_jax.training import evidence

FOLDER = Path(__file__).parents[2] / "experiments" / "small_scale_proxies"
SCRIPTS = ("claims", "collect", "figures", "rows", "run", "scaling_claims", "table")


def test_the_readme_shows_what_the_results_say(scripts):
  table = scripts["table"]
  shown = table.README.read_text(encoding="utf-8").split(table.BEGIN)[1].split(table.END)[0]
  assert shown.strip() == table.tables().strip()


def test_every_figure_has_three_seeds_and_a_verdict(scripts):
  rows = scripts["table"].claim_rows()
  assert set(rows) == set(scripts["figures"].FIGURES)
  for name, claims in rows.items():
    assert claims, name
    assert {row["verdict"] for row in claims} <= set(evidence.VERDICTS)
    assert len(scripts["figures"].Figure(name).results["summary"]["seeds"]) >= 3


def test_verdicts_turn_around_with_the_data(scripts):
  """The same rules on results in which plain and normalised models have changed places."""
  figure = scripts["figures"].Figure("qk_norm")
  other = {"plain": "qk_norm", "qk_norm": "plain"}
  for curve in figure.curves:
    curve["architecture"] = other[curve["architecture"]]
  turned = {row["claim"]: row["verdict"] for row in scripts["claims"].qk_norm(figure)}
  rows = scripts["claims"].qk_norm(scripts["figures"].Figure("qk_norm"))
  straight = {row["claim"]: row["verdict"] for row in rows}
  claim = next(claim for claim in straight if claim.startswith("S grows") and "without" in claim)
  assert straight[claim] == "reproduces"
  assert turned[claim] != "reproduces"
  claim = next(claim for claim in straight if claim.startswith("At the highest rate"))
  assert straight[claim] != "does not"
  assert turned[claim] == "does not"


def test_curves_by_hand(scripts):
  entry = {
    "learning_rates": [0.01, 0.1, 1.0],
    "parameters": 10,
    "init_loss": [5.0, 5.0],
    "final_loss": [[2.0, 2.1, None], [3.0, 2.0, 9.0]],
    "sensitivity": {"values": [1.0, 2.0]},
    "sensitivity_best_window": None,
    "max_logit": [[1.0, 10.0, None], [1.0, 100.0, 1.0]],
  }
  curve = scripts["figures"].Curve(entry)
  assert curve.at(1.0).tolist() == [5.0, 5.0]  # diverged, and worse than at the start
  assert curve.best_rate.tolist() == [-2.0, -1.0]
  # 10 % of the gain of 3 is .3: the first seed loses more at rate 1 only, and so does the second.
  assert curve.unstable_rate.tolist() == [0.0, 0.0]
  assert curve.log10("max_logit", 0.1).tolist() == [1.0, 2.0]


def test_bad_command_lines(scripts, tmp_path):
  with pytest.raises(SystemExit, match=r"unknown figures \['qknorm'\]; allowed: qk_norm"):
    scripts["run"].main(tmp_path, ["qknorm"])
  with pytest.raises(SystemExit, match="lacks finished runs of: qk_norm"):
    scripts["collect"].main(tmp_path)
