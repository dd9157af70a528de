"""One row for each arm, setting and radius of a robust training experiment, from its records."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from balance_jax.training.mixture_summary import seed_stats

SHARES = ("natural", "attacked", "certified", "certified_ibp", "certified_crown_ibp")
# A model no better than always the same answer, with a point for noise.
COLLAPSE_MARGIN = 0.01

_KEY = ("arm", "setting", "learning_rate", "eps")
_WANTED = ("step", "seed", "method", *_KEY, "natural", "certified")
_CLASSES = ("natural", "attacked", "certified")


def make_rows(records: Sequence[Mapping[str, Any]], selection: str) -> list[dict[str, Any]]:
  """The rows of `robust_summary.summarize`, which documents them.

  Args:
    records: eval and test records; others are ignored.
    selection: "certified" or "mean".

  Raises:
    ValueError: see `robust_summary.summarize`.
  """
  _check(records)
  evals, tests = _last_records(records, "eval"), _last_records(records, "test")
  if not evals:
    raise ValueError("records must hold at least one eval record, got none")
  rows = [_row(key, runs, tests.get(key, {}), selection) for key, runs in evals.items()]
  violations = dict.fromkeys(evals, 0)
  for record in records:
    if record.get("event") in ("eval", "test") and record.get("violations"):
      violations[_key(record)] += int(record["violations"])
  for row in rows:
    rivals = [other for other in rows if (other["arm"], other["eps"]) == (row["arm"], row["eps"])]
    row["violations"] = violations[_key(row)]
    row["chosen"] = row is max(rivals, key=_score)
    row["front"] = not any(_dominates(rival, row) for rival in rivals)
  bases = {row["eps"]: row for row in rows if row["chosen"] and row["arm"] == rows[0]["arm"]}
  for row in rows:
    base = bases.get(row["eps"]) if row["chosen"] else None
    row["difference"] = base and _difference(tests.get(_key(row), {}), tests.get(_key(base), {}))
  return rows


def _check(records) -> None:
  known = {_key(r) for r in records if r.get("event") == "eval" and all(n in r for n in _KEY)}
  for i, record in enumerate(records):
    if record.get("event") not in ("eval", "test"):
      continue
    missing = [name for name in _WANTED if name not in record]
    if missing:
      raise ValueError(f"records[{i}] must hold {', '.join(_WANTED)}; missing: {missing}")
    if _key(record) not in known:
      raise ValueError(f"records[{i}] is a test of {record['method']}, which has no eval record")


def _key(record) -> tuple:
  return tuple(record[name] for name in _KEY)


def _last_records(records, event: str) -> dict[tuple, dict[int, Mapping[str, Any]]]:
  """{row: {seed: the record of the last step}}."""
  found = {}
  for record in records:
    if record.get("event") == event:
      runs = found.setdefault(_key(record), {})
      last = runs.get(record["seed"])
      if last is None or record["step"] >= last["step"]:
        runs[record["seed"]] = record
  return found


def _row(key: tuple, evals, tests, selection: str) -> dict[str, Any]:
  validation = _shares(evals)
  names = ("natural", "certified") if selection == "mean" else ("certified",)
  parts = [validation[name]["mean"] for name in names if validation[name]]
  return {
    **dict(zip(_KEY, key, strict=True)),
    "method": next(iter(evals.values()))["method"],
    "seeds": sorted(evals),
    "score": float(np.mean(parts)) if len(parts) == len(names) else None,
    "validation": validation,
    "test": _shares(tests),
    "collapsed": sum(_collapsed(record) for record in tests.values()),
    "by_class": _by_class(tests),
    "curve": _curve(tests),
    "margin": _margin(tests),
  }


def _shares(runs) -> dict[str, Any]:
  return {
    name: seed_stats(_number(record.get(name)) for record in runs.values()) for name in SHARES
  }


def _number(value: float | None) -> float:
  return math.nan if value is None else float(value)


def _collapsed(record) -> bool:
  counts = record.get("class_counts")
  if not counts or not sum(counts):
    return False
  # A share that is not finite is no answer at all.
  return not _number(record["natural"]) > max(counts) / sum(counts) + COLLAPSE_MARGIN


def _rows_of(runs, field: str, like: str | None = None) -> np.ndarray | None:
  """[seeds, N] of a list field, None unless all runs have it; `like` must be equal in all runs."""
  lists = [record.get(field) for record in runs.values()]
  if not lists or any(values is None for values in lists):
    return None
  seen = {f"lengths of {field}": [len(values) for values in lists]}
  if like:
    seen[like] = [record.get(like) for record in runs.values()]
  for name, values in seen.items():
    if any(value != values[0] for value in values):
      method = next(iter(runs.values()))["method"]
      raise ValueError(f"records: {name} must be the same in all runs of {method}, got {values}")
  return np.array(lists, np.float64)


def _by_class(runs) -> dict[str, Any] | None:
  counts = _rows_of(runs, "class_counts")
  if counts is None:
    return None
  shares = {name: _rows_of(runs, f"{name}_by_class") for name in _CLASSES}
  if shares["natural"] is None:
    return None
  means = {n: _means(values) for n, values in shares.items() if values is not None}
  return {"counts": counts[0].tolist(), **means}


def _means(values: np.ndarray) -> list[float | None]:
  """The mean over seeds of each column; None for a column without a value, as an empty class."""
  stats = [seed_stats(column) for column in values.T]
  return [stat and stat["mean"] for stat in stats]


def _curve(runs) -> dict[str, Any] | None:
  certified, attacked = (
    _rows_of(runs, f"curve_{n}", "curve_eps") for n in ("certified", "attacked")
  )
  if certified is None or attacked is None or not certified.size:
    return None
  return {
    "eps": list(next(iter(runs.values()))["curve_eps"]),
    "certified": [seed_stats(column) for column in certified.T],
    "attacked": [seed_stats(column) for column in attacked.T],
  }


def _margin(runs) -> dict[str, Any] | None:
  counts = _rows_of(runs, "margin_histogram", "margin_edges")
  if counts is None or not counts.sum():
    return None
  share = counts.sum(axis=0) / counts.sum()
  return {"edges": list(next(iter(runs.values()))["margin_edges"]), "share": share.tolist()}


def _score(row) -> float:
  return -math.inf if row["score"] is None else row["score"]


def _dominates(first, second) -> bool:
  pairs = []
  for name in ("natural", "certified"):
    stats = (row["validation"][name] for row in (first, second))
    pairs.append([-math.inf if stat is None else stat["mean"] for stat in stats])
  return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _difference(runs, base) -> dict[str, Any]:
  """Error of a row minus that of the baseline in points, over the seeds of both."""
  return {
    name: seed_stats(
      100 * (_number(base[seed][name]) - _number(runs[seed][name])) for seed in runs if seed in base
    )
    for name in ("natural", "certified")
  }
