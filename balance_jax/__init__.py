"""Balanced training in JAX: how much each group, objective, teacher or parameter counts.

Sub-packages are imported when they are first used, so `import balance_jax` is cheap.

Example:
  >>> import balance_jax
  >>> p = balance_jax.mixing.temperature_probs([900, 100], 2.0)
  >>> [round(float(x), 2) for x in p]
  [0.75, 0.25]
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

__all__ = [
  "bounds",
  "data",
  "distillation",
  "gradients",
  "losses",
  "mixing",
  "models",
  "robust",
  "stability",
  "training",
]


def __getattr__(name: str) -> ModuleType:
  """Imports a sub-package at its first use (PEP 562)."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
  """What the module holds and the sub-packages not yet imported."""
  return sorted({*globals(), *__all__})
