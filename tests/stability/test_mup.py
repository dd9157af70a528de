"""muP: factors by hand and by formula, the two readout forms, decay, starts, tensors told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balance_jax.models import Decoder, DecoderConfig
from balance_jax.stability import mup


def mlp_shapes(width, hidden=None):
  """embedding, input, hidden, normed, readout: every kind of tensor once."""
  hidden = width if hidden is None else hidden
  return {
    "embedding": np.zeros((11, width)),
    "norm": {"scale": np.zeros(width)},
    "up": {"kernel": np.zeros((5, width)), "bias": np.zeros(width)},
    "mid": {"kernel": np.zeros((width, hidden)), "bias": np.zeros(hidden)},
    "head": {"kernel": np.zeros((hidden, 3)), "bias": np.zeros(3)},
  }


def factors(tree):
  """The values in the order embedding, scale, up, up bias, mid, mid bias, head, head bias."""
  paths = ("embedding", "norm/scale", "up/kernel", "up/bias", "mid/kernel", "mid/bias")
  found = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  return [found[path] for path in (*paths, "head/kernel", "head/bias")]


BY_HAND = [
  # variant, settings, learning rates, starts, readout; from width 16 to 64, so r = 4
  ("simple", {}, [1, 1, 1, 1, 1 / 4, 1, 1 / 4, 1], [1] * 8, 1),
  ("intermediate", {}, [1, 1, 1, 1, 1 / 4, 1, 1 / 4, 1], [1, 1, 1, 1, 1, 1, 1 / 2, 1], 1),
  ("full", {"query": "mid"}, [1, 1, 1, 1, 1 / 4, 1, 1 / 4, 1], [1, 1, 1, 1, 0, 1, 1 / 2, 1], 1),
  ("tensor_programs", {}, [1, 1, 1, 1, 1 / 4, 1, 1, 1], [2, 1, 1, 1, 1, 1, 2, 1], 1 / 4),
  (
    "tensor_programs", {"readout_form": "equivalent", "embedding_std": "constant"},
    [1, 1, 1, 1, 1 / 4, 1, 1 / 4, 1], [1, 1, 1, 1, 1, 1, 1 / 2, 1], 1,
  ),
  (
    "tensor_programs", {"optimizer": "sgd"},
    [4, 4, 4, 4, 1, 4, 4, 1], [2, 1, 1, 1, 1, 1, 2, 1], 1 / 4,
  ),
  (
    "tensor_programs", {"optimizer": "sgd", "readout_form": "equivalent"},
    [4, 4, 4, 4, 1, 4, 1 / 4, 1], [2, 1, 1, 1, 1, 1, 1 / 2, 1], 1,
  ),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "settings", "rates", "starts", "readout"), BY_HAND)
def test_by_hand(variant, settings, rates, starts, readout):
  found = mup.multipliers(mlp_shapes(64), mlp_shapes(16), variant, **settings)
  assert factors(found.learning_rate) == rates
  assert factors(found.init) == starts
  assert found.readout == readout
  decays = [1 / rate for rate in rates] if variant == "tensor_programs" else [1] * 8
  assert factors(found.weight_decay) == decays
  assert found.attention_scale == ("mup" if variant in ("full", "tensor_programs") else "sqrt")


def test_a_hidden_kernel_of_unequal_growth():
  """r_in = 4 and r_out = 2: Adam divides by the first, SGD by their ratio."""
  shapes = mlp_shapes(64, hidden=96), mlp_shapes(16, hidden=48)
  adam = mup.multipliers(*shapes, "tensor_programs")
  sgd = mup.multipliers(*shapes, "tensor_programs", optimizer="sgd")
  assert factors(adam.learning_rate)[4] == 1 / 4
  assert factors(sgd.learning_rate)[4] == 2 / 4
  assert adam.readout == 1 / 2


@pytest.mark.parametrize("variant", mup.VARIANTS)
def test_nothing_changes_at_the_base_width(variant):
  found = mup.multipliers(mlp_shapes(16), mlp_shapes(16), variant)
  assert factors(found.learning_rate) == factors(found.init) == [1] * 8
  assert factors(found.weight_decay) == [1] * 8
  assert found.readout == 1


def test_equivalent_form_contains_intermediate():
  """Without embeddings, Tensor Programs V for Adam is the paper's second variant."""
  shapes = [{k: v for k, v in mlp_shapes(w).items() if k != "embedding"} for w in (48, 16)]
  programs = mup.multipliers(*shapes, "tensor_programs", readout_form="equivalent")
  paper = mup.multipliers(*shapes, "intermediate")
  assert programs.learning_rate == paper.learning_rate
  assert programs.init == paper.init


