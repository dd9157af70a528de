"""Training steps of CNN-7 on a CPU: gradients of convolutions in their usual and in our form.

A step is the cross entropy in training mode, its gradient and plain gradient descent, float32.
"jax" is `models.CNN7` in a `lax.scan`, as training runs it; "jax, lax" the same with how="lax", the
gradients that JAX writes; "jax, lax, no scan" those steps as calls of one compiled step. "torch" is
the same network in PyTorch, eager, images NCHW; "torch, channels last" with that memory format.
Sides take turns. PyTorch's threads wait for each other, so on a busy machine wall time flatters
this library; with `taskset -c 0` in front all run on one core.

Command: taskset -c 0 python benchmarks/conv_step.py
Needs torch 2.13; about five minutes.
"""

import argparse
import os
import time
from collections.abc import Callable

import common
import jax
import numpy as np
import torch
from torch import nn

from balance_jax import models
from balance_jax.losses import cross_entropy

# Width, image, batch.
SIZES = ((16, (28, 28, 1), 32), (16, (28, 28, 1), 128), (64, (32, 32, 3), 32))
STEPS = 2
RATE = 0.01


def jax_side(width: int, image: tuple, batch: int, how: str, scan: bool) -> Callable[[], object]:
  """A call that takes STEPS steps and returns the last loss."""
  model = models.CNN7(width=width, how=how)
  x, labels = data(image, batch)
  # Draws of the default generator take longer to compile than the step.
  key = jax.random.key(0, impl="unsafe_rbg")
  variables = jax.jit(model.init)(key, x[:1])

  def loss(params, stats):
    variables = {"params": params, "batch_stats": stats}
    logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    return cross_entropy(logits, labels).mean(), updates["batch_stats"]

  def step(state, _=None):
    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(*state)
    params = jax.tree.map(lambda param, grad: param - RATE * grad, state[0], grads)
    return (params, stats), value

  state = (variables["params"], variables["batch_stats"])
  if scan:
    run = jax.jit(lambda state: jax.lax.scan(step, state, None, length=STEPS))
    return lambda: jax.block_until_ready(run(state))
  run = jax.jit(step)

  def steps():
    new = state
    for _ in range(STEPS):
      new, value = run(new)
    return jax.block_until_ready(value)

  return steps


def torch_side(width: int, image: tuple, batch: int, layout) -> Callable[[], object]:
  """As `jax_side`, in PyTorch."""
  layers, channels = [], image[-1]
  for multiple, stride in models.CNN7().convs:
    layers += [
      nn.Conv2d(channels, multiple * width, 3, stride, 1),
      nn.BatchNorm2d(multiple * width),
      nn.ReLU(),
    ]
    channels = multiple * width
  units = channels * (image[0] // 2) * (image[1] // 2)
  layers += [nn.Flatten(), nn.Linear(units, 512), nn.BatchNorm1d(512), nn.ReLU()]
  model = nn.Sequential(*layers, nn.Linear(512, 10)).to(memory_format=layout)
  x, labels = (torch.tensor(array) for array in data(image, batch))
  x, labels = x.permute(0, 3, 1, 2).contiguous(memory_format=layout), labels.long()
  optimizer = torch.optim.SGD(model.parameters(), RATE, fused=True)

  def steps():
    for _ in range(STEPS):
      optimizer.zero_grad()
      loss = nn.functional.cross_entropy(model(x), labels)
      loss.backward()
      optimizer.step()
    return loss.item()

  return steps


def data(image: tuple, batch: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  return rng.random((batch, *image), np.float32), rng.integers(0, 10, batch, np.int32)


def measure(width: int, image: tuple, batch: int, repeats: int) -> dict:
  """Milliseconds a step by side, and ratios to "jax" turn by turn."""
  size = (width, image, batch)
  slow = jax_side(*size, how="lax", scan=True)
  sides = {
    "jax": jax_side(*size, how="auto", scan=True),
    "jax, lax, no scan": jax_side(*size, how="lax", scan=False),
    "torch": torch_side(*size, torch.contiguous_format),
    "torch, channels last": torch_side(*size, torch.channels_last),
  }
  times = common.alternate(sides, repeats)
  # Too slow to take part in every turn.
  slow()
  start = time.perf_counter()
  slow()
  steps = common.medians(times) | {"jax, lax": time.perf_counter() - start}
  return {
    "width": width,
    "image": list(image),
    "batch": batch,
    "turns": repeats,
    "ms_per_step": {side: round(1e3 * value / STEPS, 2) for side, value in steps.items()},
    "time_over_jax": {
      side: {
        name: round(value, 3) for name, value in common.paired_ratio(times, side, "jax").items()
      }
      for side in list(sides)[1:]
    },
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--out", default="", help="JSON file; default benchmarks/results/")
  args = parser.parse_args()
  cores = len(os.sched_getaffinity(0))
  torch.set_num_threads(cores)
  sizes = []
  for size in SIZES:
    sizes.append(measure(*size, args.repeats))
    print(sizes[-1], flush=True)
  common.write("conv_step", {"cores": cores, "sizes": sizes}, ("jax", "flax", "torch"), args.out)


if __name__ == "__main__":
  main()
