"""One student, two teachers: every arm, rate and seed in one compiled program.

  python experiments/two_teachers/train.py

Twice the same: teachers, a clean and a robust one for every seed, then students. First with search
seeds, to choose each arm's rates on validation digits; then with other seeds and the chosen rates.
Writes results/two_teachers.json.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from balance_jax import data, mixing
from balance_jax.bounds import Interval
from balance_jax.distillation import (
  ard_loss,
  init_mtard_state,
  mtard_loss,
  mtard_update,
  rslad_loss,
)
from balance_jax.models import MLP
from balance_jax.robust import attack_succeeds, pgd, pgd_at_loss
from balance_jax.training import Carried, Observed, init_state, make_step
from balance_jax.training.evidence import rounded, save
from balance_jax.training.optimizers import make_optimizer
from balance_jax.training.sweep import chain, product
from balance_jax.training.sweep_runs import SweepRuns, run_sweep

RESULTS = Path(__file__).parent / "results"
LOSSES = ("rslad", "ard", "two teachers")
WEIGHT_RATE = 0.025  # of NLB, a step; published
MILESTONES = (215 / 300, 260 / 300, 285 / 300)  # shares of training; published


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes and numbers of the experiment; those that the paper has are the paper's.

  The published step of the temperatures, 0.001, moves them by 0.39 in one of its epochs and by 117
  in its 300 epochs. `temp_rates` keep the one or the other.
  """

  eps: float = 0.1
  batch: int = 50
  epochs: int = 60
  teacher_epochs: int = 40
  student: tuple[int, ...] = (128, 128)
  teacher: tuple[int, ...] = (512, 512)
  rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
  temp_rates: tuple[float, ...] = (0.39 / 24, 117 / 1440)
  search_seeds: tuple[int, ...] = (100, 101, 102)
  seeds: tuple[int, ...] = tuple(range(10))


PARTS = {
  "radius 0.1": Settings(),
  "radius 0.2": Settings(
    eps=0.2, rates=(0.3, 1.0, 3.0), search_seeds=(100, 101), seeds=tuple(range(6))
  ),
}


@dataclasses.dataclass(frozen=True)
class Arm:
  """What a student learns from: a loss, its first weight of the robust teacher, its balances."""

  loss: str = "two teachers"
  w_adv: float = 0.5
  nlb: bool = False
  ebb: bool = False


ARMS = {
  "RSLAD": Arm("rslad"),
  "ARD": Arm("ard"),
  "robust teacher": Arm(w_adv=1.0),
  "fixed": Arm(),
  "NLB": Arm(nlb=True),
  "EBB": Arm(ebb=True),
  "NLB + EBB": Arm(nlb=True, ebb=True),
}


def load() -> dict[str, dict[str, jax.Array]]:
  """Splits of the digits: "image" float32 (N, 8, 8, 1) in [0, 1] and "label" int32 (N,)."""
  splits = {}
  for split in ("train", "validation", "test"):
    found = data.load_images("digits", split)
    image = data.to_float(found.images, found.scale)
    splits[split] = {"image": image, "label": jnp.asarray(found.labels)}
  return splits


def measure(logits_fn, eps, split) -> dict[str, jax.Array]:
  """Clean accuracy, accuracy under PGD-20, and their mean, in percent."""
  image, label = split["image"], split["label"]
  box = Interval.from_linf(image, eps)
  attacked = pgd(logits_fn, jax.random.key(0), box, label, center=image, steps=20)
  clean = 100 * (1 - attack_succeeds(logits_fn, image, label).mean())
  robust = 100 * (1 - attack_succeeds(logits_fn, attacked, label).mean())
  return {"clean": clean, "robust": robust, "w_robust": (clean + robust) / 2}


# --- Teachers ---


class Teachers(NamedTuple):
  """A pair of teachers for each of S seeds.

  Attributes:
    robust: parameters of the robust ones, arrays (S, ...); attacked inputs are only known later.
    labels: logits of both on the clean training digits, "clean" and "robust", float32 (N, S, K).
    accuracy: "clean" and "robust" -> what `measure` says of test digits, arrays (S,).
  """

  robust: Any
  labels: dict[str, jax.Array]
  accuracy: dict[str, dict[str, jax.Array]]