def decoder_shapes(width, **settings):
  config = DecoderConfig(vocab_size=13, width=width, depth=2, heads=width // 8, **settings)
  return jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


@pytest.mark.parametrize("variant", mup.VARIANTS)
def test_decoder(variant):
  """Every tensor by its name and size; independent of how axes are compared."""
  settings = {"qk_norm": "per_head", "position": "learned", "max_length": 6}
  shapes, base = decoder_shapes(48, **settings), decoder_shapes(16, **settings)
  found = mup.multipliers(shapes, base, variant, readout_form="equivalent")
  inner = ("query", "key", "value", "out", "up", "down", "head")
  for path, shape in jax.tree_util.tree_leaves_with_path(shapes):
    name = path[-1].key
    rate, start = (
      next(leaf for other, leaf in jax.tree_util.tree_leaves_with_path(tree) if other == path)
      for tree in (found.learning_rate, found.init)
    )
    assert rate == (1 / 3 if name in inner else 1), path
    if name == "head" and variant != "simple":
      # The paper's standard deviation, over that of the model.
      expected = np.sqrt(16) / 48 / (1 / np.sqrt(48))
    elif name == "query" and variant == "full":
      expected = 0.0
    elif "embedding" in name and variant == "tensor_programs":
      expected = 16**-0.5 / 48**-0.5
    else:
      expected = 1.0
    np.testing.assert_allclose(start, expected, rtol=1e-12, err_msg=str(path))
    assert shape.ndim < 3


def test_tied_embeddings():
  """The embedding keeps its rate; only the multiplier of the logits is a readout's."""
  shapes = [decoder_shapes(width, tied_embeddings=True) for width in (32, 16)]
  found = mup.multipliers(*shapes, "tensor_programs", readout="embedding")
  assert found.readout == 1 / 2
  assert found.learning_rate["params"]["embedding"] == 1
  assert mup.multipliers(*shapes, "simple").learning_rate["params"]["embedding"] == 1
  with pytest.raises(ValueError, match=r"readout is 'head'.*these are: none.*if it is tied"):
    mup.multipliers(*shapes, "tensor_programs")
  with pytest.raises(ValueError, match=r"readout 'embedding' is the embedding params/embedding"):
    mup.multipliers(*shapes, "intermediate", readout="embedding")
  assert mup.multipliers(*shapes, "tensor_programs", readout=None).readout == 1


def test_which_tensor_reads_out():
  def shapes(width):
    layers = {"a": (5, width), "b": (width, 4), "c": (4, width), "d": (width, 2)}
    return {name: np.zeros(shape) for name, shape in layers.items()}

  # The bottleneck "b" is no readout of the model, so it takes the form without a multiplier.
  found = mup.multipliers(shapes(64), shapes(16), "tensor_programs", readout="d")
  assert found.learning_rate == {"a": 1, "b": 1 / 4, "c": 1, "d": 1}
  assert found.init == {"a": 1, "b": 1 / 2, "c": 1, "d": 2}
  with pytest.raises(ValueError, match=r"readout is 'head'.*\(these are: b, d\)"):
    mup.multipliers(shapes(64), shapes(16), "tensor_programs")
  one = [{"x": np.zeros((5, w)), "y": np.zeros((w, 2))} for w in (64, 16)]
  assert mup.multipliers(*one, "tensor_programs").init == {"x": 1, "y": 2}


def test_more_than_two_axes():
  def shapes(heads):
    return {
      "query": {"kernel": np.zeros((8 * heads, heads, 8)), "bias": np.zeros((heads, 8))},
      "out": {"kernel": np.zeros((heads, 8, 8 * heads))},
      "conv": {"kernel": np.zeros((3, 3, 8 * heads, 16 * heads))},
    }

  axes = {"query/kernel": (0,)}
  found = mup.multipliers(
    shapes(6), shapes(2), "tensor_programs", readout=None, fan_in_axes=axes, optimizer="sgd"
  )
  assert found.learning_rate == {
    "query": {"kernel": 1, "bias": 3}, "out": {"kernel": 1}, "conv": {"kernel": 1},
  }  # fmt: skip
  adam = mup.multipliers(shapes(6), shapes(2), "simple", fan_in_axes=axes)
  assert adam.learning_rate["query"] == {"kernel": 1 / 3, "bias": 1}
  with pytest.raises(ValueError, match=r"query/kernel has shape \(48, 6, 8\).*fan_in_axes="):
    mup.multipliers(shapes(6), shapes(2))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"variant": "fulll"}, r"variant is 'fulll' \(did you mean 'full'\?\)"),
    ({"optimizer": "lion"}, "optimizer is 'lion'; allowed: adam, sgd"),
    ({"optimizer": "sgd"}, "variant 'simple' is defined for 'adam' only"),
    ({"readout_form": "none"}, "readout_form is 'none'"),
    ({"embedding_std": 1.0}, "embedding_std is 1.0"),
    ({"base_params": {"w": np.zeros((4, 4))}}, "only one of them has v, w, w/kernel$"),
    ({"base_params": [np.zeros(4), np.zeros(4)]}, "tree structure of params: only one of them"),
    (
      {"base_params": {"w": {"kernel": np.zeros(4)}, "v": np.zeros(4)}},
      r"w/kernel has shape \(8, 8\) in params and \(4,\) in base_params; expected as many axes",
    ),
    ({"base_params": {"w": {"kernel": np.zeros((4, 0))}, "v": np.zeros(4)}}, "none of them empty"),
    ({"fan_in_axes": {"w": (2,)}}, r"fan_in_axes gives \(2,\) for w/kernel, which has 2 axes"),
  ],
)
def test_bad_input(changes, message):
  shapes = [{"w": {"kernel": np.zeros((n, n))}, "v": np.zeros(n)} for n in (8, 4)]
  arguments = {"params": shapes[0], "base_params": shapes[1], "variant": "simple", **changes}
  with pytest.raises(ValueError, match=message):
    mup.multipliers(**arguments)


