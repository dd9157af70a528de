"""The coordinate check: slopes and verdicts by hand, training by a reference, both outcomes."""

import dataclasses
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balance_jax.losses import cross_entropy
from balance_jax.models import Decoder, DecoderConfig
from balance_jax.stability import mup
from balance_jax.stability.coordinate_check import record_activations

CoordinateCheck, wider_is_better = mup.CoordinateCheck, mup.wider_is_better
WIDTHS = (64, 160, 400)
X = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 10, 64)


class Mlp(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    for _ in range(3):
      x = nn.relu(nn.Dense(self.width)(x))
    return nn.Dense(10)(x)


def power_law(exponents, spread=0.0, widths=(8, 16, 64)):
  """Magnitudes 3 w^a over 2 seeds, whose slopes are a - spread and a + spread; one step a row."""
  exponents = np.asarray(exponents, np.float64).T  # (T, A)
  each = np.stack([exponents - spread, exponents + spread])  # (S, T, A)
  magnitudes = 3.0 * np.asarray(widths, np.float64)[:, None, None, None] ** each
  names = tuple(f"layer_{i}" for i in range(exponents.shape[1]))
  return CoordinateCheck(widths, names, magnitudes, magnitudes.sum(axis=-1))


def test_slopes_by_hand():
  check = power_law([[0.0, 0.1], [0.5, -0.25], [1.0, 0.0]], spread=0.02)
  np.testing.assert_allclose(check.slopes, [[0.0, 0.1], [0.5, -0.25], [1.0, 0.0]], atol=1e-12)
  np.testing.assert_allclose(check.slope_spread, np.full((3, 2), 0.02), rtol=1e-9)
  failures = check.failures()
  assert list(failures) == ["layer_1"]
  np.testing.assert_allclose(failures["layer_1"], -0.25)
  assert not check.passes
  assert dataclasses.replace(check, exclude=("layer_1",)).passes
  assert dataclasses.replace(check, exclude=("*_1",)).passes
  assert dataclasses.replace(check, tolerance=0.26).passes


def test_slopes_are_least_squares():
  magnitudes = np.exp(np.random.default_rng(2).normal(size=(5, 3, 2, 4)))
  widths = (3, 7, 20, 21, 100)
  check = CoordinateCheck(widths, tuple("abcd"), magnitudes, magnitudes[..., 0])
  for a in range(4):
    for t in range(2):
      fits = [np.polyfit(np.log(widths), np.log(magnitudes[:, s, t, a]), 1)[0] for s in range(3)]
      np.testing.assert_allclose(check.slopes[a, t], np.mean(fits), rtol=1e-9)
      np.testing.assert_allclose(check.slope_spread[a, t], np.std(fits), rtol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_what_has_no_logarithm_fails_at_the_last_step_only(value):
  check = power_law([[0.0, 0.0], [0.0, 0.0]])
  check.magnitudes[1, 0, 0, 0] = value
  assert check.passes
  check.magnitudes[1, 0, 1, 1] = value
  failures = check.failures()
  assert list(failures) == ["layer_1"]
  assert np.isnan(failures["layer_1"])
  assert len(check.plot().axes) == 2


def test_table():
  check = dataclasses.replace(power_law([[0.0, 0.1], [0.5, 0.6]], 0.02), exclude=("layer_1",))
  rows = check.table()
  assert [(row["activation"], row["step"]) for row in rows] == [
    ("layer_0", 1), ("layer_0", 2), ("layer_1", 1), ("layer_1", 2),
  ]  # fmt: skip
  assert [row["judged"] for row in rows] == [False, True, False, False]
  np.testing.assert_allclose([row["slope"] for row in rows], [0.0, 0.1, 0.5, 0.6], atol=1e-12)
  np.testing.assert_allclose([row["spread"] for row in rows], 0.02)


def test_plot():
  exponents = [[0.0, 0.1, 0.0], [0.5, 0.6, 0.7], [0.0, 0.0, 0.4]]
  check = dataclasses.replace(power_law(exponents, 0.02), exclude=("layer_2",))
  figure = check.plot()
  assert len(figure.axes) == 3
  for t, panel in enumerate(figure.axes):
    assert panel.get_xscale() == panel.get_yscale() == "log"
    assert len(panel.lines) == 3
    for a, line in enumerate(panel.lines):
      # The geometric mean of the two seeds is the power law itself.
      expected = 3.0 * np.array([8.0, 16.0, 64.0]) ** exponents[a][t]
      np.testing.assert_allclose(line.get_xydata().T, [(8, 16, 64), expected], rtol=1e-9)
    assert len({line.get_color().tobytes() for line in panel.lines}) == 3
    assert [line.get_linestyle() for line in panel.lines] == ["-", "-", ":"]
  labels = [text.get_text() for text in figure.legends[0].get_texts()]
  assert labels == ["+0.00  layer_0", "+0.70  layer_1 (fails)", "+0.40  layer_2"]
  assert "fails for 1 of 3 activations" in figure.get_suptitle()
  figure.draw_without_rendering()  # places the legend
  right = max(panel.get_window_extent().x1 for panel in figure.axes)
  assert figure.legends[0].get_window_extent().x0 > right
  assert "matplotlib.pyplot" not in sys.modules


def linear_model(width, scale=1.0):
  """x @ up @ head with fixed start, so that a NumPy loop can follow it."""

  def init(key, x):
    del key
    grid = jnp.arange(4 * width, dtype=jnp.float32).reshape(4, width)
    return {"up": scale * jnp.cos(grid) / 2.0, "head": jnp.sin(grid).T / width**0.5}

  def apply(params, x):
    hidden = x @ params["up"]
    out = hidden @ params["head"]
    return out, {"hidden": hidden, "label": jnp.zeros(3, jnp.int32), "out": out}

  return init, apply


def reference(width, x, rate, start=1.0, growth=1.0, steps=3):
  """That model under SGD in float64: mean |hidden| and |out|, and the loss mean (out - 1)^2."""
  grid = np.arange(4 * width, dtype=np.float64).reshape(4, width)
  up, head = np.cos(grid) / 2.0, start * np.sin(grid).T / np.sqrt(width)
  sizes, losses = [], []
  for _ in range(steps):
    hidden = x @ up
    out = hidden @ head
    sizes.append([np.abs(hidden).mean(), np.abs(out).mean()])
    losses.append(np.mean((out - 1.0) ** 2))
    grad = 2.0 * (out - 1.0) / out.size
    up, head = up - rate * growth * (x.T @ grad @ head.T), head - rate * growth * (hidden.T @ grad)
  return sizes, losses


@pytest.mark.parametrize("variant", [None, "tensor_programs"])
def test_training_equals_the_reference(variant):
  """Under muP both rates are r times as large, and the readout starts r^1/2 times as large."""
  x, rate = np.random.default_rng(3).normal(size=(6, 4)), 0.05
  check = mup.coordinate_check(
    linear_model,
    (8, 32),
    inputs=x.astype(np.float32),
    loss=lambda out: jnp.square(out - 1.0),
    optimizer="sgd",
    learning_rate=rate,
    seeds=(0, 1),
    variant=variant,
    readout_form="multiplier",
  )
  assert check.activations == ("hidden", "out")  # integers are not measured
  assert check.magnitudes.shape == (2, 2, 3, 2)
  for i, r in enumerate((1, 4)):
    changed = {} if variant is None else {"start": r**0.5, "growth": r}
    sizes, losses = reference(8 * r, x, rate, **changed)
    assert losses[2] < losses[0]
    for seed in range(2):
      np.testing.assert_allclose(check.magnitudes[i, seed], sizes, rtol=1e-4)
      np.testing.assert_allclose(check.losses[i, seed], losses, rtol=1e-4)


def test_seeds_in_one_program_equal_each_alone():
  def make_model(width):
    def init(key, x):
      drawn = jax.random.uniform(key, (6, width), minval=-1.0)
      return {"up": drawn[:4], "head": drawn[4:].T / width}

    return init, linear_model(width)[1]

  def magnitudes(*seeds):
    settings = {"inputs": X[:5, :4], "loss": jnp.square, "seeds": seeds}
    return mup.coordinate_check(make_model, (8, 32), variant="intermediate", **settings).magnitudes

  both = magnitudes(3, 5)
  np.testing.assert_allclose(both[:, 1:], magnitudes(5), rtol=1e-5)
  assert np.abs(both[:, 0] / both[:, 1] - 1.0).min() > 1e-4


def test_base_width():
  """The readout starts (base / width)^1/2 times the standard one; default is the first width."""

  def start(base_width=None):
    settings = {"inputs": X[:5, :4], "loss": jnp.square, "seeds": (0,), "steps": 1}
    return mup.coordinate_check(
      linear_model, (8, 32), base_width=base_width, variant="intermediate", **settings
    ).magnitudes[:, 0, 0, 1]

  np.testing.assert_allclose(start(2), 0.5 * start(), rtol=1e-5)
  np.testing.assert_allclose(start(8), start(), rtol=1e-6)


def test_an_activation_that_overflows_is_reported():
  def make_model(width):
    return linear_model(width, scale=1.0 if width < 32 else 1e38)

  check = mup.coordinate_check(make_model, (8, 16, 32), inputs=X[:5, :4], loss=jnp.square)
  assert not np.isfinite(check.magnitudes[2]).all()
  assert not check.passes
  assert np.isnan(check.failures()["out"])
  assert not wider_is_better(check.widths, check.losses.mean(axis=1), tolerance=1e9)
  assert check.plot().axes


@pytest.fixture(scope="module")
def trained():
  """The measurement of the muP tables: six steps at a large rate, by parametrisation."""
  settings = {"inputs": X, "loss": lambda out: cross_entropy(out, LABELS), "seeds": (0, 1)}
  return {
    variant: mup.coordinate_check(Mlp, WIDTHS, variant=variant, steps=6, **settings)
    for variant in (None, "tensor_programs")
  }


def first_steps(check, steps):
  return dataclasses.replace(check, magnitudes=check.magnitudes[:, :, :steps])


def test_standard_parametrisation_fails(trained):
  check = first_steps(trained[None], 3)
  assert check.activations == ("Dense_0", "Dense_1", "Dense_2", "Dense_3", "output")
  assert not check.passes
  # At the start nothing depends on the width, so it is training that shows it.
  assert np.abs(check.slopes[:, 0]).max() < 0.2
  assert set(check.failures()) == {"Dense_1", "Dense_2", "Dense_3", "output"}
  assert min(check.failures().values()) > 0.3


def test_mup_passes(trained):
  check = first_steps(trained["tensor_programs"], 3)
  assert check.passes, check.failures()
  assert np.abs(check.slopes[:, 2]).max() < 0.1
  # The output's start shrinks as width^-1/2; over 640 random outputs and 3 widths, within 0.15.
  assert check.slopes[4, 0] == pytest.approx(-0.5, abs=0.15)
  # So the rule must not be applied to the first step.
  assert "output" in first_steps(check, 1).failures()


def test_wider_is_better_under_mup_only(trained):
  # In the first steps the widths differ by chance: two seeds are within 0.05 of each other.
  curves = {variant: check.losses.mean(axis=1) for variant, check in trained.items()}
  assert wider_is_better(WIDTHS, curves["tensor_programs"], tolerance=0.05)
  assert not wider_is_better(WIDTHS, curves[None], tolerance=0.05)
  assert wider_is_better(WIDTHS, curves["tensor_programs"][:, -1])
  assert not wider_is_better(WIDTHS, curves[None][:, -1])


@pytest.mark.parametrize(
  ("losses", "tolerance", "verdict"),
  [
    ([3.0, 2.0, 2.0], 0.0, True),
    ([3.0, 2.0, 2.1], 0.0, False),
    ([3.0, 2.0, 2.1], 0.2, True),
    # Each step is within 0.2 of the one before, but the last is 0.3 above the best.
    ([2.0, 2.15, 2.3], 0.2, False),
    ([3.0, np.nan, 2.0], 9.0, False),
    ([np.inf, 3.0, 2.0], 9.0, False),
    ([[3.0, 2.0], [2.0, 1.0], [1.0, 0.5]], 0.0, True),
    ([[3.0, 2.0], [2.0, 1.0], [1.0, 1.5]], 0.0, False),
  ],
)
def test_wider_is_better(losses, tolerance, verdict):
  assert wider_is_better((1, 2, 4), losses, tolerance) is verdict


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (((4, 2), [1.0, 1.0]), r"widths is \(4, 2\); expected at least 2 numbers, increasing"),
    (((2, 4), [1.0, 1.0, 1.0]), r"losses has shape \(3,\); expected \(2,\) or \(2, T\)"),
    (((2, 4), np.ones((2, 3, 4))), r"losses has shape \(2, 3, 4\)"),
    (((2, 4), [1.0, 1.0], -1.0), r"tolerance is -1\.0"),
  ],
)
def test_wider_is_better_bad_input(arguments, message):
  with pytest.raises(ValueError, match=message):
    wider_is_better(*arguments)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"widths": (8,)}, r"widths is \(8,\); expected at least 2"),
    ({"widths": (8, 8)}, r"widths is \(8, 8\); expected .* increasing"),
    ({"widths": (16, 8)}, "increasing"),
    ({"widths": (0, 8)}, r"widths is 0; allowed: \[1"),
    ({"widths": (8.0, 16.0)}, r"widths is 8\.0; expected an integer"),
    ({"steps": 0}, r"steps is 0; allowed: \[1"),
    ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
    ({"tolerance": -0.1}, r"tolerance is -0\.1"),
    ({"base_width": 0}, "base_width is 0"),
    ({"seeds": ()}, "seeds is empty"),
    ({"optimizer": "lion"}, "optimizer is 'lion'; allowed: adam, sgd"),
    ({"variant": "tensor_program"}, r"variant is 'tensor_program' \(did you mean"),
    ({"variant": "simple", "optimizer": "sgd"}, "variant 'simple' is defined for 'adam' only"),
    ({"make_model": lambda width: width}, "make_model returned int; expected a flax.linen"),
  ],
)
def test_bad_input(changes, message):
  settings = {"inputs": X[:5, :4], "loss": jnp.square, "seeds": (0,), "steps": 1}
  arguments = {"make_model": linear_model, "widths": (8, 16), **settings, **changes}
  with pytest.raises(ValueError, match=message):
    mup.coordinate_check(**arguments)


