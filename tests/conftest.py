"""Settings shared by all tests: eight virtual CPU devices, no silent rank promotion."""

import jax

# Must happen before the first use of a device.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
