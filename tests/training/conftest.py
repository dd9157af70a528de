"""Training is tested without LLVM's optimisations.

They take a quarter of the time of programs as small as these, and change none of what these tests
are about. The numerics (tests of losses, bounds, models) are compiled as users compile them.
"""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # for the processes that tests start
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
