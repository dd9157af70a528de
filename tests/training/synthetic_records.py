"""Records of a mixture experiment that never ran: realistic in shape, quick, deterministic."""

import numpy as np

GROUPS = ("es", "fr", "nl", "pl", "hu", "hr", "lv", "rm")
SIZES = (2800.0, 2000.0, 1400.0, 900.0, 600.0, 300.0, 180.0, 100.0)
METHODS = ("proportional", "temperature_5", "scalarization_5", "optimal_5", "cooldown", "uniform")


def tempered(sizes, tau):
  powers = (np.asarray(sizes) / np.sum(sizes)) ** (1 / tau)
  return powers / powers.sum()


def mixture(method, sizes, progress):
  """(p, r) of a method at a share `progress` of training."""
  natural, hot = tempered(sizes, 1.0), tempered(sizes, 5.0)
  if method == "proportional":
    return natural, natural
  if method == "uniform":
    return tempered(sizes, 1e9), tempered(sizes, 1e9)
  if method == "cooldown":
    return (hot, hot) if progress < 0.6 else (natural, natural)
  draw = {"scalarization_5": natural, "optimal_5": np.sqrt(hot * natural)}.get(method, hot)
  return hot, draw / draw.sum()


def make_records(
  *, groups=GROUPS, sizes=SIZES, methods=METHODS, seeds=3, steps=600, every=50, moments=True
):
  """Train, eval and (if asked for) moments records of all methods and seeds."""
  records = []
  for method in methods:
    for seed in range(seeds):
      records += _run(method, seed, groups, np.asarray(sizes), steps, every, moments)
  return records


def _run(method, seed, groups, sizes, steps, every, moments):
  rng = np.random.default_rng([seed, *method.encode()])
  luck = np.random.default_rng(seed).normal(0, 0.01, len(groups))  # shared by all methods
  floor = 1.1 + 0.25 * np.arange(len(groups)) / len(groups)
  seen = np.zeros(len(groups))
  share = sizes / sizes.sum()
  records = []
  for step in range(0, steps + 1, every):
    p, r = mixture(method, sizes, step / steps)
    seen = seen + (r * every * 24 / sizes if step else 0)
    learnt = (p * step / steps * len(groups)) ** 0.35 + 3 * step / steps
    loss = floor + luck + 4.3 * np.exp(-1.1 * learnt) + 0.05 * np.maximum(seen - 3, 0)
    head = {"method": method, "seed": seed, "step": step}
    noisy = loss + rng.normal(0, 0.008, len(groups))
    records.append({"event": "eval", **head, "group_loss": noisy.tolist()})
    variance = float((p**2 / r * (1 + 0.5 * share)).sum() * np.exp(-2 * step / steps))
    if step:
      records.append(
        {
          "event": "train",
          **head,
          "loss": float(p @ loss),
          "group_loss": [None if r_k < 0.01 else float(x) for x, r_k in zip(loss, r, strict=True)],
          "p": p.tolist(),
          "r": r.tolist(),
          "epochs": seen.tolist(),
          "grad_norm": 1.0 + variance,
          "grad_norm_var": variance * float(rng.uniform(0.9, 1.1)),
        }
      )
    if moments and step % (4 * every) == 0 and step:
      records.append(
        {
          "event": "moments",
          **head,
          "second_moment": [1.0] * len(groups),
          "predicted_variance": variance,
          "observed_variance": variance * float(rng.lognormal(0, 0.1)),
        }
      )
  return records


def describe(**changes):
  """A description as the runner writes it."""
  description = {
    "title": "Upsample or upweight? Eight languages of <Plone> & friends",
    "groups": list(GROUPS),
    "sizes": list(SIZES),
    "device": "TFRT_CPU_0, 8 devices",
    "time": "0:03:12",
    "versions": {"jax": "0.10.2", "flax": "0.12.8", "python": "3.11.2"},
    "config": {
      "model": {"layers": 4, "width": 128, "heads": 4},
      "optimizer": {"learning_rate": 1e-3, "warmup_steps": 60, "weight_decay": 1e-4},
      "batch_size": 64,
      "taus": [1.0, 5.0],
    },
    "command": "python -m balance_jax.main --config=configs/mixing.py --workdir=runs/mixing",
  }
  return description | changes
