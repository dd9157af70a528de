"""Two Gaussian classes: the closed form of their error rates, and logistic regression against it.

  python experiments/imbalanced_adversarial/theory.py

Writes results/theory.json.
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from balance_jax.robust import gaussian_two_class_errors, robust_separation
from balance_jax.training import evidence

RESULTS = Path(__file__).parent / "results"
DIRECTION = np.array([0.8, 0.6])  # of the mean; sigma is 1, so S is its length
NEWTON_STEPS = 12


@dataclasses.dataclass(frozen=True)
class Settings:
  """Of the curves and of the samples."""

  imbalance: float = 100.0
  separations: tuple[float, ...] = (1.0, 2.0, 3.0)
  weights: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0)
  eps: float = 0.5  # of the robust regression, below every coordinate of every mean it meets
  robust_separations: tuple[float, ...] = (2.0, 3.0)
  trained_weights: tuple[float, ...] = (1.0, 10.0, 100.0)
  minority: int = 2000
  seeds: int = 20


def curves(settings: Settings) -> dict:
  """Errors (separation, weight); on a finer grid of S, the marginal cost of weight."""
  separations = np.array(settings.separations)[:, None]
  weights = np.array(settings.weights)[None]
  errors = gaussian_two_class_errors(separations, settings.imbalance, weights)
  grid = np.linspace(min(settings.separations), max(settings.separations), 9)

  shift = np.log(settings.imbalance / weights) / (2 * grid[:, None])
  marginal = np.exp(-0.5 * (grid[:, None] + shift) ** 2) / (np.sqrt(8 * np.pi) * grid[:, None])
  return {
    "imbalance": settings.imbalance,
    "separations": settings.separations,
    "weights": settings.weights,
    "curves": errors._asdict(),
    "marginal_separations": grid,
    "marginal": marginal,  # d error(majority) / d log rho = phi(S + log(K / rho) / (2 S)) / (2 S)
  }


def fit(x, labels, minority_weight, eps: float) -> jax.Array:
  """(3,) slope and intercept that minimise the weighted logistic loss at the worst point in reach.

  Within eps of x in l_inf the margin falls by eps |slope|_1. Newton's method, float64.

  Args:
    x: float (N, 2).
    labels: float (N,), 1 for the majority, -1 for the minority.
    minority_weight: of the minority's losses.
    eps: radius of the attack; 0 is plain logistic regression.
  """
  weights = jnp.where(labels > 0, 1.0, minority_weight)

  def objective(theta):
    margins = labels * (x @ theta[:2] + theta[2]) - eps * jnp.abs(theta[:2]).sum()
    return jnp.mean(weights * jax.nn.softplus(-margins)) / jnp.mean(weights)

  def newton(_, theta):
    step = jnp.linalg.solve(jax.hessian(objective)(theta), jax.grad(objective)(theta))
    # Far from the minimum a whole step can overshoot.
    return theta - step * jnp.minimum(1.0, 1.0 / jnp.linalg.norm(step))

  return jax.lax.fori_loop(0, NEWTON_STEPS, newton, jnp.zeros(3))


def error_rates(theta, mean, eps: float) -> jax.Array:
  """(2,) exact (robust) errors of a linear rule: majority, minority."""
  norm = jnp.linalg.norm(theta[:2])
  reach = theta[:2] @ mean - eps * jnp.abs(theta[:2]).sum()
  return jax.scipy.stats.norm.cdf(-(reach + jnp.array([1.0, -1.0]) * theta[2]) / norm)


def train(settings: Settings, separations, eps: float) -> dict:
  """Errors of trained rules (seed, separation, weight, class) beside the expected ones."""
  sizes = (round(settings.minority * settings.imbalance), settings.minority)
  labels = np.repeat([1.0, -1.0], sizes)
  weights = np.array(settings.trained_weights)

  @jax.jit
  def errors(noise, mean):
    x = noise + labels[:, None] * mean[None]
    return jax.lax.map(lambda w: error_rates(fit(x, labels, w, eps), mean, eps), weights)

  found, means = [], [s * DIRECTION for s in separations]
  for seed in range(settings.seeds):
    noise = np.random.default_rng(seed).standard_normal((len(labels), 2))
    found.append([errors(noise, mean) for mean in means])
  robust = robust_separation(np.stack(means), 1.0, eps)
  expected = gaussian_two_class_errors(robust[:, None], settings.imbalance, weights[None])
  return {
    "separations": robust,
    "errors": np.array(found),
    "expected": np.stack(expected, axis=-1),
  }


def main(settings: Settings | None = None, folder: Path = RESULTS) -> dict:
  """Computes curves, trains on samples and writes the results."""
  began, settings = time.process_time(), settings or Settings()
  with jax.enable_x64(True):
    results = curves(settings) | {
      "trained_weights": settings.trained_weights,
      "trained": {
        "natural": train(settings, settings.separations, 0.0),
        "robust": train(settings, settings.robust_separations, settings.eps),
      },
    }
  results["cpu_seconds"] = time.process_time() - began
  results = evidence.rounded(results)
  evidence.save(folder / "theory.json", results)
  print(f"{results['cpu_seconds']:.0f} s of CPU")
  return results


if __name__ == "__main__":
  main()
