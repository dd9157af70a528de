"""What a coordinate check measures: the size of every activation against width, in early training.

Under a correct parametrisation mean |x| of an activation does not depend on the width, at the start
and after each of the first steps; under the standard one it grows. `mup.coordinate_check` runs it.

Source: Yang et al., "Tensor Programs V", 2022 (arXiv 2203.03466). The rule of passing in numbers is
ours.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balance_jax import _checks
from balance_jax.stability._mup_tensors import path_matches

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_MARKERS = "os^DvPX"
# More entries than this would make a column of the legend higher than the panels.
_LEGEND_ROWS = 16


@dataclasses.dataclass(frozen=True)
class CoordinateCheck:
  """Sizes of activations by width, seed and step, and the verdict on them.

  An activation passes if the slope of log mean |x| on log width is finite and within the tolerance
  at the last step. Earlier steps are not judged: at the first one the outputs and the attention
  logits of a correct muP model shrink like 1 / sqrt(width), unless readout and query start at zero,
  and then they have no logarithm.

  Attributes:
    widths: the W widths, increasing.
    activations: names of the A activations, block_2 before block_10, the model's output last.
    magnitudes: float64 (W, S, T, A), mean |x| by width, seed, step (the first is the start).
    losses: float64 (W, S, T), mean loss before the update of that step.
    tolerance: largest |slope| that passes.
    exclude: globs on names, or on single parts of them; what matches is not judged.
  """

  widths: tuple[int, ...]
  activations: tuple[str, ...]
  magnitudes: np.ndarray
  losses: np.ndarray
  tolerance: float = 0.15
  exclude: tuple[str, ...] = ()

  @property
  def slopes(self) -> np.ndarray:
    """float64 (A, T): least-squares slopes, mean over seeds; NaN where some |x| is 0 or not finite.

    A model of width w whose activation is proportional to w^a has slope a.
    """
    return self._slopes_by_seed().mean(axis=0).T

  @property
  def slope_spread(self) -> np.ndarray:
    """float64 (A, T): standard deviation of the slopes over the seeds; 0 with a single seed."""
    return self._slopes_by_seed().std(axis=0).T

  @property
  def passes(self) -> bool:
    """True where no activation fails."""
    return not self.failures()

  def failures(self) -> dict[str, float]:
    """Failing activation -> its slope at the last step; NaN where it has none."""
    last = self.slopes[:, -1]
    return {
      name: float(slope)
      for name, slope in zip(self.activations, last, strict=True)
      if not self._excluded(name) and not abs(slope) <= self.tolerance
    }

  def table(self) -> list[dict[str, Any]]:
    """Rows with "activation", "step" (from 1), "slope", "spread" and "judged", one a slope."""
    slopes, spread = self.slopes, self.slope_spread
    steps = slopes.shape[1]
    return [
      {
        "activation": name,
        "step": t + 1,
        "slope": float(slopes[a, t]),
        "spread": float(spread[a, t]),
        "judged": t == steps - 1 and not self._excluded(name),
      }
      for a, name in enumerate(self.activations)
      for t in range(steps)
    ]

  def plot(self) -> "Figure":
    """Mean |x| (geometric mean over seeds) against width on log axes, one panel a step.

    Returns:
      A matplotlib figure, bound to no window; `figure.savefig(path)` writes it. Excluded
      activations are dotted.
    """
    from matplotlib.figure import Figure

    columns = math.ceil(len(self.activations) / _LEGEND_ROWS)
    steps = self.magnitudes.shape[2]
    figure = Figure(figsize=(2.6 * steps + 0.6 + 2.6 * columns, 3.8), layout="constrained")
    panels = figure.subplots(1, steps, sharey=True, squeeze=False)[0]
    mean = np.exp(_log(self.magnitudes).mean(axis=1))  # (W, T, A)
    for t, panel in enumerate(panels):
      _format_panel(panel, self.widths, t)
      for a, style in enumerate(self._styles()):
        panel.plot(self.widths, mean[:, t, a], **style)
    panels[0].set_ylabel("mean |x|")
    figure.legend(
      *panels[0].get_legend_handles_labels(),
      loc="outside right center",
      frameon=False,
      ncols=columns,
      fontsize=8,
      title=f"slope at step {steps}",
    )
    failing = len(self.failures())
    verdict = f"fails for {failing} of {len(self.activations)} activations" if failing else "passes"
    figure.suptitle(f"Coordinate check {verdict} (|slope| ≤ {self.tolerance:g})", fontsize=10)
    return figure

  def _styles(self) -> list[dict[str, Any]]:
    import matplotlib

    # A sequence of colours, as activations have the order of the layers; its pale end is left out.
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(self.activations)))
    failures = self.failures()
    return [
      {
        "color": shades[a],
        "marker": _MARKERS[a % len(_MARKERS)],
        "markersize": 4,
        "linestyle": "dotted" if self._excluded(name) else "solid",
        "label": f"{slope:+.2f}  {name}" + (" (fails)" if name in failures else ""),
      }
      for a, (name, slope) in enumerate(zip(self.activations, self.slopes[:, -1], strict=True))
    ]

  def _slopes_by_seed(self) -> np.ndarray:
    """float64 (S, T, A)."""
    x = np.log(np.asarray(self.widths, np.float64))
    x = x - x.mean()
    return np.einsum("w,wsta->sta", x / np.sum(x * x), _log(self.magnitudes))

  def _excluded(self, name: str) -> bool:
    return any(path_matches(name, glob) for glob in self.exclude)


def wider_is_better(widths: Sequence[int], losses, tolerance: float = 0.0) -> bool:
  """Whether no width has a larger training loss than a narrower one, the second check of muP.

  Args:
    widths: W >= 2 numbers, increasing.
    losses: float (W,), or (W, T): then at each of T steps. Means over seeds, best after some
      hundred steps; in the first few all widths are alike.
    tolerance: by how much a wider model may be worse, >= 0, for the noise between seeds.

  Returns:
    True or False; False where a loss is not finite.

  >>> wider_is_better((64, 128, 256), [0.5, 0.4, 0.41]), wider_is_better((64, 128), [0.5, 0.5])
  (False, True)
  """
  widths = check_widths(widths)
  _checks.check_number("tolerance", tolerance, low=0.0)
  losses = np.asarray(losses, np.float64)
  if losses.ndim not in (1, 2) or losses.shape[0] != len(widths) or losses.size == 0:
    raise ValueError(
      f"losses has shape {losses.shape}; expected ({len(widths)},) or ({len(widths)}, T)"
    )
  best_narrower = np.minimum.accumulate(losses)[:-1]
  return bool(np.isfinite(losses).all() and np.all(losses[1:] <= best_narrower + tolerance))


def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
  """The widths as a tuple; ValueError unless at least two, positive, increasing integers."""
  widths = tuple(widths)
  for width in widths:
    _checks.check_number("widths", width, low=1, integer=True)
  if len(widths) < 2 or any(b <= a for a, b in itertools.pairwise(widths)):
    raise ValueError(f"widths is {widths}; expected at least 2 numbers, increasing")
  return tuple(int(width) for width in widths)


def model_functions(model: Any) -> tuple[Callable, Callable]:
  """(init(key, inputs) -> params, apply(params, inputs) -> (outputs, activations)) of a model.

  Args:
    model: such a pair, activations a pytree of arrays; or a `flax.linen` module with "params" as
      its only state, of which every module's output and all that is sown are activations.
  """
  if isinstance(model, tuple) and len(model) == 2 and all(callable(part) for part in model):
    return model
  if not (hasattr(model, "init") and hasattr(model, "apply")):
    raise ValueError(
      f"make_model returned {type(model).__name__}; expected a flax.linen module, or a pair "
      "(init(key, inputs), apply(params, inputs) -> (outputs, activations))"
    )

  def init(key, inputs):
    return {"params": model.init(key, inputs)["params"]}

  def apply(params, inputs):
    outputs, state = model.apply(
      params, inputs, capture_intermediates=True, mutable=["intermediates"]
    )
    return outputs, state["intermediates"]

  return init, apply


def record_activations(
  init: Callable, apply: Callable, optimizer: optax.GradientTransformation, loss: Callable,
  inputs: Any, seeds: Sequence[int], steps: int,
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:  # fmt: skip
  """Trains on one fixed batch, all seeds in one program.

  Args:
    init: init(key) -> params.
    apply: apply(params, inputs) -> (outputs, activations).
    optimizer: an optax transformation, learning rate and sign included.
    loss: loss(outputs) -> float array; its mean is minimised.
    inputs: the batch.
    seeds: S integers.
    steps: T forward passes, with T - 1 updates between them.

  Returns:
    (names of A activations, mean |x| as float64 (S, T, A), losses float64 (S, T)).
  """

  def objective(params, inputs):
    outputs, activations = apply(params, inputs)
    sizes = {name: _mean_abs(x) for name, x in _named(activations).items()}
    return jnp.mean(loss(outputs)), sizes

  def train(key, inputs):
    def step(carry, _):
      params, opt_state = carry
      (value, sizes), grads = jax.value_and_grad(objective, has_aux=True)(params, inputs)
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), (value, sizes)

    params = init(key)
    return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[1]

  keys = jnp.stack([jax.random.key(seed) for seed in seeds])
  losses, sizes = jax.jit(jax.vmap(train, in_axes=(0, None)))(keys, inputs)
  names = tuple(sorted(sizes, key=_reading_order))
  if not names:
    raise ValueError("the model returned no floating activations; nothing to check")
  stacked = np.stack([np.asarray(sizes[name], np.float64) for name in names], axis=-1)
  return names, stacked, np.asarray(losses, np.float64)


def _named(activations: Any) -> dict[str, jax.Array]:
  """Path -> floating array; flax's "__call__" and the place in a tuple of one are left out."""
  leaves = [
    (path, leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(activations)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  full = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  short = [
    "/".join(part for part in name.split("/") if part not in ("__call__", "0")) or "output"
    for name in full
  ]
  names = short if len(set(short)) == len(short) else full
  return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def _reading_order(name: str) -> tuple:
  """block_2 before block_10, and the model's output last."""
  parts = re.split(r"(\d+)", name)
  return name == "output", [int(part) if part.isdigit() else part for part in parts]


def _mean_abs(x: jax.Array) -> jax.Array:
  return jnp.mean(jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32))))


def _log(magnitudes: np.ndarray) -> np.ndarray:
  usable = np.isfinite(magnitudes) & (magnitudes > 0)
  return np.log(np.where(usable, magnitudes, np.nan))


def _format_panel(panel, widths: tuple[int, ...], t: int) -> None:
  panel.set_title(f"step {t + 1}" + (" (start)" if t == 0 else ""), fontsize=9, loc="left")
  panel.set_xlabel("width")
  panel.set_xscale("log")
  panel.set_yscale("log")
  panel.set_xticks(widths, [str(width) for width in widths], fontsize=8)
  panel.set_xticks([], minor=True)
  panel.grid(color="#808890", alpha=0.25, linewidth=0.5)
  panel.spines[["top", "right"]].set_visible(False)
