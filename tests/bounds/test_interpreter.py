import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.bounds import Interval, UnsupportedPrimitive, crown, ibp

RNG = np.random.default_rng(0)
WEIGHTS = jnp.asarray(RNG.normal(size=(3, 4, 4)) / 2, jnp.float32)
BOX = Interval(-jnp.ones(4), jnp.ones(4) * 0.5)


def layer(x, weight):
  return jax.nn.relu(x @ weight)


def plain(x):
  for weight in WEIGHTS:
    x = layer(x, weight)
  return x


@jax.custom_vjp
def clipped(x, weight):
  return layer(x, weight)


clipped.defvjp(lambda x, w: (layer(x, w), x), lambda x, g: (g, None))


@jax.custom_jvp
def straight(x, weight):
  return layer(x, weight)


straight.defjvp(lambda primals, tangents: (layer(*primals), tangents[0]))


def chain(step):
  def fn(x):
    for weight in WEIGHTS:
      x = step(x, weight)
    return x

  return fn


def equal(found, expected):
  np.testing.assert_allclose(found.lower, expected.lower, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found.upper, expected.upper, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bounds", [ibp, crown])
def test_nested_programs_are_entered(bounds):
  expected = bounds(plain)(BOX)
  nested = {
    "jit": chain(jax.jit(layer)),
    "jit in jit": jax.jit(chain(jax.jit(layer))),
    "custom_jvp": chain(straight),
    "custom_vjp": chain(clipped),
    "remat": chain(jax.checkpoint(layer)),
    "scan": lambda x: jax.lax.scan(lambda c, w: (layer(c, w), None), x, WEIGHTS)[0],
    "fori_loop": lambda x: jax.lax.fori_loop(0, 3, lambda i, c: layer(c, WEIGHTS[i]), x),
    "vmap": lambda x: jax.vmap(plain)(x[None])[0],
    "vmap of jit": lambda x: jax.vmap(chain(jax.jit(layer)))(x[None])[0],
  }
  for name, fn in nested.items():
    if name != "fori_loop":
      equal(bounds(fn)(BOX), expected)
  # Where the loop becomes a scan, which is when its length is known, it is entered.
  equal(bounds(nested["fori_loop"])(BOX), expected)


def test_scan_of_bounded_entries_and_carries():
  def scanned(x, *, reverse):
    columns = {"x": x.reshape(2, 2), "k": jnp.array([2.0, -3.0])}

    def step(carry, column):
      new = carry + column["k"] * column["x"]
      return new, (new * 2, column["k"])

    return jax.lax.scan(step, jnp.ones(2), columns, reverse=reverse)

  def unrolled(x, *, reverse):
    carry, outs = jnp.ones(2), [None, None]
    for i in (1, 0) if reverse else (0, 1):
      carry = carry + jnp.array([2.0, -3.0])[i] * x.reshape(2, 2)[i]
      outs[i] = carry * 2
    return carry, (jnp.stack(outs), jnp.array([2.0, -3.0]))

  for reverse in (False, True):
    found = crown(lambda x, r=reverse: scanned(x, reverse=r))(BOX)
    expected = crown(lambda x, r=reverse: unrolled(x, reverse=r))(BOX)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
  carry, outs = ibp(lambda x: jax.lax.scan(lambda c, _: (c, c), x, None, length=0))(BOX)
  equal(carry, BOX)
  assert outs.shape == (0, 4)


def test_jit_and_vmap_outside():
  boxes = Interval(jnp.stack([BOX.lower, BOX.lower * 2]), jnp.stack([BOX.upper, BOX.upper * 3]))
  for bounds in (ibp, crown):
    batched = jax.jit(jax.vmap(bounds(plain)))(boxes)
    for i in range(2):
      alone = bounds(plain)(jax.tree.map(lambda v, i=i: v[i], boxes))
      equal(jax.tree.map(lambda v, i=i: v[i], batched), alone)
  # Ends may differ in what is mapped: one eps after the other.
  sizes = jax.vmap(lambda e: ibp(plain)(Interval(-e * jnp.ones(4), e * jnp.ones(4))).upper.sum())
  found = sizes(jnp.array([0.0, 0.1, 0.2]))
  assert found[0] < found[1] < found[2]


def test_a_custom_rule_of_two_operands_is_not_taken_for_logaddexp():
  @jax.custom_jvp
  def fn(x, w):
    return x.sum() * w

  fn.defjvp(lambda primals, tangents: (fn(*primals), tangents[0].sum() * primals[1]))
  out = ibp(lambda x: fn(x, jnp.ones((3, 5))))(BOX)
  np.testing.assert_allclose(out.upper, np.full((3, 5), 2.0))

  @jax.jit
  def leaky_relu(x, a, b):  # the name alone says nothing
    return a * x + b

  out = ibp(lambda x: leaky_relu(x, 2.0, 1.0))(BOX)
  np.testing.assert_allclose(out.lower, np.full(4, -1.0))


TABLE = jnp.arange(4.0)


def sort(x):
  return jnp.sort(x)  # at: sort


def loop(x):
  return jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: c + 1, x)  # at: while