def test_widths_must_have_the_same_activations():
  def make_model(width):
    init, apply = linear_model(width)

    def renamed(params, x):
      out, _ = apply(params, x)
      return out, {f"w{width}": out}

    return init, renamed

  with pytest.raises(ValueError, match=r"\('w16',\) at width 16; expected those at width 8"):
    mup.coordinate_check(make_model, (8, 16), inputs=X[:5, :4], loss=jnp.square, steps=1)


def test_names_of_activations():
  """Natural order; the output last; nothing floating is an error; names that clash stay whole."""

  def record(activations):
    def apply(params, x):
      return params["w"] * x, activations

    return record_activations(
      lambda key: {"w": jnp.ones(())}, apply, optax.identity(), jnp.square, jnp.ones(2), (0,), 1
    )

  one = jnp.full((2,), -2.0, jnp.bfloat16)
  names, sizes, _ = record(
    {"__call__": (one,), "z10": {"__call__": (one,)}, "z2": {"__call__": (one, 2 * one)}}
  )
  assert names == ("z2", "z2/1", "z10", "output")
  np.testing.assert_array_equal(sizes[0, 0], [2.0, 4.0, 2.0, 2.0])
  # A pair from each of two calls: without the places, two of them would have the same name.
  twice = {"a": {"__call__": ((one, one), (one, one))}}
  assert record(twice)[0] == tuple(f"a/__call__/{i}/{j}" for i in range(2) for j in range(2))
  with pytest.raises(ValueError, match="no floating activations"):
    record({"count": jnp.zeros(2, jnp.int32)})


@pytest.mark.slow
def test_decoder():
  """Heads of 16, and more of them; below width 64 the limit is still far."""
  tokens = jnp.asarray(np.random.default_rng(4).integers(0, 32, (16, 17)))

  def make_model(width):
    return Decoder(DecoderConfig(vocab_size=32, width=width, depth=2, heads=width // 16))

  programs, standard = (
    mup.coordinate_check(
      make_model,
      (64, 128, 256),
      inputs=tokens[:, :-1],
      loss=lambda logits: cross_entropy(logits, tokens[:, 1:]),
      learning_rate=0.005,
      variant=variant,
    )
    for variant in ("tensor_programs", None)
  )
  assert "block_1/attention/attention_stats/max_logit" in programs.activations
  assert programs.passes, programs.failures()
  assert standard.failures()["block_0"] > 0.3
