"""Digits with ten classes of unequal size: natural and adversarial training, weights, SRAT.

  python experiments/imbalanced_adversarial/train.py [digits] [stronger]

Settings are chosen on validation images with seeds of their own, then every arm runs with new
seeds. All arms, settings and seeds of one kind of training share a compiled program. Writes
results/digits.json and, with twice the radius, results/stronger.json.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from balance_jax import data, mixing, models
from balance_jax.bounds import Interval
from balance_jax.losses import deferred_weights, effective_number_weights, ldam_loss, ldam_margins
from balance_jax.robust import apgd, attack_succeeds, pgd, srat_loss
from balance_jax.training import Carried, evidence, init_state, make_step
from balance_jax.training.sweep import product, sweep
from balance_jax.training.sweep_runs import SweepRuns, run_sweep

RESULTS = Path(__file__).parent / "results"
CLASSES = 10
COSINE_SCALE = 30.0  # of the logits of LDAM, which are cosines
NEVER = 10**9


@dataclasses.dataclass(frozen=True)
class Settings:
  """Of the problem, the network and training."""

  largest: int = 100
  ratio: float = 50.0
  width: int = 128
  eps: float = 0.1
  attack_steps: int = 10
  evaluation_steps: int = 20
  batch: int = 64
  steps: int = 860  # 200 passes
  rates: tuple[float, ...] = (0.006, 0.02, 0.06, 0.2, 0.6)
  lams: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0)
  taus: tuple[float, ...] = (0.1, 0.5)
  tuning_seeds: tuple[int, ...] = (100, 101, 102)
  seeds: tuple[int, ...] = tuple(range(10))

  @property
  def counts(self) -> tuple[int, ...]:
    return data.imbalanced_counts(self.largest, CLASSES, self.ratio)

  @property
  def deferred(self) -> int:
    """The step of deferred reweighting and of the first decay of the rate, as published: 80 %."""
    return self.steps * 4 // 5


# The second was added after a look at the first, so with fewer settings to choose from.
PARTS = {
  "digits": Settings(),
  "stronger": Settings(eps=0.2, taus=(0.5,), tuning_seeds=(100, 101)),
}


class Kind(NamedTuple):
  """What is the same for all settings of an arm: step from which weights count, LDAM or not."""

  start: int
  ldam: bool = False
  separated: bool = False


def arms(settings: Settings, adversarial: bool) -> dict[str, Kind]:
  """The arms by name."""
  late = settings.deferred
  if not adversarial:
    return {"natural": Kind(NEVER), "natural + weights": Kind(0), "natural + DRW": Kind(late)}
  return {
    "AT": Kind(NEVER),
    "AT + weights": Kind(0),
    "AT + DRW": Kind(late),
    "AT + LDAM-DRW": Kind(late, ldam=True),
    "AT + separation": Kind(NEVER, separated=True),
    "SRAT": Kind(late, separated=True),
  }


def grid(settings: Settings, kind: Kind) -> list[dict]:
  """The settings an arm may choose from."""
  strengths = {"lam": settings.lams, "tau": settings.taus} if kind.separated else {}
  fixed = kind._replace(separated=False)._asdict()
  fixed.pop("separated")
  choices = product(rate=settings.rates, **strengths)
  return [{"lam": 0.0, "tau": 0.5, **choice, **fixed} for choice in choices]


# --- The problem ---


class Problem(NamedTuple):
  """Data of several seeds, in each of which other digits are the frequent ones.

  Attributes:
    table: groups are the classes by falling size; rows {"image": uint8 (N, S, 8, 8, 1), "label":
      int32 (N,)}, where "label" is the place of the class in that order.
    place: int (S, K), the place of every digit.
    held_out: "validation" and "test": (uint8 (M, 8, 8, 1), digits int (M,)).
    scale: largest value of a pixel.
  """

  table: data.GroupTable
  place: np.ndarray
  held_out: dict
  scale: float


def make_problem(settings: Settings, seeds) -> Problem:
  """The subsets and orders of classes of `seeds`."""
  splits = {name: data.load_images("digits", name) for name in ("train", "validation", "test")}
  train = splits.pop("train")
  images, places = [], []
  for seed in seeds:
    order = np.random.default_rng(seed).permutation(CLASSES)
    place = np.argsort(order)
    taken = data.take_classes(train, np.array(settings.counts)[place], seed=seed)
    images.append(taken.images[np.argsort(place[taken.labels], kind="stable")])
    places.append(place)
  stacked, labels = np.stack(images, axis=1), np.repeat(np.arange(CLASSES), settings.counts)
  rows = {
    f"class {k}": {"image": stacked[labels == k], "label": labels[labels == k].astype(np.int32)}
    for k in range(CLASSES)
  }
  held_out = {name: (split.images, split.labels) for name, split in splits.items()}
  return Problem(data.GroupTable.from_rows(rows), np.stack(places), held_out, train.scale)


# --- The network ---


def parts(settings: Settings) -> tuple[models.MLP, models.MLP]:
  """64-128-128 and the linear classifier."""
  return models.MLP((settings.width,), settings.width), models.MLP((), CLASSES)


def init_params(settings: Settings, key) -> dict:
  backbone, head = parts(settings)
  first, second = jax.random.split(key)
  return {
    "backbone": backbone.init(first, jnp.zeros((1, 8, 8, 1))),
    "head": head.init(second, jnp.zeros((1, settings.width))),
  }


def network(settings: Settings, params, x, cosine) -> tuple[jax.Array, jax.Array]:
  """(logits (B, K), penultimate features (B, width)); cosine classifier where `cosine` holds."""
  backbone, head = parts(settings)
  features = nn.relu(backbone.apply(params["backbone"], x))
  kernel = params["head"]["params"]["head"]["kernel"]
  cosines = _unit(features, 1) @ _unit(kernel, 0)
  logits = head.apply(params["head"], features)
  return jnp.where(cosine, COSINE_SCALE * cosines, logits), features


def _unit(x, axis):
  return x * jax.lax.rsqrt(jnp.square(x).sum(axis=axis, keepdims=True) + 1e-12)


# --- Training ---


def make_runs(settings: Settings, problem: Problem, cells: list[dict], adversarial: bool):
  """`SweepRuns` of cells with rate, start, ldam, lam, tau, index (of the data) and seed."""
  weights = effective_number_weights(settings.counts)
  margins = ldam_margins(settings.counts)

  def build(cell):
    def loss(params, rows, key, context):
      labels = rows["label"]
      x = data.to_float(rows["image"][:, cell["index"]], problem.scale)
      forward = functools.partial(network, settings, params, cosine=cell["ldam"])
      if adversarial:
        # The attack ascends the plain cross entropy.
        x = pgd(
          lambda x: forward(x)[0],
          key,
          Interval.from_linf(x, settings.eps),
          labels,
          steps=settings.attack_steps,
          goal="loss",
        )
      scale = jnp.where(cell["ldam"], COSINE_SCALE, 1.0)  # no margins and scale 1: cross entropy

      def base(logits, labels):
        own = jnp.where(cell["ldam"], margins, 0.0)
        return ldam_loss(logits / scale, labels, margins=own, scale=scale)

      logits, features = forward(x)
      now = deferred_weights(context.step, cell["start"], weights)
      return srat_loss(logits, features, labels, now, lam=cell["lam"], tau=cell["tau"], base=base)[
        0
      ]

    # The published shape: a tenth of the rate after 80 % and again after 90 % of the steps.
    decays = {settings.deferred: 0.1, settings.steps * 9 // 10: 0.1}
    rate = optax.piecewise_constant_schedule(cell["rate"], decays)
    return make_step(
      loss,
      optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9)),
      mixing.proportional(problem.table.sizes),
      problem.table,
      batch_size=settings.batch,
      metrics=("loss",),
      carried=Carried(),
    )

  def init(cell, step):
    key, params_key = jax.random.split(jax.random.key(cell["seed"]))
    return init_state(key, init_params(settings, params_key), step)

  return SweepRuns(build, init, cells, problem.table)


# --- Evaluation ---


def evaluate(settings: Settings, problem: Problem, cell, images, digits, attacks: bool) -> dict:
  """Accuracies (K,) by class, frequent classes first, and scatter ratios of one trained network.

  Args:
    settings: of the run.
    problem: gives the order of the classes.
    cell: with "params".
    images: uint8 (M, 8, 8, 1).
    digits: int (M,).
    attacks: whether APGD-DLR follows PGD.

  Returns:
    "clean" and "pgd"; "both", where no attack may succeed; "scatter_clean", "scatter_attacked".
  """
  labels = jnp.asarray(problem.place)[cell["index"]][digits]
  x = data.to_float(images, problem.scale)
  box = Interval.from_linf(x, settings.eps)
  forward = functools.partial(network, settings, cell["params"], cosine=cell["ldam"])

  def logits_fn(x):
    return forward(x)[0]

  def by_class(holds):
    members = labels[:, None] == jnp.arange(CLASSES)[None]
    return (members * holds[:, None]).sum(axis=0) / members.sum(axis=0)

  key = jax.random.key(cell["seed"])
  attacked = pgd(logits_fn, key, box, labels, center=x, steps=settings.evaluation_steps)
  holds = ~attack_succeeds(logits_fn, attacked, labels)
  found = {
    "clean": by_class(~attack_succeeds(logits_fn, x, labels)),
    "pgd": by_class(holds),
    "scatter_clean": scatter_ratio(forward(x)[1], labels),
    "scatter_attacked": scatter_ratio(forward(attacked)[1], labels),
  }
  if attacks:
    steps = settings.evaluation_steps
    other = apgd(logits_fn, key, box, labels, center=x, steps=steps, loss="dlr")
    found["both"] = by_class(holds & ~attack_succeeds(logits_fn, other, labels))
  return found


def scatter_ratio(features, labels) -> jax.Array:
  """Mean squared distance of class means from their mean, over that of points from their class.

  Every class counts the same. Features are scaled to length 1, so that no outlier rules.
  """
  features = _unit(features, 1)
  members = jax.nn.one_hot(labels, CLASSES)
  share = members / members.sum(axis=0, keepdims=True)
  means = share.T @ features
  within = (share * jnp.square(features[:, None] - means[None]).sum(axis=-1)).sum()
  return jnp.square(means - means.mean(axis=0, keepdims=True)).sum() / within


def train_and_evaluate(settings, problem, cells, adversarial: bool, split: str) -> list[dict]:
  """The figures of `evaluate` for every cell, from the end of its training."""
  runs = make_runs(settings, problem, cells, adversarial)
  states, _ = run_sweep(runs, settings.steps, chunk=settings.steps, allow_divergence=True)

  def one(cell, shared):
    return evaluate(settings, problem, cell, *shared, attacks=split == "test")

  found = sweep(one, {**runs.cells, "params": states.params}, shared=problem.held_out[split])
  return [jax.tree.map(lambda x, i=i: np.asarray(x[i]), found) for i in range(len(cells))]


def with_seeds(choices: list[dict], seeds) -> list[dict]:
  return [{**c, "index": i, "seed": seed} for c in choices for i, seed in enumerate(seeds)]


# --- The experiment ---


def tune(settings: Settings, adversarial: bool) -> dict[str, list[dict]]:
  """Every setting of every arm with its score: balanced accuracy on validation images.

  Robust accuracy under PGD for adversarial training, clean accuracy for natural training; the mean
  over the tuning seeds. Best first.
  """
  problem = make_problem(settings, settings.tuning_seeds)
  kinds = arms(settings, adversarial)
  choices = [(name, choice) for name, kind in kinds.items() for choice in grid(settings, kind)]
  cells = with_seeds([choice for _, choice in choices], settings.tuning_seeds)
  found = train_and_evaluate(settings, problem, cells, adversarial, "validation")
  scores = np.array([x["pgd" if adversarial else "clean"].mean() for x in found])
  scores = scores.reshape(len(choices), -1).mean(axis=1)
  tried = {name: [] for name in kinds}
  for (name, choice), score in zip(choices, scores, strict=True):
    tried[name].append({**choice, "score": score})
  return {name: sorted(rows, key=lambda row: -row["score"]) for name, rows in tried.items()}


def judge(settings: Settings, tried: dict[str, list[dict]], adversarial: bool) -> dict:
  """Figures on test images by seed, of the best setting of every arm."""
  problem = make_problem(settings, settings.seeds)
  choices = [{k: v for k, v in rows[0].items() if k != "score"} for rows in tried.values()]
  cells = with_seeds(choices, settings.seeds)
  found = train_and_evaluate(settings, problem, cells, adversarial, "test")
  size, result = len(settings.seeds), {}
  for i, name in enumerate(tried):
    own = found[i * size : (i + 1) * size]
    chosen = {name: choices[i][name] for name in ("rate", "lam", "tau")}
    result[name] = {"chosen": chosen, **jax.tree.map(lambda *x: np.stack(x), *own)}
  return result


def main(name: str, settings: Settings, folder: Path = RESULTS) -> dict:
  """Tunes, trains, measures and writes results/<name>.json."""
  began = time.process_time()
  results = {"settings": dataclasses.asdict(settings), "counts": settings.counts}
  results |= {"tried": {}, "arms": {}}
  for adversarial in (False, True):
    tried = tune(settings, adversarial)
    results["tried"] |= tried
    results["arms"] |= judge(settings, tried, adversarial)
  results["cpu_seconds"] = time.process_time() - began
  results = evidence.rounded(results)
  evidence.save(folder / f"{name}.json", results)
  print(f"{name}: {results['cpu_seconds']:.0f} s of CPU")
  for label, arm in results["arms"].items():
    figures = {k: round(float(np.mean(arm[k])), 3) for k in ("clean", "pgd", "both")}
    print(f"{label:18s} {arm['chosen']} {figures}")
  return results


if __name__ == "__main__":
  for part in sys.argv[1:] or PARTS:
    main(part, PARTS[part])
