"""A report as one HTML file: text, tables and plots, readable anywhere and without a network.

The page has no script and refers to nothing outside itself. Figures are inline SVG: black and
white in a figure follow the page's light or dark colours, all other colours stay, and text stays
text. The blocks know nothing of what they report; see `mixture_report` for a user.
"""

import dataclasses
import html
import io
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from balance_jax.training.metric_log import replace_file

if TYPE_CHECKING:
  import matplotlib.figure

# The page's background and text; figure colours must be readable on both backgrounds.
LIGHT = {"paper": "#ffffff", "ink": "#1b2027", "soft": "#59636e", "line": "#d5dae0"}
DARK = {"paper": "#12161c", "ink": "#e4e8ed", "soft": "#9aa5b1", "line": "#39424d"}

_CSS = """
:root { color-scheme: light dark; %(light)s; --panel: #f4f6f8; --mark: #0072b2 }
@media (prefers-color-scheme: dark) { :root { %(dark)s; --panel: #1b212a; --mark: #58a9dd } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1140px; margin: 0 auto; padding: 24px 20px 64px; overflow-wrap: anywhere }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 16px 0 8px }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 44px 0 8px; padding-top: 12px;
  border-top: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin: 28px 0 4px }
p { margin: 8px 0; max-width: 75ch }
.callout { background: var(--panel); border-left: 4px solid var(--mark); border-radius: 4px;
  padding: 10px 16px; margin: 16px 0 }
figure { margin: 20px 0 32px }
figcaption { color: var(--soft); font-size: .875rem; margin-top: 8px; max-width: 90ch }
.scroll { overflow-x: auto }
.scroll:focus-visible { outline: 2px solid var(--mark) }
figure svg { display: block; height: auto; margin: 0 auto; fill: var(--ink) }
figure svg * { stroke-linejoin: round; stroke-linecap: butt }
table { border-collapse: collapse; font-size: .875rem; overflow-wrap: normal;
  font-variant-numeric: tabular-nums }
th, td { padding: 6px 10px; text-align: left; border-bottom: 1px solid var(--line) }
thead th { vertical-align: bottom; line-height: 1.3; color: var(--soft); font-weight: 600;
  border-bottom: 2px solid var(--line) }
td, tbody th { white-space: nowrap }
td.number, th.number { text-align: right }
tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 600 }
td.strong { font-weight: 700; color: var(--mark) }
dl { display: grid; grid-template-columns: minmax(120px, max-content) minmax(0, 1fr);
  gap: 4px 20px; font-size: .875rem; margin: 0 }
dt { color: var(--soft) }
dd { margin: 0; font-family: ui-monospace, Menlo, Consolas, monospace }
@media (max-width: 600px) { main { padding: 8px 14px 40px } dl { grid-template-columns: 1fr }
  dd { margin-bottom: 6px } th, td { padding: 6px 8px }
  tbody th { white-space: normal; min-width: 9ch; max-width: 40vw } }
"""


@dataclasses.dataclass(frozen=True)
class Heading:
  """A heading; `level` is 2 (section) or 3 (below it)."""

  text: str
  level: int = 2


@dataclasses.dataclass(frozen=True)
class Text:
  """A paragraph."""

  text: str


