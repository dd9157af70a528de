"""Certification of a data set: every example certified, attacked, or honestly unknown.

Methods from fast to tight certify, attacks look for counterexamples, and each example passes only
the stages that may still decide it. Bounds and attacks check each other: a certified example that
an attack breaks stops everything. Failures are counted apart and are never a verdict.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from balance_jax import __version__, _checks
from balance_jax.robust import certify_inputs as inputs
from balance_jax.robust.certify_cascade import (
  ATTACKS,
  Example,
  Problem,
  SoundnessError,
  attack_stage,
  cascade,
  clean_stage,
  evaluate,
  method_stage,
  probe,
)
from balance_jax.robust.certify_log import CertificationLog, Outcome
from balance_jax.robust.margin_bounds import METHODS


@dataclasses.dataclass(frozen=True)
class CertifyResult:
  """Outcomes of all examples, in the order of the data.

  Attributes:
    outcomes: see `Outcome`.
  """

  outcomes: tuple[Outcome, ...]

  def summary(self) -> dict[str, Any]:
    """Counts, and shares of all examples.

    Returns:
      "examples": their number. "clean_accuracy", share classified right; "adversarial_accuracy",
      share that nothing broke, an upper bound of the robust accuracy; "certified_accuracy", a lower
      bound of it, so that certified <= adversarial <= clean. "certified", "attacked", "unknown" and
      "error": counts, which add up to all. "certified_by" and "attacked_by": counts by stage.
      "stage_errors": how many examples each stage failed on, those decided elsewhere included.
    """
    status = Counter(outcome.status for outcome in self.outcomes)
    by = Counter((outcome.status, outcome.by) for outcome in self.outcomes)
    errors = Counter(stage for outcome in self.outcomes for stage in outcome.errors)
    total = len(self.outcomes)
    return {
      "examples": total,
      "clean_accuracy": (total - by["attacked", "clean"]) / total,
      "adversarial_accuracy": (total - status["attacked"]) / total,
      "certified_accuracy": status["certified"] / total,
      **{name: status[name] for name in ("certified", "attacked", "unknown", "error")},
      "certified_by": {stage: n for (kind, stage), n in by.items() if kind == "certified"},
      "attacked_by": {stage: n for (kind, stage), n in by.items() if kind == "attacked"},
      "stage_errors": dict(errors),
    }


def certify(
  apply_fn: Callable,
  variables: Any,
  data: Any,
  eps: float,
  *,
  methods: Sequence[str] = ("ibp", "crown-ibp", "crown"),
  attacks: Sequence[str] | None = None,
  lo: float = 0.0,
  hi: float = 1.0,
  batch_size: int = 100,
  directed: bool = True,
  chunk: int | None = None,
  attack_steps: int = 100,
  attack_restarts: int = 1,
  check_certified: bool = True,
  key: jax.Array | None = None,
  log: Any = None,
) -> CertifyResult:
  """Decides for each example whether its class is constant in the l_inf ball cut to [lo, hi].

  A misclassified example is attacked by itself. The others pass the methods and then the attacks;
  a stage gets full batches of those it may still decide, so every stage is compiled once. Random
  starts depend on the key and the position of an example alone, thus not on the batch size, nor on
  a restart of the program.

  Args:
    apply_fn: apply_fn(variables, x (B, ...)) -> logits (B, K), in inference mode.
    variables: its parameters and fixed statistics, all finite.
    data: (images, labels), float (N, ...) in [lo, hi] and int (N,) in [0, K), or an iterable of
      such pairs of any length; always in the same order, if a log is to be continued.
    eps: radius, >= 0, in the units of the images.
    methods: of `margin_bounds`, in the order to try; may be empty.
    attacks: names in `ATTACKS`, in the order to try; may be empty. Default "pgd", "apgd-ce" and,
      with 4 classes or more, "apgd-dlr".
    lo: lowest valid input; -inf for none.
    hi: highest valid input; inf for none.
    batch_size: examples a stage takes at once, >= 1. Some wait between stages: up to that many
      images a stage are in memory.
    directed: make bounds hold for the network as computed, rounding included.
    chunk: as in `bounds.crown`; less memory for the backward methods.
    attack_steps: of each attack, >= 1.
    attack_restarts: of each attack, >= 1.
    check_certified: attack certified examples as well. If not, attacks come right after the first
      method, and the slower methods only see what no attack broke.
    key: of the random starts; default `jax.random.key(0)`.
    log: path of a file of JSON lines. If it has some examples already, by the same header, they are
      taken from there; those that ended in an error are tried again.

  Returns:
    `CertifyResult`. A stage that fails at run time, for lack of memory say, is noted in the errors
    of its examples, which go on; one that no other stage decides has the status "error".

  Raises:
    ValueError: an argument outside its range; weights or images that are not finite, images outside
      [lo, hi]; running statistics that are missing; logits that depend on the rest of the batch; a
      log of another call or of other data. Of arrays all this is found before the start.
    UnsupportedPrimitive: the network has an operation without a rule; before the start.
    SoundnessError: a certified example was broken.
    OSError: the log cannot be read or written.

  >>> import jax.numpy as jnp
  >>> data = jnp.array([[0.9, 0.1], [0.6, 0.5], [0.2, 0.8]]), jnp.array([0, 0, 0])
  >>> result = certify(lambda w, x: x @ w, jnp.eye(2), data, 0.1, attack_steps=5)
  >>> [(outcome.status, outcome.by) for outcome in result.outcomes]
  [('certified', 'ibp'), ('attacked', 'pgd'), ('attacked', 'clean')]
  """
  inputs.check_names("methods", methods, METHODS)
  if attacks is not None:
    inputs.check_names("attacks", attacks, ATTACKS)
  problem, batches, num_classes = _open(apply_fn, variables, data, eps, lo, hi, batch_size, key)
  attacks = _default_attacks(num_classes) if attacks is None else attacks
  bounds = [method_stage(apply_fn, name, directed, chunk) for name in methods]
  searches = [
    attack_stage(apply_fn, name, attack_steps, attack_restarts, num_classes) for name in attacks
  ]
  cheap, slow = (bounds, []) if check_certified else (bounds[:1], bounds[1:])
  stages = [clean_stage(apply_fn), *cheap, *searches, *slow]
  examples = probe(stages, problem, batches, batch_size)
  header = {
    "certify": 1,
    "version": __version__,
    **{name: str(float(value)) for name, value in (("eps", eps), ("lo", lo), ("hi", hi))},
    "methods": list(methods),
    "attacks": list(attacks),
    "attack_steps": int(attack_steps),
    "attack_restarts": int(attack_restarts),
    "directed": bool(directed),
    "check_certified": bool(check_certified),
    "key": np.asarray(jax.random.key_data(problem.key)).tolist(),
    "variables": inputs.digest(problem.variables),
  }
  decide = functools.partial(
    cascade, stages=stages, problem=problem, batch_size=batch_size, check_certified=check_certified
  )
  if log is None:
    return _result(itertools.chain.from_iterable(decide(examples)))
  with CertificationLog(log, header) as file:
    outcomes = dict(file.finished)
    for done in decide(_unfinished(examples, file.finished, log)):
      file.append(done)
      outcomes.update((outcome.index, outcome) for outcome in done)
  return _result(outcomes.values())


def accuracy_curve(
  apply_fn: Callable,
  variables: Any,
  data: Any,
  eps_values: Sequence[float],
  *,
  method: str = "ibp",
  attack: str = "pgd",
  lo: float = 0.0,
  hi: float = 1.0,
  batch_size: int = 100,
  directed: bool = True,
  chunk: int | None = None,
  attack_steps: int = 100,
  attack_restarts: int = 1,
  key: jax.Array | None = None,
) -> dict[str, np.ndarray]:
  """Certified, adversarial and clean accuracy at several radii, by one program each.

  What holds in a ball holds in the smaller ones, and a counterexample is one in the larger ones:
  both are carried over, so curves fall with eps, and bounds and attacks of all radii are compared.

  Args:
    apply_fn: as in `certify`, like all that is not listed here.
    variables: as there.
    data: as there.
    eps_values: E radii, >= 0, increasing.
    method: of `margin_bounds`.
    attack: a name in `ATTACKS`.
    lo, hi, batch_size, directed, chunk, attack_steps, attack_restarts, key: as there.

  Returns:
    "eps", "certified", "adversarial" and "clean": float64 (E,), shares of all examples;
    certified <= adversarial <= clean.

  Raises:
    As `certify`; what a stage raises is not caught.

  >>> import jax.numpy as jnp
  >>> data = jnp.array([[0.9, 0.1], [0.6, 0.5]]), jnp.array([0, 0])
  >>> curve = accuracy_curve(lambda w, x: x @ w, jnp.eye(2), data, [0.01, 0.1], attack_steps=5)
  >>> curve["certified"].tolist(), curve["adversarial"].tolist(), curve["clean"].tolist()
  ([1.0, 0.5], [1.0, 0.5], [1.0, 1.0])
  """
  radii = [float(eps) for eps in np.atleast_1d(np.asarray(eps_values, np.float64))]
  if not radii or sorted(set(radii)) != radii:
    raise ValueError(f"eps_values is {eps_values}; expected one number or more, increasing")
  inputs.check_names("method", (method,), METHODS)
  inputs.check_names("attack", (attack,), ATTACKS)
  for eps in radii:
    inputs.check_range(eps, lo, hi)
  problem, batches, num_classes = _open(
    apply_fn, variables, data, radii[0], lo, hi, batch_size, key
  )
  clean = clean_stage(apply_fn)
  bound = method_stage(apply_fn, method, directed, chunk)
  search = attack_stage(apply_fn, attack, attack_steps, attack_restarts, num_classes)
  examples = probe((clean, bound, search), problem, batches, batch_size)
  right, certified, robust = [], [], []
  while group := list(itertools.islice(examples, batch_size)):
    wrong = evaluate(clean, problem, group, batch_size)[0]
    at = [problem._replace(eps=eps) for eps in radii]
    proven = np.stack([evaluate(bound, p, group, batch_size)[0] for p in at])
    broken = wrong | np.stack([evaluate(search, p, group, batch_size)[0] for p in at])
    proven = np.logical_or.accumulate(proven[::-1])[::-1]
    broken = np.logical_or.accumulate(broken)
    for i, b in np.argwhere(proven & broken)[:1]:
      raise SoundnessError(group[b].index, method, "clean" if wrong[b] else attack, radii[i])
    right.append(~wrong)
    certified.append(proven)
    robust.append(~broken)
  return {
    "eps": np.asarray(radii),
    "certified": np.concatenate(certified, axis=1).mean(axis=1),
    "adversarial": np.concatenate(robust, axis=1).mean(axis=1),
    "clean": np.full(len(radii), np.concatenate(right).mean()),
  }


def _open(apply_fn, variables, data, eps, lo, hi, batch_size, key):
  """(Problem, iterator of checked batches, K)."""
  _checks.check_number("batch_size", batch_size, low=1, integer=True)
  inputs.check_range(eps, lo, hi)
  key = jax.random.key(0) if key is None else key
  problem = Problem(inputs.checked_variables(variables), key, eps, lo, hi)
  batches, num_classes = inputs.open_data(
    apply_fn, problem.variables, data, (eps, lo, hi), batch_size
  )
  return problem, batches, num_classes


def _default_attacks(num_classes: int) -> tuple[str, ...]:
  return ("pgd", "apgd-ce", "apgd-dlr") if num_classes >= 4 else ("pgd", "apgd-ce")


def _unfinished(examples, finished, log) -> Iterator[Example]:
  """Those not in the log, which must be one of the same data."""
  end = 0
  for example in examples:
    end = example.index + 1
    if example.index not in finished:
      yield example
    elif finished[example.index].digest != example.digest():
      raise ValueError(
        f"log {log} is of other data, or of another order of them: example {example.index} is not "
        "the one that it has; give another path"
      )
  beyond = [index for index in finished if index >= end]
  if beyond:
    raise ValueError(
      f"log {log} is of other data: it has example {max(beyond)}, data has {end}; give another path"
    )


def _result(outcomes: Iterable[Outcome]) -> CertifyResult:
  return CertifyResult(tuple(sorted(outcomes, key=lambda outcome: outcome.index)))
