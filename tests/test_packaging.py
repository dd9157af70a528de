"""The package as a whole: metadata, README commands, lazy imports and rules for every file."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import balance_jax

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {"__pycache__", "build", "dist", "runs"}
TEXT = {
  "",
  ".cfg",
  ".html",
  ".ini",
  ".json",
  ".jsonl",
  ".md",
  ".py",
  ".toml",
  ".txt",
  ".yaml",
  ".yml",
}


def project_files(*suffixes):
  """The project's own files, without environments, caches and runs."""
  for folder, folders, names in os.walk(ROOT):
    folders[:] = [
      name
      for name in folders
      if name not in SKIPPED
      and not name.endswith(".egg-info")
      and (not name.startswith(".") or name in {".ci", ".github"})
    ]
    for name in names:
      path = Path(folder, name)
      if path.suffix in suffixes and not name.startswith("."):
        yield path


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def commands():
  return load(ROOT / ".ci" / "readme_commands.py")


@pytest.fixture(scope="module")
def metadata():
  """The arguments of `setup`, by a stand-in: environments need not have setuptools."""
  passed = {}
  with pytest.MonkeyPatch.context() as patch:
    stub = types.SimpleNamespace(setup=passed.update, find_packages=lambda include: include)
    patch.setitem(sys.modules, "setuptools", stub)
    runpy.run_path(str(ROOT / "setup.py"))
  return passed


def requirements(metadata, *extras):
  lines = [*metadata["install_requires"]]
  for extra in extras:
    lines += metadata["extras_require"][extra]
  return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


@pytest.mark.parametrize(
  ("name", "versions"),
  [("jax", ["0.10.2", "0.11.2", "0.12.0.1"]), ("flax", ["0.12.8", "0.12.12"])],
)
def test_requirements_admit_both_stacks(metadata, name, versions):
  allowed = requirements(metadata)[name].specifier
  assert list(allowed.filter(versions)) == versions
  assert "0.13.0" not in allowed


def test_this_environment_meets_the_requirements(metadata):
  for name, requirement in requirements(metadata, "data").items():
    assert importlib.metadata.version(name) in requirement.specifier, name


def test_extras(metadata):
  extras = metadata["extras_require"]
  assert set(extras) == {"data", "test", "bench", "cuda", "tpu", "ray", "tensorboard"}
  # The tests read the text and the event files, and start a cluster.
  assert {*extras["data"], *extras["ray"], *extras["tensorboard"]} < set(extras["test"])
  for lines in extras.values():
    assert all(Requirement(line) for line in lines)


@pytest.mark.parametrize(
  ("folder", "extras"),
  [
    ("balance_jax", ["ray", "tensorboard"]),
    ("tests", ["test"]),
    ("benchmarks", ["bench"]),
    ("configs", []),
    ("examples", []),
    ("experiments", []),
  ],
)
def test_imports_are_declared(metadata, folder, extras):
  known = set(requirements(metadata, *extras)) | {"balance-jax"}
  # Brought along by pytest and by jax.
  known |= {"packaging", "jaxlib"} if folder == "tests" else {"jaxlib"}
  distributions = importlib.metadata.packages_distributions()
  own = {"balance_jax", "tests", "configs", "examples", "experiments", "benchmarks"}
  for path in (ROOT / folder).rglob("*.py"):
    beside = {file.stem for file in path.parent.glob("*.py")}  # a script finds its neighbours
    for module in top_level_imports(path) - own - beside - sys.stdlib_module_names:
      names = {canonicalize_name(name) for name in distributions.get(module, [module])}
      assert names & known, f"{path} imports {module}, which no requirement brings"


def top_level_imports(path):
  """Names of the packages that a file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name.partition(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and not node.level:
      found.add(node.module.partition(".")[0])
  return found


def test_readme_commands(commands, metadata):
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  run, test = (commands.readme_command(text, heading) for heading in commands.HEADINGS)
  (config,) = re.findall(r"--config=(\S+)", run)
  assert (ROOT / config).is_file()
  assert test.endswith("python -m pytest")
  for command in (run, test):
    (extras,) = re.findall(r"pip install -e '\.\[([a-z,]+)\]'", command)
    assert set(extras.split(",")) <= set(metadata["extras_require"])


def test_readme_command_is_extracted_as_written(commands):
  text = "# T\n## Run it\ntext\n```bash\na 'b' && c\n```\n```text\nout\n```\n## Test it\n"
  assert commands.readme_command(text, "Run it") == "a 'b' && c"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("# T\n", "one section '## Run it', found 0"),
    (
      "## Run it\n```bash\na\n```\n## Run it\n```bash\na\n```\n",
      "one section '## Run it', found 2",
    ),
    ("## Run it\n## Test it\n```bash\na\n```\n", "one command in a bash block, found 0"),
    ("## Run it\n```bash\na\nb\n```\n", "one command in a bash block, found 2"),
    ("## Run it\n```bash\na\n```\n```bash\nb\n```\n", "one command in a bash block, found 2"),
  ],
)
def test_readme_without_one_command_is_an_error(commands, text, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    commands.readme_command(text, "Run it")


def test_ci_runs_the_readme():
  script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
  assert 'readme "Run it"' in script
  assert 'readme "Test it"' in script
  assert "bash .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
  subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_version_is_the_newest_of_the_changelog(metadata):
  text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
  newest = re.search(r"^## (\S+)", text, flags=re.MULTILINE)[1]
  assert metadata["version"] == balance_jax.__version__ == newest


def test_licence(metadata):
  text = (ROOT / "LICENSE").read_text(encoding="utf-8")
  assert re.match(r"\s*Apache License\s+Version 2\.0, January 2004", text)
  assert "END OF TERMS AND CONDITIONS" in text
  assert metadata["license"] == "Apache-2.0"


def test_files_are_short():
  lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in project_files(".py")}
  assert len(lengths) > 30
  assert not {str(path): n for path, n in lengths.items() if n > 400}


def test_nnx_is_not_imported():
  # flax 0.12.8 cannot import it with jax >= 0.11.1.
  pattern = re.compile(r"(from|import) flax(\.nnx| import .*\bnnx\b)")
  assert pattern.search("import flax.nnx")
  assert pattern.search("from flax import linen, nnx")
  for path in project_files(".py"):
    text = path.read_text(encoding="utf-8")
    if path != Path(__file__).resolve():
      assert not pattern.search(text), path


def test_no_path_of_one_machine():
  pattern = re.compile(r"(?<![\w.~/\-\]}])/(home|root|work|Users|tmp|opt|mnt)/\w")
  assert pattern.search('open("' + "/ho" + 'me/me/x")')
  for path in project_files(*TEXT):
    found = pattern.search(path.read_text(encoding="utf-8"))
    assert not found, f"{path}: {found}"


def test_subpackages_are_imported_at_first_use():
  code = """
import sys, balance_jax
assert not {"jax", "numpy", "flax"} & set(sys.modules), "heavy"
assert set(balance_jax.__all__) <= set(dir(balance_jax))
for name in balance_jax.__all__:
  assert getattr(balance_jax, name) is sys.modules["balance_jax." + name]
heavy = {"tensorflow", "tensorflow_datasets", "matplotlib", "orbax", "grain", "flax.nnx"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_every_subpackage_is_exposed():
  folders = {path.parent.name for path in (ROOT / "balance_jax").glob("*/__init__.py")}
  assert set(balance_jax.__all__) == folders
  with pytest.raises(AttributeError, match="'balance_jax' has no attribute 'mixin'"):
    _ = balance_jax.mixin
