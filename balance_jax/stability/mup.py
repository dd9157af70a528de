"""Maximal update parametrisation (muP): learning rates and starts that transfer over widths.

The parameters of a model are compared with those of a base model of another width. Axes that differ
are infinite in the sense of the theory, and r is how much larger they are. With one output axis
infinite a tensor is input-like (embedding, bias, scale), with one input axis a readout, with both a
hidden kernel. Relative to the base model, for a standard start N(0, 1 / fan_in):

| variant           | tensor  | start (factor) | Adam rate | SGD rate     | attention |
| simple            | kernels | 1              | 1 / r_in  | -            | sqrt      |
| intermediate      | readout | r_in^-1/2      | 1 / r_in  | -            | sqrt      |
| full              | query   | 0              | 1 / r_in  | -            | mup       |
| tensor_programs   | input   | see below      | 1         | r_out        | mup       |
|                   | hidden  | 1              | 1 / r_in  | r_out / r_in |           |
|   multiplier form | readout | r_in^1/2       | 1         | r_in         |           |
|   equivalent form | readout | r_in^-1/2      | 1 / r_in  | 1 / r_in     |           |

Each of the first three contains those above it. In the multiplier form the model multiplies its
readout's output (before a bias) by 1 / r_in; the equivalent form trains identically without.

Where weight decay is added behind `scale_by_mup`, it needs no change: independent decay must have
none, and coupled decay is then learning rate * decay at every width. Only where the multipliers are
learning rates, so that they also reach the decay, `Multipliers.weight_decay` cancels them.

Sources: Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities",
2023 (arXiv 2309.14322), section 3.2.4 (the first three); Yang et al., "Tensor Programs V", 2022
(arXiv 2203.03466), its tables of parametrisations and its coordinate check.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from balance_jax import _checks
from balance_jax.stability._mup_tensors import Tensor, compare, find_readouts, path_matches
from balance_jax.stability.coordinate_check import (
  CoordinateCheck,
  check_widths,
  model_functions,
  record_activations,
  wider_is_better,
)

__all__ = [
  "VARIANTS", "CoordinateCheck", "Multipliers", "coordinate_check", "init_params", "multipliers",
  "scale_by_mup", "wider_is_better",
]  # fmt: skip

VARIANTS = ("simple", "intermediate", "full", "tensor_programs")
READOUT_FORMS = ("multiplier", "equivalent")
EMBEDDING_STDS = ("inverse_sqrt", "constant")
# Directions, without learning rate and sign.
OPTIMIZERS = {"adam": optax.scale_by_adam, "sgd": optax.identity}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Multipliers:
  """Factors per tensor relative to the base model; 1 everywhere at the base width (but for "full").

  Attributes:
    learning_rate: pytree of floats like params, what `scale_by_mup` takes.
    weight_decay: pytree of floats like params, factors on a coupled decay that `learning_rate`
      reaches too: the inverses under "tensor_programs", else 1. Not for an independent decay, nor
      for a decay added behind `scale_by_mup`, which the learning rate never reaches.
    init: pytree of floats like params, factors on the start; see `init_params`.
    readout: factor of the forward pass on the readout's output, before a bias: 1 / r in the
      multiplier form, else 1. The model must apply it.
    attention_scale: "sqrt" (1 / sqrt(D) for head size D) or "mup" (sqrt(base head size) / D, where
      "full" takes 1 as base head size). The model must apply it; `DecoderConfig.attention_scale`
      and `base_head_dim` of `balance_jax.models` are these. While D is constant over widths, the
      two differ by a constant.
  """

  learning_rate: Any
  weight_decay: Any
  init: Any
  readout: float
  attention_scale: str = dataclasses.field(metadata={"static": True})


def multipliers(
  params: Any,
  base_params: Any,
  variant: str = "simple",
  *,
  optimizer: str = "adam",
  readout: str | None = "head",
  readout_form: str = "multiplier",
  embedding: str = "*embedding*",
  embedding_std: str = "inverse_sqrt",
  query: str | None = "query",
  fan_in_axes: Mapping[str, Sequence[int]] | None = None,
) -> Multipliers:
  """muP's factors for every tensor, from its shape and the shape of its base.

  Inputs of a tensor are all its axes but the last (dense and convolution kernels, and attention's
  output kernel (heads, head size, width)); a vector, a tensor named "bias" or "scale" and an
  embedding, looked up by rows, have none. Say otherwise by `fan_in_axes`. Globs are matched with
  the whole path, "params/block_0/attention/query", and with its single parts.

  Args:
    params: pytree of arrays or `jax.ShapeDtypeStruct`s.
    base_params: the same tree at the base width; shapes may differ, numbers of axes may not.
    variant: one of `VARIANTS`.
    optimizer: "adam" (any optimizer whose update does not depend on the scale of the gradient), or
      "sgd" ("tensor_programs" only; the paper has no rule for it).
    readout: glob for the readouts among the tensors with an infinite input axis only; if none
      matches and there is one such tensor, it is that one. With tied embeddings the embedding.
      None: there is no readout.
    readout_form: "multiplier" or "equivalent"; "tensor_programs" only. Readout-like tensors that
      `readout` leaves out always take the equivalent form, as the model multiplies its output only.
    embedding: glob for embeddings (rows, width).
    embedding_std: how the initialiser's standard deviation of embeddings depends on the width:
      "inverse_sqrt", width^-1/2, as in Flax and in the paper, or "constant". "tensor_programs"
      wants it constant, and rescales the first by r^1/2.
    query: glob for query kernels that "full" starts at zero; None leaves them.
    fan_in_axes: glob -> the input axes of the tensors that match, for instance {"query": (0,)} for
      attention's kernel (width, heads, head size) of Flax; the first that matches counts.

  Returns:
    `Multipliers` of Python floats.

  Raises:
    ValueError: trees that do not match, a tensor with more than two infinite axes or with two
      infinite input axes by default, readouts that cannot be told, an unknown variant.

  >>> shapes = lambda width: {"up": np.zeros((3, width)), "head": np.zeros((width, 2))}
  >>> scale = multipliers(shapes(64), shapes(16), "tensor_programs")
  >>> scale.learning_rate, scale.init["head"], scale.readout
  ({'head': 1.0, 'up': 1.0}, 2.0, 0.25)
  >>> multipliers(shapes(64), shapes(16), "simple").learning_rate
  {'head': 0.25, 'up': 1.0}
  """
  _checks.check_choice("variant", variant, VARIANTS)
  _checks.check_choice("optimizer", optimizer, OPTIMIZERS)
  _checks.check_choice("readout_form", readout_form, READOUT_FORMS)
  _checks.check_choice("embedding_std", embedding_std, EMBEDDING_STDS)
  programs = variant == "tensor_programs"
  if optimizer != "adam" and not programs:
    raise ValueError(f"optimizer is {optimizer!r}; variant {variant!r} is defined for 'adam' only")
  tensors, treedef = compare(params, base_params, embedding, dict(fan_in_axes or {}))
  multiplied = programs and readout_form == "multiplier"
  readouts = [] if variant == "simple" else find_readouts(tensors, readout, multiplied)
  if programs:
    rule = functools.partial(
      _tensor_programs,
      sgd=optimizer == "sgd",
      multiplied=readouts if multiplied else [],
      rescale_embeddings=embedding_std == "inverse_sqrt",
    )
  else:
    zero = query if variant == "full" else None
    rule = functools.partial(_paper, readouts=readouts, zero=zero)
  rates, inits = zip(*map(rule, tensors), strict=True) if tensors else ((), ())
  decays = [1.0 / rate if programs else 1.0 for rate in rates]
  return Multipliers(
    learning_rate=treedef.unflatten(rates),
    weight_decay=treedef.unflatten(decays),
    init=treedef.unflatten(inits),
    readout=1.0 / readouts[0].width if multiplied and readouts else 1.0,
    attention_scale="mup" if variant in ("full", "tensor_programs") else "sqrt",
  )


def init_params(
  init: Callable[[jax.Array], Any], key, base_params: Any, variant: str = "simple", **rules: Any
) -> Any:
  """Parameters from `init`, started as the variant wants it.

  Rescaling a second time, or rescaling a checkpoint, gives a wrong model without an error. So this
  takes the function that draws standard parameters, not parameters.

  Args:
    init: init(key) -> params, with kernels N(0, 1 / fan_in).
    key: passed to `init`, which is called once.
    base_params: see `multipliers`.
    variant: see `multipliers`.
    **rules: keyword arguments of `multipliers`; give both the same.

  Returns:
    What `init` returns, each tensor times its factor; exact zeros where the factor is 0.

  >>> init = lambda key: {"head": jax.random.normal(key, (64, 2)) / 8.0}
  >>> base = {"head": jax.ShapeDtypeStruct((16, 2), jax.numpy.float32)}
  >>> params = init_params(init, jax.random.key(0), base, "intermediate")
  >>> bool(jax.numpy.all(params["head"] == 0.5 * init(jax.random.key(0))["head"]))
  True
  """
  if not callable(init):
    raise ValueError(
      f"init is a {type(init).__name__}; expected a function of a key, as parameters that exist "
      "may have been rescaled already"
    )
  params = init(key)
  factors = multipliers(params, base_params, variant, **rules).init
  return jax.tree.map(_times, params, factors)


def scale_by_mup(multipliers: Any) -> optax.GradientTransformation:
  """Multiplies the update of each tensor by its factor, whatever the optimizer's direction.

  Its place is behind the direction and before weight decay and learning rate:
  `optax.chain(optax.scale_by_adam(), scale_by_mup(m), optax.add_decayed_weights(decay),
  optax.scale_by_learning_rate(rate))`. Behind the decay it would scale the decay too, and before
  Adam it would do nothing.

  Args:
    multipliers: pytree of numbers >= 0 like the updates, or `Multipliers`, whose `learning_rate` is
      taken. Numbers may be traced.

  Returns:
    An optax transformation without state.

  >>> updates, _ = scale_by_mup({"w": 0.5}).update({"w": np.array([2.0])}, optax.EmptyState())
  >>> float(updates["w"][0])
  1.0
  """
  factors = multipliers.learning_rate if isinstance(multipliers, Multipliers) else multipliers
  for factor in jax.tree.leaves(factors):
    _checks.check_number("multipliers", factor, low=0.0)

  def update(updates, state, params=None):
    del params
    if jax.tree.structure(updates) != jax.tree.structure(factors):
      raise ValueError(
        f"multipliers has the structure {jax.tree.structure(factors)}; expected that of the "
        f"updates, {jax.tree.structure(updates)}"
      )
    return jax.tree.map(_times, updates, factors), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def coordinate_check(
  make_model: Callable[[int], Any],
  widths: Sequence[int],
  *,
  inputs: Any,
  loss: Callable[[Any], jax.Array],
  optimizer: str = "adam",
  steps: int = 3,
  learning_rate: float = 0.02,
  seeds: Sequence[int] = (0, 1, 2),
  base_width: int | None = None,
  variant: str | None = None,
  exclude: Sequence[str] = (),
  tolerance: float = 0.15,
  **rules: Any,
) -> CoordinateCheck:
  """Trains some steps at each width and records how large every activation is.

  The learning rate has to be large, so that three steps matter: a model that does not train passes.
  So large that the loss jumps is too large; slopes are then noise. With Adam 0.02 suits an MLP,
  0.005 a small decoder.

  Args:
    make_model: make_model(width) -> a `flax.linen` module called with `inputs`, whose only state is
      "params", or a pair (init(key, inputs) -> params, apply(params, inputs) -> (outputs, pytree of
      activations)). Attention scale and readout multiplier are the model's own affair.
    widths: at least two, increasing; powers of two are usual.
    inputs: one fixed batch.
    loss: loss(outputs) -> float array, for instance `lambda logits: cross_entropy(logits, labels)`;
      its mean is minimised.
    optimizer: "adam" or "sgd", without momentum and weight decay.
    steps: forward passes recorded, >= 1; the first is the start. One update fewer.
    learning_rate: at the base width, > 0.
    seeds: of the parameters, at least one.
    base_width: a width at which the variant changes nothing; the smallest width by default.
    variant: one of `VARIANTS`; None is the standard parametrisation.
    exclude: globs for activations that are not judged.
    tolerance: largest |slope| that passes, >= 0.
    **rules: keyword arguments of `multipliers`. Here `readout_form` is "equivalent" unless given,
      as `make_model` rarely multiplies its output. Not used by the standard parametrisation.

  Returns:
    `CoordinateCheck`.

  Raises:
    ValueError: fewer than two widths, or not increasing; steps below 1; an unknown variant; widths
      with different activations; what `multipliers` raises.

  >>> def make_model(width):
  ...   def init(key, x):
  ...     shapes = {"up": (8, width), "hidden": (width, width)}
  ...     return {k: jax.random.normal(key, s) * s[0] ** -0.5 for k, s in shapes.items()}
  ...   def apply(params, x):
  ...     out = jax.numpy.tanh(x @ params["up"]) @ params["hidden"]
  ...     return out, {"hidden": out}
  ...   return init, apply
  >>> settings = {"inputs": jax.numpy.ones((4, 8)), "loss": jax.numpy.square, "seeds": (0,)}
  >>> coordinate_check(make_model, (16, 64, 256), **settings).passes
  False
  """
  widths = check_widths(widths)
  _checks.check_choice("optimizer", optimizer, OPTIMIZERS)
  _checks.check_number("steps", steps, low=1, integer=True)
  _checks.check_known("learning_rate", learning_rate)
  _checks.check_number("learning_rate", learning_rate, low=0.0, open_low=True)
  _checks.check_number("tolerance", tolerance, low=0.0)
  base_width = widths[0] if base_width is None else base_width
  _checks.check_number("base_width", base_width, low=1, integer=True)
  if variant is not None:
    _checks.check_choice("variant", variant, VARIANTS)
  if len(seeds) == 0:
    raise ValueError("seeds is empty; expected at least one integer")

  def shapes(init):
    return jax.eval_shape(init, jax.random.key(0), inputs)

  base_params = None if variant is None else shapes(model_functions(make_model(base_width))[0])
  rules = {"readout_form": "equivalent", "optimizer": optimizer, **rules}
  recorded = []
  for width in widths:
    draw, apply = model_functions(make_model(width))
    init, mup_scale = functools.partial(_swapped, draw, inputs), optax.identity()
    if variant is not None:
      mup_scale = scale_by_mup(multipliers(shapes(draw), base_params, variant, **rules))
      init = functools.partial(_started, init, base_params, variant, rules)
    chain = optax.chain(OPTIMIZERS[optimizer](), mup_scale, optax.scale(-learning_rate))
    recorded.append(record_activations(init, apply, chain, loss, inputs, seeds, steps))
  names, magnitudes, losses = zip(*recorded, strict=True)
  for width, found in zip(widths, names, strict=True):
    if found != names[0]:
      raise ValueError(
        f"make_model has the activations {found} at width {width}; expected those at width "
        f"{widths[0]}, {names[0]}"
      )
  return CoordinateCheck(
    widths, names[0], np.stack(magnitudes), np.stack(losses), tolerance, tuple(exclude)
  )


def _paper(tensor: Tensor, readouts: list[Tensor], zero: str | None) -> tuple[float, float]:
  """(learning rate, start) of the variants of the paper."""
  start = tensor.fan_in**-0.5 if tensor in readouts else 1.0
  # Kernels only: the norm of the query is named after it as well.
  if zero is not None and tensor.kernel and path_matches(tensor.path, zero):
    start = 0.0
  return 1.0 / tensor.fan_in, start


def _tensor_programs(
  tensor: Tensor, sgd: bool, multiplied: list[Tensor], rescale_embeddings: bool
) -> tuple[float, float]:
  """(learning rate, start) of Tensor Programs V."""
  r_in, r_out = tensor.fan_in, tensor.fan_out
  if tensor.kind == "readout":
    if tensor in multiplied:
      return (r_in if sgd else 1.0), r_in**0.5
    return 1.0 / r_in, r_in**-0.5
  start = r_out**0.5 if tensor.embedding and rescale_embeddings else 1.0
  return (r_out / r_in if sgd else 1.0 / r_in), start


def _times(x: jax.Array, factor: Any) -> jax.Array:
  # A counter in the tree stays an integer, and bfloat16 stays itself beside a traced float32.
  return (x * factor).astype(x.dtype)


def _swapped(draw: Callable, inputs: Any, key) -> Any:
  return draw(key, inputs)


def _started(init: Callable, base_params, variant: str, rules: Mapping, key) -> Any:
  return init_params(init, key, base_params, variant, **rules)
