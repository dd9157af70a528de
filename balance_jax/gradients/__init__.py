"""Gradients by group: their measured moments (Gram-matrix solvers join them later)."""

from balance_jax.gradients.moments import GradientMoments, measure_gradient_moments

__all__ = ["GradientMoments", "measure_gradient_moments"]
