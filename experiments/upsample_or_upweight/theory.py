"""Theorems 1 to 3 and the variance formulas, checked by numbers.

  python experiments/upsample_or_upweight/theory.py

Full gradients in float64, on the linear model and on the decoder; the variance formulas against
Monte Carlo at several points of a training run; F(tau) on a grid. Needs no data set. Writes
results/theory.json.
"""

import dataclasses
import functools
import time

import evidence
import gumbel
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from balance_jax import data, mixing, models
from balance_jax.gradients import measure_gradient_moments
from balance_jax.losses import cross_entropy, group_weighted_mean, weighted_mean
from balance_jax.training import init_state, make_step, run

FULL_GRADIENT_TAUS = (1.0, 2.0, 3.0, 5.0, 100.0, np.inf)
# Sizes of the paper's experiments (OPUS-100 and mC4), of the synthetic repeat and of the real text.
SIZES = {
  "synthetic": (40_000, 400),
  "OPUS-100": (1e6, 1e6, 1e6, 538e3, 519e3, 294e3, 102e3, 83e3, 76e3),
  "mC4": (2733e9, 162e9, 39e9, 1e9),
  "GCC messages": (834_006, 405_654, 87_537, 28_503, 7_776, 5_488),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Of the Monte Carlo check."""

  sizes: tuple[int, int] = (4000, 40)
  points: tuple[int, ...] = (0, 300, 3000)  # training steps, of TS with tau = 5 and SGD
  batch: int = 4
  batches: int = 20_000
  rate: float = 0.05


# --- Theorem 1 ---


def linear_problem():
  """(per_example_loss, init, table) of the linear model; init(key) -> random params."""
  table = gumbel.tables({"large": 400, "small": 10}, 1, 1)["train"]

  def init(key):
    return jax.tree.map(lambda x: jax.random.normal(key, x.shape), gumbel.init_params(2))

  return lambda params, rows, key: gumbel.losses(params, rows, 0), init, table


def decoder_problem():
  """The same of a decoder on random tokens."""
  rng = np.random.default_rng(0)
  streams = {name: rng.integers(0, 50, 16 * n + 1) for name, n in (("a", 60), ("b", 9), ("c", 2))}
  table = data.group_table(streams, window=16)
  decoder = models.Decoder(
    models.DecoderConfig(vocab_size=50, width=16, depth=2, heads=2, dtype=jnp.float64)
  )

  def per_example_loss(params, rows, key):
    tokens = rows["tokens"]
    return cross_entropy(decoder.apply(params, tokens[:, :-1]), tokens[:, 1:]).mean(axis=-1)

  def init(key):
    return decoder.init(key, jnp.zeros((1, 16), jnp.int32))

  return per_example_loss, init, table


def full_gradient_errors(per_example_loss, init, table) -> dict[str, float]:
  """Largest relative distance of the gradient of S, and of a wrong S, from that of TS.

  "wrong" weights by p(tau) alone, as the text of section 3.2 has it, instead of p(tau) / p(1).
  TS is sum_i p_i times the gradient of the mean loss of domain i; three random params, six tau.
  """
  sizes = table.group_sizes
  groups = np.repeat(np.arange(len(sizes)), sizes)

  def weighted_loss(params, weights):
    return weighted_mean(per_example_loss(params, table.rows, None), weights[groups]).mean()

  def domain_losses(params):
    losses = per_example_loss(params, table.rows, None)
    return group_weighted_mean(losses, groups, len(sizes)).mean()

  def gradients(params, weights):
    """Gradient for each row of weights (W, K), and that of each domain's mean loss: (., P)."""
    flat_params, unravel = ravel_pytree(params)
    of_rows = jax.vmap(jax.grad(lambda x, w: weighted_loss(unravel(x), w)), in_axes=(None, 0))
    return of_rows(flat_params, weights), jax.jacrev(lambda x: domain_losses(unravel(x)))(
      flat_params
    )

  compiled = jax.jit(gradients)
  p = jnp.stack([mixing.temperature_probs(sizes, tau) for tau in FULL_GRADIENT_TAUS])
  right = jnp.stack([mixing.scalarization_weights(sizes, tau) for tau in FULL_GRADIENT_TAUS])
  errors = {"S": 0.0, "wrong": 0.0}
  for seed in range(3):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), jax.jit(init)(jax.random.key(seed)))
    found, by_domain = compiled(params, jnp.concatenate([right, p]))
    sampled = p @ by_domain
    for name, got in zip(errors, jnp.split(found, 2), strict=True):
      distance = jnp.linalg.norm(got - sampled, axis=1) / jnp.linalg.norm(sampled, axis=1)
      errors[name] = max(errors[name], float(distance.max()))
  return errors


