"""Later work: sigma-reparam, kernels with a learned spectral norm.

Every selected kernel W is replaced by W_hat = gamma W / sigma(W) with a learned scalar gamma and
sigma(W) = u^T W v, where u and v follow the top singular vectors of W by one power iteration a step
and carry no gradient. The spectral norm of W_hat, and with it how fast attention logits can grow,
is then gamma, whatever the size of W.

  params = sigma_reparam(params, lambda name, kernel: kernel.ndim == 2)
  loss = lambda params: loss_of_model(materialize(params))
  optimizer = with_power_iteration(optimizer)

Source: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
2023 (arXiv 2303.06296), and its published code.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from balance_jax import _checks

SIGMA_VARIANTS = ("spectral", "paper")


class SigmaKernel(NamedTuple):
  """A reparametrised kernel; stands in the place of its kernel in a pytree of parameters.

  Attributes:
    kernel: floating (d, f), W.
    gamma: float32 (or float64) (), the spectral norm of the effective kernel.
    u: like gamma, (d,), unit length; approximate left singular vector of W. None where a tree holds
      what is trained only.
    v: like gamma, (f,), unit length; approximate right singular vector of W, or None.
  """

  kernel: Any
  gamma: Any
  u: Any = None
  v: Any = None


def sigma_reparam(params, select: Callable[[str, Any], bool], variant: str = "spectral") -> Any:
  """Replaces selected kernels by `SigmaKernel`s, with exact singular vectors.

  Args:
    params: pytree of arrays, which may be traced.
    select: select(name, array) -> bool, called on each array with its path, such as
      "params/block_0/attention/query".
    variant: "spectral" starts gamma at the spectral norm of the kernel, as the authors' code, and
      the model computes what it did before; "paper" starts it at 1.

  Returns:
    Like params, with a `SigmaKernel` for each selected array.

  Raises:
    ValueError: nothing selected, a selected array that is not a floating matrix with an element
      other than 0, an unknown variant.

  >>> params = sigma_reparam({"w": jnp.diag(jnp.array([3.0, 1.0]))}, lambda name, x: True)
  >>> float(params["w"].gamma), float(sigma_of(params["w"]))
  (3.0, 3.0)
  """
  _checks.check_choice("variant", variant, SIGMA_VARIANTS)
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  chosen = [bool(select(name, leaf)) for name, (_, leaf) in zip(names, leaves, strict=True)]
  if not any(chosen):
    raise ValueError(f"select picks no array of params; names: {', '.join(names)}")
  new = [
    _reparametrised(name, leaf, variant) if yes else leaf
    for name, yes, (_, leaf) in zip(names, chosen, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, new)


def sigma_of(kernel: SigmaKernel) -> jax.Array:
  """u^T W v, differentiable in W alone.

  Args:
    kernel: a `SigmaKernel`.

  Returns:
    Scalar, dtype of gamma; at most the spectral norm of W, and equal to it once u and v converged.
  """
  u, v = jax.lax.stop_gradient((kernel.u, kernel.v))
  return jnp.einsum("i,ij,j->", u, kernel.kernel.astype(u.dtype), v, precision="highest")


def materialize(params) -> Any:
  """The effective kernels gamma W / sigma(W) in place of every `SigmaKernel`; call it in the loss.

  Args:
    params: pytree with any number of `SigmaKernel`s.

  Returns:
    Pytree of arrays for the model; kernels keep the dtype of W.
  """

  def effective(node):
    if not isinstance(node, SigmaKernel):
      return node
    sigma = sigma_of(node)
    # A kernel that is all zero gives zeros, not 0 / 0.
    scale = node.gamma / jnp.where(sigma == 0, 1.0, sigma)
    return (node.kernel.astype(scale.dtype) * scale).astype(node.kernel.dtype)

  return jax.tree.map(effective, params, is_leaf=_is_sigma_kernel)


def with_power_iteration(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Trains kernels and gammas by `optimizer`, and moves u and v by one power iteration a step.

  `optimizer` sees trees in which each `SigmaKernel` has u = v = None: gradients, weight decay,
  global norms and masks concern W and gamma only. (A decay acts on gamma like on any parameter;
  mask it with `x.ndim >= 2` to leave it out.) The power iteration runs on the NEW kernel, so that
  sigma is up to date in the next forward pass; its result comes as the difference to the old
  vectors, for `optax.apply_updates`. So nothing behind this transformation may scale updates.

  Args:
    optimizer: an optax transformation of everything that is trained.

  Returns:
    An optax transformation with the state of `optimizer`; its update needs params.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def update(updates, state, params=None, **extra):
    if params is None:
      raise ValueError("params is None; with_power_iteration needs them in update")
    new, state = optimizer.update(_trained(updates), state, _trained(params), **extra)

    def with_vectors(node, change):
      if not isinstance(node, SigmaKernel):
        return change
      kernel = optax.apply_updates(node.kernel, change.kernel)
      u, v = _power_iteration(kernel, node.u, node.v)
      return change._replace(u=u - node.u, v=v - node.v)

    return jax.tree.map(with_vectors, params, new, is_leaf=_is_sigma_kernel), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optimizer.init(_trained(params)), update
  )


def _is_sigma_kernel(node) -> bool:
  return isinstance(node, SigmaKernel)


def _trained(tree):
  """`tree` without the singular vectors."""
  return jax.tree.map(
    lambda node: node._replace(u=None, v=None) if _is_sigma_kernel(node) else node,
    tree,
    is_leaf=_is_sigma_kernel,
  )


def _reparametrised(name: str, kernel, variant: str) -> SigmaKernel:
  kernel = jnp.asarray(kernel)
  if kernel.ndim != 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
    raise ValueError(
      f"params[{name!r}] is {kernel.dtype} with shape {kernel.shape}; expected floating (d, f)"
    )
  left, singular_values, right = jnp.linalg.svd(
    kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)), full_matrices=False
  )
  sigma = singular_values[0]
  if _checks.is_concrete(sigma) and not float(sigma) > 0:
    raise ValueError(f"params[{name!r}] has spectral norm {float(sigma)}; expected it > 0")
  gamma = sigma if variant == "spectral" else jnp.ones_like(sigma)
  return SigmaKernel(kernel, gamma, left[:, 0], right[0])


def _power_iteration(kernel, u, v):
  """One step v <- W^T u, u <- W v, both to unit length; a vector that vanishes stays as it was."""
  kernel = kernel.astype(u.dtype)
  v = _unit(jnp.einsum("ij,i->j", kernel, u, precision="highest"), v)
  u = _unit(jnp.einsum("ij,j->i", kernel, v, precision="highest"), u)
  return u, v


def _unit(x, otherwise):
  # Divided by the largest entry first: squares of entries below 1e-19 vanish in float32.
  largest = jnp.max(jnp.abs(x))
  scaled = x / jnp.where(largest > 0, largest, 1.0)
  norm = jnp.sqrt(jnp.sum(jnp.square(scaled)))
  return jnp.where(largest > 0, scaled / jnp.where(largest > 0, norm, 1.0), otherwise)