def test_three_growing_axes_are_an_error():
  with pytest.raises(ValueError, match=r"w has shape \(8, 8, 8\).*3 axes differ, at most 2"):
    mup.multipliers({"w": np.zeros((8, 8, 8))}, {"w": np.zeros((4, 4, 4))})


def test_readouts_of_different_growth_have_no_one_multiplier():
  shapes = [{"head": {"a": np.zeros((n, 2)), "b": np.zeros((n * n, 2))}} for n in (8, 4)]
  with pytest.raises(ValueError, match=r"head/a 2, head/b 4\).*readout_form 'equivalent'"):
    mup.multipliers(*shapes, "tensor_programs")
  found = mup.multipliers(*shapes, "tensor_programs", readout_form="equivalent")
  assert found.learning_rate["head"] == {"a": 1 / 2, "b": 1 / 4}


# Training: a small network in float64, so that two parametrisations agree to many digits.
BASE, WIDTH = 4, 12


def draw(key, width=WIDTH):
  shapes = {"up": (5, width), "mid": (width, width), "head": (width, 3)}
  # One draw for all: the generator is most of what there is to compile.
  flat = jax.random.normal(key, (5 * width + width**2 + 3 * width,))
  params, start = {}, 0
  for name, (rows, columns) in shapes.items():
    part = flat[start : start + rows * columns]
    params[name] = part.reshape(rows, columns) * rows**-0.5
    start += rows * columns
  return params


def forward(params, x, multiplier=1.0):
  return jnp.tanh(jnp.tanh(x @ params["up"]) @ params["mid"]) @ params["head"] * multiplier


