"""What the records of a robust training experiment say: a table, Pareto fronts, a verdict.

An arm is a method or an ablation; its settings are tried on the validation split, and the best is
judged on the test split. Shares of examples are natural (right without an attack), attacked (still
right under an attack of radius eps) and certified (proven right in the whole box). Papers print
errors, so the tables do: 100 (1 - share); the verified error is that of the certified share. What
is compared is that of Shi et al., "Fast certified robust training with short warmup", 2021 (arXiv
2103.17268), and, for the fronts, of Mao et al., "CTBench", 2024 (arXiv 2406.04848).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from balance_jax.training.report import render_table
from balance_jax.training.robust_rows import make_rows

SELECTIONS = ("certified", "mean")


def summarize(records: Sequence[Mapping[str, Any]], selection: str = "certified") -> dict[str, Any]:
  """Chooses the setting of every arm and compares the arms, radius by radius.

  Args:
    records: eval (validation) and test records of all runs; others are ignored. Each has "step",
      "seed", "method", "arm", "setting", "learning_rate", "eps" and the shares "natural" and
      "certified" in [0, 1]; it may have "attacked", "certified_ibp", "certified_crown_ibp",
      "violations" (examples certified and yet attacked), "class_counts" [C] and the shares by
      class, "natural_by_class" [C] and so on. Test records may have "curve_eps" [E] with
      "curve_certified" and "curve_attacked" [E], and "margin_edges" [H + 1] with
      "margin_histogram" [H]. The last record of a run counts.
    selection: validation score that chooses among the settings of an arm, the mean over seeds of
      "certified" or of "mean", (natural + certified) / 2. The first of equals is taken.

  Returns:
    A JSON-able dict; a "stat" is what `mixture_summary.seed_stats` returns, None without a value.
    - selection, arms, eps (rising), seeds, baseline (the first arm), steps;
    - violations: over all eval and test records; 0 unless a bound or an attack is wrong;
    - rows: one for each arm, setting, learning rate and eps, arms and settings in the order of
      their first record: arm, setting, learning_rate, eps, method, seeds, score, violations;
      chosen: whether it is the best of its arm at its eps on the validation split;
      front: whether no other setting of its arm is as good in the natural and the certified
      validation share and better in one;
      validation, test: stat of each of `robust_rows.SHARES`;
      difference: for a chosen row stats of paired differences "natural" and "certified" of the
      test error to the baseline's chosen row at the same eps, in points; None for other rows;
      collapsed: runs whose natural test share is at most that of the largest class + 0.01;
      by_class: {"counts", "natural", "attacked", "certified"}: [C] means over seeds, test split;
      curve: {"eps": [E], "certified", "attacked": [E] stats}; margin: {"edges": [H + 1],
      "share": [H]}; each None without records.

  Raises:
    ValueError: no eval records, a missing label or share, an unknown selection, or runs of one row
      that differ in "curve_eps", "margin_edges" or the number of classes.

  >>> run = {"arm": "ibp", "method": "ibp", "setting": "default", "learning_rate": 1e-3, "eps": 0.1}
  >>> record = {**run, "seed": 0, "step": 9, "natural": 0.9, "certified": 0.75}
  >>> summary = summarize([{"event": "eval", **record}, {"event": "test", **record}])
  >>> summary["rows"][0]["test"]["certified"]["mean"]
  0.75
  """
  if selection not in SELECTIONS:
    raise ValueError(f"selection must be one of {list(SELECTIONS)}, got {selection!r}")
  records = list(records)
  rows = make_rows(records, selection)
  arms = list(dict.fromkeys(row["arm"] for row in rows))
  return {
    "selection": selection,
    "arms": arms,
    "baseline": arms[0],
    "eps": sorted({row["eps"] for row in rows}),
    "seeds": sorted({seed for row in rows for seed in row["seeds"]}),
    "steps": max(record["step"] for record in records if record.get("event") == "eval"),
    "violations": sum(row["violations"] for row in rows),
    "rows": rows,
  }


def chosen(summary: Mapping[str, Any], eps: float) -> dict[str, dict[str, Any]]:
  """{arm: its chosen row} at one radius, in the order of the arms."""
  rows = {row["arm"]: row for row in summary["rows"] if row["chosen"] and row["eps"] == eps}
  return {arm: rows[arm] for arm in summary["arms"] if arm in rows}


def table_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
  """Header and cells of the main table: a row for each eps and arm, errors of the chosen setting.

  Columns in which every row would have the same name are left out, as are bounds never computed.
  """
  picked = [row for eps in summary["eps"] for row in chosen(summary, eps).values()]
  base = summary["baseline"]
  columns = {
    "arm": [row["arm"] for row in picked],
    "eps": [eps_name(row["eps"]) for row in picked],
    "setting": [setting_name(summary, row) for row in picked],
    "natural error": [_error(row, "natural") for row in picked],
    "attacked error": [_error(row, "attacked") for row in picked],
    "verified error": [_error(row, "certified") for row in picked],
    "by IBP": [_error(row, "certified_ibp") for row in picked],
    "by CROWN-IBP": [_error(row, "certified_crown_ibp") for row in picked],
    f"natural against {base}": [_against(summary, row, "natural") for row in picked],
    f"verified against {base}": [_against(summary, row, "certified") for row in picked],
  }
  fixed = ("arm", "natural error", "verified error")
  kept = [
    name
    for name, cells in columns.items()
    if name in fixed or (len(set(cells)) > 1 if name in ("eps", "setting") else any(cells))
  ]
  return kept, [list(cells) for cells in zip(*(columns[name] for name in kept), strict=True)]


def settings_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
  """Header and cells of the table of all settings, with the validation errors that choose."""
  header = ["arm", "eps", "setting", "natural, validation", "verified, validation"]
  header += ["natural, test", "verified, test", "role"]
  rows, order = [], {arm: i for i, arm in enumerate(summary["arms"])}
  for row in sorted(summary["rows"], key=lambda row: (row["eps"], order[row["arm"]])):
    role = "chosen" if row["chosen"] else "on the front" if row["front"] else None
    errors = [
      _error(row, share, split)
      for split in ("validation", "test")
      for share in ("natural", "certified")
    ]
    rows.append([row["arm"], eps_name(row["eps"]), setting_name(summary, row), *errors, role])
  return header, rows


def console_table(summary: Mapping[str, Any]) -> str:
  """The main table of `summarize`'s result as plain text, with a line that says how to read it."""
  return render_table(*table_rows(summary)) + "\n" + reading(summary)


