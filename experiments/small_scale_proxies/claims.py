"""The paper's claims as rows of measured effects, paired by seed, with verdicts by rule."""

import numpy as np
import scaling_claims
from figures import LARGE, MIDDLE, SMALL, Curve, Figure
from rows import ALIKE, minus, name_of, row

from balance_jax.training.evidence import paired, show, verdict
from balance_jax.training.mixture_summary import seed_stats

HIGH = 0.3  # the highest learning rate


def qk_norm(figure: Figure) -> list[dict]:
  plain, normed = (
    {size: figure.curve(name, size) for size in (SMALL, MIDDLE, LARGE)}
    for name in ("plain", "qk_norm")
  )
  gain = {s: paired(plain[s].sensitivity, normed[s].sensitivity) for s in plain}
  growth = {
    name: paired(curves[LARGE].sensitivity, curves[SMALL].sensitivity)
    for name, curves in (("without", plain), ("with", normed))
  }
  moved = paired(plain[SMALL].unstable_rate, plain[LARGE].unstable_rate)
  return [
    row(
      "qk-norm lowers the sensitivity S",
      "three sizes; S without minus S with",
      "; ".join(f"{s[0]}×{s[1]}: {show(effect)}" for s, effect in gain.items()),
      verdict(*((effect, 0.0) for effect in gain.values())),
    ),
    row(
      "S grows with the number of parameters, without qk-norm",
      "largest minus smallest",
      show(growth["without"]),
      verdict((growth["without"], 0.0)),
    ),
    row(
      "S grows with the number of parameters, with qk-norm",
      "largest minus smallest",
      show(growth["with"]),
      verdict((growth["with"], 0.0)),
    ),
    *_below_the_critical_rate(plain[LARGE], normed[LARGE]),
    row(
      "Without qk-norm the first unstable rate falls with size",
      "log10 of it, smallest minus largest",
      show(moved, 2),
      verdict((moved, 0.0)),
    ),
    *_logits(plain, normed),
    *_gradients(normed),
  ]


def _below_the_critical_rate(plain: Curve, normed: Curve) -> list[dict]:
  rates = (3e-4, 1e-3, 3e-3)
  effects = {rate: paired(plain.at(rate), normed.at(rate)) for rate in rates}
  demands = [(x, -ALIKE) for e in effects.values() for x in (e, minus(e))]
  return [
    row(
      f"Below the critical rate the losses are the same with and without (within {ALIKE})",
      "largest size, rates up to 3e-3; without minus with",
      "; ".join(f"{rate:g}: {show(effect)}" for rate, effect in effects.items()),
      verdict(*demands),
    )
  ]


def _logits(plain, normed) -> list[dict]:
  off, on = (seed_stats(c[LARGE].log10("max_logit_run", HIGH)) for c in (plain, normed))
  growth = paired(plain[LARGE].log10("max_logit", 0.1), plain[SMALL].log10("max_logit", 0.1))
  return [
    row(
      "At the highest rate attention logits pass 1e4 without qk-norm and stay small with it",
      "largest size, rate 0.3, block 0, during the run; log10",
      f"without {show(off, 2)} (must exceed 4), with {show(on, 2)} (must stay below 2)",
      verdict((off, 4.0), (minus(on), -2.0)),
    ),
    row(
      "Attention logits grow with size",
      "without qk-norm, rate 0.1, end of training; log10, largest minus smallest",
      show(growth, 2),
      verdict((growth, 0.0)),
    ),
  ]


def _gradients(normed) -> list[dict]:
  def rms(size, rate):
    return normed[size].log10("grad_rms", rate, "first_mlp")

  over_rate = paired(rms(LARGE, 3e-4), rms(LARGE, HIGH))
  over_size = paired(rms(SMALL, 0.1), rms(LARGE, 0.1))
  blocks = paired(
    np.log10(normed[LARGE].value("block_rms", HIGH)[:, -1]),
    np.log10(normed[LARGE].value("block_rms", 3e-4)[:, -1]),
  )
  return [
    row(
      "The gradient of the first MLP kernel shrinks as the rate grows, towards eps",
      "qk-norm, largest size, end of training; log10 of its RMS, rate 3e-4 minus 0.3",
      show(over_rate, 2),
      verdict((over_rate, 0.0)),
    ),
    row(
      "The same gradient shrinks as the model grows",
      "qk-norm, rate 0.1; log10, smallest minus largest",
      show(over_size, 2),
      verdict((over_size, 0.0)),
    ),
    row(
      "The RMS of a block's output grows with the rate",
      "qk-norm, largest size, last block; log10, rate 0.3 minus 3e-4",
      show(blocks, 2),
      verdict((blocks, 0.0)),
    ),
  ]


def remedies(figure: Figure) -> list[dict]:
  plain, normed = (figure.curve(name, MIDDLE) for name in ("plain", "qk_norm"))
  whole = figure.curve("qk_norm, whole width", MIDDLE)
  worse = paired(whole.sensitivity, normed.sensitivity)
  rows = [
    row(
      "Normalising over the whole width is slightly worse than by head",
      "S of whole width minus S by head",
      show(worse),
      verdict((worse, 0.0)),
    )
  ]
  for entry in figure.curves:
    name = entry["architecture"]
    if name.endswith("(later)"):
      curve = Curve(entry)
      gain, best = (
        paired(plain.sensitivity, curve.sensitivity),
        paired(plain.best_loss, curve.best_loss),
      )
      rows.append(
        row(
          f"Later work: {name.removesuffix(' (later)')} lowers S",
          "S of the plain model minus S with it",
          f"{show(gain)} (best loss {show(minus(best))})",
          verdict((gain, 0.0)),
        )
      )
  return rows