def train(direction, form, optimizer, steps=5, decay=0.1):
  """Outputs after each step, under one readout form; "standard" leaves muP out."""
  x = jax.random.normal(jax.random.key(1), (7, 5))
  y = jax.random.normal(jax.random.key(2), (7, 3))
  base, rules = jax.eval_shape(lambda k: draw(k, BASE), jax.random.key(0)), {}
  if form != "standard":
    rules = {"readout_form": form, "optimizer": optimizer}
    params = mup.init_params(draw, jax.random.key(0), base, "tensor_programs", **rules)
    scale = mup.multipliers(params, base, "tensor_programs", **rules)
    multiplier, transform = scale.readout, mup.scale_by_mup(scale)
  else:
    params, multiplier, transform = draw(jax.random.key(0)), 1.0, optax.identity()
  chain = optax.chain(
    direction, transform, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(0.1)
  )

  def step(carry, _):
    params, state = carry
    out, grad = jax.value_and_grad(
      lambda p: jnp.mean((forward(p, x, multiplier) - y) ** 2), has_aux=False
    )(params)
    updates, state = chain.update(grad, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (out, forward(params, x, multiplier))

  return jax.jit(lambda p: jax.lax.scan(step, (p, chain.init(p)), None, length=steps)[1])(params)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_readout_forms_train_identically(optimizer):
  """W = r W' everywhere: without eps Adam does not see the scale, SGD's rates undo it."""
  with jax.enable_x64(True):
    direction = optax.scale_by_adam(eps=0.0) if optimizer == "adam" else optax.identity()
    multiplied, equivalent, standard = (
      train(direction, form, optimizer) for form in ("multiplier", "equivalent", "standard")
    )
    for a, b, c in zip(multiplied, equivalent, standard, strict=True):
      assert a.dtype == jnp.float64
      np.testing.assert_allclose(a, b, rtol=1e-10)
      assert np.abs(a - c).max() > 1e-2


def test_scale_by_mup():
  rng = np.random.default_rng(0)
  updates = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
  scales = {"a": 0.25, "b": 3.0}
  found, state = mup.scale_by_mup(scales).update(updates, optax.EmptyState())
  assert state == optax.EmptyState()
  for name, scale in scales.items():
    np.testing.assert_allclose(found[name], scale * updates[name], rtol=1e-15)


def test_scale_by_mup_takes_traced_numbers_and_keeps_dtypes():
  updates = {"a": jnp.array([1.0, 2.0], jnp.bfloat16), "b": jnp.array([3.0])}

  def scaled(a):
    return mup.scale_by_mup({"a": a, "b": 1.0}).update(updates, optax.EmptyState())[0]

  many = jax.jit(jax.vmap(scaled))(jnp.array([0.5, 2.0]))
  assert many["a"].dtype == jnp.bfloat16
  assert many["b"].dtype == jnp.float32
  np.testing.assert_array_equal(many["a"].astype(jnp.float32), [[0.5, 1.0], [2.0, 4.0]])


def test_scale_by_mup_bad_input():
  with pytest.raises(ValueError, match=r"multipliers is -1\.0; allowed"):
    mup.scale_by_mup({"a": -1.0})
  with pytest.raises(ValueError, match=r"multipliers has the structure .*'b'.*'a'"):
    mup.scale_by_mup({"b": 1.0}).update({"a": jnp.ones(2)}, optax.EmptyState())


def test_place_before_the_decay():
  """Before it the decay of a step does not depend on the width; behind it, it is scaled too."""
  params = {"mid": jnp.full((8, 8), 2.0)}
  scale = mup.multipliers(params, {"mid": jnp.zeros((2, 2))}, "tensor_programs", readout=None)
  decay, rate, zeros = 0.1, 0.5, {"mid": jnp.zeros((8, 8))}

  def shrinkage(*transforms):
    chain = optax.chain(optax.scale_by_adam(), *transforms, optax.scale_by_learning_rate(rate))
    updates, _ = chain.update(zeros, chain.init(params), params)
    assert np.ptp(updates["mid"]) == 0
    return -float(updates["mid"][0, 0])

  add = optax.add_decayed_weights(decay)
  np.testing.assert_allclose(shrinkage(mup.scale_by_mup(scale), add), rate * decay * 2.0)
  np.testing.assert_allclose(shrinkage(add, mup.scale_by_mup(scale)), rate * decay * 2.0 / 4)
  # Where the factors are learning rates, `weight_decay` cancels them.
  rescaled = optax.add_decayed_weights(decay * scale.weight_decay["mid"])
  np.testing.assert_allclose(shrinkage(rescaled, mup.scale_by_mup(scale)), rate * decay * 2.0)


def test_init_params():
  calls = []

  def init(key):
    calls.append(key)
    drawn = draw(key, 64)
    return {**drawn, "query": drawn["mid"], "count": jnp.zeros((), jnp.int32)}

  base = jax.eval_shape(lambda k: {**draw(k, 16), "query": draw(k, 16)["mid"], "count": 0},
                        jax.random.key(0))  # fmt: skip
  keys = jax.random.split(jax.random.key(3), 2)
  params = jax.jit(jax.vmap(lambda key: mup.init_params(init, key, base, "full")))(keys)
  assert len(calls) == 1
  expected = jax.vmap(init)(keys)
  for name, factor in (("up", 1.0), ("mid", 1.0), ("head", 0.5), ("query", 0.0)):
    np.testing.assert_allclose(params[name], factor * expected[name], rtol=1e-6)
  assert params["count"].dtype == jnp.int32
  # sqrt(base) / fan_in, from 2 * 64 * 3 draws: 4 standard errors
  np.testing.assert_allclose(np.std(params["head"]), 16**0.5 / 64, rtol=4 / np.sqrt(2 * 384))


def test_init_params_takes_no_parameters():
  """Else they could be rescaled twice, or a checkpoint be rescaled."""
  with pytest.raises(ValueError, match="init is a dict; expected a function of a key"):
    mup.init_params(draw(jax.random.key(0)), jax.random.key(0), {}, "full")


def test_multipliers_are_a_pytree_and_need_shapes_only():
  shapes = mlp_shapes(64), mlp_shapes(16)
  found = mup.multipliers(*shapes, "tensor_programs")
  traced = jax.jit(lambda p: mup.multipliers(p, shapes[1], "tensor_programs"))(shapes[0])
  assert traced.attention_scale == "mup"
  jax.tree.map(np.testing.assert_allclose, traced, found)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
  assert mup.multipliers(*abstract, "tensor_programs") == found