def full_gradients() -> dict:
  """`full_gradient_errors` of both models, in float64."""
  with jax.enable_x64(True):
    problems = {"linear": linear_problem, "decoder": decoder_problem}
    return {name: full_gradient_errors(*problem()) for name, problem in problems.items()}


# --- Variances ---


def estimators(sizes) -> dict[str, tuple]:
  """Name -> (p, r, method of allocation): what is optimised, drawn, and how counts are made."""
  p, q = mixing.temperature_probs(sizes, 5.0), mixing.natural_probs(sizes)
  mild, half = mixing.temperature_probs(sizes, 2.0), jnp.array([0.5, 0.5])
  quarter = jnp.array([0.75, 0.25])
  return {
    "TS 2": (mild, mild, "multinomial"),
    "S 2": (mild, q, "multinomial"),
    "TS 5": (p, p, "multinomial"),
    "S 5": (p, q, "multinomial"),
    # Quotas that are whole rows in a batch of four.
    "stratified TS": (quarter, quarter, "stratified"),
    "stratified, drawn half and half": (quarter, half, "stratified"),
  }


def monte_carlo(params, table, estimator, settings: Settings, key) -> tuple[float, float, float]:
  """Mean squared distance of a batch gradient from the exact one, its standard error, and bias.

  Returns:
    (variance, standard error, bias ratio); the last is M ||mean - exact||^2 / variance, about 1
    for an unbiased estimate from M batches.
  """
  p, r, method = estimator
  keys = jax.random.split(key, settings.batches).reshape(-1, min(250, settings.batches))
  total, squares = _errors(params, table, p, r, keys, method, settings.batch)
  squares = np.asarray(squares, np.float64).reshape(-1)
  bias = np.sum(np.square(np.asarray(total, np.float64).sum(axis=0))) / settings.batches
  return squares.mean(), squares.std(ddof=1) / np.sqrt(squares.size), bias / squares.mean()


@functools.partial(jax.jit, static_argnums=(5, 6))
def _errors(params, table, p, r, keys, method: str, batch: int):
  """Sums over chunks of (batch gradient - exact gradient), and its squared norm for every key."""
  sizes = jnp.asarray(table.group_sizes)
  groups = np.repeat(np.arange(len(sizes)), table.group_sizes)

  def gradient(rows, weights):
    def objective(params):
      return weighted_mean(gumbel.losses(params, rows, 0), weights).mean()

    return ravel_pytree(jax.grad(objective)(params))[0]

  q = mixing.natural_probs(table.group_sizes)
  exact = gradient(table.rows, mixing.importance_weights(p, q)[groups])

  def one(key):
    count_key, row_key = jax.random.split(key)
    counts, _ = mixing.allocate_counts(count_key, r, batch, method)
    drawn = jnp.repeat(jnp.arange(len(counts)), counts, total_repeat_length=batch)
    rows = table.take(drawn, jax.random.randint(row_key, drawn.shape, 0, sizes[drawn]))
    return gradient(rows, mixing.importance_weights(p, r)[drawn]) - exact

  def chunk(keys):
    errors = jax.vmap(one)(keys)
    return errors.sum(axis=0), jnp.sum(jnp.square(errors), axis=1)

  return jax.lax.map(chunk, keys)


