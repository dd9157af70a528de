"""Statistics of batch normalisation in certified training: from clean examples, and once a step.

Bounds over a box need normalisation to be one fixed affine map. In training that map is made of the
mean and variance of the clean batch, and the gradient flows through both; in evaluation of running
or of precise statistics. Running statistics are updated once a step, by the clean batch only.

Source: Shi et al., "Fast Certified Robust Training with Short Warmup", NeurIPS 2021
(arXiv 2103.17268), section on batch normalisation; precise statistics: Wu and Johnson, "Rethinking
'Batch' in BatchNorm", 2021 (arXiv 2105.07576), and Mao et al., "CTBench", ICML 2025
(arXiv 2406.04848).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks


class CleanPass(NamedTuple):
  """What one pass over clean examples gives.

  Attributes:
    logits: float (B, K), normalised by the moments of the batch.
    moments: like `batch_stats`: mean and variance of this batch, with their gradients. Bounds that
      use them as `batch_stats` in inference mode are normalised as the logits are.
    running: like `batch_stats`: the updated running statistics, without gradients.
  """

  logits: jax.Array
  moments: Any
  running: Any


def clean_pass(apply_fn: Callable, params: Any, batch_stats: Any, x: jax.Array) -> CleanPass:
  """One training-mode pass that also yields the moments of the batch, at no extra cost.

  A network returns new = m old + (1 - m) batch only, and the momentum m is its own. But new is
  affine in old with slope m, while logits do not depend on old: applied at old = 0, the derivative
  along ones is m and batch = new / (1 - m), whatever the momentum of each layer.

  Args:
    apply_fn: apply_fn({"params": p, "batch_stats": s}, x, train=True) -> (logits, new s), or
      (logits, {"batch_stats": new s}) as of Flax, functools.partial(model.apply,
      mutable=["batch_stats"]).
    params: parameters.
    batch_stats: running statistics, floating, of any structure; empty without normalisation.
    x: float (B, ...), clean examples.

  Returns:
    CleanPass(logits, moments, running). Moments are exact up to rounding, which 1 - m magnifies
    (relative error 2e-7 at m = 0.9, 1e-6 at 0.99 in float32); running statistics are not divided.

  Raises:
    ValueError: a leaf of batch_stats is not floating, or a momentum of 1 (seen outside jit only;
      inside, moments are NaN).

  >>> def apply_fn(variables, x, train):  # a network that only subtracts the mean
  ...   old = variables["batch_stats"]["mean"]
  ...   mean = x.mean(0, keepdims=True) if train else old
  ...   return x - mean, {"mean": 0.9 * old + 0.1 * mean}
  >>> x = jnp.array([[1.0], [3.0]])
  >>> logits, moments, running = clean_pass(apply_fn, {}, {"mean": jnp.ones((1, 1))}, x)
  >>> logits.ravel().tolist(), [round(s["mean"].item(), 4) for s in (moments, running)]
  ([-1.0, 1.0], [2.0, 1.1])
  """
  _check_floating(batch_stats)
  zeros = jax.tree.map(jnp.zeros_like, batch_stats)
  ones = jax.tree.map(jnp.ones_like, batch_stats)

  def updated(old):
    logits, new = apply_fn({"params": params, "batch_stats": old}, x, train=True)
    return _unwrap(new), logits

  new, momentum, logits = jax.jvp(updated, (zeros,), (ones,), has_aux=True)
  for path, m in jax.tree_util.tree_leaves_with_path(momentum):
    if _checks.is_concrete(m) and np.any(np.asarray(m) == 1):
      raise ValueError(
        f"batch_stats{jax.tree_util.keystr(path)} has momentum 1, which forgets the batch; "
        "allowed: < 1"
      )
  moments = jax.tree.map(lambda new, m: new / (1 - m), new, momentum)
  running = jax.tree.map(lambda old, new, m: m * old + new, batch_stats, new, momentum)
  return CleanPass(logits, moments, jax.lax.stop_gradient(running))


def precise_statistics(
  apply_fn: Callable, params: Any, batch_stats: Any, batches: jax.Array
) -> Any:
  """Statistics of a whole data set for parameters as they are now ("precise BN").

  Running statistics lag behind the parameters. Here every batch is passed once with the moments of
  its own, and all batches count alike. A variance is that of all examples together: the mean of the
  variances inside batches plus the variance of their means (law of total variance). For a first
  layer this is the variance of the data; further layers see inputs normalised batch by batch.

  Args:
    apply_fn: as in `clean_pass`.
    params: parameters.
    batch_stats: running statistics, for their structure; values are not used.
    batches: float (N, B, ...), N >= 1 batches of clean examples.

  Returns:
    Like batch_stats. A leaf named "var" with a sibling "mean" is a variance as above, any other
    leaf is averaged.

  Raises:
    ValueError: no batches, and the errors of `clean_pass`.

  >>> def apply_fn(variables, x, train):
  ...   old = variables["batch_stats"]
  ...   batch = {"mean": x.mean(0), "var": x.var(0)}
  ...   return x, jax.tree.map(lambda old, new: (old + new) / 2, old, batch)
  >>> batches = jnp.array([[[0.0], [2.0]], [[4.0], [6.0]]])
  >>> stats = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
  >>> precise_statistics(apply_fn, {}, stats, batches)
  {'mean': Array([3.], dtype=float32), 'var': Array([5.], dtype=float32)}
  """
  if jnp.ndim(batches) < 2 or len(batches) == 0:
    raise ValueError(f"batches has shape {jnp.shape(batches)}; expected (N, B, ...), N >= 1")
  _check_floating(batch_stats)
  zeros = jax.tree.map(jnp.zeros_like, batch_stats)

  def add(carry, x):
    # Welford's recurrence, for means and for squared deviations: no difference of large squares.
    count, mean, deviation = carry
    count = count + 1
    moments = clean_pass(apply_fn, params, zeros, x).moments
    new = jax.tree.map(lambda mean, batch: mean + (batch - mean) / count, mean, moments)
    deviation = jax.tree.map(
      lambda sum_, batch, mean, new: sum_ + (batch - mean) * (batch - new),
      deviation,
      moments,
      mean,
      new,
    )
    return (count, new, deviation), None

  (count, mean, deviation), _ = jax.lax.scan(add, (0, zeros, zeros), batches)
  spread = {
    _names(path): leaf / count for path, leaf in jax.tree_util.tree_leaves_with_path(deviation)
  }

  def finished(path, leaf):
    names = _names(path)
    between = spread.get((*names[:-1], "mean")) if names[-1:] == ("var",) else None
    return leaf if between is None else leaf + between

  return jax.tree_util.tree_map_with_path(finished, mean)


def _names(path) -> tuple[str, ...]:
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _check_floating(batch_stats) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch_stats):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise ValueError(
        f"batch_stats{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}; "
        "expected floating point"
      )


def _unwrap(updates):
  """The statistics in what Flax returns for mutable=["batch_stats"]; {} if it has none."""
  if isinstance(updates, Mapping) and set(updates) == {"batch_stats"}:
    return updates["batch_stats"]
  return updates
