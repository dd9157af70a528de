"""Records of a robust training experiment that never ran: realistic in shape, deterministic."""

import numpy as np

ARMS = ("baseline", "no BN", "all")
EPS = (0.1, 0.2)


def make_records(
  *,
  arms=ARMS,
  settings=("default",),
  eps=EPS,
  seeds=3,
  layers=3,
  classes=4,
  points=8,
  curve=True,
  attacks_only=(),
):
  """All runs; later arms have lower verified errors, later settings trade natural for certified.

  Arms named in `attacks_only` have no bounds in training; "no BN" collapses at the largest radius.
  """
  records = []
  for a, arm in enumerate(arms):
    for s, setting in enumerate(settings):
      for radius in eps:
        for seed in range(seeds):
          label = {
            "method": f"{arm}, {setting}",
            "arm": arm,
            "setting": setting,
            "eps": radius,
            "learning_rate": 1e-3,
            "seed": seed,
          }
          rng = np.random.default_rng([a, s, seed, int(1000 * radius)])
          collapsed = arm == "no BN" and radius == eps[-1]
          if arm not in attacks_only:
            records += _train(label, rng, a, layers, points)
          else:
            records += _train(label, rng, a, 0, points)
          records += _measured(label, rng, a, s, classes, points, collapsed, curve)
  return records


def _train(label, rng, place, layers, points):
  records = []
  for k in range(1, points + 1):
    part = k / points
    now = label["eps"] * float(np.clip((part - 0.25) / 0.5, 0, 1))
    loss = float(2.3 * np.exp(-2 * part) + 4 * now + 0.03 * rng.normal())
    record = {
      "event": "train",
      **label,
      "step": 10 * k,
      "epoch": 2.5 * k,
      "loss": loss,
      "grad_norm": 1.0,
      "natural_loss": 0.8 * loss,
      "eps_now": now,
    }
    if layers:
      growth = 1.3 + 0.5 * (place == 0)
      undecided = [min(0.9, 0.02 + 2 * now * (1 + i) / layers) for i in range(layers)]
      record |= {
        "margin": 1.0 - 4 * now,
        "verified": float(np.clip(part - now + 0.02 * rng.normal(), 0, 1)),
        "radius": [max(now, 1e-6 * k) * growth**i for i in range(layers)],
        "relu_states": [[0.4 * (1 - u), 0.6 * (1 - u), u] for u in undecided],
      }
    records.append(record)
  return records


def _measured(label, rng, place, s, classes, points, collapsed, curve):
  start = 0.95 - label["eps"] + 0.005 * rng.normal()
  # A setting in the middle is behind in both: off the front.
  natural = start - 0.015 * s - 0.02 * (s == 1)
  certified = start - 0.9 * label["eps"] + 0.015 * place + 0.008 * s - 0.03 * (s == 1)
  certified = min(certified + 0.005 * rng.normal(), natural - 0.002)
  if collapsed:
    natural = certified = 1 / classes
  attacked = (natural + certified) / 2
  shift = np.linspace(-0.04, 0.04, classes) * (not collapsed)
  shares = {"natural": natural, "attacked": attacked, "certified": certified}
  base = {**label, "step": 10 * points, "violations": 0, "class_counts": [50] * classes}
  base |= {f"{k}_by_class": [float(v + x) for x in shift] for k, v in shares.items()}
  base |= {k: float(v) for k, v in shares.items()}
  base |= {"certified_ibp": base["certified"] - 0.01, "certified_crown_ibp": base["certified"]}
  early = {**base, "step": 5 * points, "natural": 0.5, "certified": 0.1, "attacked": 0.3}
  test = {"event": "test", **base}
  if curve:
    grid = np.linspace(0.25, 1.5, 6) * label["eps"]
    edges = np.linspace(-4, 4, 33)
    middle = (edges[1:] + edges[:-1]) / 2
    test |= {
      "curve_eps": grid.tolist(),
      "curve_certified": (natural + (certified - natural) * (grid / label["eps"]) ** 2).tolist(),
      "curve_attacked": (natural + (attacked - natural) * grid / label["eps"]).tolist(),
      "margin_edges": edges.tolist(),
      "margin_histogram": np.round(200 * np.exp(-((middle - 1 - 0.4 * place) ** 2))).tolist(),
    }
  return [{"event": "eval", **early}, {"event": "eval", **base}, test]


def describe(**changes):
  """A description as the runner writes it."""
  description = {
    "title": "Certified training of <tiny> & friends",
    "selection": "certified",
    "device": "2 x cpu",
    "seconds": 240.5,
    "versions": {"jax": "0.10.2", "flax": "0.12.8"},
    "config": {"eps": [0.1, 0.2], "train.steps": 80},
  }
  return description | changes
