"""From paired seeds to a verdict: what experiments share when they judge a published claim."""

import json
import math
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from balance_jax.training.metric_log import replace_file
from balance_jax.training.mixture_summary import seed_stats

VERDICTS = ("reproduces", "does not", "not established")


def save(path: str | os.PathLike, value: Any) -> None:
  """Writes a JSON file, numbers rounded to five digits."""
  text = json.dumps(rounded(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
  # One line a key of the first two levels, so that a new run gives a readable diff.
  replace_file(path, (text.replace('},"', '},\n"') + "\n").encode())


def load(path: str | os.PathLike) -> Any:
  """The content of a JSON file."""
  return json.loads(Path(path).read_text(encoding="utf-8"))


def rounded(value: Any) -> Any:
  """Nested lists, dicts and arrays with floats to five digits; NaN and infinity become None."""
  if isinstance(value, dict):
    return {str(key): rounded(item) for key, item in value.items()}
  if hasattr(value, "tolist"):
    return rounded(value.tolist())
  if isinstance(value, list | tuple):
    return [rounded(item) for item in value]
  if isinstance(value, float):
    return float(f"{value:.5g}") if math.isfinite(value) else None
  return value


def paired(first: Iterable[float], second: Iterable[float]) -> dict[str, Any]:
  """Stats of first - second, seed by seed: mean, std, n and ci95 (half the interval's width)."""
  return seed_stats(map(operator.sub, first, second))


def verdict(*demands: tuple[dict, float]) -> str:
  """What the intervals say of a claim made of demands "effect > bound".

  Args:
    demands: pairs of the stats of an effect over seeds (see `paired`) and its bound.

  Returns:
    "reproduces" if every 95 % interval lies above its bound, "does not" if one lies below,
    otherwise "not established".

  >>> clear = paired([2.0, 2.1, 1.9], [1.0, 1.0, 1.0])
  >>> verdict((clear, 0.0)), verdict((clear, 5.0)), verdict((clear, 1.0))
  ('reproduces', 'does not', 'not established')
  """
  if any(effect["mean"] + effect["ci95"] < bound for effect, bound in demands):
    return "does not"
  if all(effect["mean"] - effect["ci95"] > bound for effect, bound in demands):
    return "reproduces"
  return "not established"


def show(effect: dict, digits: int = 3) -> str:
  """An effect for a table: mean and half width of its 95 % interval."""
  return f"{effect['mean']:+.{digits}f} ± {effect['ci95']:.{digits}f}"


# What the table script of an experiment writes into its README lies between these.
MARKERS = ("<!-- tables: begin (made by table.py) -->", "<!-- tables: end -->")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown.

  >>> print(markdown(("arm", "error"), [("BN", "28.1")]))
  | arm | error |
  | --- | --- |
  | BN | 28.1 |
  """
  lines = [header, ("---",) * len(header), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def insert(readme: str, tables: str) -> str:
  """The text of a README with the part between the `MARKERS` replaced."""
  before, rest = readme.split(MARKERS[0])
  after = rest.split(MARKERS[1])[1]
  return f"{before}{MARKERS[0]}\n\n{tables}\n\n{MARKERS[1]}{after}"
