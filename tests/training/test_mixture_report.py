"""Tests of the mixture table and page; the page is opened in a real browser."""

import re

import numpy as np
import pytest

from balance_jax.training.mixture_report import (
  console_table,
  summarize,
  verdict,
  write_mixture_report,
)
from tests.training.chromium import measure
from tests.training.synthetic_records import GROUPS, METHODS, SIZES, describe, make_records


@pytest.fixture(scope="module")
def records():
  return make_records()


@pytest.fixture(scope="module")
def page(records, tmp_path_factory):
  path = tmp_path_factory.mktemp("report") / "r.html"
  write_mixture_report(path, records, describe())
  return path


def _many():
  """60 groups in no order, long names, more methods than colours."""
  names = [f"language-{i} (a long name)" for i in range(60)]
  sizes = np.random.default_rng(0).permutation(10_000 * 0.9 ** np.arange(60)).tolist()
  methods = [f"{m}_with_a_rather_long_name" for m in METHODS] + ["a", "b", "c", "d"]
  records = make_records(groups=names, sizes=sizes, methods=methods, seeds=2, steps=200)
  return records, describe(groups=names, sizes=sizes)


def _two():
  """Two groups, one method, one seed, no moments."""
  records = make_records(
    groups=("fr", "rm"), sizes=(2800, 100), methods=["x"], seeds=1, moments=False
  )
  return records, describe(groups=["fr", "rm"], sizes=[2800, 100])


def _check(page, folder, figures, *, width, dark):
  seen = measure(page, folder, width=width, dark=dark)
  assert seen["console"] == []
  assert seen["count"] == {"svg": figures, "table": 2, "dl": 1}
  for box in seen["shown"]:
    assert box["width"] > 50, box
    assert box["height"] > 10, box
  assert (seen["innerWidth"], seen["scrollWidth"], seen["dark"]) == (width, width, dark)
  for key in ("wide", "duplicateIds", "deadReferences", "overlaps", "outside"):
    assert seen[key] == [], key
  assert seen["textFills"] == [seen["ink"]]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (420, True)])
def test_in_a_browser(tmp_path, page, width, dark):
  _check(page, tmp_path, 5, width=width, dark=dark)


@pytest.mark.parametrize(("make", "figures"), [(_many, 5), (_two, 4)])
def test_extremes_in_a_browser(tmp_path, make, figures):
  write_mixture_report(tmp_path / "r.html", *make())
  _check(tmp_path / "r.html", tmp_path, figures, width=1280, dark=False)


def test_what_the_page_says(page, records):
  page = page.read_text(encoding="utf-8")
  assert "<h1>Upsample or upweight? Eight languages of &lt;Plone&gt; &amp; friends</h1>" in page
  assert "6 methods, 3 seeds each, 8 groups, 600 steps." in page
  assert "<dt>config.optimizer.learning_rate</dt><dd>0.001</dd>" in page
  assert "<dt>versions.jax</dt><dd>0.10.2</dd>" in page
  assert "<dt>config.taus</dt><dd>1.0, 5.0</dd>" in page
  for line in verdict(summarize(records, GROUPS, SIZES)):
    assert line in page


def test_own_verdict_and_reference(tmp_path):
  own = {"title": "T", "groups": ["a", "b"], "sizes": [2, 1], "reference": "uniform"}
  own |= {"verdict": ["Because I say so."], "summary": "A test."}
  write_mixture_report(tmp_path / "r.html", _finals(x=[1.0], uniform=[2.0]), own)
  page = (tmp_path / "r.html").read_text(encoding="utf-8")
  assert '<div class="callout"><p>Because I say so.</p></div>' in page
  assert "paired difference to uniform" in page
  assert "<p>A test.</p>" in page
  # Without train and moments records: the loss curves and the trade-off.
  assert page.count("<svg") == 2
  # The lowest is stressed: both methods tie on group a, x wins on b.
  assert page.count('<td class="number strong">1.000</td>') == 6
  assert '<td class="number">2.000</td>' in page


def test_missing_description_key(tmp_path, records):
  with pytest.raises(ValueError, match=r"missing: \['groups', 'sizes'\]"):
    write_mixture_report(tmp_path / "r.html", records, {"title": "T"})
  assert list(tmp_path.iterdir()) == []


def _finals(**methods):
  """One eval record a seed; a method's values are its low-resource losses by seed."""
  return [
    {"event": "eval", "method": method, "seed": seed, "step": 9, "group_loss": [1.0, value]}
    for method, values in methods.items()
    for seed, value in enumerate(values)
  ]


@pytest.mark.parametrize(
  ("methods", "expected"),
  [
    (
      {"temperature_5": [2.0, 2.5, 3.0], "x": [1.0, 1.5, 2.01]},
      "x, 1.503 nats/byte, -0.997 ± 0.014 against temperature_5 (95 % interval, 3 paired seeds): "
      "established.",
    ),
    (
      {"temperature_5": [2.0, 2.5, 3.0], "x": [1.0, 2.2, 1.9]},
      "x, 1.700 nats/byte, -0.800 ± 1.083 against temperature_5 (95 % interval, 3 paired seeds): "
      "not established.",
    ),
    (
      {"temperature_5": [1.0001, 2.0], "x": [1.0, 2.0]},
      "x, 1.500 nats/byte, +0.000 ± 0.001 against temperature_5 (95 % interval, 2 paired seeds): "
      "not established.",
    ),
    (
      {"temperature_5": [2.0], "x": [1.0]},
      "x, 1.000 nats/byte, -1.000 against temperature_5: one seed, so not established.",
    ),
    (
      {"temperature_5": [1.0], "x": [2.0]},
      "temperature_5, 1.000 nats/byte (the reference itself).",
    ),
  ],
)
def test_verdict(methods, expected):
  summary = summarize(_finals(**methods), ["a", "b"], [2, 1])
  assert verdict(summary)[0] == "Lowest final low-resource loss: " + expected


def test_verdict_when_everything_diverged():
  summary = summarize(_finals(x=[None]), ["a", "b"], [2, 1])
  assert verdict(summary)[0] == "No method has a final low-resource loss."
  assert "x" in console_table(summary)


def test_verdict_on_noise(records):
  lines = verdict(summarize(records, GROUPS, SIZES))
  assert lines[2].startswith("Variance of the gradient norm late in training, temperature_5 = 1: ")
  assert "scalarization_5 1.9" in lines[2]


def test_console_table(records):
  lines = console_table(summarize(records, GROUPS, SIZES)).splitlines()
  names = "method, high, low, low overfit, Δ high, Δ low, noise, steps high, steps low"
  assert re.split("  +", lines[0]) == names.split(", ")
  assert [line.split()[0] for line in lines[2:8]] == list(METHODS)
  assert len({len(line) for line in lines[1:8]}) == 1
  assert "High-resource: the 4 largest of 8 groups (es, fr, nl, pl)" in lines[8]