def exact_variance(moments, estimator, batch: int) -> float:
  """The formula, with the moments of all rows."""
  p, r, method = estimator
  name = "variance" if method == "multinomial" else "variance_stratified"
  found = mixing.estimator_moments(p, r, moments.second_moment, moments.mean_grad)
  return float(found[name]) / batch


def variances(settings: Settings) -> list[dict]:
  """Formula against Monte Carlo for every estimator at every point of training."""
  sizes = dict(zip(("large", "small"), settings.sizes, strict=True))
  table = gumbel.tables(sizes, 1, 1)["train"]
  groups = np.repeat(np.arange(2), settings.sizes)
  step = make_step(
    lambda params, rows, key: gumbel.losses(params, rows, 0),
    optax.sgd(settings.rate),
    mixing.temperature(table.sizes, 5.0),
    table,
    batch_size=32,
    metrics=("loss",),
  )
  measure = jax.jit(
    lambda params: measure_gradient_moments(
      step.per_example_loss, params, table.rows, groups, 2, chunk=100
    )
  )
  state, done, found = init_state(jax.random.key(0), gumbel.init_params(2), step), 0, []
  for point in settings.points:
    if point > done:
      state, _ = run(step, state, point - done, chunk=settings.points[1])
      done = point
    moments = measure(state.params)
    for index, (name, estimator) in enumerate(estimators(table.sizes).items()):
      key = jax.random.fold_in(jax.random.key(point), index)
      variance, error, bias = monte_carlo(state.params, table, estimator, settings, key)
      exact = exact_variance(moments, estimator, settings.batch)
      found.append(
        {
          "step": point,
          "estimator": name,
          "formula": exact,
          "monte_carlo": variance,
          "z": (variance - exact) / error,
          "bias": bias,
        }
      )
  return found


# --- Theorems 2 and 3 ---


def inflation_is_monotone() -> dict:
  """F(tau) on a grid: largest step in the wrong direction, and distance from its limits."""
  found = {}
  with jax.enable_x64(True):
    for name, sizes in SIZES.items():
      taus = np.concatenate(
        [np.geomspace(0.2, 1.0, 200), np.geomspace(1.0, 500.0, 400), [5.0, np.inf]]
      )
      inflation = jax.jit(jax.vmap(lambda tau, sizes=sizes: mixing.chi2_inflation(sizes, tau)))
      values = np.asarray(inflation(taus))
      below, above = values[:200], values[200:600]
      q = np.asarray(sizes, np.float64) / np.sum(sizes)
      limit = np.sum(1 / q) / len(q) ** 2
      found[name] = {
        "wrong_way": float(max(np.diff(below).max(), -np.diff(above).min(), 0.0)),
        "at_one": float(above[0]),
        "at_five": float(values[-2]),
        "limit_error": float(abs(values[-1] / limit - 1)),
      }
  return found


def counter_example() -> dict:
  """Second moments of S and TS, with equal G (theorem 2 holds) and with G = (10, 0.1)."""
  p, q = [0.5, 0.5], [0.9, 0.1]
  return {
    name: {
      "S": float(mixing.estimator_moments(p, q, g)["second"]),
      "TS": float(mixing.estimator_moments(p, p, g)["second"]),
    }
    for name, g in (("equal", [1.0, 1.0]), ("unequal", [10.0, 0.1]))
  }


def main(settings: Settings | None = None, folder=evidence.RESULTS) -> dict:
  """Runs all checks and writes the results."""
  began = time.monotonic()
  results = {
    "full_gradients": full_gradients(),
    "counter_example": counter_example(),
    "inflation": inflation_is_monotone(),
    "variances": variances(settings or Settings()),
  }
  results["seconds"] = time.monotonic() - began
  results = evidence.rounded(results)
  for name in ("full_gradients", "counter_example", "inflation"):
    print(name, results[name])
  for row in results["variances"]:
    print(row)
  print(f"{results['seconds']:.0f} s")
  evidence.save("theory", results, folder)
  return results


if __name__ == "__main__":
  main()
