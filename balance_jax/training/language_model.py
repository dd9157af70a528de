"""The language-model task: what a config with task = "language_model" trains and measures.

A decoder on byte tokens of several languages; every method of the config is a mixer. All cells
method x seed x swept numbers are runs of one compiled program.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from balance_jax import _checks, data, mixing
from balance_jax.losses import cross_entropy
from balance_jax.training.measure import evaluation_batches
from balance_jax.training.optimizers import adamw
from balance_jax.training.state import TrainState, init_state
from balance_jax.training.step import Batch, Step, make_step
from balance_jax.training.sweep import SweepRuns, product

# Numbers of `config.optimizer` that may be swept: traced, so all cells share one program.
SWEEPABLE = ("learning_rate", "warmup_fraction", "end_fraction", "weight_decay", "eps", "clip_norm")


@dataclasses.dataclass(frozen=True)
class Task:
  """What an experiment needs to know of a task.

  Attributes:
    groups: names of the K groups.
    sizes: rows of each group in the training table.
    runs: the training runs.
    labels: for every run, a dict of "method", "seed" and the swept numbers.
    table: training rows.
    validation: held-out rows, as `evaluation_batches` gives them.
    test: as validation, for the final figure.
    facts: what the report says about model and data.
  """

  groups: tuple[str, ...]
  sizes: tuple[int, ...]
  runs: SweepRuns
  labels: tuple[dict, ...]
  table: data.GroupTable
  validation: Batch
  test: Batch
  facts: dict[str, Any]


def language_model(config: Mapping[str, Any]) -> Task:
  """Builds the task from a resolved config (nested plain dicts; see configs/quickstart.py).

  Raises:
    ValueError: a value outside its range, an unknown method or mixer; says what is allowed.
    DatasetNotInstalledError, CorruptedDataError: see `balance_jax.data.load_documents`.
  """
  mixers = _check_config(config)
  load = functools.partial(_load_table, config["data"])
  table, validation, test = load("train"), load("validation"), load("test")
  per_example_loss, init_params, model_facts = _model(config["model"], config["data"]["window"])
  train = config["train"]
  methods = [make(table.sizes) for make in mixers]

  def build(cell: dict) -> Step:
    swept = {name: cell[name] for name in config["sweep"]}
    return make_step(
      per_example_loss,
      _optimizer(config, swept),
      mixing.select(methods, cell["method"]),
      table,
      batch_size=train["batch_size"],
      allocation=train["allocation"],
      micro_batches=train["micro_batches"],
      measure_every=train["measure_every"],
      measure_examples=train["measure_examples"],
    )

  def init(cell: dict, step: Step) -> TrainState:
    run_key, init_key = jax.random.split(jax.random.key(cell["seed"]))
    return init_state(run_key, init_params(init_key), step)

  axes = {name: list(values) for name, values in config["sweep"].items()}
  cells = product(method=range(len(methods)), **axes, seed=list(config["seeds"]))
  held_out = functools.partial(
    evaluation_batches,
    rows_per_group=config["data"]["eval_rows"],
    batch_size=train["batch_size"],
  )
  return Task(
    groups=table.names,
    sizes=table.group_sizes,
    runs=SweepRuns(build, init, cells, table, how=config["parallel"]),
    labels=tuple(_label(config, cell) for cell in cells),
    table=table,
    validation=held_out(validation),
    test=held_out(test),
    facts={"model": model_facts, "rows": dict(zip(table.names, table.group_sizes, strict=True))},
  )


def _label(config, cell) -> dict:
  """Names a run; a number swept over several values becomes part of the method's name."""
  name = config["methods"][cell["method"]]
  swept = {key: cell[key] for key, values in config["sweep"].items()}
  varied = [f"{key}={cell[key]:g}" for key, values in config["sweep"].items() if len(values) > 1]
  return {"method": " ".join([name, *varied]), "seed": cell["seed"], **swept}


def _check_config(config) -> list[Callable]:
  """Checks what needs no data and returns, for every method, sizes -> Mixer."""
  if not config["methods"]:
    raise ValueError(f"methods is empty; allowed: {', '.join(sorted(config['mixers']))}")
  if not config["seeds"]:
    raise ValueError("seeds is empty; give at least one integer")
  for name, values in config["sweep"].items():
    _checks.check_choice("sweep", name, SWEEPABLE)
    if not isinstance(values, list | tuple) or not values:
      raise ValueError(f"sweep.{name} is {values!r}; expected a tuple of numbers")
    for value in values:  # the runs see traced numbers, which nobody can check
      _optimizer(config, {name: value})
  _optimizer(config, {})
  makers, languages = [], config["data"]["languages"]
  for method in config["methods"]:
    _checks.check_choice("methods", method, config["mixers"])
    spec = dict(config["mixers"][method])
    _checks.check_choice(f"mixers.{method}.mixer", spec.get("mixer"), mixing.MIXERS)
    make = functools.partial(mixing.MIXERS[spec.pop("mixer")], **spec)
    makers.append(functools.partial(_named, method, make))
    if languages:  # most mistakes show with any large sizes; before the data are read
      makers[-1]([2.0**60] * len(languages))
  return makers


def _optimizer(config, swept: Mapping):
  return adamw(total_steps=config["train"]["steps"], **{**config["optimizer"], **swept})


def _named(method: str, make: Callable, sizes) -> mixing.Mixer:
  """The mixer, with the config's name of the method in front of any complaint."""
  try:
    return make(sizes)
  except (ValueError, TypeError) as error:
    raise ValueError(f"mixers.{method}: {error}") from error


def _load_table(spec, split: str) -> data.GroupTable:
  documents = data.load_documents(
    spec["source"],
    split,
    languages=spec["languages"] or None,
    data_dir=spec["directory"] or None,
    group_key=spec["group_key"],
    text_key=spec["text_key"],
  )
  try:
    return data.group_table(documents, window=spec["window"])
  except ValueError as error:
    raise ValueError(f"data.source {spec['source']}, split {split}: {error}") from error


def _model(spec, window: int):
  """(per_example_loss, init_params, facts) of the decoder."""
  from balance_jax import models

  names = ("width", "depth", "heads", "mlp_ratio", "qk_norm")
  config = models.DecoderConfig(
    vocab_size=data.VOCAB_SIZE,
    dtype=jnp.dtype(spec["dtype"]),
    **{name: spec[name] for name in names},
  )
  decoder = models.Decoder(config)

  def per_example_loss(params, rows, key):
    del key  # no dropout
    tokens = rows["tokens"]
    logits = decoder.apply(params, tokens[:, :-1])
    return cross_entropy(logits, tokens[:, 1:]).mean(axis=-1)

  def init_params(key):
    return decoder.init(key, jnp.zeros((1, window), jnp.int32))

  shapes = jax.eval_shape(init_params, jax.random.key(0))
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  return per_example_loss, init_params, {**spec, "parameters": count}
