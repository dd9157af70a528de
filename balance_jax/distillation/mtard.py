"""MTARD: a clean teacher's knowledge balanced against a robust teacher's, in scale and in speed.

A student learns the robust teacher's soft labels on attacked inputs and the clean teacher's on
clean ones. Two balances run beside it: the teachers' temperatures bring the entropies of their
labels together (entropy-based balance, EBB), and the loss weights follow the relative losses, so
that what is learnt slowly counts more (normalisation loss balance, NLB).

Sources: Zhao, Wang, Wei, "Mitigating the Accuracy-Robustness Trade-off via Balanced Multi-Teacher
Adversarial Distillation" (B-MTARD), 2023 (arXiv 2306.16170), and its conference form, "Enhanced
Accuracy and Robustness via Multi-Teacher Adversarial Distillation" (MTARD), ECCV 2022.

The attack is on the student alone, with the cross entropy of the true labels and with the student
in evaluation mode; teachers are always in evaluation mode. A student with batch statistics updates
them twice a step, on the attacked batch first, on the clean batch second.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balance_jax import _checks
from balance_jax.distillation.soft_labels import soft_entropy, soft_kl
from balance_jax.losses import weighted_mean

VARIANTS = ("b-mtard", "mtard")

# A student that starts as its teacher has a first loss of zero to be divided by.
_LEAST_INIT_LOSS = 1e-12


class MTARDState(NamedTuple):
  """State of the two balances; scalars.

  Attributes:
    tau_adv: float32, temperature of the robust teacher in the coming step.
    tau_nat: float32, temperature of the clean teacher in the coming step.
    w_adv: float32, weight of the robust teacher's loss in the last step.
    w_nat: float32, weight of the clean teacher's loss; the two sum to 1.
    init_adv: float32, first loss of the robust teacher, by which later ones are divided.
    init_nat: float32, first loss of the clean teacher.
    step: int32, updates so far.
  """

  tau_adv: jax.Array
  tau_nat: jax.Array
  w_adv: jax.Array
  w_nat: jax.Array
  init_adv: jax.Array
  init_nat: jax.Array
  step: jax.Array


def init_mtard_state() -> MTARDState:
  """Temperatures 1, weights 1/2, no losses seen."""
  one, half, zero = (jnp.asarray(value, jnp.float32) for value in (1.0, 0.5, 0.0))
  return MTARDState(one, one, half, half, zero, zero, jnp.zeros((), jnp.int32))


def entropy_balance(
  tau_adv, tau_nat, entropy_adv, entropy_nat, lr, low=1.0, high=10.0
) -> tuple[jax.Array, jax.Array]:
  """Cools the teacher of the larger entropy by `lr` and heats the other by as much (EBB).

  Args:
    tau_adv: scalar, temperature of one teacher, > 0.
    tau_nat: scalar, temperature of the other.
    entropy_adv: scalar, mean entropy of the first teacher's soft labels at its temperature. Only
      magnitudes are compared, so sum p log p, the negative entropy, does as well.
    entropy_nat: scalar, that of the other. Equal entropies move nothing.
    lr: length of the step, >= 0; may be traced.
    low: lowest temperature, > 0.
    high: highest temperature, >= low.

  Returns:
    (tau_adv, tau_nat), each clipped to [low, high].

  >>> tau_adv, tau_nat = entropy_balance(1.0, 1.0, 2.0, 0.5, lr=0.25)
  >>> float(tau_adv), float(tau_nat)
  (1.0, 1.25)
  """
  _checks.check_number("lr", lr, low=0.0)
  _checks.check_number("low", low, low=0.0, open_low=True)
  if _checks.is_concrete(low):
    _checks.check_number("high", high, low=float(low))
  # The paper's sign(E_adv / E_nat - 1) without its division, which two sure teachers make 0 / 0.
  direction = jnp.sign(jnp.abs(entropy_adv) - jnp.abs(entropy_nat))
  return (
    jnp.clip(tau_adv - lr * direction, low, high),
    jnp.clip(tau_nat + lr * direction, low, high),
  )


def normalization_loss_balance(weights, losses, init_losses, lr, exponent=1.0) -> jax.Array:
  """Moves the weights of M losses towards their relative losses, which are large if slow (NLB).

    w_m <- w_m - lr (w_m - l_m / sum_j l_j),  l_m = (losses_m / init_losses_m)^exponent,

  cut off at 0 and divided by their sum.

  Args:
    weights: float (M,), >= 0, sum 1: one weight for each teacher, task or objective.
    losses: float (M,), >= 0, those of the present batch.
    init_losses: float (M,), >= 0, those of the first; taken as 1e-12 where they are smaller.
    lr: share of the way to the target, >= 0, usually <= 1; may be traced.
    exponent: >= 0; above 1 it stresses the slowest loss. 1 in the published code. May be traced.

  Returns:
    float (M,), sum 1. The weights stay where they are if all losses are 0.

  >>> weights = normalization_loss_balance(
  ...   jnp.array([0.5, 0.5]), jnp.array([0.9, 0.1]), jnp.array([1.0, 1.0]), lr=0.5
  ... )
  >>> [round(float(w), 3) for w in weights]
  [0.7, 0.3]
  """
  _checks.check_number("lr", lr, low=0.0)
  _checks.check_number("exponent", exponent, low=0.0)
  _checks.check_shape("weights", weights, (None,))
  for name, array in (("losses", losses), ("init_losses", init_losses)):
    _checks.check_shape(name, array, jnp.shape(weights))
  weights, losses, init_losses = (
    jnp.asarray(x, jnp.result_type(float)) for x in (weights, losses, init_losses)
  )
  relative = jnp.maximum(losses, 0.0) / jnp.maximum(init_losses, _LEAST_INIT_LOSS)
  largest = relative.max()
  nothing = largest == 0
  # The scale cancels; without it a power could overflow.
  relative = (relative / jnp.where(nothing, 1.0, largest)) ** exponent
  target = jnp.where(nothing, weights, relative / jnp.where(nothing, 1.0, relative.sum()))
  moved = jnp.maximum(weights - lr * (weights - target), 0.0)
  return moved / moved.sum()


def mtard_update(
  state: MTARDState,
  kl_adv,
  kl_nat,
  entropy_adv,
  entropy_nat,
  *,
  weight_lr=0.025,
  temp_lr=0.001,
  temp_range=(1.0, 10.0),
  exponent=1.0,
  init_steps=1,
  variant: str = "b-mtard",
) -> MTARDState:
  """One step of both balances from what the batch showed, without gradients.

  `weight_lr=0` leaves EBB alone, `temp_lr=0` NLB alone, both zeros fixed weights: numbers, which
  may be traced, so that all ablations are one program. The paper divides both rates by 10 where it
  divides the learning rate by 10.

  Args:
    state: the state before the step.
    kl_adv: scalar, mean loss of the robust teacher in this batch, >= 0.
    kl_nat: scalar, mean loss of the clean teacher.
    entropy_adv: scalar, mean entropy of the robust teacher's labels at the state's temperature.
    entropy_nat: scalar, that of the clean teacher.
    weight_lr: rate of the loss weights, >= 0.
    temp_lr: step of the temperatures, >= 0.
    temp_range: lowest and highest temperature.
    exponent: of the relative losses, see `normalization_loss_balance`.
    init_steps: batches whose mean loss stands for the first loss, >= 1. The paper has 1, the noise
      of which stays for the whole training. Until then the mean of those seen so far is used.
    variant: "b-mtard", or "mtard", the conference form, which leaves the temperatures as they are.

  Returns:
    The state with the weights of this step's loss and the temperatures of the next step.
  """
  _checks.check_choice("variant", variant, VARIANTS)
  _checks.check_number("weight_lr", weight_lr, low=0.0)
  _checks.check_number("temp_lr", temp_lr, low=0.0)
  _checks.check_number("init_steps", init_steps, low=1)
  observed = {"kl_adv": kl_adv, "kl_nat": kl_nat}
  observed |= {"entropy_adv": entropy_adv, "entropy_nat": entropy_nat}
  for name, value in observed.items():
    _checks.check_shape(name, value, ())

  losses = jnp.stack([jnp.asarray(kl_adv, jnp.float32), jnp.asarray(kl_nat, jnp.float32)])
  seen = jnp.stack([state.init_adv, state.init_nat])
  mean = seen + (losses - seen) / (state.step + 1).astype(jnp.float32)
  init_losses = jnp.where(state.step < init_steps, mean, seen)
  weights = normalization_loss_balance(
    jnp.stack([state.w_adv, state.w_nat]), losses, init_losses, weight_lr, exponent
  )
  tau_adv, tau_nat = state.tau_adv, state.tau_nat
  if variant == "b-mtard":
    tau_adv, tau_nat = entropy_balance(
      tau_adv, tau_nat, entropy_adv, entropy_nat, temp_lr, *temp_range
    )
  floats = (tau_adv, tau_nat, *weights, *init_losses)
  floats = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in floats)
  return MTARDState(*floats, step=state.step + 1)


def mtard_loss(
  state: MTARDState,
  student_adv,
  student_nat,
  teacher_adv,
  teacher_nat,
  *,
  reduction: str = "mean",
  where=None,
  update: Callable[..., MTARDState] = mtard_update,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Two-teacher distillation loss w_adv KL_adv + w_nat KL_nat, one value per example.

  The temperatures are those of `state`; the weights are those after the update with this very
  batch, as published. Keep `update(state, **observation)` for the next step: the same function
  makes it the same update. With micro-batches each one sees its own means.

  Args:
    state: the state before the step.
    student_adv: float (B, K), the student's logits on the attacked inputs; no temperature.
    student_nat: float (B, K), the student's logits on the clean inputs.
    teacher_adv: float (B, K), the robust teacher's logits on the attacked inputs.
    teacher_nat: float (B, K), the clean teacher's logits on the clean inputs. No gradient flows
      into either teacher.
    reduction: over classes, see `soft_kl`; "mean" as published.
    where: bool (B,); False rows do not exist, whatever they hold, and get value 0.
    update: `mtard_update`, its settings bound by functools.partial.

  Returns:
    (losses, observation): float32 (or float64) (B,), whose mean over valid rows is the loss; and a
    dict of scalars without gradient, the arguments of `update` after the state.
  """
  student_adv = jnp.asarray(student_adv)
  _checks.check_shape("student_adv", student_adv, (None, None))
  logits = {"student_adv": student_adv, "student_nat": student_nat}
  logits |= {"teacher_adv": teacher_adv, "teacher_nat": teacher_nat}
  for name, array in logits.items():
    _checks.check_shape(name, array, student_adv.shape)
  if where is None:
    where = jnp.ones(student_adv.shape[:1], bool)
  _checks.check_shape("where", where, student_adv.shape[:1])
  where = jnp.asarray(where).astype(bool)
  logits = {name: jnp.where(where[:, None], array, 0.0) for name, array in logits.items()}
  teachers = jax.lax.stop_gradient((logits["teacher_adv"], logits["teacher_nat"]))

  def mean(values):
    return jax.lax.stop_gradient(weighted_mean(values, where=where).mean())

  taus = (state.tau_adv, state.tau_nat)
  students = (logits["student_adv"], logits["student_nat"])
  kl_adv, kl_nat = (
    soft_kl(student, teacher, tau, reduction)
    for student, teacher, tau in zip(students, teachers, taus, strict=True)
  )
  entropies = [
    mean(soft_entropy(teacher, tau, reduction)) for teacher, tau in zip(teachers, taus, strict=True)
  ]
  observation = {"kl_adv": mean(kl_adv), "kl_nat": mean(kl_nat)}
  observation |= dict(zip(("entropy_adv", "entropy_nat"), entropies, strict=True))
  after = update(state, **observation)
  losses = after.w_adv * kl_adv + after.w_nat * kl_nat
  return jnp.where(where, losses, 0.0), observation
