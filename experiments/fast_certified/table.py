"""Rewrites the tables of README.md and the figure from the results.

python experiments/fast_certified/table.py
"""

from pathlib import Path

import claims
from collect import RESULTS, STUDIES

from balance_jax.training import evidence
from balance_jax.training.evidence import insert, markdown
from balance_jax.training.mixture_summary import seed_stats

README = Path(__file__).parent / "README.md"
CLAIMS = ("claim", "difference", "measured (95 % interval)", "verdict")


def spread(values: list[float]) -> str:
  """Mean and standard deviation over seeds."""
  stats = seed_stats(values)
  return f"{stats['mean']:.2f} ± {stats['std']:.2f}"


def claims_table(rows) -> str:
  """Claims with their verdicts."""
  return markdown(CLAIMS, [(*row[:3], f"**{row[3]}**") for row in rows])


def errors_table(arms: dict) -> str:
  """Errors of the arms of a study without settings."""
  measures = ("natural", "attacked", "certified", "certified_ibp")
  values = [
    (name, *(spread(claims.errors(arm, measure)) for measure in measures))
    for name, arm in arms.items()
  ]
  return markdown(("arm", "natural", "attacked", "verified", "verified by IBP alone"), values)


def points_table(study: dict) -> str:
  """Errors of every setting, with those of validation images that choose."""
  rows = []
  for point in sorted(study["points"], key=lambda point: point["eps"]):
    errors = [
      spread(claims.errors(point[split], measure))
      for split, measure in (
        ("eval", "natural"),
        ("eval", "certified"),
        ("test", "natural"),
        ("test", "attacked"),
        ("test", "certified"),
      )
    ]
    role = "chosen" if point["chosen"] else "front" if point["front"] else ""
    rows.append((f"{point['eps']:g}", point["arm"], point["setting"], *errors, role))
  splits = ("natural, validation", "verified, validation", "natural", "attacked", "verified")
  return markdown(("eps", "method", "setting", *splits, ""), rows)


def gain_table(gains: dict) -> str:
  """Growth of the bounds from layer to layer."""
  layers = [
    (name, *(f"{seed_stats(layer)['mean']:.3g}" for layer in zip(*seeds, strict=True)))
    for name, seeds in gains.items()
  ]
  return markdown(("", *(f"layer {i + 1}" for i in range(len(layers[0]) - 1))), layers)


def render(found: dict) -> str:
  """All tables, in Markdown."""
  ablation, ramp, fashion = (claims.chosen(found[name]) for name in ("ablation", "ramp", "fashion"))
  over = "Errors on test images in %, mean ± standard deviation over the seeds:"
  return "\n\n".join(
    [
      "### Ablation",
      claims_table([*claims.ablation_rows(ablation), *claims.gain_rows(found["gain"])]),
      over,
      errors_table(ablation),
      "Mean radius of each layer over that of the input at initialisation, mean over seeds:",
      gain_table(found["gain"]),
      "### Methods",
      claims_table(claims.method_rows(found["methods"])),
      f"{over[:-1]}; *chosen* by the verified error of validation images, *front*: no setting of "
      "the method is better there in both errors:",
      points_table(found["methods"]),
      "### Length of the ramp",
      claims_table(claims.ramp_rows(ramp)),
      over,
      errors_table(ramp),
      "### Fashion-MNIST",
      claims_table(claims.fashion_rows(fashion)),
      over,
      errors_table(fashion),
      "### All studies",
      claims_table([claims.sound_row({name: found[name] for name in STUDIES})]),
    ]
  )


def load() -> dict:
  """The results, by file."""
  return {name: evidence.load(RESULTS / f"{name}.json") for name in (*STUDIES, "gain")}


def draw(study: dict, path: Path) -> None:
  """Natural against certified accuracy of every method, a panel for each radius."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  radii = sorted({point["eps"] for point in study["points"]})
  names = list(dict.fromkeys(point["arm"] for point in study["points"]))
  figure, axes = plt.subplots(1, len(radii), figsize=(10, 4.2), squeeze=False)
  for axis, eps in zip(axes[0], radii, strict=True):
    for color, name in enumerate(names):
      points = [p for p in study["points"] if (p["arm"], p["eps"]) == (name, eps)]
      place = sorted(
        tuple(100 * seed_stats(p["test"][m])["mean"] for m in ("natural", "certified"))
        for p in points
      )
      axis.plot(*zip(*place, strict=True), "o-", ms=4, lw=1, color=f"C{color}", label=name)
      (best,) = (p for p in points if p["chosen"])
      x, y = (seed_stats([100 * v for v in best["test"][m]]) for m in ("natural", "certified"))
      bars = {"xerr": x["std"], "yerr": y["std"]}
      axis.errorbar(x["mean"], y["mean"], **bars, fmt="s", ms=6, color=f"C{color}", alpha=0.6)
    # Networks that cannot be certified at all lie below the picture, or the rest were one line.
    heights = [
      100 * seed_stats(p["test"]["certified"])["mean"] for p in study["points"] if p["eps"] == eps
    ]
    axis.set_ylim(min(height for height in heights if height > 1) - 8, max(heights) + 8)
    axis.set(xlabel="natural accuracy, %", ylabel="certified accuracy, %", title=f"eps {eps:g}")
  axes[0][-1].legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=100)
  plt.close(figure)


def main() -> None:
  """Puts the tables between the markers, and draws."""
  found = load()
  readme = README.read_text(encoding="utf-8")
  README.write_text(insert(readme, render(found)), encoding="utf-8")
  draw(found["methods"], RESULTS / "fronts.png")


if __name__ == "__main__":
  main()