@dataclasses.dataclass(frozen=True)
class Callout:
  """A box with one paragraph a line, for what the reader must not miss."""

  lines: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table; the first column names the row. Numbers are aligned to the right.

  Attributes:
    header: C column names.
    rows: each of C cells: strings, numbers or None (shown as a dash).
    caption: what the table shows and how to read it.
    strong: (row, column) of the cells to stress.
  """

  header: Sequence[str]
  rows: Sequence[Sequence[Any]]
  caption: str
  strong: frozenset[tuple[int, int]] = frozenset()

  def __post_init__(self):
    _check_table(self.header, self.rows)


@dataclasses.dataclass(frozen=True)
class Figure:
  """A plot.

  Attributes:
    figure: matplotlib figure.
    alt: what the plot shows, for a reader who does not see it.
    caption: how to read it.
  """

  figure: "matplotlib.figure.Figure"
  alt: str
  caption: str


@dataclasses.dataclass(frozen=True)
class KeyValues:
  """A list of names and values."""

  items: Mapping[str, Any]
  caption: str


def flat_facts(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Items for `KeyValues`: nested mappings by dotted name, a list of values on one line.

  >>> flat_facts({"device": "cpu", "config": {"seeds": [0, 1]}})
  {'device': 'cpu', 'config.seeds': '0, 1'}
  """
  flat = {}
  for key, value in facts.items():
    if isinstance(value, Mapping) and value:
      flat.update(flat_facts(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
  return flat


Block = Heading | Text | Callout | Table | Figure | KeyValues


def write_report(path: str | os.PathLike, title: str, blocks: Sequence[Block]) -> None:
  """Writes one self-contained HTML page; the file appears whole or not at all.

  Args:
    path: file to write; missing folders are made.
    title: the page's title.
    blocks: `Heading`, `Text`, `Callout`, `Table`, `Figure` or `KeyValues`, in reading order. All
      text is plain and is escaped.

  Raises:
    ValueError: an entry of `blocks` is none of these.

  >>> import pathlib, tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp()) / "report.html"
  >>> write_report(path, "A & B", [Table(["method", "loss"], [["uniform", 1.5]], "Final loss.")])
  >>> "<h1>A &amp; B</h1>" in path.read_text(encoding="utf-8")
  True
  """
  body = "\n".join(_render(block, f"b{i}") for i, block in enumerate(blocks, 1))
  theme = {"light": _variables(LIGHT), "dark": _variables(DARK)}
  page = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{_escape(title)}</title>\n<style>{_CSS % theme}</style>\n</head>\n"
    f"<body>\n<main>\n<h1>{_escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
  )
  replace_file(path, page.encode("utf-8"))


def check_title(description: Mapping[str, Any]) -> None:
  """Raises ValueError unless the description of an experiment has a title."""
  if not description.get("title"):
    raise ValueError(f"description must have the key 'title', got {sorted(description)}")


def write_experiment(
  path: str | os.PathLike,
  description: Mapping[str, Any],
  own: Collection[str],
  *,
  what_was_run: str,
  verdict: Sequence[str],
  results: Iterable[Block],
  steps: Any,
) -> None:
  """Writes the page of an experiment: what was run, the verdict, the results, the settings.

  Args:
    path: file to write.
    description: "title"; "summary" and "verdict" replace the next two arguments if there; keys not
      in `own`, nested or not, are listed as settings.
    own: keys of the description that are no settings.
    what_was_run: a paragraph.
    verdict: lines.
    results: blocks.
    steps: shown where there are no settings.
  """
  facts = flat_facts({key: value for key, value in description.items() if key not in own})
  blocks = [
    Text(description.get("summary") or what_was_run),
    Heading("Verdict"),
    Callout(list(description.get("verdict") or verdict)),
    Heading("Results"),
    *results,
    Heading("What was run"),
    KeyValues(facts or {"steps": steps}, "Resolved settings."),
  ]
  write_report(path, description["title"], blocks)


def render_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """The table as aligned plain text for a console.

  Args:
    header: C column names.
    rows: each of C cells: strings, numbers or None (shown as a dash).

  Returns:
    One line a row, without a final newline.

  Raises:
    ValueError: a row has not as many cells as the header.

  >>> print(render_table(["method", "loss"], [["uniform", 1.5], ["cooldown", None]]))
  method    loss
  --------  ----
  uniform    1.5
  cooldown     –
  """
  _check_table(header, rows)
  cells = [[str(name) for name in header], *([format_cell(cell) for cell in row] for row in rows)]
  widths = [max(_width(row[c]) for row in cells) for c in range(len(header))]
  right = _number_columns(cells[1:], len(header))
  cells.insert(1, ["-" * width for width in widths])
  return "\n".join("  ".join(map(_pad, row, widths, right)).rstrip() for row in cells)


def format_cell(value: Any) -> str:
  """A cell as text: None is a dash, a float has four significant digits."""
  if value is None:
    return "–"
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_table(header, rows) -> None:
  for i, row in enumerate(rows):
    if len(row) != len(header):
      raise ValueError(f"rows[{i}] has {len(row)} cells, the header has {len(header)}")


def _number_columns(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
  """Whether a column holds numbers (perhaps with a spread or unit behind) and dashes only."""
  number = re.compile(r"[-+−]?\.?\d|–$|nan$|[-+]?inf$")
  return [bool(rows) and all(number.match(row[c]) for row in rows) for c in range(columns)]


def _width(text: str) -> int:
  """Columns on a console: wide East Asian characters take two, combining marks none."""
  wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
  return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def _pad(text: str, width: int, right: bool) -> str:
  space = " " * (width - _width(text))
  return space + text if right else text + space


def _escape(value: Any) -> str:
  return html.escape(format_cell(value), quote=True)


def _breakable(name: Any) -> str:
  """Escaped, and a long_name may break: a column need not be wider than its numbers."""
  return _escape(name).replace("_", "_<wbr>")


def _variables(colours: Mapping[str, str]) -> str:
  return "; ".join(f"--{name}: {value}" for name, value in colours.items())


def _render(block: Block, name: str) -> str:
  """One block as HTML; `name` is unique on the page."""
  match block:
    case Heading(text, level):
      return f"<h{level}>{_escape(text)}</h{level}>"
    case Text(text):
      return f"<p>{_escape(text)}</p>"
    case Callout(lines):
      return f'<div class="callout">{"".join(f"<p>{_escape(x)}</p>" for x in lines)}</div>'
    case Table():
      return _figure(_render_table(block), block.caption, "Table, scrolls sideways")
    case Figure(figure, alt, caption):
      return _figure(_svg(figure, alt, name), caption, "Figure, scrolls sideways")
    case KeyValues(items, caption):
      pairs = "".join(f"<dt>{_escape(k)}</dt><dd>{_escape(v)}</dd>" for k, v in items.items())
      return f"<figure><dl>{pairs}</dl><figcaption>{_escape(caption)}</figcaption></figure>"
  raise ValueError(f"blocks must hold report blocks, got {type(block).__name__}")


def _figure(content: str, caption: str, label: str) -> str:
  """A captioned box; on a narrow screen its content scrolls, the page does not."""
  return (
    f'<figure><div class="scroll" tabindex="0" role="group" aria-label="{label}">{content}</div>'
    f"<figcaption>{_escape(caption)}</figcaption></figure>"
  )


def _render_table(table: Table) -> str:
  cells = [[format_cell(cell) for cell in row] for row in table.rows]
  css = [' class="number"' if n else "" for n in _number_columns(cells, len(table.header))]
  head = "".join(
    f'<th scope="col"{css[c]}>{_breakable(name)}</th>' for c, name in enumerate(table.header)
  )
  rows = []
  for r, row in enumerate(cells):
    parts = [f'<th scope="row">{_breakable(row[0])}</th>'] if row else []
    for c, cell in enumerate(row[1:], 1):
      classes = ' class="number strong"' if (r, c) in table.strong else css[c]
      parts.append(f"<td{classes}>{_escape(cell)}</td>")
    rows.append(f"<tr>{''.join(parts)}</tr>")
  return (
    f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
  )


def _svg(figure: "matplotlib.figure.Figure", alt: str, name: str) -> str:
  """The figure as an inline SVG element whose ids start with `name`."""
  import matplotlib

  buffer = io.StringIO()
  # Text as text: smaller, selectable, searchable. The salt makes the file reproducible.
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
  root = ElementTree.fromstring(buffer.getvalue())
  for parent in list(root.iter()):
    for child in list(parent):
      # Matplotlib's style sheet would apply to the whole page; ours holds the same rule.
      if child.tag.endswith(("}metadata", "}style")):
        parent.remove(child)
  for element in root.iter():
    # Inside HTML the parser supplies the namespaces.
    element.tag = element.tag.split("}")[-1]
    attributes = {key.split("}")[-1]: value for key, value in element.attrib.items()}
    element.attrib.clear()
    element.attrib.update({k: _attribute(k, v, name) for k, v in attributes.items()})
  width = float(root.attrib.pop("width").removesuffix("pt")) * 4 / 3
  root.attrib.pop("height")
  # Below 600 pixels the labels would be too small to read: then the box scrolls.
  root.set("style", f"width: 100%; min-width: {min(width, 600):.0f}px; max-width: {width:.0f}px")
  root.attrib.update({"role": "img", "aria-label": alt})
  return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _attribute(key: str, value: str, name: str) -> str:
  """An SVG attribute with ids made unique on the page and black and white made the page's."""
  if key == "id":
    return f"{name}-{value}"
  if key == "href" and value.startswith("#"):
    return f"#{name}-{value[1:]}"
  value = value.replace("url(#", f"url(#{name}-")
  if key == "style":
    value = value.replace("#000000", "var(--ink)").replace("#ffffff", "var(--paper)")
  return value
