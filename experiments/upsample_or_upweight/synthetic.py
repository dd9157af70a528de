"""Two synthetic domains, 100 : 1: every arm, learning rate and seed in one compiled program.

  python experiments/upsample_or_upweight/synthetic.py

Three parts: SGD with two domains (its learning rate 0.05 is the fixed-rate repeat), Adam with two
domains, and SGD with three domains. Writes results/synthetic.json and synthetic.png. Settings were
fixed before the first run but for the grids of learning rates: they were widened once, by the rule
that no arm may have its choice at an end of the grid.
"""

import dataclasses
import time

import evidence
import gumbel
import jax
import numpy as np
import optax

from balance_jax import mixing
from balance_jax.training import init_state, make_step
from balance_jax.training.measure import evaluate, evaluation_batches
from balance_jax.training.sweep import product
from balance_jax.training.sweep_runs import SweepRuns

TAUS = (2, 3, 5, 100)
FIXED_RATE = 0.05
DRAWN = ("TS 1", "TS 5", "S 5", "cooldown", "increasing")  # arms in the figure


@dataclasses.dataclass(frozen=True)
class Part:
  """One program: domain sizes, optimizer by learning rate, the grid, steps."""

  sizes: tuple[int, ...]
  optimizer: object
  rates: tuple[float, ...]
  steps: int
  seeds: int = 5
  held_out: int = 2000
  batch: int = 32
  every: int = 125  # steps between evaluations in the first quarter; four times that later


def adam(rate):
  return optax.adam(rate, b1=0.9, b2=0.98, eps=1e-6)  # the paper's


PARTS = {
  "sgd": Part((40_000, 400), optax.sgd, (0.00625, 0.0125, 0.025, FIXED_RATE, 0.1, 0.2, 0.4), 6000),
  "adam": Part((40_000, 400), adam, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 6000),
  "three": Part((40_000, 4_000, 400), optax.sgd, (FIXED_RATE,), 4000),
}


def arms(sizes, steps: int, batch: int) -> dict[str, mixing.Mixer]:
  """TS = temperature sampling, S = scalarization; the control arms keep the names of the paper."""
  half = steps // 2
  found = {"TS 1": mixing.proportional(sizes)}
  for tau in TAUS:
    found[f"TS {tau}"] = mixing.temperature(sizes, tau)
    found[f"S {tau}"] = mixing.temperature(sizes, tau, draw="natural")
  return found | {
    "optimal 5": mixing.temperature(sizes, 5.0, draw="optimal"),
    "cooldown": mixing.cooldown(sizes, switch_step=half, tau_hi=5.0, tau_lo=1.0),
    "increasing": mixing.cooldown(sizes, switch_step=half, tau_hi=1.0, tau_lo=5.0),
    "order matters": mixing.order_matters(sizes, switch_step=half, tau=5.0),
    "unimax": mixing.unimax(sizes, max_epochs=10.0, budget=steps * batch),
  }


def _losses_of_cell(step, state, batches):
  return {split: evaluate(step, state, part).mean() for split, part in batches.items()}


def _second_moments(step, state, table):
  return step.measure(state, table, examples=64).second_moment


def train(part: Part) -> dict:
  """Trains all cells; arrays with the leading axes (arm, rate, seed).

  Returns:
    dict of "arms", names; "steps" (E,), of the evaluations; "validation" and "test", losses
    (..., E, K); "spread" (...), variance of the gradient norm over the first quarter;
    "second_moment" (..., 2, K), G after the first quarter and at the end.
  """
  names = [f"domain {i}" for i in range(len(part.sizes))]
  tables = gumbel.tables(dict(zip(names, part.sizes, strict=True)), part.seeds, part.held_out)
  table = tables.pop("train")
  batches = {k: evaluation_batches(t, part.held_out, 250) for k, t in tables.items()}
  mixers = arms(table.sizes, part.steps, part.batch)

  def build(cell):
    return make_step(
      lambda params, rows, key: gumbel.losses(params, rows, cell["seed"]),
      part.optimizer(cell["rate"]),
      mixing.select(mixers.values(), cell["arm"]),
      table,
      batch_size=part.batch,
      allocation="multinomial",  # the domain of every example is drawn, as the theorems have it
      metrics=("grad_norm",),
    )

  def init(cell, step):
    return init_state(jax.random.key(cell["seed"]), gumbel.init_params(len(part.sizes)), step)

  cells = product(arm=range(len(mixers)), rate=part.rates, seed=range(part.seeds))
  runs = SweepRuns(build, init, cells, table)
  records = _train_runs(part, runs, batches)
  shape = (len(mixers), len(part.rates), part.seeds)
  records = {k: v if k == "steps" else v.reshape(*shape, *v.shape[1:]) for k, v in records.items()}
  return {"arms": list(mixers), **records}


def _train_runs(part: Part, runs: SweepRuns, batches) -> dict:
  states, quarter = runs.init(), part.steps // 4
  steps, losses, norms, moments = [], [], [], []
  for done in range(0, part.steps + 1, part.every):
    if done <= quarter or done % (4 * part.every) == 0 or done == part.steps:
      steps.append(done)
      losses.append(jax.device_get(runs.apply(_losses_of_cell, states, batches)))
    if done in (quarter, part.steps):
      moments.append(jax.device_get(runs.apply(_second_moments, states, runs.table)))
    if done < part.steps:
      states, metrics = runs.advance(states, part.every)
      norms.append(np.asarray(metrics["grad_norm"]))
  return {
    "steps": np.array(steps),
    **{k: np.stack([x[k] for x in losses], 1) for k in ("validation", "test")},
    "spread": np.concatenate(norms, 1)[:, :quarter].var(axis=1, ddof=1),
    "second_moment": np.stack(moments, 1),
  }