def reading(summary: Mapping[str, Any]) -> str:
  """How to read the columns of the table."""
  seeds = len(summary["seeds"])
  over = f"mean over {seeds} seeds ± the standard deviation" if seeds > 1 else "one seed"
  score = "certified share" if summary["selection"] == "certified" else "(natural + certified) / 2"
  several = len(summary["rows"]) > len({(row["arm"], row["eps"]) for row in summary["rows"]})
  rule = f" Of an arm's settings the one with the best {score} in validation." if several else ""
  interval = ", seed by seed, ± half the width of its 95 % interval" if seeds > 1 else ""
  paired = (
    f" Against {summary['baseline']}: difference in points{interval}; negative is better."
    if len(summary["arms"]) > 1
    else ""
  )
  return (
    f"Errors on the test split in %, {over}.{rule} Natural: without an attack. Attacked: the "
    "strongest attack tried finds a mistake; the true error in the box is no lower. Verified: no "
    f"proof of the right answer in the whole box; the true error is no higher.{paired}"
  )


def verdict(summary: Mapping[str, Any]) -> list[str]:
  """What the runs establish, in plain sentences.

  An interval is Student's 95 % interval of the mean paired difference; it does not allow for the
  best of several arms having been picked afterwards.

  Args:
    summary: what `summarize` returned.
  """
  lines = [line for eps in summary["eps"] for line in _verdict_at(summary, eps)]
  return [*lines, _collapse_line(summary), _violation_line(summary)]


def eps_name(eps: float) -> str:
  """A radius as people write it.

  >>> eps_name(0.1), eps_name(8 / 255)
  ('0.1', '8/255')
  """
  levels = round(255 * eps)
  short = math.isclose(float(f"{eps:.3g}"), eps, rel_tol=1e-6)
  if levels and not short and math.isclose(levels, 255 * eps, rel_tol=1e-4):
    return f"{levels}/255"
  return f"{eps:.3g}"


