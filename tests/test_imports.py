"""Which module may import which, seen in fresh interpreters and in the source."""

import ast
import pathlib
import pkgutil
import subprocess
import sys

import balance_jax

ROOT = pathlib.Path(balance_jax.__file__).parents[1]
FAMILIES = sorted(
  module.name
  for module in pkgutil.iter_modules(balance_jax.__path__)
  if module.ispkg and module.name not in ("training", "models", "data")
)
SLOW = ("matplotlib", "orbax", "tensorflow_datasets", "grain")


def run_python(code):
  result = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
  )
  assert result.returncode == 0, result.stderr[-2000:]


def imports_of(path):
  """Dotted names that a file imports, wherever in the file."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} imports relatively"
      names.update(f"{node.module}.{alias.name}" for alias in node.names)
  return names


def test_families_import_without_the_trainer():
  assert {"gradients", "losses", "mixing", "stability"} <= set(FAMILIES)
  # optax, which some build on, imports absl itself; what counts is that they do not.
  run_python(f"""
import importlib, sys
import optax
for name in [name for name in sys.modules if name.split(".")[0] == "absl"]:
  del sys.modules[name]
for name in ("flax", "absl", "ml_collections", "balance_jax.training"):
  sys.modules[name] = None
for family in {FAMILIES}:
  importlib.import_module("balance_jax." + family)
""")


def test_imports_that_would_slow_the_start_are_lazy():
  run_python(f"""
import sys
def check(allowed, banned):
  found = sorted(set(banned) & {{name.split(".")[0] for name in sys.modules}})
  assert not found, f"import {{allowed}} loads {{found}}"
import balance_jax
check("balance_jax", {(*SLOW, "flax", "scipy", "absl", "ml_collections")})
import balance_jax.training
check("balance_jax.training", {SLOW})
""")


def test_dependencies_point_downwards():
  below = {family: ("flax", "absl", "ml_collections") for family in FAMILIES}
  for family in set(FAMILIES) - {"gradients", "stability"}:
    below[family] += ("optax",)
  below |= {"models": ("ml_collections", "optax"), "data": ("flax", "ml_collections", "optax")}
  for package, banned in below.items():
    files = list((ROOT / "balance_jax" / package).rglob("*.py"))
    assert files
    for path in files:
      for name in imports_of(path):
        assert name.split(".")[0] not in banned, f"{path} imports {name}"
        assert not name.startswith(("balance_jax.training", "balance_jax.main")), path


def test_nobody_imports_nnx():
  folders = [ROOT / name for name in ("balance_jax", "benchmarks", "configs", "tests")]
  files = [path for folder in folders for path in folder.rglob("*.py")]
  assert len(files) > 20
  for path in files:
    assert not any(name.startswith("flax.nnx") for name in imports_of(path)), path
