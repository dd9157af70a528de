"""Late in training on real text: does the small language's gradient vanish, and what follows?

  python experiments/upsample_or_upweight/memorised.py

A decoder on a large and a small language of the GCC messages, trained by temperature sampling with
tau = 5 long enough to repeat the small one over a hundred times. On the way, the gradient moments G
of both languages and the variance of the two estimators, by formula and by scatter, at the same
parameters. Theorem 2 says that scalarization has the larger variance; that holds while G is alike
in both. Three cases, in the order they were tried: French and Catalan (152 : 1) with the decoder of
the main run, which memorises little; French and Greek (438 : 1) with a wider one, which memorises
but not enough for so small a share; Croatian and Greek (15 : 1), where less is enough. Needs
Debian's gcc-12-locales. Writes results/memorised.json.
"""

import dataclasses
import time

import evidence
import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import data, mixing, models
from balance_jax.losses import cross_entropy
from balance_jax.training import init_state, make_step
from balance_jax.training.measure import evaluate, evaluation_batches, gradient_variance
from balance_jax.training.optimizers import make_optimizer
from balance_jax.training.sweep import product
from balance_jax.training.sweep_runs import SweepRuns

# Temperature sampling and scalarization, as the exponent a of the draw r ~ p^a q^(1-a).
ESTIMATORS = {"TS": 1.0, "S": 0.0}
KINDS = ("predicted", "observed")


@dataclasses.dataclass(frozen=True)
class Settings:
  """One case; the defaults are the model of configs/upsample_or_upweight_text.py."""

  languages: tuple[str, ...]  # the larger one first
  width: int = 32
  depth: int = 2
  heads: int = 2
  window: int = 32
  tau: float = 5.0
  rate: float = 1e-2
  end_fraction: float = 1.0  # of the learning rate, at the end of its cosine
  steps: int = 3000
  batch: int = 32
  seeds: int = 5
  every: int = 500  # steps between measurements
  examples: int = 128  # of each language, for G
  batches: int = 64  # mini-batches for the scatter


_MEMORISING = Settings((), width=64, heads=4, rate=5e-3, end_fraction=0.1)
CASES = {
  "French and Catalan": Settings(("fr", "ca")),
  "French and Greek": dataclasses.replace(_MEMORISING, languages=("fr", "el"), steps=2500),
  "Croatian and Greek": dataclasses.replace(_MEMORISING, languages=("hr", "el"), steps=1500),
}


def load(settings: Settings) -> dict[str, data.GroupTable]:
  """Rows of GCC messages by split."""

  def table(split):
    documents = data.load_documents("gcc_catalogues", split, languages=settings.languages)
    return data.group_table(documents, window=settings.window)

  return {split: table(split) for split in ("train", "validation")}


def measure(settings: Settings, step, state, inputs) -> dict:
  """Losses, G, and the variance of the batch gradient of both estimators, at a state."""
  batches, table = inputs
  losses = {name: evaluate(step, state, part).mean() for name, part in batches.items()}

  def variance(a):
    mixer = mixing.temperature(table.group_sizes, settings.tau, draw=a)
    return gradient_variance(
      dataclasses.replace(step, mixer=mixer),
      state,
      table,
      examples=settings.examples,
      batches=settings.batches,
    )

  # Mapped, not one after the other, so that it is compiled once.
  found = jax.lax.map(variance, jnp.array(list(ESTIMATORS.values())))
  ratios = {kind: found[f"{kind}_variance"][1] / found[f"{kind}_variance"][0] for kind in KINDS}
  return {**losses, **ratios, "second_moment": found["second_moment"][0]}


