"""Training steps of CNN-7 with certified losses: this library against PyTorch on the same CPU.

Three steps: clean (cross entropy), IBP (batch normalisation of the clean batch, bounds, margins
with the last layer elided, both warm-up regularisers) and CROWN-IBP (the same, with half of the
CROWN bound mixed in). All with global gradient norm clipped at 10 and Adam, float32, one batch that
stays in memory. PyTorch: torch_certified.py. The sides take turns, the first turn of each is
warm-up. Ratios are torch time over jax time, turn by turn: above 1, this library is faster; and
each side's certified steps over its own clean step. PyTorch's threads wait for each other, so that
other work on the machine makes it look slower: `taskset -c 0` in front puts both on one core.

Command: python benchmarks/certified_step.py
Needs torch 2.13.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from balance_jax import mixing, models, robust, training
from balance_jax.training.robust_runs import RobustLoss, network_of, optimizer_of

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import common
from torch_certified import TorchCertifiedTrainer

STEPS = ("clean", "ibp", "crown-ibp")
# Image, batch, width, dense units, and turns.
SIZES = {
  "w16": {"image": (28, 28, 1), "batch": 64, "width": 16, "dense": 512, "repeats": 20},
  "w64": {"image": (32, 32, 3), "batch": 128, "width": 64, "dense": 512, "repeats": 3},
}
FLOPS: dict[str, float] = {}  # of the compiled steps of this library, of the last size
EPS, LAMBDA, MIX, TAU, LEARNING_RATE = 8 / 255, 0.25, 0.5, 0.5, 5e-4


def draw_batch(size: dict) -> tuple[np.ndarray, np.ndarray]:
  """Images float32 (B, H, W, C) in [0, 1] and labels int64 (B,) of 10 classes."""
  rng = np.random.default_rng(0)
  images = rng.uniform(0, 1, (size["batch"], *size["image"])).astype(np.float32)
  return images, rng.integers(0, 10, size["batch"])


def torch_sides(size: dict, steps: list[str]) -> dict[str, Callable[[], float]]:
  """One step of PyTorch a call, by name."""
  images, labels = draw_batch(size)
  sizes = {name: size[name] for name in ("image", "width", "dense")}
  options = {
    "clean": None,
    "ibp": {"lam": LAMBDA, "tau": TAU},
    "crown-ibp": {"lam": LAMBDA, "tau": TAU, "mix": MIX},
  }

  def side(step):
    trainer = TorchCertifiedTrainer(learning_rate=LEARNING_RATE, **sizes)
    if step == "clean":
      return lambda: trainer.clean_step(images, labels)
    return lambda: trainer.step(images, labels, EPS, **options[step])

  return {f"torch {step}": side(step) for step in steps}


def jax_sides(size: dict, steps: list[str]) -> dict[str, Callable[[], float]]:
  """One compiled step of this library a call, by name ("jax ibp", ...); blocks on its loss."""
  images, labels = draw_batch(size)
  model = models.CNN7(width=size["width"], dense=size["dense"], initialization="ibp")
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *size["image"])))
  network = network_of(model, has_parts=True)
  rows = {"image": jnp.asarray(images), "label": jnp.asarray(labels, jnp.int32)}
  batch = training.Batch(rows, jnp.zeros(len(labels), jnp.int32), jnp.ones(len(labels)))
  optimizer = optimizer_of(
    {"clip_norm": 10.0, "decay_factor": 1.0, "b1": 0.9, "b2": 0.999, "epsilon": 1e-8},
    LEARNING_RATE,
    (),
  )

  def side(step):
    # At half of the target radius the weights of regularisers and CROWN are LAMBDA and MIX.
    objective = robust.Objective(
      method="natural" if step == "clean" else step, eps=2 * EPS, lambda_0=2 * LAMBDA, tau=TAU
    )

    def loss(params, rows, key, context):
      result = objective(network, params, context.carried, rows["image"], rows["label"], key, EPS)
      return result.losses, training.Observed(carried={"running": result.running})

    train = training.make_step(
      loss,
      optimizer,
      mixing.uniform([len(labels)]),
      batch_size=len(labels),
      num_groups=1,
      metrics=("loss",),
      carried=RobustLoss.carried(lambda key: variables),
    )
    state = training.init_state(jax.random.key(1), variables["params"], train)
    compiled = jax.jit(train, donate_argnums=0).lower(state, batch).compile()
    FLOPS[step] = compiled.cost_analysis()["flops"]

    def call():
      nonlocal state
      state, metrics = compiled(state, batch)
      return float(metrics["loss"])

    return call

  return {f"jax {step}": side(step) for step in steps}


def measure(size: dict, steps: list[str], repeats: int) -> dict:
  """Seconds a step, ratios of each side to its clean step, and of the sides to each other."""
  times = common.alternate(torch_sides(size, steps) | jax_sides(size, steps), repeats)
  result = {**size, "repeats": repeats, "seconds": common.medians(times)}
  over_clean, torch_over_jax = {}, {}
  for name in times:
    side, step = name.split()
    if step != "clean" and f"{side} clean" in times:
      over_clean[name] = common.paired_ratio(times, name, f"{side} clean")
    if side == "torch" and f"jax {step}" in times:
      torch_over_jax[step] = common.paired_ratio(times, name, f"jax {step}")
  flops = (
    {name: round(value / FLOPS["clean"], 3) for name, value in FLOPS.items()}
    if "clean" in FLOPS
    else {}
  )
  return {
    **result,
    "over_clean": over_clean,
    "torch_over_jax": torch_over_jax,
    "jax_flops_over_clean": flops,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", default="", help="JSON file to write")
  parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
  parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
  parser.add_argument("--repeats", type=int, help="turns instead of those of the size")
  parser.add_argument("--batch", type=int, help="batch instead of that of the size")
  args = parser.parse_args()
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  result = {"threads": torch.get_num_threads(), "sizes": {}}
  for name in args.sizes:
    size = dict(SIZES[name])
    repeats = args.repeats or size["repeats"]
    size["batch"] = args.batch or size["batch"]
    found = result["sizes"][name] = measure(size, args.steps, repeats)
    for label in ("seconds", "over_clean", "torch_over_jax", "jax_flops_over_clean"):
      print(f"{name} {label}: {found[label]}", flush=True)
  common.write("certified_step", result, ("jax", "flax", "torch"), args.out)


if __name__ == "__main__":
  main()
