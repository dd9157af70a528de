"""What an experiment trains, and what it makes of the measurements.

A task is a list of arms. An arm is a set of runs of one shape, one compiled program; arms differ
in what changes shapes: sizes, architectures, numbers of steps. The runner in `experiment` trains
one arm after another and knows nothing of what they are about.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from balance_jax import _checks
from balance_jax.training.batch import Batch
from balance_jax.training.sweep_runs import SweepRuns


@dataclasses.dataclass(frozen=True)
class Arm:
  """Runs that share a compiled program.

  Attributes:
    runs: the training runs.
    labels: for every run a dict of "method", "seed" and whatever else names it in its records.
    groups: names of the K groups.
    validation: held-out rows, as `evaluation_batches` gives them.
    test: as validation, for the final figure; None without one.
    chunk_record: metrics of one run over a chunk, NumPy (steps, ...) -> fields of its record.
    evaluate: evaluate(step, state, batches) -> dict of arrays, fields of an evaluation record; the
      same function every time, so that it is compiled once.
    measure: every `train.variance_every` steps, on rows of the runs' table; or None.
    train: the step counts, see `check_schedule`.
    allow_divergence: whether a loss that is not finite is a result instead of an error.
    max_rollbacks: how often an arm may go back to its last checkpoint after such an error, with
      another data order for the runs it happened to; 0 stops at the first.
    max_skips: how many steps of a run may be not finite and left out (`Step.skip_bad_steps`) before
      that is such an error.
    score: field of the evaluation records whose mean over runs and groups, the lower the better,
      says which checkpoint is kept as the best; None for none.
  """

  runs: SweepRuns
  labels: tuple[dict, ...]
  groups: tuple[str, ...]
  validation: Batch
  test: Batch | None
  chunk_record: Callable[[Mapping[str, Any]], dict]
  evaluate: Callable[..., dict]
  measure: "RowMeasurement | None"
  train: Mapping[str, Any]
  allow_divergence: bool = False
  max_rollbacks: int = 0
  max_skips: int = 0
  score: str | None = None

  def part(self, runs: Sequence[int]) -> "Arm":
    """The arm with some of its runs only, given by their indices."""
    labels = tuple(self.labels[index] for index in runs)
    return dataclasses.replace(self, runs=self.runs.part(runs), labels=labels)


class RowMeasurement(NamedTuple):
  """What is measured on rows that the state chooses; see `SweepRuns.apply_to_rows`.

  Attributes:
    draw: draw(step, state) -> list of (groups, indices).
    measure: measure(step, state, rows) -> dict of arrays, fields of a record.
  """

  draw: Callable[..., list]
  measure: Callable[..., dict]


@dataclasses.dataclass(frozen=True)
class Task:
  """An experiment.

  Attributes:
    arms: name -> the arm, built when its turn has come. A single arm has the empty name and lies in
      the folder of the run itself; others have folders of their own below it.
    labels: name -> labels of the runs of the arm, known before it is built.
    conclude: conclude(records, facts, report) -> (text to print, results for results.json); writes
      the page `report`. Records are those of all arms, facts say what was run.
    facts: what the report says about model and data.
  """

  arms: Mapping[str, Callable[[], Arm]]
  labels: Mapping[str, tuple[dict, ...]]
  conclude: Callable[[list[dict], dict, Path], tuple[str, dict]]
  facts: dict[str, Any]


def check_schedule(train: Mapping[str, Any], *intervals: str) -> None:
  """Raises ValueError unless the step counts of `config.train` fit together.

  Args:
    train: the entries "steps", "batch_size", "chunk", "eval_every", "checkpoint_every".
    intervals: names of further entries that must be multiples of the chunk.
  """
  multiples = ("steps", "eval_every", "checkpoint_every", *intervals)
  for name in ("batch_size", "chunk", *multiples):
    _checks.check_number(f"train.{name}", train[name], low=1, integer=True)
  for name in multiples:
    if train[name] % train["chunk"]:
      raise ValueError(
        f"train.{name} is {train[name]}; it must be a multiple of train.chunk = {train['chunk']}"
      )


def check_folder_name(argument: str, name: str) -> None:
  """Raises ValueError unless an entry of a config may name the folder of an arm."""
  if "/" in name or name.startswith("."):
    raise ValueError(f"{argument} holds {name!r}; it names a folder, so no / in it")


def override(
  config: Mapping[str, Any], sections: Sequence[str], changes: Mapping[str, Mapping], where: str
) -> dict[str, dict]:
  """The named sections of a config, copied, with entries changed.

  Args:
    config: holds the sections.
    sections: their names; no other may be changed.
    changes: section -> entry -> new value.
    where: the key of `changes` in the config, for messages.

  Raises:
    ValueError: an unknown section or entry.
  """
  copies = {name: dict(config[name]) for name in sections}
  for section, entries in changes.items():
    _checks.check_choice(where, section, sections)
    for key, value in entries.items():
      _checks.check_choice(f"{where}.{section}", key, copies[section])
      copies[section][key] = value
  return copies
