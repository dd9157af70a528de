"""Claims about sizes, batches and steps, forced logits, and prediction; see `claims`."""

import numpy as np
from figures import LARGE, MIDDLE, Curve, Figure
from rows import ALIKE, alike, minus, name_of, row

from balance_jax.training.evidence import paired, show, verdict


def mup(figure: Figure) -> list[dict]:
  sizes = figure.sizes("standard")
  names = [n for n in dict.fromkeys(c["architecture"] for c in figure.curves) if n != "standard"]
  curves = {n: [figure.curve(n, size) for size in sizes] for n in ("standard", *names)}

  def drift(name):
    """Decades between the lowest and the highest best rate over the widths."""
    return np.ptp([c.best_rate for c in curves[name]], axis=0)

  rows = []
  for name in names:
    steadier = paired(drift("standard"), drift(name))
    largest, usual = curves[name][-1], curves["standard"][-1]
    gain = paired(usual.sensitivity, largest.sensitivity)
    loss = paired(usual.best_loss, largest.best_loss)
    rows += [
      row(
        "muP keeps the best rate in place as the width grows",
        f"{name}; decades the best rate moves over three widths, standard minus muP",
        f"{show(steadier, 2)} (standard moves {drift('standard').mean():.2f})",
        verdict((steadier, 0.0)),
      ),
      row(
        f"muP lowers neither S nor the best loss (by more than {ALIKE})",
        f"{name}, {name_of(sizes[-1])}; standard minus muP",
        f"S {show(gain)}, loss {show(loss)}",
        verdict((minus(gain), -ALIKE), (minus(loss), -ALIKE)),
      ),
    ]
  return rows


def depth_width(figure: Figure) -> list[dict]:
  def series(sizes):
    curves = [figure.curve("qk_norm", size) for size in sizes]
    return np.log2([c.parameters for c in curves]), curves

  deep_n, deep = series([(48, 1), (48, 2), (48, 4), (48, 6)])
  wide_n, wide = series([(32, 2), (48, 2), (64, 2), (96, 2)])

  def slope(n, curves):
    return np.polyfit(n, np.array([c.sensitivity for c in curves]), 1)[0]

  faster = paired(slope(deep_n, deep), slope(wide_n, wide))
  losses = np.array([c.best_loss for c in wide])
  same_size = [np.interp(deep_n[-1], wide_n, column) for column in losses.T]
  lower = paired(same_size, deep[-1].best_loss)
  return [
    row(
      "Depth raises S faster than width",
      "slope of S over log2 of the parameters, depth 1 to 6 minus width 32 to 96",
      show(faster),
      verdict((faster, 0.0)),
    ),
    row(
      "The deeper model has the lower best loss at the largest size",
      f"{name_of((48, 6))}; width at as many parameters (interpolated) minus depth",
      show(lower),
      verdict((lower, 0.0)),
    ),
  ]


def batch_steps(figure: Figure) -> list[dict]:
  usual = figure.curve("batch 16, 120 steps", MIDDLE)
  rows = []
  for entry in figure.curves:
    name = entry["architecture"]
    if name != "batch 16, 120 steps":
      change = paired(Curve(entry).sensitivity, usual.sensitivity)
      rows.append(
        row(
          f"Batch size and steps hardly change S (by at most {ALIKE})",
          f"{name}, minus batch 16, 120 steps",
          show(change),
          alike(change),
        )
      )
  return rows


def kappa(figure: Figure) -> list[dict]:
  best = {
    power: figure.curve("forced logits", LARGE, f"kappa 1e{power}").best_loss for power in range(5)
  }
  bigram = figure.curve("forced logits", (64, 0), "kappa 1e0").best_loss
  starts, fails = paired(best[3], best[0]), paired(best[4], bigram)
  shown = ", ".join(f"1e{power} {loss.mean():.3f}" for power, loss in best.items())
  return [
    row(
      "Forced attention logits of 1e3 begin to hurt",
      "best loss over three rates; at kappa 1e3 minus at 1",
      f"{show(starts)} (losses {shown})",
      verdict((starts, 0.0)),
    ),
    row(
      "At 1e4 the model is worse than one without blocks",
      "best loss; at kappa 1e4 minus that of the bigram model",
      f"{show(fails)} (bigram {bigram.mean():.3f})",
      verdict((fails, 0.0)),
    ),
  ]


def predict(figure: Figure) -> list[dict]:
  rows = []
  for name in ("softmax", "squared_relu"):
    ladders = [ladder for ladder in figure.ladders if ladder["architecture"] == name]
    held = {ladder["learning_rate"]: ladder["held_back"] for ladder in ladders}
    right = sum(h["agree"] for h in held.values())
    broke = [f"{rate:g}" for rate, h in held.items() if h["measured_unstable"]]
    said = [f"{rate:g}" for rate, h in held.items() if h["predicted_unstable"]]
    sizes = figure.sizes(name)
    growth = paired(
      figure.curve(name, sizes[-1]).log10("max_logit", 0.1),
      figure.curve(name, sizes[0]).log10("max_logit", 0.1),
    )
    rows += [
      row(
        "Which rates pass a logit of 1e4 at a larger size is predicted from smaller ones",
        f"{name}, {name_of(sizes[-1])} held back, medians over seeds",
        f"{right} of {len(held)} rates right; predicted {', '.join(said) or 'none'}, "
        f"measured {', '.join(broke) or 'none'}",
        _prediction_verdict(right, held, broke),
      ),
      row(
        "Attention logits grow with size" + (", softmax or not" if name == "squared_relu" else ""),
        f"{name}, rate 0.1, step 80; log10, largest minus smallest",
        show(growth, 2),
        verdict((growth, 0.0)),
      ),
    ]
  return rows


def _prediction_verdict(right: int, held, broke) -> str:
  """Nothing is shown where nothing breaks; else all rates must be right."""
  if not broke:
    return "not established"
  return "reproduces" if right == len(held) else "does not"
