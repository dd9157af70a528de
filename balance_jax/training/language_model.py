"""The language-model task: what a config with task = "language_model" trains and measures.

A decoder on byte tokens of several languages; every method of the config is a mixer. All cells
method x seed x swept numbers are runs of one compiled program.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from balance_jax import _checks, mixing
from balance_jax.training import byte_text
from balance_jax.training.measure import evaluate, variance_draws, variance_on_rows
from balance_jax.training.mixture_report import (
  console_table,
  summarize,
  verdict,
  write_mixture_report,
)
from balance_jax.training.optimizers import SWEEPABLE, make_optimizer
from balance_jax.training.reading import check_foreseen
from balance_jax.training.sharding import placement
from balance_jax.training.state import TrainState, init_state
from balance_jax.training.step import Step, make_step
from balance_jax.training.sweep import product
from balance_jax.training.sweep_runs import SweepRuns
from balance_jax.training.task import Arm, RowMeasurement, Task, check_schedule


def language_model(config: Mapping[str, Any]) -> Task:
  """Builds the task from a resolved config (nested plain dicts; see configs/quickstart.py).

  Raises:
    ValueError: a value outside its range, an unknown method or mixer; says what is allowed.
    DatasetNotInstalledError, CorruptedDataError: see `balance_jax.data.load_documents`.
  """
  from balance_jax import models

  check_schedule(config["train"], "variance_every")
  for name in ("max_rollbacks", "max_skips"):
    _checks.check_number(f"train.{name}", config["train"][name], low=0, integer=True)
  mixers = _check_config(config)
  spec = config["data"]
  table = byte_text.load_rows(spec, "train")
  # A stand-in does not know the groups of a source.
  if len(table.names) < 2 and spec["source"] != byte_text.STAND_IN:
    raise ValueError(f"data holds one group, {table.names[0]!r}; methods that mix need two or more")
  methods = [make(table.sizes) for make in mixers]
  labels = tuple(_label(config, cell) for cell in _cells(config))
  if config["reference"]:
    _checks.check_choice("reference", config["reference"], {x["method"] for x in labels})
  init = byte_text.initializer(byte_text.make_decoder(config["model"]), spec["window"])
  parameters = models.count_params(jax.eval_shape(init, jax.random.key(0)))
  return Task(
    arms={"": functools.partial(_arm, config, table, methods, labels)},
    labels={"": labels},
    conclude=functools.partial(_conclude, config, table),
    facts={
      "model": {**config["model"], "parameters": parameters},
      "rows": dict(zip(table.names, table.group_sizes, strict=True)),
    },
  )


def _arm(config, table, methods, labels) -> Arm:
  spec, train = config["data"], config["train"]
  return Arm(
    runs=_runs(config, table, methods),
    labels=labels,
    groups=table.names,
    validation=byte_text.held_out(spec, "validation", train["batch_size"]),
    test=byte_text.held_out(spec, "test", train["batch_size"]),
    chunk_record=_chunk_record,
    evaluate=_evaluate,
    measure=_variance(train),
    train=train,
    max_rollbacks=train["max_rollbacks"],
    max_skips=train["max_skips"],
    score="group_loss",
  )


def _cells(config) -> list[dict]:
  axes = {name: list(values) for name, values in config["sweep"]["axes"].items()}
  return product(method=range(len(config["methods"])), **axes, seed=list(config["seeds"]))


def _runs(config, table, methods) -> SweepRuns:
  train = config["train"]
  decoder = byte_text.make_decoder(config["model"])
  init_params = byte_text.initializer(decoder, config["data"]["window"])

  def build(cell: dict) -> Step:
    swept = {name: cell[name] for name in config["sweep"]["axes"]}
    return make_step(
      byte_text.cross_entropy_loss(decoder),
      _optimizer(config, swept),
      mixing.select(methods, cell["method"]),
      table,
      batch_size=train["batch_size"],
      allocation=train["allocation"],
      micro_batches=train["micro_batches"],
      measure_every=train["measure_every"],
      measure_examples=train["measure_examples"],
      skip_bad_steps=train["max_skips"] > 0,
    )

  def init(cell: dict, step: Step) -> TrainState:
    run_key, init_key = jax.random.split(jax.random.key(cell["seed"]))
    return init_state(run_key, init_params(init_key), step)

  place = {"how": config["parallel"], "placement": placement(config["mesh"])}
  return SweepRuns(build, init, _cells(config), table, **place)


def _variance(train) -> RowMeasurement:
  sizes = {"examples": train["variance_examples"], "batches": train["variance_batches"]}
  return RowMeasurement(
    functools.partial(variance_draws, **sizes), functools.partial(variance_on_rows, **sizes)
  )


def _evaluate(step, state, batches) -> dict:
  return {"group_loss": evaluate(step, state, batches).mean()}


def _chunk_record(metrics) -> dict:
  good = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"])
  loss, norm = metrics["loss"][good], metrics["grad_norm"][good]
  group_loss = jax.tree.map(lambda x: x[good].sum(axis=0), metrics["group_loss"])
  with np.errstate(invalid="ignore"):
    losses = group_loss.num / group_loss.den  # NaN, written as null, without an example
  return {
    "loss": loss.mean() if good.any() else None,
    "group_loss": losses,
    "p": metrics["mixture"]["p"][-1],
    "r": metrics["mixture"]["r"][-1],
    "epochs": metrics["epochs"][-1],
    "grad_norm": norm.mean() if good.any() else None,
    "grad_norm_var": norm.var(ddof=1) if len(norm) > 1 else None,
    "skipped": int((~good).sum()),
  }


def _conclude(config, table, records: list[dict], facts: dict, report: Path) -> tuple[str, dict]:
  reference = config["reference"] or None
  summary = summarize(records, table.names, table.group_sizes, reference=reference)
  lines = verdict(summary)
  description = {
    "title": config["title"],
    "groups": table.names,
    "sizes": table.group_sizes,
    "reference": reference,
    "verdict": lines,
    **facts,
  }
  write_mixture_report(report, records, description)
  text = "\n".join([console_table(summary), "", *lines])
  test = [record for record in records if record["event"] == "test"]
  return text, {"summary": summary, "test": test}


def _label(config, cell) -> dict:
  """Names a run; a number swept over several values becomes part of the method's name."""
  name = config["methods"][cell["method"]]
  swept = {key: cell[key] for key, values in config["sweep"]["axes"].items()}
  varied = [
    f"{key}={cell[key]:g}" for key, values in config["sweep"]["axes"].items() if len(values) > 1
  ]
  return {"method": " ".join([name, *varied]), "seed": cell["seed"], **swept}


