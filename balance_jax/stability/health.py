"""What to watch in a run: sizes of tensors against the epsilon of Adam, spikes, and a report.

Sources: Wortsman et al., 2023 (arXiv 2309.14322), section 3.4 for the gradient size that meets the
epsilon of Adam, and for the limit of 1e4 on attention logits. The other limits are ours and are
rules of thumb.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax.stability.trends import UNSTABLE_MAX_LOGIT

MAX_LOGIT_LIMIT = UNSTABLE_MAX_LOGIT
# Ours: |log Z| stays near 0 with the z-loss, and starts near log V, 10.4 for 32,101 tokens.
LOG_Z_LIMIT = 20.0
# Ours, in nats: a row with 99.9 % on one position and the rest on another has 0.008.
ENTROPY_LIMIT = 0.01
# Ours: at this ratio the epsilon of Adam shortens the updates by a factor of 10 / 11.
GRADIENT_TO_EPS_LIMIT = 10.0
# Any spike at all.
SPIKE_SCORE_LIMIT = 0.0

# A standard deviation of fewer values is too uncertain for a limit of seven of them.
_MIN_HISTORY = 10
# A rise within the rounding of a constant curve is no spike.
_ROUNDING = 1e-9
_CHUNK_ELEMENTS = 4_000_000


def tree_rms(tree: Any) -> Any:
  """Root mean square of every array, sqrt(mean x^2).

  Squares are taken after a division by the largest entry, so gradients of 1e-30 or activations of
  1e30 neither vanish nor overflow in float32. The gradient at an all-zero array is 0.

  Args:
    tree: pytree of float or integer arrays, any shapes.

  Returns:
    Same structure, float32 scalars (float64 for float64 arrays); 0 for an array without entries.

  >>> float(tree_rms({"kernel": jnp.array([[3.0, -3.0]])})["kernel"])
  3.0
  """
  return jax.tree.map(_leaf_rms, tree)


def global_rms(tree: Any) -> jax.Array:
  """Root mean square over all entries of all arrays of a pytree.

  Args:
    tree: pytree of float or integer arrays.

  Returns:
    float32 (or float64) scalar; 0 for a tree without entries.

  >>> print(f"{global_rms([jnp.array([3.0]), jnp.array([0.0, 4.0, 0.0])]):g}")
  2.5
  """
  leaves = [leaf for leaf in jax.tree.leaves(tree) if np.size(leaf)]
  if not leaves:
    return jnp.zeros((), jnp.float32)
  # Shares of Python integers: a count of parameters may exceed 2^31.
  total = sum(math.prod(np.shape(leaf)) for leaf in leaves)
  shares = [math.prod(np.shape(leaf)) / total for leaf in leaves]
  rms = jnp.stack([_leaf_rms(leaf) for leaf in leaves])
  return _scaled_rms(rms, lambda squares: jnp.dot(jnp.asarray(shares, rms.dtype), squares))


def update_to_eps_ratio(grads: Any, eps) -> Any:
  """RMS(g) / eps of every gradient; near 1 or below, the updates of Adam shrink.

  Adam divides by sqrt(u) + eps, where sqrt(u) is about RMS(g). In the paper RMS(g) falls as the
  learning rate and the model grow. Give gradients from before clipping.

  Args:
    grads: pytree of float arrays.
    eps: the epsilon of Adam, >= 0; may be traced.

  Returns:
    Same structure, float32 scalars; 0 for a zero gradient, infinity for eps = 0 and any other.

  >>> print(f"{update_to_eps_ratio(jnp.array([3e-8, -3e-8]), 1e-8):.1f}")
  3.0
  """
  _checks.check_number("eps", eps, low=0.0, high=np.finfo(np.float32).max)
  return jax.tree.map(lambda rms: jnp.where(rms > 0, rms / eps, 0.0 * rms), tree_rms(grads))


def spike_score(values, window: int = 1000, n_std: float = 7.0) -> Any:
  """Share of steps whose value lies far above what came before.

  A step is a spike if its value lies at least `n_std` standard deviations above the mean of the
  finite values among the `window` values before it (the population standard deviation, divisor n;
  not counting the step itself), and above that mean by more than rounding. Steps with fewer than 10
  finite values before them are not judged, so they count neither as spikes nor as steps. A NaN or
  an infinite value is a spike wherever it stands.

  Later work than the paper: the rule of 7 standard deviations and 1000 steps is in use for the loss
  and the gradient norm of language models; the details of the definition are ours.

  Args:
    values: float (..., T), loss or gradient norm of consecutive steps, on the host.
    window: steps of history, >= 10.
    n_std: > 0.

  Returns:
    float for (T,), else float64 (...); in [0, 1], and 0 where no step was judged.

  >>> curve = [1.0, 1.1] * 10 + [9.0] + [1.0, 1.1] * 10
  >>> print(f"{spike_score(curve):.4f}")  # 1 of the 31 steps after the tenth
  0.0323
  """
  _checks.check_number("window", window, low=_MIN_HISTORY, integer=True)
  _checks.check_number("n_std", n_std, low=0.0, high=np.finfo(np.float64).max, open_low=True)
  values = _as_float64("values", values)
  if values.ndim == 0:
    raise ValueError("values has shape (); expected (..., T)")
  steps = values.shape[-1]
  window = max(1, min(int(window), steps))
  before = np.full((*values.shape[:-1], window), np.nan)
  padded = np.concatenate([before, values], axis=-1)
  spikes = np.zeros(values.shape[:-1])
  judged = np.zeros(values.shape[:-1])
  # In blocks of steps: the windows of a long run would not fit in memory all at once. Running sums
  # would need no windows, but one spike of 1e20 would cancel what comes after it.
  block = max(1, _CHUNK_ELEMENTS // (window * max(1, spikes.size)))
  for start in range(0, steps, block):
    now = values[..., start : start + block]
    part = padded[..., start : start + window + now.shape[-1] - 1]
    history = np.lib.stride_tricks.sliding_window_view(part, window, axis=-1)
    is_spike, is_judged = _judge(now, history, n_std)
    spikes += is_spike.sum(axis=-1)
    judged += is_judged.sum(axis=-1)
  score = spikes / np.maximum(judged, 1)
  return float(score) if score.ndim == 0 else score


@dataclasses.dataclass(frozen=True)
class StabilityReport:
  """Warning signs of one run, each None where it was not measured.

  Attributes:
    max_logit: largest attention logit; warns above 1e4 (from the paper).
    log_z_mean: mean log normaliser of the output logits; warns beyond +-20 (ours).
    attention_entropy: smallest mean entropy of an attention head, nats; warns below 0.01 (ours).
    gradient_to_eps: smallest RMS(g) / eps of a tensor; warns below 10 (ours).
    block_rms: largest RMS of a block's output; for information, without a limit.
    spike_score: share of loss spikes, see `spike_score`; warns above 0 (ours).
    diverged: a NaN or an infinite value was seen. One in the fields above counts too.

  >>> report = StabilityReport(max_logit=2.5e4, spike_score=0.0)
  >>> report.is_stable
  False
  >>> print(report.table())
  measure           value    limit
  largest logit     2.5e+04  <= 10000  warning
  mean log Z        -        +-20
  lowest entropy    -        >= 0.01
  gradient / eps    -        >= 10
  block output RMS  -
  spike score       0        <= 0
  diverged          no       no
  """

  max_logit: float | None = None
  log_z_mean: float | None = None
  attention_entropy: float | None = None
  gradient_to_eps: float | None = None
  block_rms: float | None = None
  spike_score: float | None = None
  diverged: bool = False

  def __post_init__(self):
    measured = [value for value in map(self._value, _MEASURES) if value is not None]
    if not all(map(math.isfinite, measured)):
      object.__setattr__(self, "diverged", True)

  @classmethod
  def from_history(
    cls, history: Mapping[str, Any], eps: float | None = None, tail: int = 500
  ) -> "StabilityReport":
    """Reads the signs out of the recorded history of one run.

    The largest logit and the spikes are looked for in the whole run. The others describe its end:
    means over the last `tail` recorded steps (the paper's 500), then the worst of all blocks, heads
    or tensors. Non-finite values are left out of these figures and make the run count as diverged.

    Args:
      history: arrays on the host, T recorded steps first, of which any may be absent: "max_logit"
        (T, ...), "log_z" (T,), "entropy" (T, ...), "grad_rms" (T, ...), "block_rms" (T, ...),
        "loss" (T,). A value may also be a dict of such arrays, as of named tensors. An entry
        of None is NaN, a value of None absent. Other keys are ignored.
      eps: the epsilon of Adam, > 0; needed with "grad_rms".
      tail: steps, >= 1.

    Returns:
      The report.

    Raises:
      ValueError: none of the keys is there, a value has no steps, eps is missing.
    """
    _checks.check_number("tail", tail, low=1, integer=True)
    present = [key for key in _HISTORY_KEYS if history.get(key) is not None]
    given = {key: _columns(key, history[key]) for key in present}
    if not given:
      raise ValueError(
        f"history holds {sorted(map(str, history))}; expected at least one of: "
        + ", ".join(_HISTORY_KEYS)
      )
    found: dict[str, Any] = {}
    if "max_logit" in given:
      finite = given["max_logit"][np.isfinite(given["max_logit"])]
      found["max_logit"] = float(finite.max()) if finite.size else math.nan
    if "log_z" in given:
      means = _tail_means(given["log_z"], tail)
      found["log_z_mean"] = float(means[np.argmax(np.abs(means))])
    if "entropy" in given:
      found["attention_entropy"] = float(_tail_means(given["entropy"], tail).min())
    if "grad_rms" in given:
      if eps is None:
        raise ValueError("eps is None; expected the epsilon of Adam, as history holds grad_rms")
      _checks.check_number("eps", eps, low=0.0, high=np.finfo(np.float64).max, open_low=True)
      found["gradient_to_eps"] = float(_tail_means(given["grad_rms"], tail).min() / float(eps))
    if "block_rms" in given:
      found["block_rms"] = float(_tail_means(given["block_rms"], tail).max())
    if "loss" in given:
      found["spike_score"] = float(np.max(spike_score(given["loss"].T)))
    diverged = not all(np.isfinite(columns).all() for columns in given.values())
    return cls(**found, diverged=diverged)

  def warnings(self) -> list[str]:
    """One sentence for every sign beyond its limit: the figure, the limit, what usually helps."""
    sentences = [
      f"{measure.sentence.format(self._value(measure), measure.limit)} {measure.remedy}"
      for measure in _MEASURES
      if self._exceeds(measure)
    ]
    if self.diverged:
      sentences.insert(
        0, "The run diverged: a NaN or an infinite value was seen. Lower the learning rate."
      )
    return sentences

  @property
  def is_stable(self) -> bool:
    """True where nothing that was measured gives a warning."""
    return not self.warnings()

  def table(self) -> str:
    """All signs with their limits as aligned plain text, a dash where not measured."""
    rows = [("measure", "value", "limit", "")]
    for measure in _MEASURES:
      value = self._value(measure)
      shown = "-" if value is None else f"{value:.3g}"
      mark = "warning" if self._exceeds(measure) else ""
      rows.append((measure.label, shown, measure.shown_limit(), mark))
    rows.append(("diverged", *(("yes", "no", "warning") if self.diverged else ("no", "no", ""))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

  def _value(self, measure: "_Measure") -> float | None:
    return getattr(self, measure.field)

  def _exceeds(self, measure: "_Measure") -> bool:
    value = self._value(measure)
    if value is None or measure.limit is None or not math.isfinite(value):
      return False
    if measure.side == "below":
      return value < measure.limit
    return (abs(value) if measure.side == "beyond" else value) > measure.limit


@dataclasses.dataclass(frozen=True)
class _Measure:
  """One row of the report; `side` says on which side of the limit the trouble lies."""

  field: str
  label: str
  limit: float | None = None
  side: str = "above"
  sentence: str = ""
  remedy: str = ""

  def shown_limit(self) -> str:
    if self.limit is None:
      return ""
    return {"below": ">= ", "beyond": "+-", "above": "<= "}[self.side] + f"{self.limit:g}"


_MEASURES = (
  _Measure(
    "max_logit", "largest logit", MAX_LOGIT_LIMIT, "above",
    "The largest attention logit is {:.3g}, above {:g}: attention is about to become one-hot.",
    "Layer norm on queries and keys (qk_norm) usually helps, or a lower learning rate.",
  ),
  _Measure(
    "log_z_mean", "mean log Z", LOG_Z_LIMIT, "beyond",
    "The mean log Z of the output logits is {:.3g}, beyond +-{:g}: the output logits drift.",
    "The z-loss (1e-4) or weight decay usually helps.",
  ),
  _Measure(
    "attention_entropy", "lowest entropy", ENTROPY_LIMIT, "below",
    "The entropy of an attention head is {:.3g} nats, below {:g}: it looks at single positions.",
    "Layer norm on queries and keys (qk_norm) or a longer warm-up usually helps.",
  ),
  _Measure(
    "gradient_to_eps", "gradient / eps", GRADIENT_TO_EPS_LIMIT, "below",
    "A gradient has an RMS of {:.3g} times the epsilon of Adam, below {:g}: its updates shrink.",
    "A smaller epsilon (1e-15) usually helps.",
  ),
  _Measure("block_rms", "block output RMS"),
  _Measure(
    "spike_score", "spike score", SPIKE_SCORE_LIMIT, "above",
    "A share of {:.3g} of the steps are loss spikes, above {:g}.",
    "A longer warm-up, a smaller b2 or gradient clipping usually helps.",
  ),
)  # fmt: skip

_HISTORY_KEYS = ("max_logit", "log_z", "entropy", "grad_rms", "block_rms", "loss")


def _leaf_rms(leaf) -> jax.Array:
  leaf = jnp.asarray(leaf)
  leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
  return _scaled_rms(leaf, lambda squares: squares.mean()) if leaf.size else leaf.sum()


def _scaled_rms(x, mean):
  """sqrt(mean(x^2)) with squares that stay in range and a gradient of 0 at 0."""
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
  # The scale cancels, so it takes no part in the gradient; 0, inf and NaN are no divisors.
  scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
  mean_square = mean(jnp.square(x / scale))
  is_zero = mean_square == 0
  return scale * jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, mean_square)))


def _judge(now, history, n_std):
  """(is_spike, is_judged), bool (..., B), for values (..., B) after histories (..., B, W)."""
  known = np.isfinite(history)
  count = known.sum(axis=-1)
  divisor = np.maximum(count, 1)
  with np.errstate(over="ignore", invalid="ignore"):
    mean = np.where(known, history, 0.0).sum(axis=-1) / divisor
    deviation = np.where(known, history - mean[..., None], 0.0)
    std = np.sqrt(np.square(deviation).sum(axis=-1) / divisor)
    rise = now - mean
    high = (rise >= n_std * std) & (rise > _ROUNDING * np.abs(mean))
  broken = ~np.isfinite(now)
  judged = (count >= _MIN_HISTORY) | broken
  return broken | (judged & high), judged


def _columns(key: str, value: Any) -> np.ndarray:
  """All arrays of a history entry as one float64 (T, M)."""
  # A list is an array over steps here, not a tree of its own.
  leaves = jax.tree.leaves(value, is_leaf=lambda node: isinstance(node, list | tuple))
  arrays = [_as_float64(f'history["{key}"]', leaf) for leaf in leaves]
  if not arrays or any(array.ndim == 0 or array.size == 0 for array in arrays):
    shapes = [array.shape for array in arrays]
    raise ValueError(f'history["{key}"] has shapes {shapes}; expected (T, ...) with T >= 1')
  if len({array.shape[0] for array in arrays}) > 1:
    lengths = [array.shape[0] for array in arrays]
    raise ValueError(f'history["{key}"] holds arrays of {lengths} steps; expected one length')
  return np.concatenate([array.reshape(array.shape[0], -1) for array in arrays], axis=1)


def _tail_means(columns: np.ndarray, tail: int) -> np.ndarray:
  """Mean of the finite values of the last rows; (M,), or one NaN where no column has any."""
  last = columns[-tail:]
  known = np.isfinite(last)
  count = known.sum(axis=0)
  if not count.any():
    return np.array([math.nan])
  sums = np.where(known, last, 0.0).sum(axis=0)
  return sums[count > 0] / count[count > 0]


def _as_float64(argument: str, numbers) -> np.ndarray:
  """float64 array on the host; None counts as NaN."""
  _checks.check_known(argument, numbers)
  try:
    return np.asarray(numbers, dtype=np.float64)
  except (TypeError, ValueError):
    raise ValueError(f"{argument} is {numbers!r}; expected numbers") from None
