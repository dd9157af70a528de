"""Group probabilities from group sizes, and what they do to the variance of a gradient estimate.

Notation: K groups with sizes n_i, natural frequencies q_i = n_i / sum n, p what is optimised,
r what is drawn; an example of group i carries the loss weight p_i / r_i.

Source: Li et al., "Upsample or Upweight? Balanced Training on Heavily Imbalanced Datasets", 2025
(arXiv 2410.04579). The law for a free r is ours; see `estimator_moments`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax import _checks


def _float_dtype():
  return jnp.result_type(float)


def natural_probs(sizes) -> jax.Array:
  """Natural frequencies q_i = n_i / sum n.

  Args:
    sizes: numbers (K,), >= 0, not all zero, known on the host (up to 1e300: no int32 overflow).

  Returns:
    float (K,) on the simplex.
  """
  sizes = _checks.check_sizes(sizes)
  return jnp.asarray(sizes / sizes.sum(), _float_dtype())


def given_probs(p, sizes, argument: str = "p") -> jax.Array:
  """A mixture given by hand, divided by its sum.

  Args:
    p: numbers (K,), >= 0, not all zero; 0 where the size is 0. May be traced, then unchecked.
    sizes: numbers (K,), >= 0, not all zero.
    argument: name of `p` in error messages.

  Returns:
    float (K,) on the simplex.
  """
  sizes = _checks.check_sizes(sizes)
  if _checks.is_concrete(p):
    p = _checks.check_sizes(p, argument)
    _checks.check_shape(argument, p, sizes.shape)
    if np.any((p > 0) & (sizes == 0)):
      group = int(np.argmax((p > 0) & (sizes == 0)))
      raise ValueError(f"{argument} is {p[group]:g} at {group}, a group of size 0; expected 0")
    return jnp.asarray(p / p.sum(), _float_dtype())
  p = jnp.asarray(p, _float_dtype())
  _checks.check_shape(argument, p, sizes.shape)
  return p / p.sum()


def temperature_probs(sizes, tau) -> jax.Array:
  """Temperature sampling p_i proportional to n_i^(1/tau) (Li et al., 2025, section 2).

  Args:
    sizes: numbers (K,), >= 0, not all zero, known on the host. A group of size 0 gets exactly 0.
    tau: > 0, `jnp.inf` allowed, may be traced. 1 is proportional, infinity uniform over n_i > 0.

  Returns:
    float (K,) on the simplex.

  >>> [round(float(x), 4) for x in temperature_probs([900, 100], 2.0)]
  [0.75, 0.25]
  """
  _checks.check_number("tau", tau, low=0.0, open_low=True)
  sizes = _checks.check_sizes(sizes)
  positive = sizes > 0
  # Logarithms and the subtraction of the maximum in float64: sizes reach 1e12 and more.
  log_sizes = np.log(np.where(positive, sizes, sizes.max()))
  log_sizes = jnp.asarray(log_sizes - log_sizes.max(), _float_dtype())
  # Finite for a tau so small that its inverse overflows: 0 * inf would be NaN.
  inverse = jnp.minimum(1.0 / jnp.asarray(tau, _float_dtype()), jnp.finfo(_float_dtype()).max)
  logits = log_sizes * inverse
  return jax.nn.softmax(logits, where=jnp.asarray(positive))


def capped_probs(sizes, cap) -> jax.Array:
  """Examples-proportional mixing with an artificial size limit, p_i ~ min(n_i, cap) (T5, 2020).

  Args:
    sizes: numbers (K,), >= 0, not all zero.
    cap: > 0, in the unit of `sizes`; may be traced.

  Returns:
    float (K,) on the simplex.
  """
  _checks.check_number("cap", cap, low=0.0, open_low=True)
  sizes = _checks.check_sizes(sizes)
  # Divided by the largest size first: float32 holds no 1e12 exactly, but ratios are fine.
  scale = sizes.max()
  capped = jnp.minimum(
    jnp.asarray(sizes / scale, _float_dtype()), jnp.asarray(cap, _float_dtype()) / scale
  )
  return capped / capped.sum()


def unimax_probs(sizes, budget: float, max_epochs: float) -> jax.Array:
  """UniMax: as uniform as a cap on the repetitions of every group allows (Chung et al., 2023).

  Groups are served from the smallest to the largest; each takes an equal share of what is left of
  the budget, but at most `max_epochs` times its size.

  Args:
    sizes: numbers (K,), >= 0, not all zero.
    budget: total number of draws of the whole training, in the unit of `sizes`; > 0, finite.
    max_epochs: cap on the passes over any group; > 0. Neither may be traced.

  Returns:
    float (K,) on the simplex.

  Raises:
    ValueError: if the budget cannot be spent, budget > max_epochs * sum(sizes).
  """
  for name, value in (("budget", budget), ("max_epochs", max_epochs)):
    _checks.check_known(name, value)
  _checks.check_number("budget", budget, low=0.0, high=np.finfo(np.float64).max, open_low=True)
  _checks.check_number("max_epochs", max_epochs, low=0.0, open_low=True)
  budget, max_epochs = float(budget), float(max_epochs)
  sizes = _checks.check_sizes(sizes)
  if budget > max_epochs * sizes.sum():
    raise ValueError(
      f"budget is {budget:g}, more than max_epochs * sum(sizes) = {max_epochs * sizes.sum():g}: "
      "the cap binds for every group; lower the budget or raise max_epochs"
    )
  spent = np.zeros_like(sizes)
  left = budget
  # Groups of size 0 take nothing; the others share the budget among themselves.
  order = [i for i in np.argsort(sizes, kind="stable") if sizes[i] > 0]
  for rank, group in enumerate(order):
    spent[group] = min(left / (len(order) - rank), max_epochs * sizes[group])
    left -= spent[group]
  return jnp.asarray(spent / spent.sum(), _float_dtype())


def importance_weights(p, r) -> jax.Array:
  """Loss weight p_i / r_i of an example of group i; 0 where p_i = 0.

  Args:
    p: float (K,), what is optimised.
    r: float (K,), what is drawn; r_i = 0 with p_i > 0 gives infinity, as no draw can be unbiased.

  Returns:
    float (K,); the expectation under r is 1.
  """
  p, r = jnp.asarray(p), jnp.asarray(r)
  _checks.check_shape("r", r, p.shape)
  return jnp.where(p > 0, p / jnp.where(p > 0, r, 1.0), 0.0)


def scalarization_weights(sizes, tau) -> jax.Array:
  """Loss weights w_i = p_i(tau) / q_i that make natural draws optimise p(tau) (theorem 1).

  The text of section 3.2 of the paper multiplies by p_i alone, which would optimise p*q; the
  theorem needs the ratio. The mean of w under q is 1 for every tau.

  Args:
    sizes: numbers (K,), >= 0, not all zero.
    tau: > 0; see `temperature_probs`.

  Returns:
    float (K,); 0 for groups of size 0.

  >>> [round(float(x), 4) for x in scalarization_weights([900, 100], 2.0)]
  [0.8333, 2.5]
  """
  return importance_weights(temperature_probs(sizes, tau), natural_probs(sizes))


def chi2_inflation(sizes, tau) -> jax.Array:
  """F(tau) = sum_i p_i(tau)^2 / q_i, one plus the chi-square divergence of p(tau) from q.

  With the same gradient second moment G in every group, scalarization has the second moment
  F(tau) * G against G of temperature sampling (theorem 3: F(1) = 1 is the minimum).

  Args:
    sizes: numbers (K,), >= 0, not all zero.
    tau: > 0; see `temperature_probs`.

  Returns:
    float scalar >= 1.
  """
  return jnp.sum(temperature_probs(sizes, tau) * scalarization_weights(sizes, tau))


def optimal_sampling(p, second_moment) -> jax.Array:
  """The draw of least variance for the objective p: r_i proportional to p_i * sqrt(G_i).

  Args:
    p: float (K,) on the simplex.
    second_moment: float (K,), G_i = mean squared gradient norm of group i, >= 0.

  Returns:
    float (K,) on the simplex; p itself where every p_i * G_i is zero or one of them is NaN.

  >>> [round(float(x), 4) for x in optimal_sampling([0.5, 0.5], [9.0, 1.0])]
  [0.75, 0.25]
  """
  p, second_moment = jnp.asarray(p), jnp.asarray(second_moment)
  _checks.check_shape("second_moment", second_moment, p.shape)
  mass = p * jnp.sqrt(second_moment)
  total = mass.sum()
  return jnp.where(total > 0, mass / jnp.where(total > 0, total, 1.0), p)


def estimator_moments(p, r, second_moment, mean_grad=None, *, gram=None) -> dict[str, jax.Array]:
  """Moments of the one-example gradient estimate that draws from r and weights by p / r.

  With G_i = E||grad l||^2 and g_i = E grad l within group i, and gbar = sum_i p_i g_i:

    second              = sum_i p_i^2 / r_i * G_i
    variance            = second - ||gbar||^2                      (groups drawn at random)
    variance_stratified = sum_i p_i^2 / r_i * (G_i - ||g_i||^2)    (fixed quotas)

  A batch of B independent draws divides each by B. Their difference, the between-group term, is
  what fixed quotas remove. r = p is temperature sampling, r = q scalarization. Theorem 2 of Li et
  al. (2025), "scalarization has the larger variance", holds only for equal G_i.

  Args:
    p: float (K,), what is optimised.
    r: float (K,), what is drawn.
    second_moment: float (K,), G_i.
    mean_grad: float (K, P), the mean gradient of every group; or give `gram`.
    gram: float (K, K), inner products <g_i, g_j>, instead of `mean_grad`.

  Returns:
    dict with "second" and, where mean gradients are given, "variance" and "variance_stratified".

  >>> moments = estimator_moments([0.5, 0.5], [0.9, 0.1], [10.0, 0.1])
  >>> round(float(moments["second"]), 3)
  3.028
  """
  p, r, second_moment = (jnp.asarray(x, _float_dtype()) for x in (p, r, second_moment))
  _checks.check_shape("p", p, (None,))
  _checks.check_shape("r", r, p.shape)
  _checks.check_shape("second_moment", second_moment, p.shape)
  if mean_grad is not None and gram is not None:
    raise ValueError("give mean_grad or gram, not both")
  factor = p * importance_weights(p, r)
  moments = {"second": jnp.sum(factor * second_moment)}
  if mean_grad is not None:
    mean_grad = jnp.asarray(mean_grad)
    _checks.check_shape("mean_grad", mean_grad, (p.shape[0], None))
    # TPUs and recent GPUs round the factors of a float32 product; the variance is a difference.
    gram = jnp.matmul(mean_grad, mean_grad.T, precision="highest")
  if gram is not None:
    gram = jnp.asarray(gram)
    _checks.check_shape("gram", gram, (p.shape[0], p.shape[0]))
    squared_norm = jnp.einsum("i,ij,j->", p, gram, p, precision="highest")
    moments["variance"] = moments["second"] - squared_norm
    moments["variance_stratified"] = jnp.sum(factor * (second_moment - jnp.diagonal(gram)))
  return moments
