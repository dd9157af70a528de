"""Two small runs that tests put on meshes and on processes: a decoder with an adaptive mixture, and
a certified network with batch normalisation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balance_jax import data, mixing, models, robust, training
from balance_jax.training import byte_text
from balance_jax.training.robust_runs import RobustLoss, network_of
from balance_jax.training.sharding import ONE_DEVICE

WINDOW, STEPS = 8, 4


def decoder_runs(placement=ONE_DEVICE, how="map", draw="optimal"):
  """Two runs of a decoder on two groups; what is drawn follows measured gradients."""
  rng = np.random.default_rng(0)
  rows = {
    name: {"tokens": rng.integers(low, low + 9, (count, WINDOW + 1)).astype(np.uint8)}
    for name, low, count in (("first", 0, 60), ("second", 7, 12))
  }
  table = data.GroupTable.from_rows(rows)
  decoder = models.Decoder(models.DecoderConfig(vocab_size=16, width=16, depth=1, heads=2))
  init_params = byte_text.initializer(decoder, WINDOW)

  def build(cell):
    return training.make_step(
      byte_text.cross_entropy_loss(decoder),
      optax.adam(cell["learning_rate"]),
      mixing.temperature(table.sizes, 3.0, draw=draw),
      table,
      batch_size=16,
      measure_every=2,
    )

  def init(cell, step):
    return training.init_state(jax.random.key(3), init_params(jax.random.key(2)), step)

  cells = training.product(learning_rate=[1e-2, 3e-2])
  return training.SweepRuns(build, init, cells, table, how=how, placement=placement)


def certified_runs(placement=ONE_DEVICE):
  """One run of IBP training: statistics of the clean batch, both regularisers, a ramp."""
  rng = np.random.default_rng(1)
  labels = np.arange(48, dtype=np.int32) % 4
  images = (rng.uniform(0, 90, (48, 6, 6, 1)) + 40 * labels[:, None, None, None]).astype(np.uint8)
  table = data.image_table(data.ImageData(images, labels, tuple("abcd")), group_by="all")
  model = models.CNN7(num_classes=4, width=2, dense=8, convs=((1, 1), (2, 2)), initialization="ibp")
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 6, 6, 1)))
  loss = RobustLoss(
    network_of(model, has_parts=True),
    robust.Objective("ibp", eps=0.05),
    robust.smoothed_eps_schedule(1, 4, 0.05),
    0.05,
    255.0,
    {"flip": False, "crop_padding": 0},
    3,
  )

  def build(cell):
    return training.make_step(
      loss,
      # Not Adam, which enlarges the rounding that is all the gradient of a bias before a norm.
      optax.sgd(cell["learning_rate"]),
      mixing.proportional(table.sizes),
      table,
      batch_size=16,
      carried=RobustLoss.carried(lambda key: variables),
    )

  def init(cell, step):
    return training.init_state(jax.random.key(5), variables["params"], step)

  cells = training.product(learning_rate=[1e-2])
  return training.SweepRuns(build, init, cells, table, how="map", placement=placement)


RUNS = {"decoder": decoder_runs, "certified": certified_runs}


def losses_of(runs) -> np.ndarray:
  """Training losses, float (R, STEPS), and the sum of absolute parameters in the last column."""
  states, history = training.run_sweep(runs, STEPS, chunk=2)
  size = runs.apply(parameter_size, states)
  return np.concatenate([history["loss"], np.asarray(jax.device_get(size))[:, None]], axis=1)


def parameter_size(step, state, inputs):
  return sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(state.params))


def spread_shapes(runs) -> dict[str, tuple[int, ...]]:
  """Of every parameter that is split, the shape of what one device holds."""
  shapes = runs.shapes().params
  return {
    jax.tree_util.keystr(path): leaf.sharding.shard_shape(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    if not leaf.sharding.is_fully_replicated
  }


def collectives(runs, length: int = 1) -> dict[str, int]:
  """Kind -> how often devices speak to each other or to the host in a program of `length` steps.

  What is in the body of a loop counts once.
  """
  if length == 1:
    compiled = runs.compile_step()
  else:
    compiled = jax.jit(lambda states: runs.advance(states, length)).lower(runs.shapes()).compile()
  kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
  kinds += ("infeed", "outfeed", "send", "recv", "custom-call")
  program = compiled.as_text()
  counts = {kind: len(re.findall(rf"\s{kind}(?:-start)?\(", program)) for kind in kinds}
  return {kind: count for kind, count in counts.items() if count}
