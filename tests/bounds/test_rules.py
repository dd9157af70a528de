"""Every operation with a rule, one small function each: sound in both modes and both precisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from balance_jax._convolution import conv2d
from balance_jax.bounds import RULES, Interval, crown
from tests.bounds import sampling

RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 5))
SIX = RNG.normal(size=6)
IMAGE = (1, 4, 4, 2)
KERNEL = RNG.normal(size=(3, 3, 2, 3))
INPUT = RNG.normal(size=6) * 0.7


def like(x, array):
  return jnp.asarray(array, x.dtype)


def image(x):
  return jnp.outer(x[:4], jnp.concatenate([x, x[:2]])).reshape(IMAGE)


def convolve(x, kernel, **options):
  numbers = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def affine_image(x):
  return jnp.tile(x, 6)[:32].reshape(IMAGE)


def window(x, init, op, sizes, strides, padding):
  return jax.lax.reduce_window(affine_image(x), init, op, sizes, strides, padding)


# Name -> function of a vector of 6 in [-1, 1] or so. Names tell what is peculiar about a case.
CASES = {
  # Moves and copies.
  "moves": lambda x: jnp.flip(x.reshape(2, 3).T[None], 0).squeeze(0)[1:, ::-1],
  "copy": lambda x: jnp.copy(x) + checkpoint_name(x, "kept"),
  "broadcast size one": lambda x: x[None, :2] * like(x, W[:4, :1]) + x[2:, None],
  "broadcast scalar": lambda x: x[0] + like(x, SIX) * x[1] - x[2],
  "tile": lambda x: jnp.tile(x.reshape(2, 3), (2, 2)) * like(x, W[:4, :1]),
  "stack": lambda x: jnp.stack([x[:3], like(x, SIX[:3]), x[3:], x[:3]], axis=1),
  "unstack": lambda x: sum(like(x, k) * v for k, v in zip(SIX, jnp.unstack(x), strict=True)),
  "concatenate": lambda x: jnp.concatenate([x, like(x, SIX), -x[::2]]),
  "pad": lambda x: jax.lax.pad(x, like(x, 0.7), [(2, -1, 1)]),
  "pad negative": lambda x: jax.lax.pad(x.reshape(2, 3), like(x, 0.0), [(-1, 2, 0), (1, -2, 2)]),
  "pad with a bounded value": lambda x: jax.lax.pad(x[1:], x[0], [(2, 3, 1)]).sum(),
  "dynamic slice": lambda x: jax.lax.dynamic_slice(
    x.reshape(2, 3), (5, jnp.argmax(like(x, SIX)[:2])), (1, 2)
  ),
  "dynamic update slice": lambda x: jax.lax.dynamic_update_slice(x, -2 * x[:2], (jnp.int32(3),)),
  "dynamic update of an exact array": lambda x: jax.lax.dynamic_update_slice(
    like(x, SIX), x[:2], (jnp.int32(1),)
  ),
  "gather": lambda x: x[jnp.array([0, 3, 3, -1])] - x[jnp.array([3, 0, 1, 1])],
  "gather pairs": lambda x: x.reshape(2, 3)[jnp.array([0, 1]), jnp.array([2, 0])],
  "scatter": lambda x: x.at[1].set(x[0]).at[jnp.array([0, 4])].set(2 * x[1:3], unique_indices=True),
  "scatter-add": lambda x: like(x, SIX).at[jnp.array([0, 4, 4])].add(x[:3] - x[3:]),
  "split": lambda x: tuple(k * v for k, v in zip((1, -2, 3), jnp.split(x, (1, 4)), strict=True)),
  "barrier": lambda x: sum(jax.lax.optimization_barrier((x, jnp.flip(x)))),
  "stop gradient": lambda x: x - jax.lax.stop_gradient(x) + x,
  # Sums and products.
  "sums": lambda x: (-x - like(x, SIX)).sum() + (like(x, SIX) - x)[::2].sum(),
  "cumsum": lambda x: jnp.cumsum(x) - jax.lax.cumsum(x, reverse=True),
  "factors": lambda x: (x * like(x, SIX) / like(x, SIX[::-1])) * -3 / 7,
  "matrix": lambda x: x @ like(x, W) + like(x, W.T) @ x,
  "matrix in batches": lambda x: jnp.einsum(
    "bij,bjk->bik", x.reshape(2, 1, 3), like(x, W[:4].T[:3, :4] * np.array([1, -1])[:, None, None])
  ),
  "product of bounded matrices": lambda x: jnp.einsum(
    "bij,bkj->bik", x.reshape(2, 1, 3), jnp.tanh(x[::-1]).reshape(2, 1, 3)
  ),
  "product with broadcasting": lambda x: x.reshape(2, 3) * x[::3, None] * x[0],
  "square by product": lambda x: x * x - x[0] * x,
  "convolution": lambda x: convolve(affine_image(x), like(x, KERNEL)),
  "grouped convolution": lambda x: jax.lax.conv_general_dilated(
    affine_image(x),
    like(x, KERNEL[:, :, :1, :2]),
    (2, 1),
    ((1, 0), (0, 1)),
    rhs_dilation=(1, 2),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=2,
  ),
  "own convolution": lambda x: conv2d(
    affine_image(x), like(x, KERNEL[:, :2]), strides=(1, 2), padding=((1, 0), (0, 2))
  ),
  "own convolution, bounded kernel": lambda x: conv2d(
    like(x, KERNEL[:, :, 0, :2]).reshape(1, 3, 3, 2), jnp.tile(x, 2).reshape(2, 3, 2, 1)
  ),
  "convolution with a bounded kernel": lambda x: convolve(
    like(x, KERNEL[:, :, 0, :2]).reshape(1, 3, 3, 2), jnp.tile(x, 2).reshape(2, 3, 2, 1)
  ),
  "average pooling": lambda x: window(
    x, np.zeros((), x.dtype)[()], jax.lax.add, (1, 2, 3, 1), (1, 2, 1, 1), "SAME"
  ),
  # Maxima, comparisons, choices.
  "max pooling": lambda x: window(
    x, -np.array(np.inf, x.dtype)[()], jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
  ),
  "max pooling, padded": lambda x: window(
    x, -np.array(np.inf, x.dtype)[()], jax.lax.max, (1, 3, 3, 1), (1, 2, 1, 1), "SAME"
  ),
  "reduce max with ties": lambda x: jnp.max(jnp.stack([x, x, x[::-1]]), axis=0) - x,
  "reduce max over axes": lambda x: jnp.max(jnp.tile(x, 2).reshape(2, 3, 2), axis=(0, 2)) + x[:3],
  "reduce min": lambda x: jnp.min(x.reshape(2, 3), axis=1) + 2 * jnp.max(x),
  "max and min": lambda x: (
    jnp.maximum(x, x[::-1]) - jnp.minimum(0.3, x) + jnp.maximum(like(x, SIX), x[0])
  ),
  "relu": lambda x: jax.nn.relu(x) - jnp.maximum(0.0, -x) + jax.nn.relu6(8 * x),
  "clamp": lambda x: jax.lax.clamp(-0.3, x, 0.2) + jnp.clip(x, like(x, SIX) - 1, like(x, SIX) + 1),
  "clamp by bounded": lambda x: jax.lax.clamp(x, like(x, SIX), jnp.abs(x) + 1),
  "select by an exact mask": lambda x: jnp.where(jnp.arange(6) % 2 == 0, 2 * x, like(x, SIX)),
  "select, open": lambda x: jnp.where(x > 0.1, x + 1, -x) + jnp.where(x[::-1] <= x, 2.0, x),
  "select, one open for all": lambda x: jax.lax.select_n(x[0] < 0, x, like(x, SIX)),
  "truths": lambda x: jnp.where(
    ((x > 0) & ~(x[::-1] >= 0.2)) | (x < -0.5) | jnp.all(x > -3) | jnp.any(x <= 0), x, 0.0
  ),
  "truth as number": lambda x: (x != 0).astype(x.dtype) + (jnp.sign(x) == 1).astype(x.dtype),
  "truth of a number": lambda x: x.astype(bool).astype(x.dtype),
  "finite": lambda x: jnp.where(jnp.isfinite(x) & ~jnp.isnan(x), x, 7.0),
  "steps": lambda x: jnp.floor(3 * x) + jnp.ceil(3 * x) + jnp.round(3 * x),
  # Functions of one number.
  "abs": lambda x: jnp.abs(x) - x,
  "powers": lambda x: x**2 + x**3 - x**4 + x**5 + jnp.square(x) + (x + 3) ** -1 + (x - 3) ** -3,
  "even negative power": lambda x: (x - 3) ** -2 + (3 + x) ** -4,
  "power": lambda x: (3 + x) ** 1.5 - (3 + x) ** -0.3,
  "quotients": lambda x: x / (3 + x[::-1]) + 2 / (x - 3) + x[0] / like(x, SIX),
  "exponentials": lambda x: jnp.exp(x) + jnp.exp2(-x) - jnp.expm1(x),
  "logarithms": lambda x: jnp.log(x + 3) - jnp.log1p(x + 2) + jnp.log1p(0.2 * x),
  "roots": lambda x: jnp.sqrt(x + 3) - jax.lax.rsqrt(x + 3) + jnp.sqrt(jnp.abs(x)),
  "s-shaped": lambda x: jnp.tanh(3 * x) - jax.nn.sigmoid(5 * x) + jnp.arctan(x) + jnp.arcsinh(x),
  "error functions": lambda x: jax.lax.erf(2 * x) - jax.lax.erfc(-x) + jax.lax.erfc(3 * x),
  # Whole activations and blocks.
  "leaky relu": lambda x: jax.nn.leaky_relu(x) - jax.nn.leaky_relu(x, 0.3),
  "leaky relu, odd slopes": lambda x: jax.nn.leaky_relu(x, -0.5) + jax.nn.leaky_relu(x, 2.0),
  "softplus": lambda x: jax.nn.softplus(3 * x) - jnp.logaddexp(x, x[::-1]) + jnp.logaddexp(0.5, x),
  "smooth": lambda x: jax.nn.silu(x) + jax.nn.elu(x) + jax.nn.gelu(x) - jax.nn.mish(x),
  "exact gelu": lambda x: jax.nn.gelu(x, approximate=False) + jax.nn.soft_sign(x),
  "hard": lambda x: jax.nn.hard_tanh(2 * x) + jax.nn.hard_sigmoid(x) + jax.nn.celu(x),
  "softmax": lambda x: jax.nn.softmax(3 * x.reshape(2, 3), axis=0) @ x[:3],
  "masked softmax": lambda x: jax.nn.softmax(
    jnp.where(jnp.arange(6) % 3 > 0, x, jnp.finfo(x.dtype).min)
  ),
  "log softmax": lambda x: jax.nn.log_softmax(x) + jax.nn.logsumexp(x),
  "norms": lambda x: jnp.linalg.norm(x + 2) + jax.nn.standardize(x * 0.05 + like(x, SIX)),
}


def primitives(jaxpr) -> set[str]:
  """Names of all operations, nested ones too."""
  names = set()
  for eqn in jaxpr.eqns:
    names.add(eqn.primitive.name)
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        names |= primitives(inner)
  return names


def test_every_rule_has_a_case():
  with jax.enable_x64(True):
    seen = set().union(*(primitives(jax.make_jaxpr(f)(INPUT).jaxpr) for f in CASES.values()))
  # These come from transformations: of gradients, of sharded programs.
  elsewhere = {"add_any", "sharding_constraint"}
  assert set(RULES) - seen == elsewhere


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bits", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_sound(name, bits):
  """With outward rounding and no tolerance in float32; in float64 to a dozen digits."""
  fn, dtype = CASES[name], {32: np.float32, 64: np.float64}[bits]
  with jax.enable_x64(bits == 64):
    center, radius = INPUT.astype(dtype), np.array([0.3, 0.01, 0.5, 1e-4, 0.2, 0], dtype)
    box = Interval(center - radius, center + radius)
    low, high = jax.jit(lambda box, xs: sampling.extremes(fn, box, xs))(
      box, sampling.points(box, 15_000)
    )
    # Not compiled: the small operations are shared by all cases, whole programs are not. CROWN's
    # result is cut with IBP's, so that this is a test of both.
    found = crown(fn, directed=bits == 32)(box)
    sampling.assert_contains(found, low, high, 0.0 if bits == 32 else 1e-12)