def make_runs(settings: Settings, table: data.GroupTable) -> SweepRuns:
  """The training runs, one a seed."""
  decoder = models.Decoder(
    models.DecoderConfig(
      vocab_size=data.VOCAB_SIZE,
      width=settings.width,
      depth=settings.depth,
      heads=settings.heads,
    )
  )

  def per_example_loss(params, rows, key):
    tokens = rows["tokens"]
    return cross_entropy(decoder.apply(params, tokens[:, :-1]), tokens[:, 1:]).mean(axis=-1)

  step = make_step(
    per_example_loss,
    make_optimizer(
      settings.rate,
      total_steps=settings.steps,
      end_fraction=settings.end_fraction,
      weight_decay=0.0,
      b2=0.98,
      eps=1e-6,
    ),
    mixing.temperature(table.sizes, settings.tau),
    table,
    batch_size=settings.batch,
    allocation="multinomial",
    metrics=("loss", "epochs"),
  )

  def init(cell, step):
    run_key, init_key = jax.random.split(jax.random.key(cell["seed"]))
    params = decoder.init(init_key, jnp.zeros((1, settings.window), jnp.int32))
    return init_state(run_key, params, step)

  return SweepRuns(lambda cell: step, init, product(seed=range(settings.seeds)), table)


def train(settings: Settings, tables: dict[str, data.GroupTable]) -> dict:
  """Trains all seeds and measures on the way.

  Returns:
    What the table needs: "steps" (E,); arrays (S, E, ...) of "train" and "validation" loss (K,),
    "second_moment" (K,), and the ratio V_S / V_TS, "predicted" and "observed"; "epochs" (S, K);
    "threshold", the G_small / G_large below which scalarization has the smaller second moment.
  """
  runs = make_runs(settings, tables["train"])
  inputs = (
    {k: evaluation_batches(t, 96, settings.batch) for k, t in tables.items()},
    tables["train"],
  )

  def at(step, state, inputs):
    return measure(settings, step, state, inputs)

  states, measured, epochs = runs.init(), [], None
  for done in range(0, settings.steps + 1, settings.every):
    measured.append(jax.device_get(runs.apply(at, states, inputs)))
    if done < settings.steps:
      states, metrics = runs.advance(states, settings.every)
      epochs = np.asarray(metrics["epochs"])[:, -1]
      print(f"step {done + settings.every} of {settings.steps}", flush=True)
  sizes = tables["train"].group_sizes
  p = np.asarray(mixing.temperature_probs(sizes, settings.tau))
  # V_S - V_TS = sum_i gain_i G_i
  gain = p * (np.asarray(mixing.scalarization_weights(sizes, settings.tau)) - 1)
  return {
    "settings": dataclasses.asdict(settings),
    "sizes": sizes,
    "steps": np.arange(0, settings.steps + 1, settings.every),
    "epochs": epochs,
    "threshold": -gain[0] / gain[1],
    **jax.tree.map(lambda *x: np.stack(x, 1), *measured),
  }


def show(results: dict) -> None:
  """Prints one line a measurement."""
  print(f"G_small / G_large below {results['threshold']:.4f}: less variance for scalarization")
  moments, losses = (np.mean(results[key], axis=0) for key in ("second_moment", "train"))
  ratios = [np.median(results[kind], axis=0) for kind in KINDS]
  for i, step in enumerate(results["steps"]):
    print(
      f"step {step:5d} train loss {losses[i].round(3)} G ratio {moments[i, 1] / moments[i, 0]:.4f} "
      f"V_S / V_TS {ratios[0][i]:.2f} by formula, {ratios[1][i]:.2f} by scatter"
    )


def main(cases: dict[str, Settings] = CASES, load=load, folder=evidence.RESULTS) -> dict:
  """Runs all cases and writes the results."""
  results = {}
  for name, settings in cases.items():
    began = time.monotonic()
    found = train(settings, load(settings))
    results[name] = evidence.rounded({**found, "seconds": time.monotonic() - began})
    print(f"{name}: {results[name]['seconds']:.0f} s")
    show(results[name])
  evidence.save("memorised", results, folder)
  return results


if __name__ == "__main__":
  import os

  # Runs of a sweep are spread over CPU devices.
  jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
  main()
