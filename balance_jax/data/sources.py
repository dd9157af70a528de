"""Text sources: translated messages by language, read from packages installed on the machine.

A source is called with the wanted languages (None: all) and yields a `Record` for each string. The
key is the English source string: translations of one message share it, so a split by key keeps a
held-out message out of the training text of every language. Nothing is downloaded and no carrying
package is imported.
"""

import dataclasses
import functools
import gettext
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from balance_jax import _checks
from balance_jax.data import po, python_text

LOCALE_ROOT = Path("/usr/share/locale")

_PLONE_INSTALL = "pip install 'balance_jax[data]'"
_GCC_INSTALL = "apt-get install --no-install-recommends gcc-12-locales"
_GCC_DOMAINS = ("gcc-12", "cpplib-12")


class DatasetNotInstalledError(RuntimeError):
  """The package that carries a data set is missing; the message names the command to install it."""


class DatasetNotFoundError(DatasetNotInstalledError, ValueError):
  """Prepared data, or a file of data, that was asked for by name is not on this machine."""


class Record(NamedTuple):
  """One string of a source."""

  language: str
  key: str  # the English source string
  text: str


@dataclasses.dataclass(frozen=True)
class Source:
  """A text source; call it to read it.

  Attributes:
    files: () -> language -> the files that hold its text, sorted. Raises
      `DatasetNotInstalledError` if there are none.
    read_file: path -> (key, text) pairs, in the order of the file.
    description, homepage, licence, citation: for `dataset_info.json`.
  """

  files: Callable[[], dict[str, list[Path]]]
  read_file: Callable[[Path], Iterator[tuple[str, str]]]
  description: str
  homepage: str
  licence: str
  citation: str

  def __call__(self, languages: Collection[str] | None = None) -> Iterator[Record]:
    """Reads the source, language by language in sorted order.

    Args:
      languages: names of languages, or None for all.

    Yields:
      Records; no two with the same language and text (the first one counts).

    Raises:
      DatasetNotInstalledError: the package is missing.
      ValueError: an unknown language; the message lists the known ones.
    """
    files = self.files()
    wanted = check_languages(languages, files)
    return (record for name in sorted(wanted) for record in self._read(name, files[name]))

  def fingerprint(self) -> str:
    """16 hex digits that change with any name or byte of the files."""
    digest = hashlib.blake2b(digest_size=8)
    for language, paths in sorted(self.files().items()):
      for path in paths:
        content = hashlib.blake2b(path.read_bytes()).hexdigest()
        digest.update(f"{language}/{path.name}:{content}\n".encode())
    return digest.hexdigest()

  def _read(self, language: str, paths: list[Path]) -> Iterator[Record]:
    seen = set()
    for path in paths:
      for key, text in self.read_file(path):
        if text not in seen:
          seen.add(text)
          yield Record(language, key, text)


def check_languages(languages: Collection[str] | None, known: Collection[str]) -> list[str]:
  """The wanted languages as a list.

  Args:
    languages: names, or None for all of `known`, sorted.
    known: names that exist.

  Returns:
    The names in the order given, without repetition.

  Raises:
    ValueError: a plain string, no name at all, or an unknown name.
  """
  if languages is None:
    return sorted(known)
  if isinstance(languages, str) or not languages:
    raise ValueError(f"languages must be None or a list of >= 1 names, got {languages!r}")
  for name in languages:
    _checks.check_choice("languages", name, known)
  return list(dict.fromkeys(languages))


def plone_catalogues(root: str | os.PathLike | None = None) -> Source:
  """Messages of the Plone content management system, 64 languages (PyPI plone.app.locales).

  The key is the `#. Default: "..."` comment where there is one, else the msgid. Untranslated, fuzzy
  and obsolete entries are left out.

  Args:
    root: directory with `<language>/LC_MESSAGES/*.po`; None for the installed package.

  Returns:
    The source.
  """
  return Source(
    files=functools.partial(_plone_files, None if root is None else Path(root)),
    read_file=_read_po_file,
    description="Translated messages of Plone, from the .po files of plone.app.locales.",
    homepage="https://github.com/collective/plone.app.locales",
    licence="GPL-2.0-only",
    citation="@misc{plone_app_locales, title={plone.app.locales}, "
    "author={Plone i18n team}, url={https://github.com/collective/plone.app.locales}}",
  )