def train_teachers(settings: Settings, splits, seeds) -> Teachers:
  """Trains them with Adam by PGD-AT, the clean ones at radius 0, which is plain training."""
  model = MLP(settings.teacher)
  table = data.GroupTable.from_rows({"all": splits["train"]})
  steps = settings.teacher_epochs * table.group_sizes[0] // settings.batch

  def build(cell):
    def losses(params, rows, key):
      logits_fn = functools.partial(model.apply, params)
      box = Interval.from_linf(rows["image"], cell["eps"])
      return pgd_at_loss(logits_fn, logits_fn, key, box, rows["label"])[0]

    return make_step(
      losses,
      make_optimizer(1e-3, total_steps=steps),
      mixing.proportional(table.sizes),
      table,
      batch_size=settings.batch,
      metrics=("loss",),
    )

  def init(cell, step):
    params_key, key = jax.random.split(jax.random.key(cell["seed"] + 1000))
    return init_state(key, model.init(params_key, splits["train"]["image"][:1]), step)

  def judge(step, state, splits):
    del step
    logits_fn = functools.partial(model.apply, state.params)
    return logits_fn(splits["train"]["image"]), measure(logits_fn, settings.eps, splits["test"])

  runs = SweepRuns(build, init, product(eps=(0.0, settings.eps), seed=seeds), table)
  states, _ = run_sweep(runs, steps, chunk=steps)
  halves = {"clean": slice(0, len(seeds)), "robust": slice(len(seeds), None)}
  logits, accuracy = runs.apply(judge, states, splits)
  return Teachers(
    jax.tree.map(lambda x: x[halves["robust"]], states.params),
    {name: logits[half].swapaxes(0, 1) for name, half in halves.items()},
    {name: {k: v[half] for k, v in accuracy.items()} for name, half in halves.items()},
  )


# --- Students ---


@dataclasses.dataclass(frozen=True)
class Students:
  """The training of all students; `cells` has what a cell holds.

  Attributes:
    settings: numbers.
    teachers: a pair for every seed.
    table: rows of "image", "label" and the teachers' logits on it, "robust" and "clean" (S, K).
  """

  settings: Settings
  teachers: Teachers
  table: data.GroupTable

  @property
  def model(self) -> MLP:
    return MLP(self.settings.student)

  @property
  def steps(self) -> int:
    return self.settings.epochs * self.table.group_sizes[0] // self.settings.batch

  def decay(self, step):
    """Factor on all three rates: a tenth after each milestone."""
    milestones = jnp.array([int(share * self.steps) for share in MILESTONES])
    return 0.1 ** jnp.sum(step >= milestones)

  def build(self, cell):
    """The `Step` of one cell."""
    robust = jax.tree.map(lambda x: x[cell["pair"]], self.teachers.robust)
    robust_teacher = functools.partial(MLP(self.settings.teacher).apply, robust)

    def update(state, step, **observed):
      decay = self.decay(step)
      rates = {"weight_lr": cell["nlb"] * decay, "temp_lr": cell["ebb"] * decay}
      return mtard_update(state, **observed, **rates)

    def start(key):
      del key
      return init_mtard_state()._replace(w_adv=cell["w_adv"], w_nat=1 - cell["w_adv"])

    optimizer = optax.chain(
      optax.add_decayed_weights(2e-4),
      optax.sgd(lambda step: cell["rate"] * self.decay(step), momentum=0.9),
    )
    return make_step(
      functools.partial(self.losses, cell, robust_teacher, update),
      optimizer,
      mixing.proportional(self.table.sizes),
      self.table,
      batch_size=self.settings.batch,
      metrics=("loss", "observed"),
      carried=Carried(start, lambda state, observed, step: update(state, step, **observed)),
    )

  def losses(self, cell, robust_teacher, update, params, rows, key, context):
    """(losses (B,) of the cell's arm, what the two balances observe)."""
    logits_fn = functools.partial(self.model.apply, params)
    x, label = rows["image"], rows["label"]
    robust, clean = rows["robust"][:, cell["pair"]], rows["clean"][:, cell["pair"]]
    box = Interval.from_linf(x, self.settings.eps)
    # Published: from next to x, 10 steps of a quarter of the radius, cross entropy, on the student.
    attack = {"steps": 10, "step_size": 0.25, "init": "center", "goal": "loss"}
    x_adv = pgd(logits_fn, key, box, label, center=x, **attack)
    adv, nat = logits_fn(x_adv), logits_fn(x)
    two_teachers, observed = mtard_loss(
      context.carried,
      adv,
      nat,
      robust_teacher(x_adv),
      clean,
      where=context.where,
      update=lambda state, **observed: update(state, context.step, **observed),
    )
    one_teacher = rslad_loss(adv, nat, robust), ard_loss(adv, nat, robust, label)
    shown = {
      "gap": jnp.abs(observed["entropy_adv"] - observed["entropy_nat"]),
      "tau_adv": context.carried.tau_adv,
      "tau_nat": context.carried.tau_nat,
      "w_nat": context.carried.w_nat,
    }
    means = {name: jnp.broadcast_to(value, label.shape) for name, value in shown.items()}
    losses = jnp.stack([*one_teacher, two_teachers])[cell["loss"]]
    return losses, Observed(means=means, carried=observed)

  def init(self, cell, step):
    """The state of one cell before training."""
    params_key, key = jax.random.split(jax.random.key(cell["seed"]))
    params = self.model.init(params_key, self.table.rows["image"][:1])
    return init_state(key, params, step)

  def measure(self, step, state, splits):
    """Accuracies of one student on every split."""
    del step
    logits_fn = functools.partial(self.model.apply, state.params)
    return {name: measure(logits_fn, self.settings.eps, split) for name, split in splits.items()}

  def train(self, cells, splits) -> tuple[dict, dict]:
    """Trains all cells: ({split: {accuracy: (R,)}}, {observed: (R, steps)})."""
    runs = SweepRuns(self.build, self.init, cells, self.table)
    # A rate that is too high for an arm leaves it without a correct prediction, not the others.
    states, history = run_sweep(runs, self.steps, chunk=self.steps, allow_divergence=True)
    return jax.device_get(runs.apply(self.measure, states, splits)), history["observed"]


