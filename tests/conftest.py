"""Settings shared by all tests: eight virtual CPU devices, no silent rank promotion."""

import os
import tempfile

import jax

# Must happen before the first use of a device.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests that stop and resume, or compare two runs, compile the same programs again and again. The
# environment variable is for the command lines they start and for pytest's parallel workers.
CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="balance_jax_"))
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def pytest_unconfigure(config):
  """Removes the cache, in the process that made it."""
  import shutil

  if os.path.basename(CACHE).startswith("balance_jax_") and not hasattr(config, "workerinput"):
    shutil.rmtree(CACHE, ignore_errors=True)
