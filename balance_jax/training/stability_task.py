"""The stability task: sizes x architectures, each over learning rate x setting x seed.

What changes shapes (size, architecture, steps, batch) makes an arm, a program of its own; what is a
number (learning rate, decay, warm-up, z coefficient, eps, beta2, clip) is traced, so all cells of
an arm are runs of that one program. Question and method: Wortsman et al., 2023 (arXiv 2309.14322).
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks, mixing, stability
from balance_jax.losses import cross_entropy_with_z_loss
from balance_jax.stability import mup
from balance_jax.training import byte_text
from balance_jax.training.batch import Observed
from balance_jax.training.measure import evaluate
from balance_jax.training.optimizers import SWEEPABLE, make_optimizer
from balance_jax.training.sharding import placement
from balance_jax.training.stability_report import write_stability_report
from balance_jax.training.stability_summary import console_table, summarize, verdict
from balance_jax.training.state import init_state
from balance_jax.training.step import make_step
from balance_jax.training.sweep import product
from balance_jax.training.sweep_runs import SweepRuns
from balance_jax.training.task import Arm, Task, check_folder_name, check_schedule, override

# Numbers a setting may change beside those of the optimizer.
NUMBERS = (*SWEEPABLE, "z_coefficient", "kappa")
# The tensors whose gradient and update sizes are recorded; the first is the paper's.
WATCHED = {
  "first_mlp": ("block_0", "mlp", "up"),
  "embedding": ("embedding",),
  "head": ("head",),
}
_SECTIONS = ("data", "loss", "model", "mup", "optimizer", "train")


def stability_task(config: Mapping[str, Any]) -> Task:
  """Builds the task from a resolved config (nested plain dicts; see configs/lr_sensitivity.py).

  Raises:
    ValueError: a value outside its range, a grid of learning rates that does not span the window,
      too few sizes for a prediction; says what is allowed.
    DatasetNotInstalledError, CorruptedDataError: see `balance_jax.data.load_documents`.
  """
  arms = arm_configs(config)
  _check_grid(config, arms)
  for name, arm in arms.items():
    _check_arm(name, arm, config)
    arm["parameters"] = _parameters(arm)
  spec = config["data"]
  table = byte_text.load_rows(spec, "train")
  if len(table.names) != 1:
    raise ValueError(f"data.languages gives the groups {table.names}; this task wants one")
  load = functools.cache(functools.partial(byte_text.held_out, spec, "validation"))
  labels = {name: _labels(config, arm) for name, arm in arms.items()}
  return Task(
    arms={
      name: functools.partial(_arm, config, arm, table, load, labels[name])
      for name, arm in arms.items()
    },
    labels=labels,
    conclude=functools.partial(_conclude, config),
    facts={
      "rows": dict(zip(table.names, table.group_sizes, strict=True)),
      "parameters": {name: arm["parameters"] for name, arm in arms.items()},
    },
  )


def arm_configs(config: Mapping[str, Any]) -> dict[str, dict]:
  """Architecture-size -> the config of that arm, with its width, depth and heads set."""
  arms = {}
  if not config["sizes"] or not config["architectures"]:
    raise ValueError("sizes and architectures must each hold at least one entry")
  for architecture, changes in _baseline_first(config["architectures"]):
    check_folder_name("architectures", architecture)
    for size in config["sizes"]:
      if len(size) != 3:
        raise ValueError(f"sizes holds {size}; expected (width, depth, heads)")
      width, depth, heads = size
      name = f"{architecture}-w{width}-d{depth}"
      if name in arms:
        raise ValueError(
          f"sizes holds width {width} with depth {depth} twice; their runs would mix"
        )
      arm = override(config, _SECTIONS, changes, f"architectures.{architecture}")
      arm["model"] |= {"width": width, "depth": depth, "heads": heads}
      arm["architecture"] = architecture
      arms[name] = arm
  return arms


def _baseline_first(changes: Mapping[str, Mapping]) -> list[tuple[str, Mapping]]:
  """The entries in their order, but what changes nothing comes first: it is compared with."""
  return sorted(changes.items(), key=lambda item: bool(item[1]))


def _check_grid(config, arms) -> None:
  rates = config["learning_rates"]
  settings = config["interventions"]
  if not settings or not config["seeds"]:
    raise ValueError("interventions and seeds must each hold at least one entry")
  for name, numbers in settings.items():
    for key in numbers:
      _checks.check_choice(f"interventions.{name}", key, NUMBERS)
  if len(rates) < 2:
    raise ValueError(f"learning_rates is {tuple(rates)}; a curve takes at least 2, increasing")
  # Any losses will do: this checks the grid against the window.
  stability.lr_sensitivity(
    np.zeros(len(rates)), 0.0, learning_rates=rates, window=tuple(config["window"])
  )
  sizes = len({arm["model"]["width"] for arm in arms.values()})
  if config["hold_back_largest"] and sizes < 3:
    raise ValueError(
      f"sizes holds {sizes} widths; with hold_back_largest a line needs two and the third is "
      "predicted, so give at least 3"
    )


def _check_arm(name: str, arm, config) -> None:
  """Everything that will be traced, and so unchecked, once with its concrete values."""
  try:
    check_schedule(arm["train"])
    byte_text.make_decoder(arm["model"])
    _checks.check_choice("mup.variant", arm["mup"]["variant"], (*mup.VARIANTS, "none"))
    for numbers in config["interventions"].values():
      for rate in config["learning_rates"]:
        _optimizer(arm, {"learning_rate": rate, **numbers}, None)
      z = numbers.get("z_coefficient", arm["loss"]["z_coefficient"])
      _checks.check_number("z_coefficient", z, low=0.0)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error


def _optimizer(arm, numbers: Mapping, scale):
  settings = {**arm["optimizer"], **{k: v for k, v in numbers.items() if k in SWEEPABLE}}
  settings["total_steps"] = settings["total_steps"] or arm["train"]["steps"]
  return make_optimizer(**settings, multipliers=None if scale is None else scale.learning_rate)


def _base(model: Mapping, width: int) -> dict:
  """The base model of muP: another width, the same size of head."""
  head_dim = model["width"] // model["heads"]
  if width % head_dim:
    raise ValueError(f"mup.base_width is {width}; expected a multiple of the head size {head_dim}")
  return {**model, "width": width, "heads": width // head_dim}


def _initializer(arm):
  """(init(key) -> params, `Multipliers` or None)."""
  window = arm["data"]["window"]
  init = byte_text.initializer(byte_text.make_decoder(arm["model"]), window)
  variant = arm["mup"]["variant"]
  if variant == "none":
    return init, None
  base = _base(arm["model"], arm["mup"]["base_width"])
  base_init = byte_text.initializer(byte_text.make_decoder(base), window)
  shapes, base_shapes = (jax.eval_shape(f, jax.random.key(0)) for f in (init, base_init))
  scale = mup.multipliers(shapes, base_shapes, variant, readout_form="equivalent")
  return (
    lambda key: mup.init_params(init, key, base_shapes, variant, readout_form="equivalent"),
    scale,
  )


def _parameters(arm) -> int:
  """N: parameters without embedding and head."""
  from balance_jax import models

  init, _ = _initializer(arm)
  shapes = jax.eval_shape(init, jax.random.key(0))
  return models.count_params(shapes, exclude_embeddings=True)


def _cells(config) -> list[dict]:
  """Index of the setting, learning rate and seed of every run."""
  return product(
    setting=range(len(config["interventions"])),
    learning_rate=list(config["learning_rates"]),
    seed=list(config["seeds"]),
  )


def _numbers(config, arm, cells) -> list[dict]:
  """The cells with every number that some setting changes, so that all have the same keys."""
  settings = [numbers for _, numbers in _baseline_first(config["interventions"])]
  keys = sorted({key for numbers in settings for key in numbers} - {"learning_rate"})
  usual = {**arm["optimizer"], **arm["loss"], "kappa": arm["model"].get("kappa")}
  full = []
  for cell in cells:
    numbers = {key: settings[cell["setting"]].get(key, usual[key]) for key in keys}
    full.append({"learning_rate": cell["learning_rate"], "seed": cell["seed"], **numbers})
  return full


def _labels(config, arm) -> tuple[dict, ...]:
  names = [name for name, _ in _baseline_first(config["interventions"])]
  model = arm["model"]
  label = {
    "architecture": arm["architecture"],
    "width": model["width"],
    "depth": model["depth"],
    "parameters": arm["parameters"],
  }
  return tuple(
    {
      "method": f"{arm['architecture']}, {names[cell['setting']]}, rate {cell['learning_rate']:g}",
      **label,
      "intervention": names[cell["setting"]],
      "learning_rate": cell["learning_rate"],
      "seed": cell["seed"],
    }
    for cell in _cells(config)
  )


def _arm(config, arm, table, load, labels) -> Arm:
  # Without the z term, which is no part of what is reported.
  held_out_loss = byte_text.cross_entropy_loss(byte_text.make_decoder(arm["model"]))

  def measure(step, state, batches):
    return {"loss": evaluate(step, state, batches, held_out_loss).mean()[0]}

  runs = make_runs(config, arm, table, _numbers(config, arm, _cells(config)))
  return Arm(
    runs=runs,
    labels=labels,
    groups=table.names,
    validation=load(arm["train"]["batch_size"]),
    test=None,
    chunk_record=functools.partial(_chunk_record, config["statistics"]),
    evaluate=measure,
    measure=None,
    train=arm["train"],
    allow_divergence=True,
  )


def make_runs(config, arm, table, cells) -> SweepRuns:
  """The runs of one arm; `cells` hold "learning_rate", "seed" and the numbers that vary."""
  init_params, scale = _initializer(arm)
  metrics = ["loss", "grad_norm", "group_loss"]
  if config["statistics"]:
    metrics += ["observed", "grad_rms", "update_rms"]

  def build(cell):
    kappa = {"kappa": cell["kappa"]} if "kappa" in cell else {}
    decoder = byte_text.make_decoder({**arm["model"], **kappa})
    z = cell.get("z_coefficient", arm["loss"]["z_coefficient"])
    return make_step(
      training_loss(decoder, z, config["statistics"]),
      _optimizer(arm, cell, scale),
      mixing.proportional(table.sizes),
      table,
      batch_size=arm["train"]["batch_size"],
      micro_batches=arm["train"]["micro_batches"],
      metrics=metrics,
    )

  def init(cell, step):
    run_key, init_key = jax.random.split(jax.random.key(cell["seed"]))
    return init_state(run_key, init_params(init_key), step)

  place = {"how": config["parallel"], "placement": placement(config["mesh"])}
  return SweepRuns(build, init, cells, table, **place)


def training_loss(decoder, z_coefficient, statistics: bool):
  """per_example_loss with the z term; with statistics it also observes the forward pass.

  Observed are, by block, the largest attention logit ("max_logit"), the mean attention entropy in
  nats ("entropy") and the root mean square of the output ("block_rms"); and the mean of log Z
  ("log_z") and of its square ("log_z_square").
  """

  def per_example_loss(params, rows, key):
    del key  # no dropout
    tokens = rows["tokens"]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if not statistics:
      logits = decoder.apply(params, inputs)
      return cross_entropy_with_z_loss(logits, targets, z_coefficient=z_coefficient)[0].mean(-1)
    logits, state = decoder.apply(params, inputs, mutable=["intermediates"])
    loss, aux = cross_entropy_with_z_loss(logits, targets, z_coefficient=z_coefficient)
    return loss.mean(axis=-1), _observe(state.get("intermediates", {}), aux["log_normalizer"])

  return per_example_loss


def _observe(intermediates, log_z) -> Observed:
  log_z = jax.lax.stop_gradient(log_z)
  means = {"log_z": log_z.mean(axis=-1), "log_z_square": jnp.square(log_z).mean(axis=-1)}
  if not intermediates:  # a model without blocks
    return Observed(means)
  attention = stability.sown(intermediates, "attention_stats").values()
  rms = stability.sown(intermediates, "output_rms").values()

  def by_block(arrays):
    return jax.lax.stop_gradient(jnp.stack(list(arrays), axis=-1))

  means["entropy"] = by_block(stats.entropy.mean(axis=-1) for stats in attention)
  means["block_rms"] = by_block(rms)
  return Observed(
    means, {"max_logit": by_block(stats.max_logit.max(axis=-1) for stats in attention)}
  )


def _chunk_record(statistics: bool, metrics) -> dict:
  """Means over the chunk, but of attention logits the maximum and the last."""
  record = {"loss": metrics["loss"].mean(), "grad_norm": metrics["grad_norm"].mean()}
  if not statistics:
    return record
  observed = metrics["observed"]
  for name, values in observed.items():
    if name == "max_logit":
      record |= {"max_logit": values.max(axis=0), "max_logit_last": values[-1]}
    else:
      record[name] = values.mean(axis=0)
  return {
    **record,
    "grad_rms": _watched(metrics["grad_rms"]),
    "update_rms": _watched(metrics["update_rms"]),
  }


def _watched(tree) -> dict[str, float]:
  """Means over the chunk of the tensors in `WATCHED` that the model has."""
  found = {}
  for name, path in WATCHED.items():
    node = tree["params"]
    for key in path:
      node = node.get(key) if isinstance(node, Mapping) else None
    if node is not None:
      found[name] = node.mean()
  return found


def _conclude(config, records: list[dict], facts: dict, report: Path) -> tuple[str, dict]:
  summary = summarize(
    records,
    probe_step=config["probe_step"] or None,
    hold_back_largest=config["hold_back_largest"],
  )
  lines = verdict(summary)
  write_stability_report(
    report,
    records,
    {
      "title": config["title"],
      "verdict": lines,
      "probe_step": config["probe_step"] or None,
      "hold_back_largest": config["hold_back_largest"],
      **facts,
    },
  )
  return "\n".join([console_table(summary), "", *lines]), {"summary": summary}