def gcc_catalogues(root: str | os.PathLike = LOCALE_ROOT) -> Source:
  """Messages of the GNU compilers, 22 languages from 15 k to 37 strings (Debian gcc-12-locales).

  The key is the English message, without its context. Strings equal to their key, which nobody
  translated, are left out.

  Args:
    root: directory with `<language>/LC_MESSAGES/{gcc-12,cpplib-12}.mo`.

  Returns:
    The source.
  """
  return Source(
    files=functools.partial(_gcc_files, Path(root)),
    read_file=_read_mo_file,
    description="Translated messages of GCC 12, from the .mo files of Debian's gcc-12-locales.",
    homepage="https://packages.debian.org/bookworm/gcc-12-locales",
    licence="GPL-3.0-or-later",
    citation="@misc{gcc, title={{GCC}, the {GNU} Compiler Collection, version 12}, "
    "author={Free Software Foundation and translators}, url={https://gcc.gnu.org/}}",
  )


def python_topics() -> Source:
  """The help topics of the running Python, about 460 kB of English in the one group "en"."""
  return Source(
    files=functools.partial(_python_files, "python_topics", python_text.topics_files, "en"),
    read_file=python_text.read_topics,
    description="Paragraphs of the help topics that come with Python.",
    **_PYTHON,
  )


def python_library() -> Source:
  """The source of the standard library of the running Python, over 10 MB in the group "python"."""
  return Source(
    files=functools.partial(_python_files, "python_library", python_text.library_files, "python"),
    read_file=python_text.read_module,
    description="Modules of Python's standard library, without its tests.",
    **_PYTHON,
  )


_PYTHON = {
  "homepage": "https://docs.python.org/3/",
  "licence": "PSF-2.0",
  "citation": "@misc{python, title={Python}, author={Python Software Foundation}, "
  "url={https://www.python.org/}}",
}


def _python_files(source: str, find: Callable[[], list[Path]], group: str):
  files = find()
  if not files:
    raise DatasetNotInstalledError(
      f"the data of {source!r} is not installed: this Python came without its library's "
      "source; run: apt-get install libpython3-stdlib, or use another Python"
    )
  return {group: files}


def _plone_files(root: Path | None) -> dict[str, list[Path]]:
  if root is not None:
    paths = root.glob("*/LC_MESSAGES/*.po")
  else:
    try:
      distribution = importlib.metadata.distribution("plone.app.locales")
    except importlib.metadata.PackageNotFoundError:
      paths = []
    else:
      members = distribution.files or []
      paths = [Path(distribution.locate_file(f)) for f in members if f.suffix == ".po"]
  return _by_language("plone_catalogues", paths, _PLONE_INSTALL)


def _gcc_files(root: Path) -> dict[str, list[Path]]:
  paths = [path for name in _GCC_DOMAINS for path in root.glob(f"*/LC_MESSAGES/{name}.mo")]
  return _by_language("gcc_catalogues", paths, _GCC_INSTALL)


def _by_language(source: str, paths: Iterator[Path] | list[Path], command: str):
  """Files by language. Sorted by name, as the order of a directory differs between machines."""
  files: dict[str, list[Path]] = {}
  for path in sorted(paths):
    files.setdefault(path.parent.parent.name, []).append(path)
  if not files:
    raise DatasetNotInstalledError(f"the data of {source!r} is not installed; run: {command}")
  return files


def _read_po_file(path: Path) -> Iterator[tuple[str, str]]:
  # UTF-8 whatever the header says: ten headers of plone.app.locales 7.0.4 name another charset, and
  # the files are UTF-8 all the same.
  try:
    content = path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8: {error}") from error
  for entry in po.read_po(content, str(path)):
    if not entry.fuzzy:
      key = _default(entry.comments, str(path)) or entry.msgid
      yield from ((key, text) for text in entry.msgstr if text)


def _default(comments: tuple[str, ...], place: str) -> str:
  """The text of a `Default: "..."` comment, whose string may go on in the comments behind it."""
  parts: list[str] = []
  for comment in comments:
    if comment.startswith('Default: "'):
      parts = [comment.removeprefix("Default: ")]
    elif parts and comment.startswith('"'):
      parts.append(comment)
    elif parts:
      break
  return "".join(po.unquote(part.rstrip(), place) for part in parts)


def _read_mo_file(path: Path) -> Iterator[tuple[str, str]]:
  with path.open("rb") as file:
    translations = gettext.GNUTranslations(file)
  # gettext has no public way to list a catalogue. A plural message has a key (msgid, form).
  for source, text in translations._catalog.items():
    key = (source[0] if isinstance(source, tuple) else source).rpartition("\x04")[2]
    if key and text and key != text:
      yield key, text


# Name -> source, for `load_documents`. An entry of your own makes it loadable by name.
SOURCES = {
  "gcc_catalogues": gcc_catalogues(),
  "plone_catalogues": plone_catalogues(),
  "python_library": python_library(),
  "python_topics": python_topics(),
}
