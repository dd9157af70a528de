"""The documents tell the truth: code runs, links lead somewhere, names exist."""

import re
from pathlib import Path

import pytest

from balance_jax import mixing

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
  *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").glob("*/*.md"),
]  # fmt: skip


def test_the_library_example_of_the_readme_runs():
  (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
  assert len([line for line in code.splitlines() if line.strip()]) <= 20
  scope = {}
  exec(code, scope)
  assert scope["history"]["loss"].shape == (1000,)
  p = scope["history"]["mixture"]["p"]
  assert p[499, 1] > 2 * p[500, 1]  # Cooldown switches where the example says


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
  for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", path.read_text()):
    if target and "://" not in target:
      assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_anchors_of_the_readme_exist():
  headings = re.findall(r"^## (.*)$", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
  known = {heading.lower().replace(" ", "-") for heading in headings}
  anchors = re.findall(r"docs/methods\.md#([\w-]+)", (ROOT / "README.md").read_text())
  assert anchors
  assert set(anchors) <= known


def test_every_mixer_is_documented():
  text = (ROOT / "docs" / "methods.md").read_text()
  for name in mixing.MIXERS:
    assert f"`{name}" in text or f"mixing.{name}" in text, name
