import importlib.metadata
import struct

import pytest

from balance_jax import data
from balance_jax.data import po, sources


def installed(name):
  """The files of a source, or a skipped test with the command that installs them."""
  try:
    return data.SOURCES[name].files()
  except data.DatasetNotInstalledError as error:
    pytest.skip(str(error))


def write_po(root, language, name, text):
  path = root / language / "LC_MESSAGES" / f"{name}.po"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text, encoding="utf-8")


def write_mo(root, language, name, messages):
  """A .mo file by the format's description: header, two tables of (length, offset), strings."""
  messages = {
    "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n>1;\n"
  } | messages
  pairs = sorted((k.encode(), v.encode()) for k, v in messages.items())
  count = len(pairs)
  strings, tables, position = b"", ([], []), 28 + 16 * count
  for column in (0, 1):
    for pair in pairs:
      tables[column].append(struct.pack("<II", len(pair[column]), position + len(strings)))
      strings += pair[column] + b"\0"
  header = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
  path = root / language / "LC_MESSAGES" / f"{name}.mo"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(header + b"".join(tables[0] + tables[1]) + strings)


@pytest.fixture
def plone_root(tmp_path):
  write_po(
    tmp_path,
    "fr",
    "b",
    """
#. Default: "The \\"first\\" "
#. "and more"
msgid "id_one"
msgstr "Le premier"

#. A remark. Default: "no"
#. Default: ""
msgid "id_two"
msgstr "Deux"

#, fuzzy
msgid "id_three"
msgstr "Trois"

msgid "id_four"
msgstr ""

msgid "bird"
msgid_plural "birds"
msgstr[0] "oiseau"
msgstr[1] "oiseaux"

msgid "again"
msgstr "Deux"
#~ msgid "old"
#~ msgstr "vieux"
""",
  )
  write_po(tmp_path, "fr", "a", 'msgid "first file"\nmsgstr "premier fichier"')
  write_po(tmp_path, "de", "a", 'msgid "first file"\nmsgstr "erste Datei"')
  write_po(tmp_path, "xx", "a", 'msgid "first file"\nmsgstr ""')
  return tmp_path


def test_plone_records(plone_root):
  source = sources.plone_catalogues(plone_root)
  assert list(source()) == [
    ("de", "first file", "erste Datei"),
    ("fr", "first file", "premier fichier"),
    ("fr", 'The "first" and more', "Le premier"),
    ("fr", "id_two", "Deux"),
    ("fr", "bird", "oiseau"),
    ("fr", "bird", "oiseaux"),
  ]


def test_gcc_records(tmp_path):
  write_mo(
    tmp_path,
    "fr",
    "gcc-12",
    {
      "error": "erreur",
      "same": "same",
      "ctx\x04lost": "perdu",
      "%d bird\0%d birds": "%d oiseau\0%d oiseaux",
    },
  )
  write_mo(tmp_path, "fr", "cpplib-12", {"macro": "macro-définition", "error": "erreur"})
  write_mo(tmp_path, "fr", "other", {"x": "y"})
  records = list(sources.gcc_catalogues(tmp_path)())
  assert sorted(records) == [
    ("fr", "%d bird", "%d oiseau"),
    ("fr", "%d bird", "%d oiseaux"),
    ("fr", "error", "erreur"),
    ("fr", "lost", "perdu"),
    ("fr", "macro", "macro-définition"),
  ]


def test_languages_are_chosen_and_checked(plone_root):
  source = sources.plone_catalogues(plone_root)
  assert {record.language for record in source(["de"])} == {"de"}
  with pytest.raises(
    ValueError, match=r"languages is 'ft' \(did you mean 'fr'\?\); allowed: de, fr"
  ):
    source(["ft"])
  with pytest.raises(ValueError, match="list of >= 1 names, got 'fr'"):
    source("fr")
  with pytest.raises(ValueError, match="list of >= 1 names"):
    source([])


def test_check_languages():
  assert sources.check_languages(None, {"b": 1, "a": 2}) == ["a", "b"]
  assert sources.check_languages(["b", "a", "b"], ["a", "b"]) == ["b", "a"]


def test_fingerprint_follows_names_and_bytes(plone_root):
  source = sources.plone_catalogues(plone_root)
  first = source.fingerprint()
  assert first == sources.plone_catalogues(plone_root).fingerprint()
  assert len(first) == 16
  write_po(plone_root, "xx", "a", 'msgid "first file"\nmsgstr "."')
  second = source.fingerprint()
  (plone_root / "xx").rename(plone_root / "yy")
  assert len({first, second, source.fingerprint()}) == 3


def test_broken_catalogues_are_named(tmp_path):
  write_po(tmp_path, "fr", "a", "nonsense")
  with pytest.raises(ValueError, match=r"a\.po, line 1"):
    list(sources.plone_catalogues(tmp_path)())
  (tmp_path / "fr" / "LC_MESSAGES" / "a.po").write_bytes(b'msgid "a"\nmsgstr "\xe9"')
  with pytest.raises(ValueError, match=r"a\.po is not UTF-8"):
    list(sources.plone_catalogues(tmp_path)())


def test_missing_packages_name_the_command(tmp_path, monkeypatch):
  with pytest.raises(
    data.DatasetNotInstalledError,
    match="run: apt-get install --no-install-recommends gcc-12-locales",
  ):
    sources.gcc_catalogues(tmp_path)()

  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "distribution", missing)
  with pytest.raises(
    data.DatasetNotInstalledError, match=r"run: pip install 'balance_jax\[data\]'"
  ):
    data.SOURCES["plone_catalogues"]()


def test_installed_plone_po_equals_its_compiled_twin():
  # The wheel carries a .mo beside each .po, written by another tool: an independent reading.
  files = installed("plone_catalogues")
  for language in ("fr", "hu", "rm"):
    for path in files[language]:
      compiled = path.with_suffix(".mo")
      if compiled.exists():
        entries = po.read_po(path.read_text(encoding="utf-8"), str(path))
        ours = {e.msgid: e.msgstr[0] for e in entries if e.msgstr[0] and not e.fuzzy}
        theirs = dict(read_mo(compiled))
        assert ours == {k: v for k, v in theirs.items() if k}, path


def read_mo(path):
  content = path.read_bytes()
  order = "<" if content[:4] == b"\xde\x12\x04\x95" else ">"
  _, count, keys, values = struct.unpack(f"{order}4I", content[4:20])
  for number in range(count):
    pair = []
    for table in (keys, values):
      length, offset = struct.unpack_from(f"{order}2I", content, table + 8 * number)
      pair.append(content[offset : offset + length].decode("utf-8"))
    yield pair


def test_installed_plone_is_imbalanced_text():
  installed("plone_catalogues")
  sizes = {}
  for language, _, text in data.SOURCES["plone_catalogues"](["fr", "hr", "rm"]):
    assert text
    sizes[language] = sizes.get(language, 0) + len(text)
  assert sizes["fr"] > 10 * sizes["hr"] > 10 * sizes["rm"] > 1000


def test_installed_gcc_counts():
  installed("gcc_catalogues")
  texts = {"fr": set(), "el": set()}
  for language, key, text in data.SOURCES["gcc_catalogues"](["fr", "el"]):
    assert key != text
    assert text not in texts[language]
    texts[language].add(text)
  # Distinct strings of gcc-12.mo and cpplib-12.mo, counted with gettext's own listing.
  assert {language: len(found) for language, found in texts.items()} == {"fr": 15515, "el": 38}
