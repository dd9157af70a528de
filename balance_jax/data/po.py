"""A strict reader of gettext .po catalogues.

Only what a reader of translations needs: entries with their context, plural forms, extracted
comments and fuzzy flag. A line outside of the grammar raises with its file and line number.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_KEYWORD = re.compile(r"(msgctxt|msgid_plural|msgid|msgstr)(?:\[(\d+)\])?[ \t]*(?=\")")
_QUOTED = re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"')
_ESCAPE = re.compile(r"\\(.)")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_ESCAPES |= {"\\": "\\", '"': '"'}


class Entry(NamedTuple):
  """One message of a catalogue."""

  msgid: str
  msgstr: tuple[str, ...]  # one string, or one for each plural form
  context: str | None
  comments: tuple[str, ...]  # the "#." lines, without the mark and the space behind it
  fuzzy: bool


def read_po(text: str, name: str = "<po>") -> Iterator[Entry]:
  """Reads a catalogue, leaving out its header and its obsolete ("#~") entries.

  Args:
    text: contents of the file.
    name: what to call it in an error, usually its path.

  Yields:
    The entries in their order, untranslated and fuzzy ones included.

  Raises:
    ValueError: a line that is no part of the format, or an entry without msgid or msgstr.

  >>> list(read_po('msgid "cat"\\nmsgstr "ch"\\n"at"'))
  [Entry(msgid='cat', msgstr=('chat',), context=None, comments=(), fuzzy=False)]
  """
  comments: list[str] = []
  flags: set[str] = set()
  fields: dict[str, str] = {}
  field = ""
  # Only "\n" ends a line here: str.splitlines would also cut at U+2028 inside a translation.
  for number, line in enumerate([*text.split("\n"), "#"], start=1):
    line = line.strip()
    keyword = _KEYWORD.match(line) if line.startswith("msg") else None
    # A comment or the next message ends an entry; blank lines are optional.
    starts = line.startswith("#") or (keyword and keyword[1] in ("msgctxt", "msgid"))
    if starts and field.startswith("msgstr"):
      entry = _entry(fields, comments, flags, name, number)
      if entry.msgid or entry.context is not None:
        yield entry
      comments, flags, fields, field = [], set(), {}, ""
    if line.startswith("#."):
      comments.append(line[2:].removeprefix(" "))
    elif line.startswith("#,"):
      flags.update(flag.strip() for flag in line[2:].split(","))
    elif keyword:
      field = keyword[1] + (keyword[2] or "")
      if field in fields:
        raise ValueError(f"{name}, line {number}: second {keyword[0].strip()} in one entry")
      fields[field] = unquote(line[keyword.end() :], name, number)
    elif line and not line.startswith("#"):
      if not fields:
        raise ValueError(
          f"{name}, line {number}: expected a comment or a keyword, got {line!r:.80}"
        )
      fields[field] += unquote(line, name, number)
  if fields:
    raise ValueError(f"{name}: the last entry has no msgstr")


def unquote(quoted: str, name: str = "<po>", number: int = 1) -> str:
  r"""The value of one quoted string.

  Args:
    quoted: the string with its double quotes.
    name: the file it stands in, for the error.
    number: the line it stands in, for the error.

  Returns:
    The string between the quotes with its escapes replaced.

  Raises:
    ValueError: quotes missing, or an unknown escape.

  >>> unquote(r'"a \"b\""')
  'a "b"'
  """
  match = _QUOTED.fullmatch(quoted)
  if match is None:
    raise ValueError(
      f"{name}, line {number}: expected one string in double quotes, got {quoted!r:.80}"
    )

  def replace(escape: re.Match) -> str:
    if escape[1] not in _ESCAPES:
      raise ValueError(f"{name}, line {number}: unknown escape {escape[0]!r}")
    return _ESCAPES[escape[1]]

  return _ESCAPE.sub(replace, match[1]) if "\\" in quoted else match[1]


def _entry(
  fields: dict[str, str], comments: list[str], flags: set[str], name: str, number: int
) -> Entry:
  if "msgid" not in fields:
    raise ValueError(f"{name}: the entry before line {number} has no msgid")
  forms = tuple(value for field, value in fields.items() if field.startswith("msgstr"))
  return Entry(fields["msgid"], forms, fields.get("msgctxt"), tuple(comments), "fuzzy" in flags)
