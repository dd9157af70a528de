"""The scripts of an experiment as modules, for the test file that names its folder."""

import importlib
import sys

import pytest


@pytest.fixture(scope="module")
def scripts(request):
  """The modules SCRIPTS of the test's FOLDER, which is on the path, as it is when one is run."""
  names = request.module.SCRIPTS
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(request.module.FOLDER))
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
      sys.modules.pop(name)


@pytest.fixture(scope="module")
def committed(scripts):
  """The results in the repository."""
  return scripts["table"].load()
