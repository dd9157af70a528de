"""Metadata and dependencies of the package; pyproject.toml holds the settings of the tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
  """The version in balance_jax/__init__.py, read as text: nothing is installed yet."""
  text = (ROOT / "balance_jax" / "__init__.py").read_text(encoding="utf-8")
  return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


def read_requirements() -> list[str]:
  """The lines of requirements.txt without comments."""
  lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
  return [line for line in lines if line and not line.startswith("#")]


# The quickstart's text, GPL and so an extra, and scikit-learn's digits. Both are carriers of files
# that are read; neither is imported.
DATA = ["plone.app.locales==7.0.4", "scikit-learn>=1.5"]
TENSORBOARD = ["tensorboardX>=2.6.2"]
RAY = ["ray>=2.60"]

setup(
  name="balance_jax",
  version=read_version(),
  description="Balanced training in JAX: how much each group, objective or teacher counts.",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  packages=find_packages(include=["balance_jax", "balance_jax.*"]),
  python_requires=">=3.11",
  install_requires=read_requirements(),
  extras_require={
    "data": DATA,
    # Ray is a download of 75 MB, a tenth of what the tests need anyway; without it, half of what
    # happens when a machine of a sweep dies would never be tried.
    # A new minor version of ruff may format differently, which would turn a green check red.
    "test": [
      *DATA,
      *RAY,
      *TENSORBOARD,
      "hypothesis>=6.100",
      "pytest>=8.0",
      "pytest-xdist>=3.6",
      "ruff>=0.17,<0.18",
    ],
    # On Linux the usual wheel brings gigabytes of CUDA libraries. PyTorch's own package index has a
    # CPU build; where pip is pointed at it, the same pin takes that one.
    "bench": ["torch==2.13.0"],
    # CUDA 12 rather than 13: jax ships both, and 12 runs with older drivers and cards as well.
    "cuda": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    "ray": RAY,
    "tensorboard": TENSORBOARD,
  },
  classifiers=[
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
