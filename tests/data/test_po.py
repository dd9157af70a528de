import pytest

from balance_jax.data import po

CATALOGUE = r"""
# a translator's comment
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\n"
"Language: xx\n"

#. Default: "A cat"
#. sat here
#: file.py:1
#, python-format, c-format
msgctxt "animal"
msgid "cat"
msgstr "ch"
"at\n"
  "\ttab \"quoted\" \\ back"
#, fuzzy, c-format
msgid "dog"
msgstr "chienne"

msgid "untranslated"
msgstr ""
msgid "%d bird"
msgid_plural "%d birds"
msgstr[0] "%d oiseau"
msgstr[1] "%d oiseaux"

#| msgid "old name"
msgid "last" 
msgstr "dernier"
#~ msgid "gone"
#~ msgstr "parti"
"""


def test_every_part_of_a_catalogue():
  entries = list(po.read_po(CATALOGUE))
  assert [entry.msgid for entry in entries] == ["cat", "dog", "untranslated", "%d bird", "last"]
  cat, dog, untranslated, bird, last = entries
  assert cat.msgstr == ('chat\n\ttab "quoted" \\ back',)
  assert cat.context == "animal"
  assert cat.comments == ('Default: "A cat"', "sat here")
  assert [entry.fuzzy for entry in entries] == [False, True, False, False, False]
  assert dog.comments == ()
  assert untranslated.msgstr == ("",)
  assert bird.msgstr == ("%d oiseau", "%d oiseaux")
  assert last.msgstr == ("dernier",)


def test_windows_line_ends_and_no_newline_at_the_end():
  text = 'msgid "a"\r\nmsgstr "b"\r\n\r\nmsgid "c"\r\nmsgstr "d"'
  assert [(entry.msgid, *entry.msgstr) for entry in po.read_po(text)] == [("a", "b"), ("c", "d")]


def test_unicode_line_separator_is_text():
  (entry,) = po.read_po('msgid "a"\nmsgstr "one\u2028two\x85three"')
  assert entry.msgstr == ("one\u2028two\x85three",)


def test_empty_catalogue():
  assert list(po.read_po("")) == []
  assert list(po.read_po("# only a comment\n")) == []


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('msgid "a"\nmsgstr "b', r"x.po, line 2: expected one string in double quotes"),
    ('msgid "a"\nmsgstr "b" c', r"x.po, line 2: expected one string"),
    ('msgid "a"\nmsgstr "b" "c"', r"x.po, line 2: expected one string"),
    ('msgid "a"\nmsgstr "b\\q"', r"x.po, line 2: unknown escape"),
    ('msgid "a"\nnonsense\nmsgstr "b"', r"x.po, line 2: expected one string"),
    ('"a"', r"x.po, line 1: expected a comment or a keyword"),
    ('msgid "a"\nmsgid "b"\nmsgstr "c"', r"x.po, line 2: second msgid"),
    ('msgid "a"\nmsgstr[0] "b"\nmsgstr[0] "c"', r"x.po, line 3: second msgstr\[0\]"),
    ('msgstr "b"', r"x.po: the entry before line 2 has no msgid"),
    ('msgid "a"', r"x.po: the last entry has no msgstr"),
  ],
)
def test_what_is_no_catalogue_is_an_error(text, message):
  with pytest.raises(ValueError, match=message):
    list(po.read_po(text, "x.po"))
