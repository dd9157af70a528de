"""The cascade of a certification: stages, a compiled program each, and the way through them.

Each stage has a queue of the examples that it may still decide, and runs when a batch is full.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks
from balance_jax.bounds import Interval
from balance_jax.robust.apgd import apgd
from balance_jax.robust.attacks import attack_succeeds, check_classes, pgd
from balance_jax.robust.certify_log import Outcome
from balance_jax.robust.margin_bounds import bound_margins
from balance_jax.robust.margins import verified

ATTACKS = {
  "apgd-ce": functools.partial(apgd, loss="ce"),
  "apgd-dlr": functools.partial(apgd, loss="dlr"),
  "apgd-targeted-dlr": functools.partial(apgd, loss="targeted-dlr"),
  "pgd": functools.partial(pgd, loss="ce"),
  "pgd-margin": functools.partial(pgd, loss="margin"),
}
_MESSAGE_LENGTH = 300  # of a stored error; XLA appends whole programs


class SoundnessError(RuntimeError):
  """A certified example was broken: the bound or the attack is wrong, so no result is to be used.

  Attributes:
    index: position of the example in the data.
    method: what certified it.
    attack: what broke it.
  """

  def __init__(self, index: int, method: str, attack: str, eps: float):
    self.index, self.method, self.attack = index, method, attack
    super().__init__(
      f"example {index} is certified by {method!r} and broken by {attack!r} at eps={eps:g}: one of "
      "them is wrong (without directed=True it may be rounding); no certificate of this call holds"
    )


class Problem(NamedTuple):
  """What all programs are given: a change of values compiles nothing."""

  variables: Any
  key: jax.Array
  eps: Any
  lo: Any
  hi: Any


class Batch(NamedTuple):
  """images float (B, ...), labels int32 (B,), indices uint32 (B,), positions in the data."""

  images: Any
  labels: Any
  indices: Any


class Stage(NamedTuple):
  """program(problem, batch) -> (bool (B,), who gets the verdict; lowest margin (B,) or None)."""

  name: str
  verdict: str
  program: Callable


@dataclasses.dataclass
class Example:
  """An example on its way through the stages."""

  index: int
  image: np.ndarray
  label: int
  status: str = "unknown"
  by: str | None = None
  margin: float | None = None
  errors: dict[str, str] = dataclasses.field(default_factory=dict)

  def digest(self) -> int:
    """CRC-32 of image and label."""
    return zlib.crc32(self.image.tobytes(), self.label)

  def outcome(self) -> Outcome:
    status = "error" if self.status == "unknown" and self.errors else self.status
    return Outcome(self.index, status, self.by, self.margin, self.errors, self.digest())


def clean_stage(apply_fn) -> Stage:
  """Misclassified examples, which are their own counterexamples."""
  return Stage("clean", "attacked", functools.partial(_clean, apply_fn=apply_fn))


def cascade(examples, *, stages, problem, batch_size, check_certified) -> Iterator[list[Outcome]]:
  """Sends each example through the stages that may decide it; yields what is finished."""
  waiting: list[list[Example]] = [[] for _ in stages]

  def finished_after(example, position) -> bool:
    """Puts it in the queue of its next stage after `position`, if there is one."""
    for i in range(position + 1, len(stages)):
      check = check_certified and example.status == "certified" and stages[i].verdict == "attacked"
      if example.status == "unknown" or check:
        waiting[i].append(example)
        return False
    return True

  def run(i) -> list[Outcome]:
    group, waiting[i] = waiting[i][:batch_size], waiting[i][batch_size:]
    _decide(stages[i], problem, group, batch_size)
    return [example.outcome() for example in group if finished_after(example, i)]

  for example in examples:
    finished_after(example, -1)
    # In this order, because a full queue may fill the next one.
    for i in range(len(stages)):
      if len(waiting[i]) >= batch_size:
        yield run(i)
  for i in range(len(stages)):
    while waiting[i]:
      yield run(i)


def _decide(stage: Stage, problem, group: list[Example], batch_size: int) -> None:
  """Runs a stage on up to `batch_size` examples and writes down what it found."""
  try:
    hits, margins = evaluate(stage, problem, group, batch_size)
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    if stage.name == "clean":  # a network that does not run cannot be certified
      raise
    for example in group:
      example.errors[stage.name] = f"{type(error).__name__}: {error}"[:_MESSAGE_LENGTH]
    return
  for row, example in enumerate(group):
    if margins is not None and np.isfinite(margins[row]):
      # All are lower bounds, so the largest is one.
      known = -np.inf if example.margin is None else example.margin
      example.margin = max(known, float(margins[row]))
    if hits[row]:
      if example.status == "certified":
        raise SoundnessError(example.index, example.by, stage.name, problem.eps)
      example.status, example.by = stage.verdict, stage.name


def probe(stages, problem, batches, batch_size) -> Iterator[Example]:
  """Traces every stage, so that what the network does not allow is known before the start.

  Args:
    stages: to be traced.
    problem: `Problem`.
    batches: iterator of (images, labels), one or more.
    batch_size: of the programs.

  Returns:
    The examples of the batches, one by one.
  """
  first = next(batches)
  shape = (batch_size, *first[0].shape[1:])
  batch = Batch(
    jax.ShapeDtypeStruct(shape, first[0].dtype),
    jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    jax.ShapeDtypeStruct((batch_size,), jnp.uint32),
  )
  with jax.default_matmul_precision("highest"):
    for stage in stages:
      jax.eval_shape(stage.program, problem, batch)
  pairs = (zip(*pair, strict=True) for pair in itertools.chain([first], batches))
  numbered = enumerate(itertools.chain.from_iterable(pairs))
  return (Example(index, image, int(label)) for index, (image, label) in numbered)


def evaluate(stage: Stage, problem, group: list[Example], batch_size: int):
  """The results of `stage` for a group, which is filled up to one shape with its first example."""
  rows = group + [group[0]] * (batch_size - len(group))
  batch = Batch(
    np.stack([example.image for example in rows]),
    np.asarray([example.label for example in rows], np.int32),
    np.asarray([example.index for example in rows], np.uint32),
  )
  with jax.default_matmul_precision("highest"):
    hits, margins = jax.device_get(stage.program(problem, batch))
  return hits[: len(group)], margins


@functools.partial(jax.jit, static_argnames=("apply_fn",))
def _clean(problem, batch, *, apply_fn):
  logits_fn = functools.partial(apply_fn, problem.variables)
  return attack_succeeds(logits_fn, batch.images, batch.labels), None


@functools.partial(jax.jit, static_argnames=("apply_fn", "method", "directed", "chunk"))
def _bound(problem, batch, *, apply_fn, method, directed, chunk):
  logits_fn = functools.partial(apply_fn, problem.variables)
  box = Interval.from_linf(batch.images, problem.eps, problem.lo, problem.hi)
  options = {"directed": directed, "chunk": chunk}
  lower = bound_margins(logits_fn, box, batch.labels, method, **options).lower
  return verified(lower), lower.min(axis=-1)


@functools.partial(jax.jit, static_argnames=("apply_fn", "attack", "steps", "restarts"))
def _search(problem, batch, *, apply_fn, attack, steps, restarts):
  logits_fn = functools.partial(apply_fn, problem.variables)
  box = Interval.from_linf(batch.images, problem.eps, problem.lo, problem.hi)
  key = jax.random.fold_in(problem.key, zlib.crc32(attack.encode()))

  # One by one, for a key of its own: what is found does not depend on the rest of the batch.
  def one(image, box, label, index):
    alone = jax.tree.map(lambda end: end[None], box)
    options = {"center": image[None], "steps": steps, "restarts": restarts}
    own_key = jax.random.fold_in(key, index)
    return ATTACKS[attack](logits_fn, own_key, alone, label[None], **options)[0]

  x = jax.vmap(one)(batch.images, box, batch.labels, batch.indices)
  # A counterexample speaks for itself, so that no mistake of the search is a verdict.
  inside = (x >= box.lower) & (x <= box.upper)
  inside = jnp.all(inside.reshape(len(x), -1), axis=-1)
  return inside & attack_succeeds(logits_fn, x, batch.labels), None


def method_stage(apply_fn, name, directed, chunk) -> Stage:
  """Certifies by `bound_margins`, whose options these are."""
  options = {"apply_fn": apply_fn, "method": name, "directed": directed, "chunk": chunk}
  return Stage(name, "certified", functools.partial(_bound, **options))


def attack_stage(apply_fn, name, steps, restarts, num_classes) -> Stage:
  """Attacks by `ATTACKS[name]`, whose options these are."""
  check_classes(name, num_classes)
  _checks.check_number("attack_steps", steps, low=1, integer=True)
  _checks.check_number("attack_restarts", restarts, low=1, integer=True)
  options = {"apply_fn": apply_fn, "attack": name, "steps": steps, "restarts": restarts}
  return Stage(name, "attacked", functools.partial(_search, **options))
