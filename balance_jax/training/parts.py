"""The list of all runs of a job, cut into parts that are trained apart, and put together again.

Part i of n takes every n-th run of the list, from the i-th on, so that all parts take about equally
long, also where an arm has fewer runs than there are parts. What a part holds of one arm is one
compiled program: it has a folder of its own, with its own lock, and can be trained by any process
on any host that sees the folder. A job that is not cut is the case n = 1.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from balance_jax import _checks
from balance_jax.training.metric_log import read_records
from balance_jax.training.task import Task
from balance_jax.training.workdir import Workdir, WorkdirError

ENGINES = ("local", "ray")
# Written into the folder of a part when it is done.
FINISHED = "finished.json"


@dataclasses.dataclass(frozen=True)
class Part:
  """What part `index` of `count` holds of one arm.

  Attributes:
    arm: name of the arm.
    index: which part, from 0.
    count: how many there are.
    runs: indices of its runs in the arm, at least one.
    folder: where its records and checkpoints lie.
    config_digest: of the config of the job; what another one left in the folder is refused.
  """

  arm: str
  index: int
  count: int
  runs: tuple[int, ...]
  folder: Workdir
  config_digest: str

  def __str__(self) -> str:
    part = f"part {self.index}/{self.count}" if self.count > 1 else ""
    return " of ".join(filter(None, [part, self.arm])) or "all runs"

  def finished(self) -> dict[str, Any] | None:
    """What `finish` noted, or None.

    Raises:
      WorkdirError: that was for another config.
    """
    note = self.folder.read(FINISHED)
    if note is not None and note["config"] != self.config_digest:
      raise WorkdirError(f"the runs in {self.folder.path} are those of another config")
    return note


def finish(part: Part, facts: Mapping[str, Any]) -> None:
  """Notes that a part has been trained, with the last evaluation of each of its runs."""
  evaluations = [r for r in read_records(part.folder.metrics) if r["event"] == "eval"]
  note = {"config": part.config_digest, **facts, "evaluations": evaluations[-len(part.runs) :]}
  part.folder.write(FINISHED, note)


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config after a look at `config.sweep`, with the number of parts that its shard asks for.

  Raises:
    ValueError: a shard that is not i/n, or contradicts the number of parts or the engine; a value
      outside of its range.
  """
  spec = dict(config["sweep"])
  _checks.check_number("sweep.parts", spec["parts"], low=1, integer=True)
  _checks.check_choice("sweep.engine", spec["engine"], ENGINES)
  _checks.check_number("sweep.retries", spec["retries"], low=0, integer=True)
  for name, amount in spec["resources"].items():
    _checks.check_number(f"sweep.resources.{name}", amount, low=0.0)
  if spec["shard"]:
    found = re.fullmatch(r"(\d+)/(\d+)", spec["shard"])
    index, count = map(int, found.groups()) if found else (0, 0)
    if index >= count:
      raise ValueError(
        f"sweep.shard is {spec['shard']!r}; expected i/n with i from 0 to n - 1, such as '0/4'"
      )
    if spec["parts"] not in (1, count):
      raise ValueError(
        f"sweep.shard is {spec['shard']!r} and sweep.parts is {spec['parts']}; give one of them"
      )
    if spec["engine"] != "local":
      raise ValueError(
        f"sweep.shard is {spec['shard']!r}; with sweep.engine = {spec['engine']!r}, which trains "
        f"all parts, give --config.sweep.parts={count} instead"
      )
    spec["parts"] = count
  return {**config, "sweep": spec}


def cut(task: Task, folder: Workdir, count: int, config_digest: str) -> list[Part]:
  """All parts of a job, by arm and then by index.

  Raises:
    ValueError: more parts than runs.
  """
  total = sum(map(len, task.labels.values()))
  if count > max(total, 1):
    raise ValueError(
      f"sweep.parts is {count}; allowed: 1 to {max(total, 1)}, as there are {total} runs to share"
    )
  parts, before = [], 0
  for arm, labels in task.labels.items():
    for index in range(count):
      runs = tuple(range((index - before) % count, len(labels), count))
      if runs:
        place = folder.below(arm).part(index, count)
        parts.append(Part(arm, index, count, runs, place, config_digest))
    before += len(labels)
  return parts


def of_shard(parts: Sequence[Part], shard: str) -> list[Part]:
  """Those that `config.sweep.shard` names, by default all."""
  return [part for part in parts if not shard or part.index == int(shard.partition("/")[0])]


def records_of(task: Task, parts: Iterable[Part]) -> list[dict[str, Any]]:
  """The records of all parts of all arms, as those of a job that is not cut: by step, then by run.

  Records of one run and step stay as they were written; those of no run come before the others.
  """
  records = []
  for arm, labels in task.labels.items():
    names = list(labels[0])
    order = {_key(names, label): index for index, label in reversed(list(enumerate(labels)))}
    found = [r for part in parts if part.arm == arm for r in read_records(part.folder.metrics)]
    records += sorted(found, key=lambda r: (r["step"], order.get(_key(names, r), -1)))
  return records


def _key(names: Sequence[str], record: Mapping[str, Any]) -> str:
  """What says which run a record belongs to."""
  return json.dumps([record.get(name) for name in names])


def so_far(parts: Sequence[Part], finished: Mapping[Part, Mapping]) -> dict[str, Any]:
  """results.json while parts are missing."""
  return {
    "complete": False,
    "finished": {str(part): finished[part]["evaluations"] for part in parts if part in finished},
    "missing": [str(part) for part in parts if part not in finished],
  }