def interventions(figure: Figure) -> list[dict]:
  rows = []
  for name in ("plain", "qk_norm"):
    rows += [*_z_loss(figure, name), *_warm_up(figure, name), _decay(figure, name)]
  return [*rows, *_eps(figure)]


def _gain(figure: Figure, architecture: str, worse: str, better: str, size=MIDDLE) -> dict:
  """S in one setting minus S in another."""
  curves = (figure.curve(architecture, size, setting) for setting in (worse, better))
  return paired(*(curve.sensitivity for curve in curves))


def _z_loss(figure: Figure, name: str) -> list[dict]:
  without, with_z = "no z-loss, no decay", "no decay"
  effect = _gain(figure, name, without, with_z)
  bare, treated = (figure.curve(name, MIDDLE, setting) for setting in (without, with_z))
  log_z = bare.value("log_z", 0.1).mean()
  # The failure is a log Z far below zero; where it has not begun there is nothing to remove.
  found = verdict((effect, 0.0)) if log_z < 0 else "not established"
  smaller = paired(bare.log10("log_z_square", 0.1), treated.log10("log_z_square", 0.1))
  return [
    row(
      "Without decay, z-loss removes late divergence at high rates",
      f"{name}, {name_of(MIDDLE)}; S without z-loss minus S with it",
      f"{show(effect)}; mean log Z at rate 0.1 without it {log_z:+.1f}",
      found,
    ),
    row(
      "z-loss keeps log Z smaller",
      f"{name}, {name_of(MIDDLE)}, no decay, rate 0.1, end; log10 of mean (log Z)^2, without "
      "minus with",
      show(smaller),
      verdict((smaller, 0.0)),
    ),
  ]


def _warm_up(figure: Figure, name: str) -> list[dict]:
  short, long = "warm-up 1 %", "warm-up 25 %"
  gains = {size: _gain(figure, name, short, long, size) for size in (SMALL, MIDDLE)}
  curves = (figure.curve(name, MIDDLE, setting) for setting in (short, long))
  loss = paired(*(curve.best_loss for curve in curves))
  return [
    row(
      "A longer warm-up lowers S",
      f"{name}; S at 1 % of the steps minus S at 25 %",
      "; ".join(f"{name_of(size)}: {show(effect)}" for size, effect in gains.items()),
      verdict(*((effect, 0.0) for effect in gains.values())),
    ),
    row(
      "A longer warm-up lowers the best loss",
      f"{name}, {name_of(MIDDLE)}; at 1 % minus at 25 %",
      show(loss),
      verdict((loss, 0.0)),
    ),
  ]


def _decay(figure: Figure, name: str) -> dict:
  effect = _gain(figure, name, "no decay", "default")
  return row(
    "Independent decay of 1e-4 lowers S",
    f"{name}, {name_of(MIDDLE)}; S without decay minus S with it",
    show(effect),
    verdict((effect, 0.0)),
  )


def _eps(figure: Figure) -> list[dict]:
  usual, small, large = (
    figure.curve("qk_norm", MIDDLE, name) for name in ("default", "eps 1e-15", "eps 1e-6")
  )
  better = paired(usual.at(HIGH), small.at(HIGH))
  worse = paired(large.at(HIGH), usual.at(HIGH))
  ratio = usual.log10("grad_rms", HIGH, "first_mlp").mean() + 8
  return [
    row(
      "eps 1e-15 gives a lower loss than 1e-8 where gradients are small",
      f"qk_norm, {name_of(MIDDLE)}, rate 0.3; loss at 1e-8 minus at 1e-15",
      f"{show(better)}; gradient RMS of the first MLP kernel is 10^{ratio:.1f} eps",
      verdict((better, 0.0)),
    ),
    row(
      "eps 1e-6 is worse than 1e-8 (at 4.8B parameters it diverges)",
      f"qk_norm, {name_of(MIDDLE)}, rate 0.3; loss at 1e-6 minus at 1e-8",
      show(worse),
      verdict((worse, 0.0)),
    ),
  ]


def decay_kind(figure: Figure) -> list[dict]:
  def curves(name):
    return [figure.curve(name, size) for size in (SMALL, MIDDLE)]

  gain = [
    paired(c.best_window, i.best_window)
    for c, i in zip(curves("coupled"), curves("independent"), strict=True)
  ]
  rows = [
    row(
      "Independent decay gives a lower S than coupled decay",
      "S of coupled minus S of independent, each over the better of two windows of three decades",
      "; ".join(f"{name_of(s)}: {show(e)}" for s, e in zip((SMALL, MIDDLE), gain, strict=True)),
      verdict(*((effect, 0.0) for effect in gain)),
    )
  ]
  for name in ("independent", "coupled"):
    more, usual = (figure.curve(n, MIDDLE) for n in (f"{name}, more", name))
    moved = paired(more.best_rate, usual.best_rate)
    rows.append(
      row(
        "More decay moves the best rate slightly up",
        f"{name}, {name_of(MIDDLE)}; log10 of the best rate, ten times the decay minus the usual",
        show(moved, 2),
        verdict((moved, 0.0)),
      )
    )
  return rows


CLAIMS = {
  "qk_norm": qk_norm,
  "remedies": remedies,
  "interventions": interventions,
  "decay_kind": decay_kind,
  "mup": scaling_claims.mup,
  "depth_width": scaling_claims.depth_width,
  "batch_steps": scaling_claims.batch_steps,
  "kappa": scaling_claims.kappa,
  "predict": scaling_claims.predict,
}
