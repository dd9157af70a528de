import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax import _checks

ALLOWED = ("natural", "optimal", "target")


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), jnp.bfloat16(1), jnp.ones(()), 2**40])
def test_check_number_admits(value):
  _checks.check_number("x", value, low=1)


@pytest.mark.parametrize(
  ("value", "limits", "message"),
  [
    (0.5, {"low": 1}, r"^x is 0\.5; allowed: \[1, inf\]$"),
    (0, {"low": 0, "open_low": True}, r"^x is 0; allowed: \(0, inf\]$"),
    (2, {"low": 0, "high": 1}, r"^x is 2; allowed: \[0, 1\]$"),
    (np.nan, {}, "^x is nan; "),
    (jnp.float32(2), {"high": 1}, r"^x is 2\.0; "),
    ([1, 2], {}, r"^x has shape \(2,\); expected one number$"),
    ("1", {}, "^x is '1'; expected a number$"),
    (None, {}, "^x is None; expected a number$"),
    (True, {}, "^x is True; expected a number$"),
    (1j, {}, "expected a number$"),
    (2.0, {"integer": True}, r"^x is 2\.0; expected an integer$"),
  ],
)
def test_check_number_rejects(value, limits, message):
  with pytest.raises(ValueError, match=message):
    _checks.check_number("x", value, **limits)


def test_limits_are_inside_unless_open():
  _checks.check_number("x", 1, low=1, high=1)
  _checks.check_number("x", np.inf, low=0, open_low=True)
  _checks.check_number("x", np.int32(1), integer=True)


def test_traced_values_pass_and_constants_do_not():
  constant = jnp.float32(-1)

  def traced(x):
    _checks.check_number("x", x, low=0)
    return x

  def closed_over(x):
    _checks.check_number("constant", constant, low=0)
    return x

  assert jax.jit(traced)(-1) == -1
  with pytest.raises(ValueError, match=r"constant is -1\.0"):
    jax.jit(closed_over)(1)


def test_is_concrete_looks_into_lists():
  seen = []

  def note(x):
    seen.append([_checks.is_concrete(y) for y in (x, [1, x], [1, 2], jnp.int32, constant)])
    return x

  constant = jnp.ones(2)
  jax.jit(note)(1)
  assert seen == [[False, False, True, True, True]]


def test_check_known():
  _checks.check_known("budget", 5)
  with pytest.raises(ValueError, match="budget must be known when the function is traced"):
    jax.jit(lambda x: _checks.check_known("budget", x))(5)


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ("natrual", r"^draw is 'natrual' \(did you mean 'natural'\?\); allowed: natural, optimal, "),
    ("zzz", "^draw is 'zzz'; allowed: natural, optimal, target$"),
    (None, "^draw is None; allowed: "),
    (["natural"], r"^draw is \['natural'\]"),
  ],
)
def test_check_choice(value, message):
  _checks.check_choice("draw", "natural", ALLOWED)
  for allowed in (ALLOWED, dict.fromkeys(ALLOWED)):
    with pytest.raises(ValueError, match=message):
      _checks.check_choice("draw", value, allowed)


def test_nearest():
  assert _checks.nearest("optimul", ALLOWED) == " (did you mean 'optimal'?)"
  assert _checks.nearest("zzz", ALLOWED) == ""


def test_check_sizes_returns_float64():
  sizes = _checks.check_sizes([2_700_000_000_000, 0, 1])
  assert sizes.dtype == np.float64
  assert sizes.tolist() == [2.7e12, 0, 1]


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ([], r"^rows has shape \(0,\); expected \(K,\) with K >= 1$"),
    (3, r"^rows has shape \(\)"),
    ([1, np.nan], "^rows must be finite"),
    ([1, -1, -5], "^rows must be >= 0, got -5 at 2$"),
    ([0, 0], "^rows must hold at least one group above zero"),
    (["a", "b"], r"^rows is \['a', 'b'\]; expected K numbers$"),
    ([[1], [1, 2]], "^rows is .*; expected K numbers$"),
  ],
)
def test_check_sizes_rejects(sizes, message):
  with pytest.raises(ValueError, match=message):
    _checks.check_sizes(sizes, "rows")


def test_check_shape():
  _checks.check_shape("x", np.ones((2, 3)), (None, 3))
  _checks.check_shape("x", 1.0, ())
  for shape in ((2,), (3, 3), (2, 3, 1)):
    with pytest.raises(ValueError, match=r"^x has shape \(2, 3\); expected \("):
      _checks.check_shape("x", np.ones((2, 3)), shape)
  with pytest.raises(ValueError, match=r"expected \(any, 4\)$"):
    _checks.check_shape("x", np.ones((2, 3)), (None, 4))
