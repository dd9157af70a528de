"""Text that comes with Python: what is read, what is left out, and that nothing is executed."""

import pytest

from balance_jax import data
from balance_jax.data import python_text, sources


def test_topics_are_paragraphs_of_a_parsed_file(tmp_path):
  path = tmp_path / "topics.py"
  path.write_text("topics = {'a': 'one\\n\\ntwo', 'b': '\\n\\n three'}\nraise SystemExit('ran')\n")
  assert [text for _, text in python_text.read_topics(path)] == ["one", "two", " three"]
  path.write_text("topics = []\n")
  with pytest.raises(ValueError, match="holds no dict of topics"):
    list(python_text.read_topics(path))


def test_the_library_comes_without_its_tests_and_without_what_others_installed():
  files = python_text.library_files()
  names = {path.name for path in files}
  assert {"argparse.py", "json"} & names == {"argparse.py"}
  folders = {part for path in files for part in path.relative_to(python_text._library()).parts[:-1]}
  assert "json" in folders
  assert not folders & {"test", "tests", "site-packages"}
  name, text = next(python_text.read_module(python_text._library() / "json" / "decoder.py"))
  assert name == "json/decoder.py"
  assert "class JSONDecoder" in text


def test_a_module_that_is_not_utf8_or_empty_is_left_out(tmp_path, monkeypatch):
  monkeypatch.setattr(python_text, "_library", lambda: tmp_path)
  (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
  (tmp_path / "empty.py").write_text("\n")
  assert python_text.library_files() == [tmp_path / "empty.py", tmp_path / "latin.py"]
  assert [
    pair for path in python_text.library_files() for pair in python_text.read_module(path)
  ] == []


def test_the_source_is_one_group_without_repetition():
  records = list(data.SOURCES["python_topics"]())
  assert {record.language for record in records} == {"en"}
  texts = [record.text for record in records]
  assert len(texts) == len(set(texts)) > 1000


def test_a_python_without_its_library_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setattr(python_text, "_library", lambda: tmp_path)
  for make in (sources.python_topics, sources.python_library):
    with pytest.raises(data.DatasetNotInstalledError, match="apt-get install libpython3-stdlib"):
      list(make()())
