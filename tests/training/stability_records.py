"""Records of a stability experiment that never ran: realistic in shape, quick, deterministic."""

import numpy as np

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SIZES = ((32, 1), (48, 2), (64, 2), (96, 3))
INIT = float(np.log(128))


def parameters(width, depth):
  return 12 * depth * width**2


def make_records(
  *,
  architectures=("plain", "qk_norm"),
  sizes=SIZES,
  settings=("default",),
  rates=RATES,
  seeds=3,
  steps=40,
  every=10,
  statistics=True,
  diverge=True,
):
  """All runs; "qk_norm" bears high rates, the others diverge where N and rate are large."""
  cells = [
    (architecture, size, setting, rate, seed)
    for architecture in architectures
    for size in sizes
    for setting in settings
    for rate in rates
    for seed in range(seeds)
  ]
  return [
    record
    for cell in cells
    for record in _run(*cell, settings.index(cell[2]), steps, every, statistics, diverge)
  ]


def _run(architecture, size, setting, rate, seed, place, steps, every, statistics, diverge):
  (width, depth), rng = (
    size,
    np.random.default_rng([seed, *size, int(1e5 * rate), *architecture.encode()]),
  )
  count = parameters(width, depth)
  label = {
    "method": f"{architecture}, {setting}, rate {rate:g}",
    "architecture": architecture,
    "width": width,
    "depth": depth,
    "parameters": count + 16 * depth * (architecture == "qk_norm"),
    "intervention": setting,
    "learning_rate": rate,
    "seed": seed,
  }
  tame = architecture == "qk_norm"
  start = INIT + 0.01 * rng.normal()
  off = np.log10(rate / 1e-2)
  slope = (0.12 if tame else 0.5) * (count / 1e4) ** 0.15 * (1 + 0.1 * place)
  best = 1.9 - 0.15 * np.log10(count / 1e4)
  final = best + 0.45 * min(off, 0) ** 2 + slope * max(off, 0) ** 1.5 + 0.01 * rng.normal()
  logit = 8 * (rate / 3e-4) ** 0.2 if tame else 2e7 * (count / 1e5) ** 1.1 * rate**2.4 + 5
  logit *= np.exp(0.1 * rng.normal())
  broken = diverge and not tame and logit > 3e6 and seed != 1
  records = [{"event": "eval", **label, "step": 0, "loss": start}]
  for step in range(every, steps + 1, every):
    part = step / steps
    train = {"loss": start + part * (final - start), "grad_norm": 1.0}
    if statistics:
      gradient = 3e-6 / (rate + 1e-3) * (count / 1e4) ** -0.6
      gone = broken and part > 0.5
      train |= {
        "max_logit": [None if gone else 1.2 * logit * part] + [5.0] * (depth - 1),
        "max_logit_last": [None if gone else logit * part] + [4.0] * (depth - 1),
        "entropy": [None if gone else 1.5] * depth,
        "block_rms": [None if gone else 1.0 + 10 * rate] * depth,
        "log_z": None if gone else 3.0,
        "log_z_square": None if gone else 9.5,
        "grad_rms": {"first_mlp": None if gone else gradient, "head": None if gone else 2e-3},
        "update_rms": {"first_mlp": None if gone else 1.0, "head": 1.0},
      }
    records.append({"event": "train", **label, "step": step, **train})
  records.append(
    {"event": "eval", **label, "step": steps, "loss": None if broken else float(final)}
  )
  return records


def describe(**changes):
  """A description as the runner writes it."""
  description = {
    "title": "Learning-rate sensitivity of <tiny> & friends",
    "hold_back_largest": True,
    "device": "2 x cpu",
    "seconds": 240.5,
    "versions": {"jax": "0.10.2", "flax": "0.12.8"},
    "config": {"optimizer.eps": 1e-8, "train.steps": 40, "sizes": [[32, 1], [48, 2]]},
  }
  return description | changes