def cells(arm: Arm, rate: float, temp_rate: float, seeds) -> list[dict]:
  """The numbers of one run for each seed; "pair" is the place of the seed's teachers."""
  numbers = {
    "loss": LOSSES.index(arm.loss),
    "w_adv": arm.w_adv,
    "nlb": WEIGHT_RATE * arm.nlb,
    "ebb": temp_rate * arm.ebb,
    "rate": rate,
  }
  return [{**numbers, "pair": pair, "seed": seed} for pair, seed in enumerate(seeds)]


# --- The experiment ---


def students_of(settings: Settings, splits, seeds) -> Students:
  """Students whose teachers are trained here and now, a pair for each seed."""
  teachers = train_teachers(settings, splits, seeds)
  rows = {"all": splits["train"] | teachers.labels}
  return Students(settings, teachers, data.GroupTable.from_rows(rows))


def search(settings: Settings, splits) -> dict[str, list[dict]]:
  """Every arm's candidates with the mean W-Robust of the search seeds on validation digits."""
  students = students_of(settings, splits, settings.search_seeds)
  candidates = {
    name: product(rate=settings.rates, temp_rate=settings.temp_rates if arm.ebb else (0.0,))
    for name, arm in ARMS.items()
  }
  runs = [
    cells(ARMS[name], seeds=settings.search_seeds, **candidate)
    for name, rows in candidates.items()
    for candidate in rows
  ]
  measured, _ = students.train(chain(*runs), {"validation": splits["validation"]})
  means = iter(measured["validation"]["w_robust"].reshape(len(runs), -1).mean(axis=1))
  return {
    name: [{**candidate, "w_robust": float(next(means))} for candidate in rows]
    for name, rows in candidates.items()
  }


def choose(candidates: list[dict]) -> dict:
  """The best candidate; "at_edge" if its learning rate is the lowest or the highest of all."""
  best = max(candidates, key=lambda row: row["w_robust"])
  rates = [row["rate"] for row in candidates]
  return {**best, "at_edge": best["rate"] in (min(rates), max(rates))}


def compare(settings: Settings, chosen: dict[str, dict], splits) -> tuple[dict, dict]:
  """All arms at their chosen rates: (arm -> record, accuracies of the teachers), by seed.

  A record has the accuracies on test digits, the entropy gap of the first step, the means of what
  was observed in the last epoch, all by seed, and the course of the latter, means over seeds.
  """
  students = students_of(settings, splits, settings.seeds)
  runs = [
    cells(ARMS[name], found["rate"], found["temp_rate"], settings.seeds)
    for name, found in chosen.items()
  ]
  measured, observed = students.train(chain(*runs), {"test": splits["test"]})
  records = {}
  for i, (name, found) in enumerate(chosen.items()):
    own = slice(i * len(settings.seeds), (i + 1) * len(settings.seeds))
    by_epoch = {
      key: array[own].reshape(len(settings.seeds), settings.epochs, -1).mean(axis=2)
      for key, array in observed.items()
    }
    records[name] = {
      "chosen": found,
      **{key: array[own] for key, array in measured["test"].items()},
      "first_gap": observed["gap"][own, 0],
      "last": {key: array[:, -1] for key, array in by_epoch.items()},
      "course": {key: array.mean(axis=0) for key, array in by_epoch.items()},
    }
  return records, students.teachers.accuracy


def repeat(settings: Settings) -> dict:
  """The whole experiment at one radius."""
  began, cpu = time.monotonic(), time.process_time()
  splits = load()
  candidates = search(settings, splits)
  chosen = {name: choose(rows) for name, rows in candidates.items()}
  records, teachers = compare(settings, chosen, splits)
  return {
    "settings": dataclasses.asdict(settings),
    "teachers": teachers,
    "search": candidates,
    "arms": records,
    "seconds": time.monotonic() - began,
    "cpu_seconds": time.process_time() - cpu,
  }


def main(parts: dict[str, Settings] = PARTS, folder: Path = RESULTS) -> dict:
  """Runs all parts; writes two_teachers.json, part by part."""
  results = {}
  for name, settings in parts.items():
    results[name] = repeat(settings)
    save(folder / "two_teachers.json", results)
    print(f"{name}: {results[name]['cpu_seconds']:.0f} s of CPU")
  return rounded(results)


if __name__ == "__main__":
  import os

  # Runs of a sweep are spread over CPU devices.
  jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
  main()
