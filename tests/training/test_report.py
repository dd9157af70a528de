"""Tests of the HTML report and of the console table."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure as MatplotlibFigure

from balance_jax.training import report
from tests.training.chromium import measure

NASTY = '<script>alert("x")</script> & "quoted" \'single\' é'


def _plot():
  figure = MatplotlibFigure(figsize=(4, 2))
  axes = figure.add_subplot()
  axes.plot([0, 1], [0, 1], marker="o", color="#123456", label=NASTY)
  axes.fill_between([0, 1], [0, 1], color="black")
  axes.legend()
  return figure


def _write(tmp_path, *blocks, title="T"):
  report.write_report(tmp_path / "r.html", title, blocks)
  return (tmp_path / "r.html").read_text(encoding="utf-8")


class _Elements(HTMLParser):
  """Collects (tag, attributes) and the text; checks that tags are balanced."""

  def __init__(self, page):
    super().__init__()
    self.elements, self.open, self.text = [], [], ""
    self.feed(page)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in ("meta", "wbr"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_everything_is_escaped(tmp_path):
  page = _write(
    tmp_path,
    report.Heading(NASTY),
    report.Text(NASTY),
    report.Callout([NASTY]),
    report.Table([NASTY], [[NASTY]], NASTY),
    report.Figure(_plot(), NASTY, NASTY),
    report.KeyValues({NASTY: NASTY}, NASTY),
    title=NASTY,
  )
  parsed = _Elements(page)
  assert "script" not in [tag for tag, _ in parsed.elements]
  # title twice, heading, text, callout, three in the table, legend, caption, three in the list
  assert parsed.text.count(NASTY) == 13
  assert dict(parsed.elements)["svg"]["aria-label"] == NASTY


def test_the_page_needs_nothing_else(tmp_path):
  page = _write(tmp_path, report.Figure(_plot(), "a", "b"))
  for tag, attributes in _Elements(page).elements:
    assert tag not in ("script", "link", "iframe", "img")
    assert attributes.get("href", "#").startswith("#")
    assert not any(name.startswith("on") for name in attributes)
  assert "http" not in page
  assert "@import" not in page


def test_two_equal_figures_share_no_id(tmp_path):
  page = _write(tmp_path, *[report.Figure(_plot(), "a", "b")] * 2)
  elements = _Elements(page).elements
  ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
  assert len(ids) > 20
  assert len(ids) == len(set(ids))
  used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
  assert used
  assert {a or b for a, b in used} <= set(ids)


def test_black_becomes_ink_and_colours_stay(tmp_path):
  page = _write(tmp_path, report.Figure(_plot(), "a", "b"))
  svg = page[page.index("<svg") : page.index("</svg>")]
  assert "#000000" not in svg
  assert "var(--ink)" in svg
  assert "#123456" in svg


def test_the_same_blocks_give_the_same_page(tmp_path):
  pages = [_write(tmp_path, report.Figure(_plot(), "a", "b")) for _ in range(2)]
  assert pages[0] == pages[1]


def test_cells(tmp_path):
  rows = [["a", 1.23456, None, 7, "x"], ["b", "-1.0 ± 0.1", 2.0, True, None]]
  page = _write(
    tmp_path, report.Table(["m", "loss", "n", "k", "s"], rows, "c", frozenset({(0, 1)}))
  )
  assert '<th scope="row">a</th><td class="number strong">1.235</td>' in page
  assert '<td class="number">–</td>' in page
  assert '<th scope="col" class="number">loss</th>' in page
  assert "<td>x</td>" in page
  assert "<td>True</td>" in page


def test_render_table_by_hand():
  text = report.render_table(["m", "loss"], [["ab", 0.123456], ["日", None], ["c", "-1 ± 2"]])
  assert text.split("\n") == [
    "m     loss",
    "--  ------",
    "ab  0.1235",
    "日       –",
    "c   -1 ± 2",
  ]


def test_render_table_without_rows():
  assert report.render_table(["a", "b"], []) == "a  b\n-  -"


@pytest.mark.parametrize("make", [report.render_table, lambda h, r: report.Table(h, r, "c")])
def test_ragged_rows(make):
  with pytest.raises(ValueError, match=r"rows\[1\] has 1 cells, the header has 2"):
    make(["a", "b"], [[1, 2], [1]])


def test_unknown_block(tmp_path):
  with pytest.raises(ValueError, match="blocks must hold report blocks, got str"):
    _write(tmp_path, "text")
  assert os.listdir(tmp_path) == []


def test_importing_training_does_not_import_matplotlib():
  names = ("metric_log", "report", "mixture_summary", "mixture_figures", "mixture_report")
  imports = "; ".join(f"import balance_jax.training.{name}" for name in names)
  code = f"import sys; {imports}; assert 'matplotlib' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (420, True)])
def test_in_a_browser(tmp_path, width, dark):
  wide = report.Table([f"column {i}" for i in range(30)], [[1.5] * 30], "a wide table")
  long = report.KeyValues({"x" * 90: "y" * 400}, "long words")
  _write(tmp_path, wide, report.Figure(_plot(), "a", "b"), long, report.Text("z" * 500))
  seen = measure(tmp_path / "r.html", tmp_path, width=width, dark=dark)
  assert seen["console"] == []
  assert seen["count"] == {"svg": 1, "table": 1, "dl": 1}
  assert all(box["width"] > 0 and box["height"] > 0 for box in seen["shown"])
  assert (seen["innerWidth"], seen["scrollWidth"]) == (width, width)
  assert seen["wide"] == []
  assert seen["dark"] is dark
  ink = (report.DARK if dark else report.LIGHT)["ink"]
  rgb = ", ".join(str(int(ink[i : i + 2], 16)) for i in (1, 3, 5))
  assert seen["ink"] == f"rgb({rgb})"
  assert seen["textFills"] == [seen["ink"]]
