"""What the records of a stability experiment say: curves, ladders of sizes, a table, a verdict.

The questions are those of Wortsman et al., "Small-scale proxies for large-scale Transformer
training instabilities", 2023 (arXiv 2309.14322): how much does the final loss depend on the
learning rate (section 2.2), and at which size will a learning rate break (section 3.3)?
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from balance_jax.stability.trends import UNSTABLE_MAX_LOGIT
from balance_jax.training.mixture_summary import seed_stats
from balance_jax.training.report import render_table
from balance_jax.training.stability_curves import UNSTABLE_SHARE, sensitivity_curves
from balance_jax.training.stability_ladders import logit_ladders, median_logit

_MODEL = ("architecture", "width", "depth", "parameters")
# How far beyond the largest size the verdict trusts a trend; the paper looks four times ahead.
_FORESIGHT = 10


def summarize(
  records: Iterable[Mapping[str, Any]],
  probe_step: int | None = None,
  window: int = 7,
  hold_back_largest: bool = False,
) -> dict[str, Any]:
  """Curves over learning rate, ladders over size and heat maps over settings.

  Args:
    records: train and eval records of all runs. Each has "event", "step", "architecture", "width",
      "depth", "parameters" (N, without embeddings), "intervention" (setting), "learning_rate" and
      "seed". Eval records hold "loss", validation cross entropy, at step 0 and at the last step.
      Train records, one a chunk, may hold "max_logit", "max_logit_last", "entropy", "block_rms"
      (one number a block), "log_z", "log_z_square", "grad_rms" and "update_rms" (by tensor). None
      stands for a number that is not finite.
    probe_step: step at which attention logits are compared; None for the last train record.
    window: learning rates of the best-window sensitivity, 7 as in the paper's three decades.
    hold_back_largest: whether trends leave out the largest size, to be predicted.

  Returns:
    A JSON-able dict:
    - seeds, hold_back_largest, window;
    - curves: see `stability_curves.sensitivity_curves`;
    - ladders: see `stability_ladders.logit_ladders`;
    - heat: one for each architecture and size with two settings or more: architecture, width,
      depth, parameters; interventions [I], learning_rates [K]; loss [I][K], the capped mean;
      diverged [I][K]; both None where that setting has no such learning rate.

  Raises:
    ValueError: see `stability_curves.sensitivity_curves`.

  >>> run = {"architecture": "plain", "width": 8, "depth": 1, "parameters": 768,
  ...        "intervention": "default", "seed": 0, "event": "eval"}
  >>> ends = {0.01: 2.0, 0.1: 3.0}
  >>> records = [{**run, "learning_rate": rate, "step": step, "loss": loss}
  ...            for rate, end in ends.items() for step, loss in ((0, 5.0), (9, end))]
  >>> summarize(records)["curves"][0]["sensitivity"]["mean"]
  0.5
  """
  curves = sensitivity_curves(records, probe_step, window)
  return {
    "seeds": sorted({seed for curve in curves for seed in curve["seeds"]}),
    "hold_back_largest": hold_back_largest,
    "window": window,
    "curves": curves,
    "ladders": logit_ladders(curves, hold_back_largest),
    "heat": _heat(curves),
  }


def _heat(curves) -> list[dict[str, Any]]:
  models = {}
  for curve in curves:
    models.setdefault(tuple(curve[name] for name in _MODEL), []).append(curve)
  maps = []
  for model, found in models.items():
    if len(found) < 2:
      continue
    rates = sorted({rate for curve in found for rate in curve["learning_rates"]})

    def row(curve, field, rates=rates):
      known = dict(zip(curve["learning_rates"], curve[field], strict=True))
      return [known.get(rate) for rate in rates]

    maps.append(
      {
        **dict(zip(_MODEL, model, strict=True)),
        "interventions": [curve["intervention"] for curve in found],
        "learning_rates": rates,
        "loss": [row(curve, "mean") for curve in found],
        "diverged": [row(curve, "diverged") for curve in found],
      }
    )
  return maps


def table_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
  """Header and cells of the main table, one row a curve; None is a cell without a value."""
  header = ["architecture", "size", "parameters", "setting", "best rate", "best loss"]
  header += ["S", "unstable from", "diverged", "logit"]
  rows = []
  for curve in summary["curves"]:
    runs = len(curve["seeds"]) * len(curve["learning_rates"])
    highest = _highest_logit(curve)
    row = [
      curve["architecture"],
      size_name(curve),
      f"{curve['parameters']:,}",
      curve["intervention"],
      _rate(curve["best_learning_rate"]),
      None if curve["best_loss"] is None else f"{curve['best_loss']:.3f}",
      spread(curve["sensitivity"]),
      _rate(curve["first_unstable_learning_rate"]),
      f"{sum(curve['diverged'])}/{runs}",
      None if highest is None else short_number(highest),
    ]
    rows.append(row)
  if len({curve["intervention"] for curve in summary["curves"]}) < 2:
    at = header.index("setting")
    del header[at]
    for row in rows:
      del row[at]
  return header, rows


def console_table(summary: Mapping[str, Any]) -> str:
  """The main table of `summarize`'s result as plain text, with a line that says how to read it.

  Args:
    summary: what `summarize` returned.
  """
  return render_table(*table_rows(summary)) + "\n" + reading(summary)


def reading(summary: Mapping[str, Any]) -> str:
  """How to read the columns of the table."""
  seeds = len(summary["seeds"])
  over = f"mean over {seeds} seeds, ± the standard deviation" if seeds > 1 else "one seed"
  return (
    f"Size: width × depth; parameters without embeddings. Losses in nats/token, {over}. "
    "S: learning-rate sensitivity, the mean over the learning rates of (final loss, at most the "
    "initial one) minus the lowest; 0 is best, but a model that never learns has 0 too. "
    f"Unstable from: lowest rate above the best one that loses more than {UNSTABLE_SHARE:.0%} of "
    "what training gains. Diverged: runs without a finite final loss, which count as their initial "
    "loss. Logit: largest attention logit of block 0 at the highest rate and the probe step, "
    "median over seeds."
  )


def verdict(summary: Mapping[str, Any]) -> list[str]:
  """What the runs establish, in plain sentences.

  Sensitivities are compared at the largest size, seed by seed. Whether Student's 95 % interval of
  the mean difference excludes 0 is said from two seeds on; it does not allow for the ends of more
  than two candidates having been picked afterwards.

  Args:
    summary: what `summarize` returned.
  """
  curves = summary["curves"]
  usual = curves[0]["intervention"]
  plain = [curve for curve in curves if curve["intervention"] == usual]
  sizes = sorted({_size(curve) for curve in plain}, key=lambda size: _parameters(plain, size))
  largest = [curve for curve in plain if _size(curve) == sizes[-1]]
  lines = [_architectures(largest)]
  if len(sizes) > 1:
    lines.append(_growth(plain, sizes))
  for curve in largest:
    settings = [other for other in curves if _model(other) == _model(curve)]
    lines += _settings(settings) if len(settings) > 1 else []
  ladders = [ladder for ladder in summary["ladders"] if ladder["intervention"] == usual]
  return [*lines, *_logits(largest), *_predictions(ladders), *_divergence(curves)]


def _size(curve) -> tuple[int, int]:
  # Not the parameters: an architecture may add a few.
  return curve["width"], curve["depth"]


def _model(curve) -> tuple:
  return curve["architecture"], *_size(curve)


def _parameters(curves, size) -> int:
  return min(curve["parameters"] for curve in curves if _size(curve) == size)


def _architectures(curves) -> str:
  """S of the architectures at one size, and the paired difference between the ends."""
  low, high = _ends(curves)
  where = f"Sensitivity S at {curves[0]['parameters']:,} parameters ({size_name(low)})"
  if low is high:
    return f"{where}: {_with_optimum(low, 'architecture')}."
  count = f" of {len(curves)}" if len(curves) > 2 else ""
  return (
    f"{where}: lowest{count} is {_with_optimum(low, 'architecture')}, highest is "
    f"{_with_optimum(high, 'architecture')}; difference {_paired(high, low)}."
  )


def _growth(curves, sizes) -> str:
  """S from the smallest to the largest size, by architecture."""
  changes = []
  for architecture in dict.fromkeys(curve["architecture"] for curve in curves):
    found = {_size(curve): curve for curve in curves if curve["architecture"] == architecture}
    if sizes[0] in found and sizes[-1] in found:
      ends = (found[size]["sensitivity"]["mean"] for size in (sizes[0], sizes[-1]))
      changes.append(f"{architecture} {next(ends):.3f} to {next(ends):.3f}")
  first, last = (f"{_parameters(curves, size):,}" for size in (sizes[0], sizes[-1]))
  return f"S from {first} to {last} parameters: {', '.join(changes)}."


def _settings(curves) -> Iterable[str]:
  """S and best loss of the settings of one model, the ends of S against the first setting."""
  low, high = _ends(curves)
  usual = curves[0]
  parts = [f"{usual['intervention']} {spread(usual['sensitivity'])}"]
  for name, curve in (("lowest", low), ("highest", high)):
    if curve is usual:
      parts[0] += f" (the {name})"
    else:
      parts.append(
        f"{name} {curve['intervention']} {spread(curve['sensitivity'])}, against "
        f"{usual['intervention']} {_paired(curve, usual)}"
      )
  where = f"{len(curves)} settings of {usual['architecture']} at {size_name(usual)}"
  yield f"S of {where}: {'; '.join(parts)}."
  losses = {c["intervention"]: c["best_loss"] for c in curves if c["best_loss"] is not None}
  if losses:
    ends = (pick(losses, key=losses.get) for pick in (min, max))
    yield f"Best loss of these: {' to '.join(f'{name} {losses[name]:.3f}' for name in ends)}."


def _ends(curves):
  """The curves of lowest and highest S."""
  by_value = sorted(curves, key=lambda curve: curve["sensitivity"]["mean"])
  return by_value[0], by_value[-1]


def _with_optimum(curve, name: str) -> str:
  found = "every run diverged"
  if curve["best_loss"] is not None:
    found = f"best loss {curve['best_loss']:.3f} at rate {curve['best_learning_rate']:g}"
  return f"{curve[name]}, {spread(curve['sensitivity'])} ({found})"


def _paired(curve, other) -> str:
  """The difference of S over the seeds of both, and whether it is established."""
  first, second = (
    dict(zip(c["seeds"], c["sensitivity"]["values"], strict=True)) for c in (curve, other)
  )
  stats = seed_stats(first[seed] - second[seed] for seed in first if seed in second)
  if stats is None:
    return "unknown, no seed in common"
  change = f"{stats['mean']:+.3f}"
  if stats["std"] is None:
    return f"{change} (one seed: no interval)"
  side = "excludes" if abs(stats["mean"]) > stats["ci95"] else "includes"
  return f"{change} ± {stats['std']:.3f} ({stats['n']} paired seeds, 95 % interval {side} 0)"


def _logits(curves) -> Iterable[str]:
  measured = [curve for curve in curves if curve["max_logit"]]
  if not measured:
    return
  found = []
  for curve in measured:
    found.append(f"{curve['architecture']} {_finite(_highest_logit(curve))}")
  yield (
    f"Largest attention logit of block 0 at rate {measured[0]['learning_rates'][-1]:g}, "
    f"{size_name(measured[0])}: {', '.join(found)}; above {short_number(UNSTABLE_MAX_LOGIT)} every "
    "run of the paper diverged."
  )


def _predictions(ladders) -> Iterable[str]:
  """One line for each architecture with a ladder of sizes."""
  groups = {}
  for ladder in ladders:
    if ladder["trend"] is not None:
      groups.setdefault(ladder["architecture"], []).append(ladder)
  for architecture, found in groups.items():
    line = _held_back_line if found[0]["held_back"] else _crossing_line
    yield line(architecture, found)


def _held_back_line(name: str, ladders) -> str:
  size = ladders[0]["held_back"]["parameters"]
  shown = []
  for ladder in ladders:
    held = ladder["held_back"]
    if held["predicted_unstable"] or held["measured_unstable"]:
      shown.append(
        f"rate {ladder['learning_rate']:g} predicted {_finite(held['predicted'])}, "
        f"measured {_finite(held['measured'])}"
      )
  right = sum(ladder["held_back"]["agree"] for ladder in ladders)
  return (
    f"{name}, {size:,} parameters held back: {right} of {len(ladders)} rates fall on the predicted "
    f"side of a logit of {short_number(UNSTABLE_MAX_LOGIT)}; predicted or measured above it: "
    f"{'; '.join(shown) or 'none'}."
  )


def _crossing_line(name: str, ladders) -> str:
  last = ladders[0]["parameters"][-1]
  above, coming = [], []
  for ladder in ladders:
    rate, crossing = f"{ladder['learning_rate']:g}", ladder["trend"]["crossing"]
    if ladder["first_unstable"] is not None:
      above.append(f"{rate} (from {ladder['first_unstable']:,})")
    elif crossing is not None and crossing <= _FORESIGHT * last:
      coming.append(f"{rate} (at {short_number(crossing)})")
  return (
    f"{name}, learning rates with a logit above {short_number(UNSTABLE_MAX_LOGIT)}: "
    f"{', '.join(above) or 'none'} of up to {last:,} parameters; the trend adds "
    f"{', '.join(coming) or 'none'} within {_FORESIGHT} times that size."
  )


def _divergence(curves) -> Iterable[str]:
  runs = sum(len(curve["seeds"]) * len(curve["learning_rates"]) for curve in curves)
  lost = {}
  for curve in curves:
    for rate, count in zip(curve["learning_rates"], curve["diverged"], strict=True):
      lost[rate] = lost.get(rate, 0) + count
  at = ", ".join(f"{count} at {rate:g}" for rate, count in sorted(lost.items()) if count)
  total = sum(lost.values())
  yield f"Runs without a finite final loss: {total} of {runs}{f' ({at})' if at else ''}."


def size_name(curve: Mapping[str, Any]) -> str:
  return f"{curve['width']}×{curve['depth']}"


def short_number(value: float) -> str:
  """Two or three digits; large and small numbers with a power of ten.

  >>> short_number(14244), short_number(245.0), short_number(2.4e-5)
  ('1.4e4', '245', '2.4e-5')
  """
  text = f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 else f"{value:.2g}"
  return re.sub(r"e\+?(-?)0*", r"e\1", text)


def spread(stats: Mapping[str, Any]) -> str:
  """The mean, with the standard deviation where there is one."""
  return f"{stats['mean']:.3f}" + ("" if stats["std"] is None else f" ± {stats['std']:.3f}")


def _finite(value: float | None) -> str:
  return "not finite" if value is None else short_number(value)


def _rate(value: float | None) -> str | None:
  return None if value is None else f"{value:g}"


def _highest_logit(curve) -> float | None:
  return median_logit([row[-1] for row in curve["max_logit"]]) if curve["max_logit"] else None