def setting_name(summary: Mapping[str, Any], row: Mapping[str, Any]) -> str:
  """The setting, with the learning rate where an arm's setting was run at several."""
  rates = {
    other["learning_rate"]
    for other in summary["rows"]
    if all(other[name] == row[name] for name in ("arm", "setting", "eps"))
  }
  return row["setting"] + (f", rate {row['learning_rate']:g}" if len(rates) > 1 else "")


def _error(row, name: str, split: str = "test") -> str | None:
  stat = row[split][name]
  if stat is None:
    return None
  spread = "" if stat["std"] is None else f" ± {100 * stat['std']:.2f}"
  return f"{100 * (1 - stat['mean']):.2f}{spread}"


def _against(summary, row, name: str) -> str | None:
  if row["arm"] == summary["baseline"] or not (row["difference"] and row["difference"][name]):
    return None
  stat = row["difference"][name]
  return f"{stat['mean']:+.2f}" + ("" if stat["ci95"] is None else f" ± {stat['ci95']:.2f}")


def _verdict_at(summary, eps: float) -> Iterable[str]:
  rows = {arm: row for arm, row in chosen(summary, eps).items() if row["test"]["certified"]}
  if not rows:
    yield f"eps {eps_name(eps)}: no test records."
    return
  best = max(rows.values(), key=lambda row: row["test"]["certified"]["mean"])
  count = f" of {len(rows)} arms" if len(rows) > 1 else ""
  others = [f"natural {_error(best, 'natural')} %"]
  others += [f"attacked {_error(best, 'attacked')} %"] if best["test"]["attacked"] else []
  line = (
    f"eps {eps_name(eps)}: the lowest verified error{count} is that of {best['arm']}, "
    f"{_error(best, 'certified')} % (setting {setting_name(summary, best)}; {', '.join(others)})"
  )
  if best["arm"] == summary["baseline"]:
    line += ", the baseline" if len(rows) > 1 else ""
  elif change := _against(summary, best, "certified"):
    line += f"; against {summary['baseline']} {change} points ({_interval(best)})"
  yield line + "."
  others = [row for row in rows.values() if row["arm"] != summary["baseline"]]
  if others != [best]:
    yield from _sides(summary, others, eps)


def _interval(row) -> str:
  stat = row["difference"]["certified"]
  if stat["ci95"] is None:
    return "one seed: no interval"
  side = "excludes" if abs(stat["mean"]) > stat["ci95"] else "includes"
  return f"{stat['n']} paired seeds, 95 % interval {side} 0"


def _sides(summary, rows, eps: float) -> Iterable[str]:
  """Which arms differ from the baseline in verified error by more than chance."""
  sides = {"lower": [], "higher": [], "not told apart": []}
  for row in rows:
    stat = row["difference"] and row["difference"]["certified"]
    if stat and stat["ci95"] is not None:
      clear = abs(stat["mean"]) > stat["ci95"]
      side = ("lower" if stat["mean"] < 0 else "higher") if clear else "not told apart"
      sides[side].append(row["arm"])
  if any(sides.values()):
    text = "; ".join(f"{side}: {', '.join(arms)}" for side, arms in sides.items() if arms)
    against = f"verified error against {summary['baseline']} by 95 % intervals"
    yield f"eps {eps_name(eps)}, {against}: {text}."


def _collapse_line(summary) -> str:
  lost = [row for row in summary["rows"] if row["collapsed"]]
  start = "Collapsed runs (natural accuracy at most a point above the share of the largest class)"
  shown = [
    f"{row['arm']} at eps {eps_name(row['eps'])} ({row['collapsed']} of {len(row['seeds'])} seeds)"
    for row in lost
    if row["chosen"]
  ]
  others = sum(row["collapsed"] for row in lost if not row["chosen"])
  shown += [f"{others} with settings that were not chosen"] if others else []
  return f"{start}: {', '.join(shown) or 'none'}."


def _violation_line(summary) -> str:
  count = summary["violations"]
  if not count:
    return "No certified example was ever broken by an attack."
  where = [row for row in summary["rows"] if row["violations"]]
  names = ", ".join(dict.fromkeys(f"{r['method']} at eps {eps_name(r['eps'])}" for r in where))
  return (
    f"INVALID: {count} certified examples were broken by an attack ({names}); a bound or the "
    "attack is wrong, and no verified error here can be trusted."
  )
