"""Tests of the page of a stability experiment; it is opened in a real browser."""

import pytest

from balance_jax.training.stability_report import write_stability_report
from balance_jax.training.stability_summary import summarize, verdict
from tests.training.chromium import measure
from tests.training.stability_records import RATES, SIZES, describe, make_records

SETTINGS = ("default", "no z-loss, no decay", "warm-up 25 %", *(f"eps 1e-{i}" for i in range(6)))


@pytest.fixture(scope="module")
def records():
  return make_records()


@pytest.fixture(scope="module")
def page(records, tmp_path_factory):
  path = tmp_path_factory.mktemp("report") / "r.html"
  write_stability_report(path, records, describe())
  return path


def _check(page, folder, figures, *, width, dark, one_ink=True):
  seen = measure(page, folder, width=width, dark=dark)
  assert seen["console"] == []
  assert seen["count"] == {"svg": figures, "table": 1, "dl": 1}
  for box in seen["shown"]:
    assert box["width"] > 50, box
    assert box["height"] > 10, box
  assert (seen["innerWidth"], seen["scrollWidth"], seen["dark"]) == (width, width, dark)
  for key in ("wide", "duplicateIds", "deadReferences", "overlaps", "outside"):
    assert seen[key] == [], key
  # The cells of a map have their own two inks.
  assert seen["ink"] in seen["textFills"]
  assert len(seen["textFills"]) <= (1 if one_ink else 3)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (420, True)])
def test_in_a_browser(tmp_path, page, width, dark):
  # Loss, sensitivity, logits over rate and over size, gradients.
  _check(page, tmp_path, 5, width=width, dark=dark)


EXTREMES = {
  "settings": ({"settings": SETTINGS, "sizes": SIZES[:3], "seeds": 1}, 6),
  "one size": ({"sizes": SIZES[:1], "seeds": 1}, 3),
  "no statistics": ({"statistics": False, "seeds": 1}, 2),
  "many long names": (
    {
      "architectures": [f"architecture-{i}, with a rather long name" for i in range(8)],
      "sizes": SIZES[:3],
      "seeds": 1,
    },
    5,
  ),
  "one curve": (
    {"architectures": ["x"], "sizes": SIZES[:1], "rates": RATES[:2], "statistics": False},
    2,
  ),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_in_a_browser(tmp_path, name):
  changes, figures = EXTREMES[name]
  write_stability_report(tmp_path / "r.html", make_records(**changes), describe())
  maps = "settings" in changes
  _check(tmp_path / "r.html", tmp_path, figures, width=1280, dark=False, one_ink=not maps)


def test_what_the_page_says(page, records):
  text = page.read_text(encoding="utf-8")
  assert "<h1>Learning-rate sensitivity of &lt;tiny&gt; &amp; friends</h1>" in text
  assert (
    "168 runs: 2 architectures, 4 sizes, 1 setting, 7 learning rates, 3 seeds; 40 steps." in text
  )
  assert "<dt>config.optimizer.eps</dt><dd>1e-08</dd>" in text
  assert "<dt>versions.jax</dt><dd>0.10.2</dd>" in text
  assert "eps of Adam, 1e-8" in text
  assert "hold_back_largest" not in text
  for line in verdict(summarize(records, hold_back_largest=True)):
    assert line in text
  # The lowest S of each of four sizes, all with qk-norm.
  assert text.count('<td class="number strong">') == 4


def test_own_verdict_probe_and_nested_eps(tmp_path, records):
  own = describe(verdict=["Because I say so."], summary="A test.", probe_step=20)
  own |= {"hold_back_largest": False, "config": {"optimizer": {"eps": 1e-12}}}
  write_stability_report(tmp_path / "r.html", records, own)
  text = (tmp_path / "r.html").read_text(encoding="utf-8")
  assert '<div class="callout"><p>Because I say so.</p></div>' in text
  assert "<p>A test.</p>" in text
  assert "block 0 at step 20, median" in text
  assert "eps of Adam, 1e-12" in text
  assert "held back" not in text


def test_refused_descriptions_and_records(tmp_path, records):
  with pytest.raises(ValueError, match=r"must have the key 'title', got \['device'\]"):
    write_stability_report(tmp_path / "r.html", records, {"device": "cpu"})
  one = [record for record in records if record["learning_rate"] == 0.1]
  with pytest.raises(ValueError, match=r"has one learning rate, 0\.1; a curve takes two"):
    write_stability_report(tmp_path / "r.html", one, describe())
  assert list(tmp_path.iterdir()) == []
