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
  arms = copy.deepcopy(committed["ablation"]["arms"])
  verdicts = [row[3] for row in scripts["claims"].ablation_rows(arms)]
  arms["BN"], arms["no BN"] = arms["no BN"], arms["BN"]
  arms["all"]["violations"][0] = 1
  turned = [row[3] for row in scripts["claims"].ablation_rows(arms)]
  assert (verdicts[1], turned[1]) == ("reproduces", "does not")
  assert (verdicts[-1], turned[-1]) == ("reproduces", "does not")
