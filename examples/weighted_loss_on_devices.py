"""One weighted loss under jit, shard_map and pmap on 8 devices: the gradient of a single device.

The loss is a pair (numerator, denominator), divided once, globally. Averaging the devices' means,
the usual recipe, is wrong as soon as the weights differ between devices; the last line shows it.

  python examples/weighted_loss_on_devices.py
"""

import jax
import jax.numpy as jnp

from balance_jax.losses import WeightedMean, weighted_mean


def local_sums(w, x, y, weights) -> WeightedMean:
  """Numerator and denominator of the weighted squared error of some rows."""
  return weighted_mean((x @ w - y) ** 2, weights, normalize="weights")


def whole_loss(w, x, y, weights):
  """What a single device computes, and jit over a mesh as well: no axis name anywhere."""
  return local_sums(w, x, y, weights).mean()


def device_gradient(w, x, y, weights):
  """The gradient as one of several devices along the axis "data" computes it."""
  den = jax.lax.psum(local_sums(w, x, y, weights).den, "data")
  return jax.lax.psum(jax.grad(lambda w: local_sums(w, x, y, weights).num / den)(w), "data")


def device_gradient_shard_map(w, x, y, weights):
  """As above; shard_map must be told that the parameters are meant per device."""
  return device_gradient(jax.lax.pcast(w, "data", to="varying"), x, y, weights)


def mean_of_means(w, x, y, weights):
  """The wrong recipe: every device divides by its own denominator, then the means are averaged."""
  return jax.lax.pmean(jax.grad(whole_loss)(w, x, y, weights), "data")


def main() -> dict[str, float]:
  """Largest difference of each gradient to the single device's, as a share of its size."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  keys = jax.random.split(jax.random.key(0), 3)
  x, y = jax.random.normal(keys[0], (64, 4)), jax.random.normal(keys[1], (64,))
  weights = jnp.exp(3.0 * jax.random.normal(keys[2], (64,)))
  w = jnp.ones(4)
  expected = jax.grad(whole_loss)(w, x, y, weights)

  rows, everywhere = jax.P("data"), jax.P()
  placed = jax.device_put((x, y, weights), jax.NamedSharding(mesh, rows))
  shard_map = jax.shard_map(
    device_gradient_shard_map,
    mesh=mesh,
    in_specs=(everywhere, rows, rows, rows),
    out_specs=everywhere,
  )

  def pmap(gradient):
    split = [array.reshape(8, -1, *array.shape[1:]) for array in (x, y, weights)]
    return jax.pmap(gradient, axis_name="data", in_axes=(None, 0, 0, 0))(w, *split)[0]

  gradients = {
    "jit": jax.jit(jax.grad(whole_loss))(w, *placed),
    "shard_map": jax.jit(shard_map)(w, *placed),
    "pmap": pmap(device_gradient),
    "mean of means (wrong)": pmap(mean_of_means),
  }
  size = jnp.abs(expected).max()
  return {name: float(jnp.abs(g - expected).max() / size) for name, g in gradients.items()}


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  for name, error in main().items():
    print(f"{name:22} relative error {error:.1e}")