def summarize(part: Part, found: dict) -> dict:
  """What is kept: for every arm, the figures of its chosen learning rates, by seed.

  An arm's rate is chosen twice, on validation points: "final" by the mean loss over domains at the
  end; "early" by the loss it optimises, at 25 % of the steps. The figures are of test points.
  """
  quarter = _quarter(part, found)
  rows = {}
  for index, name in enumerate(found["arms"]):
    validation = _no_nan(found["validation"][index])  # (rate, seed, E, K)
    choices = {"final": validation[:, :, -1].mean(axis=(1, 2))}
    if name.split()[0] in ("TS", "S"):
      p = np.asarray(mixing.temperature_probs(part.sizes, float(name.split()[1])))
      choices["early"] = (validation[:, :, quarter] @ p).mean(axis=1)
    rows[name] = {k: _record(part, found, index, int(v.argmin())) for k, v in choices.items()}
    if FIXED_RATE in part.rates:
      rows[name]["fixed"] = _record(part, found, index, part.rates.index(FIXED_RATE))
  fixed = part.rates.index(FIXED_RATE) if FIXED_RATE in part.rates else None
  curves = {
    name: found["test"][found["arms"].index(name), fixed].mean(axis=0)
    for name in (DRAWN if fixed is not None else ())
  }
  return {
    "sizes": part.sizes,
    "steps": part.steps,
    "rates": part.rates,
    "seeds": part.seeds,
    "arms": rows,
    "speedup": {tau: _speedup(part, found, rows, tau) for tau in TAUS},
    "curves": {"steps": found["steps"], "test": curves},
  }


def _no_nan(losses):
  return np.where(np.isfinite(losses), losses, np.inf)


def _record(part: Part, found, arm: int, rate: int) -> dict:
  """Figures by seed, of one arm at one learning rate; "best" is at the best validation step."""
  quarter = _quarter(part, found)
  test = found["test"][arm, rate]
  best = _no_nan(found["validation"][arm, rate]).argmin(axis=1)  # (seed, K)
  return {
    "rate": part.rates[rate],
    "at_edge": len(part.rates) > 1 and rate in (0, len(part.rates) - 1),
    "final": test[:, -1],
    "quarter": test[:, quarter],
    "best": np.take_along_axis(test, best[:, None], axis=1)[:, 0],
    "spread": found["spread"][arm, rate],
    "second_moment": found["second_moment"][arm, rate],
  }


def _speedup(part: Part, found, rows, tau: int) -> list[float]:
  """`evidence.log2_speedup` of TS over S on the objective p(tau), in the first quarter.

  Test points; each arm at its own rate for early loss.
  """
  p = np.asarray(mixing.temperature_probs(part.sizes, float(tau)))
  until = _quarter(part, found) + 1
  curves = []
  for name in (f"TS {tau}", f"S {tau}"):
    rate = part.rates.index(rows[name]["early"]["rate"])
    curves.append(found["test"][found["arms"].index(name), rate, :, :until] @ p)
  return evidence.log2_speedup(found["steps"][:until], *curves)


def _quarter(part: Part, found) -> int:
  """Position of the evaluation at 25 % of the steps."""
  return int(np.flatnonzero(found["steps"] == part.steps // 4)[0])


def draw(results: dict, path) -> None:
  """Test loss of both domains against the step, at the fixed learning rate."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  part = results["sgd"]
  figure, axes = plt.subplots(1, 2, figsize=(9, 3.7))
  for k, (axis, title) in enumerate(zip(axes, ("large domain", "small domain"), strict=True)):
    for name in DRAWN:
      curve = np.asarray(part["curves"]["test"][name])[:, k]
      axis.plot(part["curves"]["steps"], curve, label=name)
    axis.set(title=f"{title}, n = {part['sizes'][k]}", xlabel="step", ylabel="test loss (nats)")
  axes[0].set_ylim(0.95, 1.2)
  figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(DRAWN))
  figure.tight_layout(rect=(0, 0.08, 1, 1))
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main(parts: dict[str, Part] = PARTS, folder=evidence.RESULTS) -> dict:
  """Runs all parts and writes the results."""
  results = {}
  for name, part in parts.items():
    began = time.monotonic()
    results[name] = summarize(part, train(part))
    results[name]["seconds"] = time.monotonic() - began
    print(f"{name}: {results[name]['seconds']:.0f} s")
    for arm, record in results[name]["arms"].items():
      loss = np.mean(record["final"]["final"], axis=0).round(3)
      print(f"  {arm:14s} rate {record['final']['rate']:<6g} final test loss {loss}")
  results = evidence.rounded(results)
  evidence.save("synthetic", results, folder)
  draw(results, folder / "synthetic.png")
  return results


if __name__ == "__main__":
  import os

  # Runs of a sweep are spread over CPU devices.
  jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
  main()