def _check_config(config) -> list[Callable]:
  """Checks what needs no data and returns, for every method, sizes -> Mixer."""
  if not config["methods"]:
    raise ValueError(f"methods is empty; allowed: {', '.join(sorted(config['mixers']))}")
  if not config["seeds"]:
    raise ValueError("seeds is empty; give at least one integer")
  for name, values in config["sweep"]["axes"].items():
    _checks.check_choice("sweep.axes", name, SWEEPABLE)
    if not isinstance(values, list | tuple) or not values:
      raise ValueError(f"sweep.axes.{name} is {values!r}; expected a tuple of numbers")
    for value in values:  # the runs see traced numbers, which nobody can check
      _optimizer(config, {name: value})
  _optimizer(config, {})
  makers, languages = [], config["data"]["languages"]
  for method in config["methods"]:
    _checks.check_choice("methods", method, config["mixers"])
    spec = config["mixers"][method]
    _checks.check_choice(f"mixers.{method}.mixer", spec.get("mixer"), mixing.MIXERS)
    ahead = 0 if config["data"]["reader"] == "memory" else config["train"]["chunk"]
    makers.append(functools.partial(_mixer, method, spec, ahead))
    if languages:  # most mistakes show with any large sizes; before the data are read
      makers[-1]([2.0**60] * len(languages))
  return makers


def _optimizer(config, swept: Mapping):
  return make_optimizer(total_steps=config["train"]["steps"], **{**config["optimizer"], **swept})


def _mixer(method: str, spec: Mapping, ahead: int, sizes) -> mixing.Mixer:
  """The mixer of a method, with the method's name in front of any complaint.

  Args:
    method: name in the config.
    spec: "mixer", its arguments, and "delay" where its draw is to be known some steps before.
    ahead: steps for which it must be known.
    sizes: rows by group.
  """
  arguments = {key: value for key, value in spec.items() if key not in ("mixer", "delay")}
  try:
    mixer = mixing.MIXERS[spec["mixer"]](sizes, **arguments)
    if spec.get("delay", 1) != 1:
      mixer = mixing.delayed(mixer, spec["delay"])
    check_foreseen(mixer, ahead)
    return mixer
  except (ValueError, TypeError) as error:
    raise ValueError(f"mixers.{method}: {error}") from error
