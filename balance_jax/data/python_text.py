"""Text that comes with every Python: the help topics, and the source of the standard library.

Both are one group, and differ between versions of Python. A document is split off as a whole: a
paragraph of the topics, a file of the library.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def topics_files() -> list[Path]:
  """The file of the help topics, `pydoc_data/topics.py`; an empty list where it is missing."""
  path = _library() / "pydoc_data" / "topics.py"
  return [path] if path.is_file() else []


def read_topics(path: Path) -> Iterator[tuple[str, str]]:
  """(paragraph, paragraph) for every paragraph of every topic; the file is parsed, not run.

  Raises:
    ValueError: the file holds no dict of strings.
  """
  tree = ast.parse(path.read_text(encoding="utf-8"))
  dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
  if not dicts:
    raise ValueError(f"{path} holds no dict of topics")
  for text in ast.literal_eval(dicts[0]).values():
    for paragraph in text.split("\n\n"):
      if paragraph.strip():
        yield paragraph, paragraph


def library_files() -> list[Path]:
  """The .py files of the standard library, without its tests and what others installed."""
  root = _library()
  outside = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3"}
  return sorted(
    path for path in root.rglob("*.py") if not outside & set(path.relative_to(root).parts[:-1])
  )


def read_module(path: Path) -> Iterator[tuple[str, str]]:
  """(name, content) of one file; a file that is not UTF-8 is left out."""
  try:
    content = path.read_text(encoding="utf-8")
  except UnicodeDecodeError:
    return
  if content.strip():
    yield path.relative_to(_library()).as_posix(), content


def _library() -> Path:
  return Path(sysconfig.get_path("stdlib"))
