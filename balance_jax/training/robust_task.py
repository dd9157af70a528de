"""The robust task: methods of certified and adversarial training, each over radius, setting, seed.

What changes the program (method, network, regularisers) makes an arm; what is a number (radius,
weights of the losses, learning rate) is traced, so all runs of an arm are one program with the
whole schedule of the radius inside.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from balance_jax import _checks, mixing, robust
from balance_jax.robust.margin_bounds import METHODS as BOUNDS
from balance_jax.training.robust_report import write_robust_report
from balance_jax.training.robust_runs import (
  Evaluate,
  Images,
  RobustLoss,
  evaluation_inputs,
  load_splits,
  network_of,
  optimizer_of,
  training_examples,
)
from balance_jax.training.robust_summary import SELECTIONS, console_table, summarize, verdict
from balance_jax.training.sharding import placement
from balance_jax.training.state import init_state
from balance_jax.training.step import make_step
from balance_jax.training.sweep import product
from balance_jax.training.sweep_runs import SweepRuns
from balance_jax.training.task import Arm, Task, check_folder_name, check_schedule, override

# Numbers of the objective that a setting may change, beside "learning_rate".
NUMBERS = (
  "alpha",
  "attack_scale",
  "beta",
  "kappa_end",
  "kappa_start",
  "l1",
  "lambda_0",
  "relu_shrinkage",
  "shrinkage",
  "taps_weight",
  "tau",
)
MODELS = ("cnn7", "mlp", "resnext", "wide_resnet8")
STATISTICS = ("precise", "running")
_SECTIONS = ("model", "objective", "optimizer", "train")


def robust_task(config: Mapping[str, Any]) -> Task:
  """Builds the task from a resolved config (nested plain dicts; see configs/certified_digits.py).

  Raises:
    ValueError: a value outside its range, an unknown name; says what is allowed.
    DatasetNotInstalledError, CorruptedDataError: see `balance_jax.data.load_images`.
  """
  arms = arm_configs(config)
  _check(config)
  for name, arm in arms.items():
    _check_arm(name, arm, config)
  images = load_splits(config["data"])
  for arm in arms.values():
    _derive_steps(arm["train"], training_examples(config["data"], images))
  parameters = {name: _parameters(arm, images) for name, arm in arms.items()}
  labels = {name: _labels(config, name, arm) for name, arm in arms.items()}
  # A single arm lies in the folder of the run itself.
  places = {name: "" if len(arms) == 1 else name for name in arms}
  return Task(
    arms={
      places[name]: functools.partial(_arm, config, arm, images, labels[name])
      for name, arm in arms.items()
    },
    labels={places[name]: labels[name] for name in arms},
    conclude=functools.partial(_conclude, config),
    facts={
      "examples": {
        "train": int(images.table.sizes[0]),
        "validation": len(images.validation.images),
        "test": len(images.test.images),
      },
      "parameters": parameters,
    },
  )


def arm_configs(config: Mapping[str, Any]) -> dict[str, dict]:
  """Name -> the sections of that arm, with its changes, and its settings."""
  _checks.check_choice("baseline", config["baseline"], config["arms"])
  arms = {}
  # The first arm is what the others are compared with.
  for name in sorted(config["arms"], key=lambda name: (name != config["baseline"], name)):
    changes = config["arms"][name]
    check_folder_name("arms", name)
    changes = dict(changes)
    settings = changes.pop("settings", config["settings"])
    if not settings:
      raise ValueError(f"settings of arm {name!r} must hold at least one entry")
    sections = override(config, _SECTIONS, changes, f"arms.{name}")
    arms[name] = {**sections, "settings": {k: dict(v) for k, v in settings.items()}}
  return arms


def _check(config) -> None:
  for name in ("eps", "seeds"):
    if not config[name]:
      raise ValueError(f"{name} must hold at least one entry")
  for eps in config["eps"]:
    _checks.check_number("eps", eps, low=0.0, high=1.0, open_low=True)
  _checks.check_choice("selection", config["selection"], SELECTIONS)
  evaluation = config["evaluation"]
  _checks.check_choice("evaluation.statistics", evaluation["statistics"], STATISTICS)
  if not evaluation["methods"]:
    raise ValueError("evaluation.methods must hold at least one entry")
  for method in evaluation["methods"]:
    _checks.check_choice("evaluation.methods", method, BOUNDS)
  for name in ("attack_steps", "restarts", "batch_size", "precise_batches", "precise_batch_size"):
    _checks.check_number(f"evaluation.{name}", evaluation[name], low=1, integer=True)
  for factor in evaluation["curve"]:
    _checks.check_number("evaluation.curve", factor, low=0.0)


def _check_arm(name: str, arm, config) -> None:
  """Everything that will be traced, and so unchecked, once with its concrete values."""
  try:
    train = arm["train"]
    for key in ("epochs", "batch_size", "micro_batches", "eval_every", "checkpoint_every"):
      _checks.check_number(f"train.{key}", train[key], low=1, integer=True)
    for key in ("natural_epochs", "ramp_epochs"):
      _checks.check_number(f"train.{key}", train[key], low=0, integer=True)
    if train["natural_epochs"] + train["ramp_epochs"] > train["epochs"]:
      raise ValueError(
        f"train.natural_epochs + train.ramp_epochs is "
        f"{train['natural_epochs'] + train['ramp_epochs']}; allowed: at most train.epochs = "
        f"{train['epochs']}"
      )
    _checks.check_number("train.eps_factor", train["eps_factor"], low=0.0, open_low=True)
    for numbers in arm["settings"].values():
      for key in numbers:
        _checks.check_choice("settings", key, (*NUMBERS, "learning_rate"))
      for eps in config["eps"]:
        _objective(arm, {**numbers, "eps": eps})
      rate = numbers.get("learning_rate", arm["optimizer"]["learning_rate"])
      optimizer_of(arm["optimizer"], rate, ())
    _make_model(arm["model"], config["data"]["num_classes"], (0.0,), (1.0,))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{name}: {error}") from error


def _derive_steps(train: dict, examples: int) -> None:
  """Epochs become steps; an epoch is ceil(examples / batch) of them."""
  per_epoch = math.ceil(examples / train["batch_size"])
  train.update(
    per_epoch=per_epoch,
    steps=train["epochs"] * per_epoch,
    chunk=per_epoch,
    eval_every=train["eval_every"] * per_epoch,
    checkpoint_every=train["checkpoint_every"] * per_epoch,
  )
  check_schedule(train)


def _make_model(spec: Mapping[str, Any], num_classes: int, mean, std):
  """The flax network of `config.model`."""
  from balance_jax import models

  _checks.check_choice("model.name", spec["name"], MODELS)
  shared = {
    "num_classes": num_classes,
    "initialization": spec["initialization"],
    "mean": mean,
    "std": std,
  }
  if spec["name"] == "mlp":
    _checks.check_choice("model.batch_norm", spec["batch_norm"], ("all", "none"))
    norm = spec["batch_norm"] == "all"
    return models.MLP(features=tuple(spec["features"]), batch_norm=norm, **shared)
  shared |= {key: spec[key] for key in ("dense", "batch_norm", "suffix_blocks")}
  if spec["name"] == "cnn7":
    convs = tuple(tuple(pair) for pair in spec["convs"])
    return models.CNN7(width=spec["width"], convs=convs, **shared)
  if spec["name"] == "wide_resnet8":
    return models.WideResNet8(widen=spec["width"], **shared)
  return models.ResNeXt(base_width=spec["width"], **shared)


def _objective(arm, numbers: Mapping[str, Any]) -> robust.Objective:
  """The objective of a cell; its radius is that of training."""
  own = {key: value for key, value in numbers.items() if key in NUMBERS}
  eps = numbers["eps"] * arm["train"]["eps_factor"]
  return robust.Objective(**{**arm["objective"], **own, "eps": eps})


def _initializer(images: Images, model):
  """init(key) -> variables."""

  def init(key):
    return dict(model.init(key, jnp.zeros((1, *images.shape), jnp.float32)))

  return init


def _parameters(arm, images: Images) -> int:
  from balance_jax import models

  model = _make_model(arm["model"], images.test.num_classes, images.mean, images.std)
  shapes = jax.eval_shape(_initializer(images, model), jax.random.key(0))
  return models.count_params(shapes)


def _cells(config, arm) -> list[dict]:
  """Index of the setting, radius and seed of every run."""
  return product(
    setting=range(len(arm["settings"])), eps=list(config["eps"]), seed=list(config["seeds"])
  )


def _numbers(arm, cells) -> list[dict]:
  """The cells with every number that some setting changes, so that all have the same keys."""
  settings = list(arm["settings"].values())
  keys = sorted({key for numbers in settings for key in numbers} - {"learning_rate"})
  rate = arm["optimizer"]["learning_rate"]
  return [
    {
      "eps": cell["eps"],
      "seed": cell["seed"],
      "learning_rate": settings[cell["setting"]].get("learning_rate", rate),
      **{k: float(settings[cell["setting"]].get(k, arm["objective"][k])) for k in keys},
    }
    for cell in cells
  ]


def make_runs(config, arm, images: Images, cells) -> SweepRuns:
  """The runs of one arm; `cells` hold "eps", "learning_rate", "seed" and what settings change."""
  train = arm["train"]
  model = _make_model(arm["model"], images.test.num_classes, images.mean, images.std)
  network = network_of(model, has_parts=arm["model"]["name"] != "mlp")
  init_variables = _initializer(images, model)
  start = train["natural_epochs"] * train["per_epoch"]
  end = start + train["ramp_epochs"] * train["per_epoch"]
  decay_steps = tuple(epoch * train["per_epoch"] for epoch in arm["optimizer"]["decay_epochs"])

  def build(cell):
    objective = _objective(arm, cell)
    loss = RobustLoss(
      network,
      objective,
      robust.smoothed_eps_schedule(start, end, objective.eps),
      cell["eps"],
      images.scale,
      config["data"]["augment"],
      train["per_epoch"],
    )
    return make_step(
      loss,
      optimizer_of(arm["optimizer"], cell["learning_rate"], decay_steps),
      mixing.proportional(images.table.sizes),
      images.table,
      batch_size=train["batch_size"],
      micro_batches=train["micro_batches"],
      metrics=("loss", "grad_norm", "group_loss", "observed"),
      carried=RobustLoss.carried(init_variables),
    )

  def init(cell, step):
    run_key, init_key = jax.random.split(jax.random.key(cell["seed"]))
    return init_state(run_key, init_variables(init_key)["params"], step)

  place = {"how": config["parallel"], "placement": placement(config["mesh"])}
  return SweepRuns(build, init, cells, images.table, **place)


def _labels(config, name: str, arm) -> tuple[dict, ...]:
  cells, settings = _cells(config, arm), list(arm["settings"])
  return tuple(
    {
      "method": name if len(settings) == 1 else f"{name}, {settings[cell['setting']]}",
      "arm": name,
      "setting": settings[cell["setting"]],
      "eps": cell["eps"],
      "learning_rate": number["learning_rate"],
      "seed": cell["seed"],
    }
    for cell, number in zip(cells, _numbers(arm, cells), strict=True)
  )


def _arm(config, arm, images: Images, labels) -> Arm:
  evaluation = config["evaluation"]
  inputs = functools.partial(evaluation_inputs, table=images.table, settings=evaluation)
  return Arm(
    runs=make_runs(config, arm, images, _numbers(arm, _cells(config, arm))),
    labels=labels,
    groups=images.table.names,
    validation=inputs(images.validation, curve=False),
    test=inputs(images.test, curve=True),
    chunk_record=_chunk_record,
    evaluate=Evaluate(
      tuple(evaluation["methods"]),
      evaluation["attack_steps"],
      evaluation["restarts"],
      evaluation["directed"],
      images.test.num_classes,
    ),
    measure=None,
    train=arm["train"],
    # A collapse to NaN is a result of a method that is too hard, not an error of the run.
    allow_divergence=True,
  )


def _chunk_record(metrics) -> dict:
  """Means over the epoch; the radius and the epoch at its end."""
  record = {"loss": metrics["loss"].mean(), "grad_norm": metrics["grad_norm"].mean()}
  for name, values in metrics["observed"].items():
    record[name] = values[-1] if name in ("eps_now", "epoch") else values.mean(axis=0)
  return record


def _conclude(config, records: list[dict], facts: dict, report: Path) -> tuple[str, dict]:
  summary = summarize(records, selection=config["selection"])
  lines = verdict(summary)
  write_robust_report(
    report,
    records,
    {"title": config["title"], "verdict": lines, "selection": config["selection"], **facts},
  )
  return "\n".join([console_table(summary), "", *lines]), {"summary": summary}
