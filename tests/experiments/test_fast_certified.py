"""The README of the experiment says what its results say."""

import copy
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "experiments" / "fast_certified"
SCRIPTS = ("claims", "collect", "gain", "table")


def test_the_readme_shows_what_the_results_say(scripts, committed):
  table = scripts["table"]
  readme = table.README.read_text(encoding="utf-8")
  assert table.insert(readme, table.render(committed)) == readme


def test_verdicts_turn_around_with_the_data(scripts, committed):
  claims, found = scripts["claims"], copy.deepcopy(committed)
  arms = claims.chosen(found["ablation"])
  before = [row[3] for row in claims.ablation_rows(arms)]
  arms["BN"], arms["all"] = arms["all"], arms["BN"]
  after = [row[3] for row in claims.ablation_rows(arms)]
  assert (before[0], after[0]) == ("reproduces", "does not")
  studies = {name: found[name] for name in scripts["collect"].STUDIES}
  assert claims.sound_row(studies)[3] == "reproduces"
  studies["ramp"]["points"][2]["test"]["violations"][0] = 1
  assert claims.sound_row(studies)[2:] == ("1 broken", "does not")


def test_a_short_ramp_is_judged_both_ways(scripts, committed):
  claims = scripts["claims"]
  arms = claims.chosen(committed["ramp"])
  verdicts = [row[3] for row in claims.ramp_rows(arms)]
  same = {name: arms[f"{name.partition(',')[0]}, ramp 30"] for name in arms}
  unharmed = [row[3] for row in claims.ramp_rows(same)]
  assert (verdicts[0], unharmed[0]) == ("does not", "reproduces")


def test_chosen_settings_are_the_best_of_validation(scripts, committed):
  points = committed["methods"]["points"]
  for point in points:
    rivals = [p for p in points if (p["arm"], p["eps"]) == (point["arm"], point["eps"])]
    best = max(rivals, key=lambda p: sum(p["eval"]["certified"]))
    assert point["chosen"] == (point is best)
