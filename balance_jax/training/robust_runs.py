"""What robust training does in a step and in an evaluation: images, network, loss, measures."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balance_jax import _checks, data, robust
from balance_jax.bounds import Interval
from balance_jax.training.batch import Batch, Observed
from balance_jax.training.byte_text import STAND_IN
from balance_jax.training.measure import evaluation_batches
from balance_jax.training.state import Carried

# Least certified margins are counted in these bins; what lies outside goes to the outer ones.
MARGIN_EDGES = np.linspace(-4.0, 4.0, 41)
NORMALIZE = ("none", "train")


@dataclasses.dataclass(frozen=True)
class Images:
  """The splits of a config: training table, held-out images, and what the network must know."""

  table: data.GroupTable
  validation: data.ImageData
  test: data.ImageData
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @property
  def scale(self) -> float:
    return self.test.scale

  @property
  def shape(self) -> tuple[int, ...]:
    return self.test.images.shape[1:]


def load_splits(spec: Mapping[str, Any]) -> Images:
  """Reads the splits that `config.data` names.

  Raises:
    ValueError: fewer examples than asked for, or as `data.load_images`.
    DatasetNotInstalledError, CorruptedDataError: see `data.load_images`.
  """
  _checks.check_choice("data.normalize", spec["normalize"], NORMALIZE)
  if spec["source"] == STAND_IN:  # a few images, whatever is asked for
    counts = {f"{split}_examples": 0 for split in ("train", "validation", "test")}
    spec = {**spec, **counts, "validation_from_train": 0, "normalize": "none"}
  train = _load(spec, "train")
  held_out = spec["validation_from_train"]
  if held_out:
    _checks.check_number(
      "data.validation_from_train", held_out, low=1, high=len(train.images) - 1, integer=True
    )
    # Every prefix is a random sample, so the end is one as well.
    validation, train = _rows(train, slice(-held_out, None)), _rows(train, slice(-held_out))
  else:
    validation = _load(spec, "validation")
  test = _load(spec, spec["test_split"])
  train, validation, test = (
    _first(data_, spec[f"{name}_examples"], name)
    for name, data_ in (("train", train), ("validation", validation), ("test", test))
  )
  mean, std = (0.0,), (1.0,)
  if spec["normalize"] == "train":
    pixels = train.images.reshape(-1, train.images.shape[-1]) / np.float64(train.scale)
    mean, std = (tuple(f(pixels, axis=0).round(4).tolist()) for f in (np.mean, np.std))
  return Images(data.image_table(train, group_by="all"), validation, test, mean, std)


def training_examples(spec: Mapping[str, Any], images: Images) -> int:
  """How many examples an epoch has; of stand-in images as many as `config.data` says there are."""
  found = int(images.table.sizes[0])
  return spec["train_examples"] or found if spec["source"] == STAND_IN else found


def _load(spec, split: str) -> data.ImageData:
  if spec["source"] == STAND_IN:
    labels = np.arange(2 * spec["num_classes"], dtype=np.int32) % spec["num_classes"]
    images = np.zeros((len(labels), *spec["image_shape"]), np.uint8)
    return data.ImageData(images, labels, tuple(map(str, range(spec["num_classes"]))))
  found = data.load_images(
    spec["source"], split, path=spec["path"] or None, data_dir=spec["directory"] or None
  )
  shape = found.images.shape[1:], found.num_classes
  if shape != (tuple(spec["image_shape"]), spec["num_classes"]):
    raise ValueError(
      f"data.image_shape is {tuple(spec['image_shape'])} and data.num_classes "
      f"{spec['num_classes']}; {spec['source']} has {shape[0]} and {shape[1]}"
    )
  return found


def _first(found: data.ImageData, count: int, name: str) -> data.ImageData:
  _checks.check_number(f"data.{name}_examples", count, low=0, integer=True)
  if count > len(found.images):
    raise ValueError(f"data.{name}_examples is {count}; the split has {len(found.images)}")
  return _rows(found, slice(count or None))


def _rows(found: data.ImageData, rows: slice) -> data.ImageData:
  return dataclasses.replace(found, images=found.images[rows], labels=found.labels[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class RobustLoss:
  """The loss of a step, see `training.make_step`; state carried: the running statistics.

  Attributes:
    network: see `robust.Network`.
    objective: see `robust.Objective`; its radius is that of training.
    schedule: step -> radius.
    eps: radius that is evaluated; may be traced, as may the numbers of the others.
    scale: largest value of a pixel.
    augment: arguments of `data.augment`.
    per_epoch: steps of an epoch.
  """

  network: robust.Network
  objective: robust.Objective
  schedule: Any
  eps: Any
  scale: float
  augment: Mapping[str, Any]
  per_epoch: int

  def __call__(self, params, rows, key, context):
    augment_key, attack_key = jax.random.split(key)
    x = data.to_float(rows["image"], self.scale)
    x = data.augment(augment_key, x, **self.augment)
    eps, labels = self.schedule(context.step), rows["label"]
    result = self.objective(
      self.network,
      params,
      context.carried,
      x,
      labels,
      attack_key,
      eps,
      where=context.where,
    )
    now = {"eps_now": eps, "epoch": (context.step + 1) / self.per_epoch}
    means = result.observed | {k: jnp.broadcast_to(v, labels.shape) for k, v in now.items()}
    return result.losses, Observed(means, carried={"running": result.running})

  @staticmethod
  def carried(init_variables) -> Carried:
    """The rule of the running statistics; init_variables(key) gives those to start with."""

    def init(key):
      return init_variables(key).get("batch_stats", {})

    return Carried(init, lambda state, observed, step: observed["running"])


def network_of(model, has_parts: bool) -> robust.Network:
  """A flax network as the objective wants it."""

  def apply(variables, x, train=False):
    if train:
      return model.apply(variables, x, train=True, mutable=["batch_stats"])
    return model.apply(variables, x)

  if not has_parts:
    return robust.Network(apply)
  return robust.Network(
    apply,
    functools.partial(model.apply, part="prefix"),
    functools.partial(model.apply, part="suffix"),
  )


def optimizer_of(settings: Mapping[str, Any], learning_rate, decay_steps) -> Any:
  """Adam behind a clip of the global norm, the rate multiplied by a factor at given steps.

  Args:
    settings: "clip_norm", "decay_factor", "b1", "b2", "epsilon".
    learning_rate: > 0; may be traced.
    decay_steps: steps at which it decays.
  """
  for name in ("clip_norm", "decay_factor", "epsilon"):
    _checks.check_number(f"optimizer.{name}", settings[name], low=0.0, open_low=True)
  _checks.check_number("learning_rate", learning_rate, low=0.0, open_low=True)

  def schedule(step):
    decays = sum((step >= boundary).astype(jnp.float32) for boundary in decay_steps)
    return learning_rate * settings["decay_factor"] ** decays

  return optax.chain(
    optax.clip_by_global_norm(settings["clip_norm"]),
    optax.adam(schedule, settings["b1"], settings["b2"], settings["epsilon"]),
  )


def evaluation_inputs(
  found: data.ImageData, table: data.GroupTable, settings: Mapping[str, Any], *, curve: bool
) -> dict[str, Any]:
  """What `evaluate` reads: batches, and where asked for training images and radii of a curve."""
  held_out = data.image_table(found, group_by="all")
  inputs = {"batches": evaluation_batches(held_out, len(found.images), settings["batch_size"])}
  if settings["statistics"] == "precise":
    size = settings["precise_batch_size"]
    count = min(settings["precise_batches"], table.sizes[0] // size)
    if not count:
      raise ValueError(
        f"evaluation.precise_batch_size is {size}; there are {table.sizes[0]} training examples"
      )
    images = np.asarray(table.rows["image"][: count * size])
    inputs["statistics"] = jnp.asarray(images.reshape(count, size, *images.shape[1:]))
  if curve:
    inputs["curve"] = jnp.asarray(settings["curve"], jnp.float32)
  return inputs


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """evaluate(step, state, inputs) -> measures of a run; equal settings compile once.

  Attributes:
    methods: bounds that certify, of `robust.margin_bounds`; an example counts as certified if any
      of them verifies it.
    attack_steps: of PGD, >= 1.
    restarts: of PGD, >= 1.
    directed: whether bounds are rounded outwards.
    num_classes: C.
  """

  methods: tuple[str, ...]
  attack_steps: int
  restarts: int
  directed: bool
  num_classes: int

  def __call__(self, step, state, inputs) -> dict[str, jax.Array]:
    loss = step.per_example_loss
    stats = state.carried
    if "statistics" in inputs:
      batches = data.to_float(inputs["statistics"], loss.scale)
      stats = robust.precise_statistics(loss.network.apply, state.params, stats, batches)
    variables = {"params": state.params, "batch_stats": stats}

    def logits_fn(x):
      return loss.network.apply(variables, x, train=False)

    def one(batch: Batch):
      return self._measure(logits_fn, loss, batch, inputs.get("curve"))

    sums = jax.tree.map(lambda x: x.sum(axis=0), jax.lax.map(one, inputs["batches"]))
    return self._summarize(sums, loss, inputs.get("curve"))

  def _measure(self, logits_fn, loss, batch: Batch, curve):
    """Sums over the valid examples of a batch."""
    x, labels = data.to_float(batch.rows["image"], loss.scale), batch.rows["label"]
    valid = batch.where.astype(jnp.float32)
    classes = jax.nn.one_hot(labels, self.num_classes) * valid[:, None]
    natural = ~robust.attack_succeeds(logits_fn, x, labels)

    def at(factor):
      eps = factor * loss.eps
      attacked = natural & self._resists(logits_fn, x, labels, eps)
      return *self._certify(logits_fn, x, labels, eps), attacked

    # The radius and those of the curve in one loop: certifying is most of the program.
    factors = jnp.ones(1) if curve is None else jnp.concatenate([jnp.ones(1), curve])
    certified, least, attacked = jax.lax.map(at, factors)
    any_method = functools.reduce(jnp.logical_or, certified.values())
    found = {"natural": natural, "certified": any_method[0], "attacked": attacked[0]}
    sums = {
      "class_counts": classes.sum(axis=0),
      **{f"{name}_by_class": values @ classes for name, values in found.items()},
      **{f"certified_{name.replace('-', '_')}": v[0] @ valid for name, v in certified.items()},
      "violations": (any_method[0] & ~attacked[0]) @ valid,
    }
    if curve is not None:
      bins = jnp.searchsorted(jnp.asarray(MARGIN_EDGES[1:-1], least.dtype), least[0])
      sums["margin_histogram"] = valid @ jax.nn.one_hot(bins, len(MARGIN_EDGES) - 1)
      sums |= {"curve_certified": any_method[1:] @ valid, "curve_attacked": attacked[1:] @ valid}
    return sums

  def _certify(self, logits_fn, x, labels, eps):
    """({method: verified (B,)}, the least margin (B,) by the best method)."""
    box = Interval.from_linf(x, eps)
    lower = {
      method: robust.bound_margins(logits_fn, box, labels, method, directed=self.directed).lower
      for method in self.methods
    }
    # Bounds hold together, so the larger of two is one; NaN says nothing and must not win.
    best = functools.reduce(jnp.fmax, lower.values())
    return {name: robust.verified(value) for name, value in lower.items()}, best.min(axis=-1)

  def _resists(self, logits_fn, x, labels, eps):
    box = Interval.from_linf(x, eps)
    x_adv = robust.pgd(
      logits_fn,
      jax.random.key(0),
      box,
      labels,
      center=x,
      steps=self.attack_steps,
      restarts=self.restarts,
    )
    return ~robust.attack_succeeds(logits_fn, x_adv, labels)

  def _summarize(self, sums, loss, curve):
    count = sums["class_counts"].sum()
    shares = {
      name: sums[f"{name}_by_class"].sum() / count for name in ("natural", "certified", "attacked")
    }
    shares |= {
      name: value / count
      for name, value in sums.items()
      if name.startswith(("certified_", "curve_")) and name != "certified_by_class"
    }
    by_class = {
      name: value / jnp.maximum(sums["class_counts"], 1)
      for name, value in sums.items()
      if name.endswith("_by_class")
    }
    rest = {name: sums[name] for name in ("class_counts", "violations")}
    if curve is not None:
      rest["margin_histogram"] = sums["margin_histogram"]
      rest["margin_edges"] = jnp.asarray(MARGIN_EDGES, jnp.float32)
      rest["curve_eps"] = curve * loss.eps
    return shares | by_class | rest