def branch(x):
  return jax.lax.cond(x[0] > 0, lambda x: x, lambda x: -x, x)  # at: cond


def reduction(x):
  return jax.lax.reduce(x, 0.0, lambda a, b: a + b * 1, (0,))  # at: reduce


def largest(x):
  return TABLE[jnp.argmax(x)]  # at: argmax


def whole_number(x):
  return TABLE[x.astype(int)]  # at: convert_element_type


def open_place(x):
  place = (x[0] > 0).astype(int)
  return jax.lax.dynamic_slice_p.bind(TABLE, place, slice_sizes=(1,))  # at: dynamic_slice


def count(x):
  return jnp.sum((x > 0).astype(int))  # at: reduce_sum


def power_of_two(x):
  return 2.0**x  # at: pow


def scatter_twice(x):
  return x.at[jnp.array([0, 0])].set(x[:2])  # at: scatter


UNSUPPORTED = [
  ("sort", sort),
  ("sort", jax.jit(lambda x: jax.jit(sort)(x) + 1)),
  ("sort", jax.checkpoint(sort)),
  ("sort", lambda x: jax.lax.scan(lambda c, _: (sort(c), None), x, None, 2)),
  ("while", loop),
  ("cond", branch),
  ("reduce", reduction),
  ("argmax", largest),
  ("convert_element_type", whole_number),
  ("dynamic_slice", open_place),
  ("reduce_sum", count),
  ("pow", power_of_two),
  ("scatter", scatter_twice),
]


@pytest.mark.parametrize("bounds", [ibp, crown])
def test_unsupported_operations_are_named_with_their_place(bounds):
  source = pathlib.Path(__file__).read_text().splitlines()
  for primitive, fn in UNSUPPORTED:
    line = 1 + next(i for i, text in enumerate(source) if text.endswith(f"# at: {primitive}"))
    with pytest.raises(UnsupportedPrimitive) as error:
      bounds(fn)(BOX)
    assert error.value.primitive == primitive
    assert error.value.source.startswith(f"{__file__}:{line} "), (error.value.source, line)
    assert repr(primitive) in str(error.value)
    assert error.value.source in str(error.value)
    assert isinstance(error.value, NotImplementedError)


def test_exact_arguments_may_do_anything():
  def fn(x, k):
    order = jnp.argsort(k)
    return jax.lax.cond(k[0] > 0, jnp.sort, jnp.negative, k) * x[order]

  k = jnp.array([3.0, 1.0, 2.0, 0.0])
  found = ibp(fn)(BOX, k)
  np.testing.assert_allclose(found.upper, 0.5 * np.sort(k))
  np.testing.assert_allclose(jax.jit(ibp(fn))(BOX, k).upper, found.upper)


def test_outputs_keep_structure_and_dtype():
  out = crown(lambda x: {"a": (x > 0, x[0]), "b": jnp.arange(2), "c": None})(BOX)
  assert out["a"][0].dtype == bool
  assert out["a"][0].lower.tolist() == [False] * 4
  assert out["a"][1].shape == ()
  assert out["b"].lower.tolist() == out["b"].upper.tolist() == [0, 1]
  assert out["c"] is None
