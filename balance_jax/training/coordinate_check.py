"""The coordinate-check task: does the size of activations depend on the width?

Decoders of several widths train for a few steps on one batch, in the standard parametrisation and
in muP's variants; see `balance_jax.stability.mup.coordinate_check`.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.losses import cross_entropy
from balance_jax.stability import mup
from balance_jax.training import byte_text, evidence, report
from balance_jax.training.task import Task

STANDARD = "standard"
# Statistics of the attention weights, not activations of the network.
_EXCLUDED = ("*attention_stats*",)


def coordinate_check(config: Mapping[str, Any]) -> Task:
  """Builds the task from a resolved config (nested plain dicts; see configs/coordinate_check.py).

  Raises:
    ValueError: a value outside its range, an unknown variant, widths the heads do not divide.
    DatasetNotInstalledError, CorruptedDataError: see `balance_jax.data.load_documents`.
  """
  widths = config["widths"]
  if len(widths) < 2 or list(widths) != sorted(set(widths)):
    raise ValueError(f"widths is {widths}; expected at least 2 numbers, increasing")
  if not config["variants"] or not config["seeds"]:
    raise ValueError("variants and seeds must each hold at least one entry")
  for variant in config["variants"]:
    _checks.check_choice("variants", variant, (STANDARD, *mup.VARIANTS))
  for name in ("steps", "batch_size"):
    _checks.check_number(f"train.{name}", config["train"][name], low=1, integer=True)
  rate = config["train"]["learning_rate"]
  _checks.check_number("train.learning_rate", rate, low=0.0, open_low=True)
  for width in widths:
    _decoder(config, STANDARD, width)
  table = byte_text.load_table(config["data"], "train")
  rows = table.rows["tokens"][: config["train"]["batch_size"]].astype(jnp.int32)
  return Task(
    arms={},
    labels={},
    conclude=functools.partial(_conclude, config, rows),
    facts={"batch": list(rows.shape)},
  )


def _decoder(config, variant: str, width: int):
  head_dim = config["head_dim"]
  if width % head_dim:
    raise ValueError(f"widths holds {width}; expected multiples of head_dim = {head_dim}")
  scale = {"attention_scale": "mup"} if variant in ("full", "tensor_programs") else {}
  if variant == "tensor_programs":
    scale["base_head_dim"] = head_dim
  size = {"width": width, "heads": width // head_dim}
  return byte_text.make_decoder({**config["model"], **size, **scale})


def check_variant(config, rows, variant: str) -> mup.CoordinateCheck:
  """The coordinate check of one variant on a batch of rows int32 (B, window + 1)."""
  return mup.coordinate_check(
    functools.partial(_decoder, config, variant),
    config["widths"],
    inputs=rows[:, :-1],
    loss=lambda logits: cross_entropy(logits, rows[:, 1:]),
    steps=config["train"]["steps"],
    learning_rate=config["train"]["learning_rate"],
    seeds=config["seeds"],
    base_width=config["widths"][0],
    variant=None if variant == STANDARD else variant,
    exclude=_EXCLUDED,
    tolerance=config["tolerance"],
  )


def _conclude(config, rows, records, facts, path: Path) -> tuple[str, dict]:
  checks = {name: check_variant(config, rows, name) for name in config["variants"]}
  header = ["variant", "verdict", "activations", "failing", "steepest", "slope", "spread"]
  table = report.render_table(header, [_row(name, check) for name, check in checks.items()])
  lines = [_line(name, check) for name, check in checks.items()]
  blocks = [
    report.Text(
      f"Decoders of widths {', '.join(map(str, config['widths']))} on one batch, "
      f"{config['train']['steps']} forward passes, learning rate "
      f"{config['train']['learning_rate']:g} at the base width."
    ),
    report.Heading("Verdict"),
    report.Callout(lines),
    report.Table(
      header,
      [_row(name, check) for name, check in checks.items()],
      "Slope of log mean |x| on log width at the last step, mean over seeds; an activation fails "
      f"outside ±{config['tolerance']:g}.",
    ),
  ]
  for name, check in checks.items():
    blocks += [
      report.Heading(name),
      report.Figure(
        check.plot(),
        f"Mean absolute activation against width, {name}",
        "One line an activation; flat lines do not depend on the width. Statistics of attention "
        "weights (dotted) are not judged.",
      ),
    ]
  blocks += [report.Heading("What was run"), report.KeyValues(facts["config"], "Settings.")]
  report.write_report(path, config["title"], blocks)
  results = {
    name: {"passes": check.passes, "slopes": check.table(), "failures": sorted(check.failures())}
    for name, check in checks.items()
  }
  return "\n".join([table, "", *lines]), {"checks": evidence.rounded(results)}


def _judged(check: mup.CoordinateCheck) -> list[dict]:
  return [entry for entry in check.table() if entry["judged"]]


def _row(name: str, check: mup.CoordinateCheck) -> list:
  judged = _judged(check)
  steepest = max(judged, key=lambda entry: abs(entry["slope"]))
  return [
    name,
    "passes" if check.passes else "fails",
    len(judged),
    len(check.failures()),
    steepest["activation"],
    f"{steepest['slope']:+.2f}",
    f"{steepest['spread']:.2f}",
  ]


def _line(name: str, check: mup.CoordinateCheck) -> str:
  if check.passes:
    return f"{name}: passes, no activation depends on the width after {_steps(check)} steps."
  found = sorted(check.failures().items(), key=lambda item: -abs(item[1]))[:3]
  worst = ", ".join(f"{activation} {slope:+.2f}" for activation, slope in found)
  return f"{name}: fails for {len(check.failures())} activations, such as {worst}."


def _steps(check: mup.CoordinateCheck) -> int:
  return check.magnitudes.shape[2]
