"""Probes of linen models: a hand-written one, flax's attention, and the decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.models import Decoder, DecoderConfig
from balance_jax.stability.attention import AttentionStats, attention_stats
from balance_jax.stability.probes import (
  block_output_rms,
  capture_outputs,
  probe_attention,
  sown,
)

X = np.random.default_rng(0).normal(size=(2, 5, 6)).astype("f4")


class HandWritten(nn.Module):
  """Dense projections of its own, heads side by side, twelve blocks, one shared module."""

  blocks: int = 12

  @nn.compact
  def __call__(self, x, double=False):
    shared = nn.Dense(6, name="shared")
    for i in range(self.blocks):
      x = Layer(name=f"layer_{i}")(x)
    x = shared(shared(x))
    self.sow("intermediates", "mean", x.mean())
    return 2 * x if double else x


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x):
    q, k, v = (nn.Dense(6, name=name)(x) for name in ("q_proj", "k_proj", "v_proj"))
    split = (*x.shape[:2], 3, 2)
    mixed = nn.dot_product_attention(*(a.reshape(split) for a in (q, k, v)))
    x = x + nn.Dense(6, name="mlp")(mixed.reshape(x.shape))
    self.sow("intermediates", "mean", x.mean())
    return x


class TwoMethods(nn.Module):
  def setup(self):
    self.encoder = nn.Dense(6)
    self.decoder = nn.Dense(6)

  def __call__(self, x):
    return self.decoder(self.encoder(x))

  def decode(self, x):
    return self.decoder(x)


class FlaxAttention(nn.Module):
  """Blocks around flax's own attention module."""

  normalize: bool = False

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      attend = nn.MultiHeadDotProductAttention(
        num_heads=3, normalize_qk=self.normalize, name=f"attention_{i}"
      )
      x = x + attend(x, mask=nn.make_causal_mask(x[..., 0]))
    return x


class NoAttention(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(6, name="dense")(x))
    return nn.relu(x)


