"""Tests of the page of a robust training experiment; it is opened in a real browser."""

import pytest

from balance_jax.training import robust_figures as figures
from balance_jax.training.robust_report import write_robust_report
from balance_jax.training.robust_summary import summarize, verdict
from tests.training.chromium import measure
from tests.training.robust_records import describe, make_records

LONG = tuple(f"method {i}, with a rather long name" for i in range(4))
SETTINGS = ("default", "alpha 0.2", "alpha 0.5")


@pytest.fixture(scope="module")
def records():
  return make_records(settings=SETTINGS, seeds=2)


@pytest.fixture(scope="module")
def page(records, tmp_path_factory):
  path = tmp_path_factory.mktemp("report") / "r.html"
  write_robust_report(path, records, describe())
  return path


def _check(page, folder, count, tables, *, width, dark):
  seen = measure(page, folder, width=width, dark=dark)
  assert seen["console"] == []
  assert seen["count"] == {"svg": count, "table": tables, "dl": 1}
  for box in seen["shown"]:
    assert box["width"] > 50, box
    assert box["height"] > 10, box
  assert (seen["innerWidth"], seen["scrollWidth"], seen["dark"]) == (width, width, dark)
  for key in ("wide", "duplicateIds", "deadReferences", "overlaps", "outside"):
    assert seen[key] == [], key
  assert seen["textFills"] in ([seen["ink"]], [])


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_in_a_browser(tmp_path, page, width, dark):
  # Front, curves, margins, classes, training, states, radii.
  _check(page, tmp_path, 7, 2, width=width, dark=dark)


EXTREMES = {
  "large": (
    {
      "arms": LONG,
      "eps": tuple(n / 255 for n in (2, 4, 8, 16)),
      "layers": 7,
      "classes": 10,
      "seeds": 1,
    },
    7,
  ),
  "an attack only": (
    {"arms": ["pgd"], "eps": (8 / 255,), "seeds": 1, "attacks_only": ["pgd"], "curve": False},
    3,
  ),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_in_a_browser(tmp_path, name):
  changes, count = EXTREMES[name]
  write_robust_report(tmp_path / "r.html", make_records(**changes), describe())
  _check(tmp_path / "r.html", tmp_path, count, 1, width=1280, dark=False)


def test_what_the_page_says(page, records):
  text = page.read_text(encoding="utf-8")
  assert "<h1>Certified training of &lt;tiny&gt; &amp; friends</h1>" in text
  assert "36 runs: 3 arms, 3 settings, 2 radii, 2 seeds; 80 steps." in text
  assert "<dt>config.eps</dt><dd>0.1, 0.2</dd>" in text
  assert "<dt>selection</dt>" not in text
  assert "Settings whose every run collapsed are left out." in text
  for line in verdict(summarize(records)):
    assert line in text
  # The lowest verified error of each of two radii.
  assert text.count('<td class="number strong">') == 2
  assert "best certified share in validation" in text


def test_the_page_says_what_it_leaves_out(tmp_path, monkeypatch):
  for name, most in {"MAX_ROWS": 1, "MAX_PANELS": 2, "MAX_COLUMNS": 2, "MAX_RADII": 1}.items():
    monkeypatch.setattr(figures, name, most)
  records = make_records(arms=("a", "b", "c"), seeds=1, curve=False)
  write_robust_report(tmp_path / "r.html", records, describe())
  text = (tmp_path / "r.html").read_text(encoding="utf-8")
  for what, count in {
    "1 of 2 radii": 2,  # front and training
    "2 of 3 arms": 1,  # classes
    "1 of 3 arms": 2,  # states and, beside the start, radii
    "2 of 3 layers": 2,
  }.items():
    assert text.count(f" {what} are shown.") == count, what


def test_own_verdict_and_selection(tmp_path):
  records = [record for record in make_records(seeds=1) if record["event"] == "eval"]
  own = describe(verdict=["Because I say so."], summary="A test.", selection="mean")
  write_robust_report(tmp_path / "r.html", records, own)
  text = (tmp_path / "r.html").read_text(encoding="utf-8")
  assert '<div class="callout"><p>Because I say so.</p></div>' in text
  assert "<p>A test.</p>" in text
  # Nothing but the table is left without train and test records.
  assert "<svg" not in text
  assert 'class="number strong"' not in text


def test_a_broken_certificate_is_in_the_verdict(tmp_path):
  records = [record for record in make_records(seeds=1) if record["event"] == "eval"]
  records[-1]["violations"] = 1
  write_robust_report(tmp_path / "r.html", records, describe())
  assert "<p>INVALID: 1 certified examples" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_refused_descriptions_and_records(tmp_path, records):
  with pytest.raises(ValueError, match=r"must have the key 'title', got \['device'\]"):
    write_robust_report(tmp_path / "r.html", records, {"device": "cpu"})
  with pytest.raises(ValueError, match="selection must be one of"):
    write_robust_report(tmp_path / "r.html", records, describe(selection="loss"))
  assert list(tmp_path.iterdir()) == []