def init(model, x=X):
  """Random variables, other than the initial ones, so that a norm's scale and a bias show."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  return jax.tree.map(lambda leaf: 0.25 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def dense(variables, path, x):
  for name in ("params", *path.split("/")):
    variables = variables[name]
  kernel, bias = (np.asarray(variables[name]) for name in ("kernel", "bias"))
  return np.asarray(x) @ kernel.reshape(len(kernel), -1) + bias.ravel()


def assert_same(stats, expected):
  for got, want in zip(stats, expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def hand_written():
  return HandWritten(), init(HandWritten())


def test_captured_outputs_are_those_of_the_modules(hand_written):
  model, variables = hand_written
  outputs = capture_outputs(model, variables, X, paths=["layer_?/q_proj", "layer_1?"])
  assert list(outputs) == [*(f"layer_{i}/q_proj" for i in range(10)), "layer_10", "layer_11"]
  first = dense(variables, "layer_0/q_proj", X)
  np.testing.assert_allclose(outputs["layer_0/q_proj"], first, rtol=1e-5, atol=1e-6)


def test_globs(hand_written):
  def names(paths):
    return list(capture_outputs(*hand_written, X, paths=paths))

  layers = [f"layer_{i}" for i in range(12)]
  assert names("layer_*") == layers  # 2 before 10, and nothing inside of a layer
  assert names("*") == [*layers, "shared"]
  assert names("layer_3*") == ["layer_3"]
  assert names("*/k_proj") == [f"layer_{i}/k_proj" for i in range(12)]
  assert names("layer_3**") == ["layer_3", *(f"layer_3/{n}" for n in LAYER)]
  assert names("") == [""]


LAYER = ("k_proj", "mlp", "q_proj", "v_proj")


def test_module_called_twice_gives_both_outputs(hand_written):
  model, variables = hand_written
  outputs = capture_outputs(model, variables, X, paths=["layer_11", "shared"])
  first = dense(variables, "shared", outputs["layer_11"])
  second = dense(variables, "shared", first)
  assert_same(outputs["shared"], (first, second))


def test_arguments_reach_the_model(hand_written):
  model, variables = hand_written
  plain = capture_outputs(model, variables, X, paths="")[""]
  doubled = capture_outputs(model, variables, X, paths="", double=True)[""]
  np.testing.assert_allclose(doubled, 2 * plain, rtol=1e-6)


def test_method_of_the_model():
  model = TwoMethods()
  variables = init(model)
  assert list(capture_outputs(model, variables, X, paths="*")) == ["decoder", "encoder"]
  outputs = capture_outputs(model, variables, X, paths="*", method="decode")
  assert list(outputs) == ["decoder"]
  expected = dense(variables, "decoder", X)
  np.testing.assert_allclose(outputs["decoder"], expected, rtol=1e-5, atol=1e-6)


def test_other_mutable_collections_are_kept():
  model = NoAttention()
  variables = init(model)
  outputs = capture_outputs(model, variables, X, paths="dense", mutable="batch_stats")
  np.testing.assert_allclose(outputs["dense"], dense(variables, "dense", X), rtol=1e-5, atol=1e-6)


def test_what_an_earlier_call_sowed_is_not_returned(hand_written):
  model, variables = hand_written
  _, state = model.apply(variables, X, mutable=["intermediates"])
  again = capture_outputs(model, {**variables, **state}, X, paths="layer_0")
  _, state = model.apply(
    variables, X, mutable=["intermediates"], capture_intermediates=lambda *_: True
  )
  again = capture_outputs(model, {**variables, **state}, X, paths="layer_0")["layer_0"]
  assert again.shape == X.shape


@pytest.mark.parametrize(
  ("paths", "message"),
  [
    ("layr_3", r"paths has 'layr_3', which matches no module \(did you mean .*'layer_3'.*modules:"),
    (
      ["layer_0", "nothing"],
      "'nothing', which matches no module; modules: layer_0, layer_0/k_proj",
    ),
    ((), "paths is empty"),
  ],
)
def test_paths_that_match_nothing(hand_written, paths, message):
  with pytest.raises(ValueError, match=message):
    capture_outputs(*hand_written, X, paths=paths)


def test_sown(hand_written):
  model, variables = hand_written
  sow = jax.jit(lambda v: model.apply(v, X, mutable=["intermediates"]))
  output, state = sow(variables)
  values = sown(state, "mean")
  assert list(values) == ["", *(f"layer_{i}" for i in range(12))]
  np.testing.assert_allclose(values[""], output.mean(), rtol=1e-5)
  assert sown(state["intermediates"], "mean") == values
  assert sown(state, "median") == {}
  assert sown({"a": {"b": (1, 2)}}, "b") == {"a": (1, 2)}
  with pytest.raises(ValueError, match="intermediates is tuple; expected a mapping"):
    sown((output, state), "mean")


def test_attention_of_a_hand_written_model(hand_written):
  model, variables = hand_written
  stats = probe_attention(
    model, variables, X, query="*/q_proj", key="*/k_proj", heads=3, causal=False, chunk=2
  )
  assert list(stats) == [f"layer_{i}" for i in range(12)]
  layer = capture_outputs(model, variables, X, paths="layer_0")["layer_0"]
  query, key = (
    dense(variables, f"layer_1/{name}", layer).reshape(2, 5, 3, 2) for name in ("q_proj", "k_proj")
  )
  assert_same(stats["layer_1"], attention_stats(query, key, causal=False))


@pytest.mark.parametrize("normalize", [False, True])
def test_attention_of_flax(normalize):
  model = FlaxAttention(normalize)
  variables = init(model)
  where = np.arange(5)[None, :] < np.array([[5], [3]])
  options = {"where": where, "scale": 0.4, "soft_cap": 2.0}
  stats = jax.jit(lambda v: probe_attention(model, v, X, **options))(variables)
  assert list(stats) == ["attention_0", "attention_1"]
  query, key = (
    dense(variables, f"attention_0/{name}", X).reshape(2, 5, 3, 2) for name in ("query", "key")
  )
  if normalize:
    parameters = variables["params"]["attention_0"]
    # flax's layer norm takes the variance as mean x^2 - mean^2, of two numbers here.
    query, key = (
      nn.LayerNorm(use_bias=False).apply({"params": parameters[name]}, x)
      for name, x in (("query_ln", query), ("key_ln", key))
    )
  assert_same(stats["attention_0"], attention_stats(query, key, **options))


def test_attention_module_itself():
  model = nn.MultiHeadDotProductAttention(num_heads=3)
  variables = init(model)
  stats = probe_attention(model, variables, X, causal=False)
  assert list(stats) == [""]
  query, key = (dense(variables, name, X).reshape(2, 5, 3, 2) for name in ("query", "key"))
  assert_same(stats[""], attention_stats(query, key, causal=False))


def test_decoder_is_asked_for_what_it_sows():
  model = Decoder(DecoderConfig(vocab_size=11, width=8, depth=1, heads=2, qk_norm="per_head"))
  tokens = np.arange(12).reshape(2, 6) % 11
  variables = init(model, tokens)
  _, state = jax.jit(lambda v: model.apply(v, tokens, mutable=["intermediates"]))(variables)
  stats = jax.jit(lambda v: probe_attention(model, v, tokens))(variables)
  assert list(stats) == ["block_0/attention"]
  assert isinstance(stats["block_0/attention"], AttentionStats)
  block = state["intermediates"]["block_0"]
  assert_same(stats["block_0/attention"], block["attention"]["attention_stats"][0])
  assert np.shape(block["output_rms"][0]) == (2,)
  rms = block_output_rms(model, variables, tokens)
  each = sown(state, "output_rms")
  assert list(rms) == list(each) == ["block_0"]
  for path, value in rms.items():
    np.testing.assert_allclose(value, np.sqrt(np.square(each[path]).mean()), rtol=1e-6)


def test_rms_of_outputs(hand_written):
  model, variables = hand_written
  outputs = capture_outputs(model, variables, X, paths=["layer_0", "shared"])
  rms = block_output_rms(model, variables, X, paths=["layer_0", "shared"])
  expected = np.sqrt(np.square(np.asarray(outputs["layer_0"], np.float64)).mean())
  np.testing.assert_allclose(rms["layer_0"], expected, rtol=1e-6)
  expected = np.sqrt(np.square(np.asarray(outputs["shared"], np.float64)).mean())
  np.testing.assert_allclose(rms["shared"], expected, rtol=1e-6)
  assert rms["layer_0"].shape == ()
  assert rms["layer_0"].dtype == jnp.float32


def test_rms_has_no_gradient():
  model = NoAttention()
  variables = init(model)
  grad = jax.grad(
    lambda x: block_output_rms(model, variables, x, paths="dense", mutable="batch_stats")["dense"]
  )(X)
  np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {},
      "no attention found: 'attention_stats' is not sown, and no query module matches .*layer_0/",
    ),
    ({"query": "*/q_proj"}, r"query is '\*/q_proj' and key is None; expected both or none"),
    ({"query": "*/q_proj", "key": "*/k_pr"}, r"no key module matches '\*/k_pr'.*modules: layer_0"),
    ({"query": "*/q_proj", "key": "*_0/k_proj"}, "do not pair up below 'layer_1'"),
    ({"query": "*/q_proj", "key": "*/?_proj"}, "expected one below 'layer_0'"),
    ({"query": "*/q_proj", "key": "*/k_proj"}, r"'layer_0/q_proj' returns shape .* give heads"),
    ({"query": "*/q_proj", "key": "*/k_proj", "heads": 4}, "heads is 4; expected a divisor of 6"),
    ({"query": "shared", "key": "shared"}, "'shared' gives 2 outputs"),
  ],
)
def test_attention_that_is_not_found(hand_written, options, message):
  with pytest.raises(ValueError, match=message):
    probe_attention(*hand_written, X, **options)


def test_model_without_attention():
  model = NoAttention()
  with pytest.raises(ValueError, match=r"no attention found.*'query'.*modules: dense, norm"):
    probe_attention(model, init(model), X, mutable=["batch_stats"])
