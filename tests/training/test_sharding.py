"""Runs on a mesh of eight devices equal those on one; what lies where, and how they speak."""

import jax
import numpy as np
import pytest

from balance_jax import training
from balance_jax.training import dry_run
from balance_jax.training.checkpoint import Checkpointer
from balance_jax.training.sharding import ONE_DEVICE, Placement, make_mesh, placement
from tests.training import mesh_runs

# Sums over devices are added in another order, and four steps of Adam pass that on: float32 has 7
# digits, of which one or two are lost.
TOLERANCE = {"rtol": 2e-5}


@pytest.fixture(scope="module")
def one_device():
  return {name: mesh_runs.losses_of(make()) for name, make in mesh_runs.RUNS.items()}


@pytest.mark.parametrize(
  ("name", "data", "model", "shard_parameters"),
  [
    ("decoder", 8, 1, False),
    ("decoder", 4, 2, False),
    ("decoder", 2, 2, True),
    ("certified", 8, 1, False),
    ("certified", 4, 1, True),
  ],
)
def test_a_mesh_equals_one_device(name, data, model, shard_parameters, one_device):
  place = Placement(make_mesh(data, model), shard_parameters)
  runs = mesh_runs.RUNS[name](place)
  np.testing.assert_allclose(mesh_runs.losses_of(runs), one_device[name], **TOLERANCE)
  split = mesh_runs.spread_shapes(runs)
  assert bool(split) == (model > 1 or shard_parameters)
  if name == "decoder" and model == 2:
    inner = 8 if shard_parameters else 16
    assert split["['params']['block_0']['mlp']['up']"] == (2, inner, 32)


def test_batched_runs_share_a_mesh_too(one_device):
  runs = mesh_runs.decoder_runs(Placement(make_mesh(4, 2)), how="vmap")
  np.testing.assert_allclose(mesh_runs.losses_of(runs), one_device["decoder"], **TOLERANCE)


def test_a_run_goes_on_with_fewer_devices(tmp_path):
  """Saved and restored on 8, 4, 2 devices and one, two steps on each, but for rounding."""
  history = []
  for i, devices in enumerate((8, 4, 2, 1)):
    spec = {"data": devices, "model": 1, "shard_parameters": True}
    runs = mesh_runs.decoder_runs(placement(spec))
    with Checkpointer(tmp_path) as checkpoints:
      states = checkpoints.restore(runs.shapes())[0] if i else runs.init()
      states, metrics = training.run_sweep(runs, 2, chunk=2, states=states)
      checkpoints.save(2 * (i + 1), states)
    history.append(metrics["loss"])
  _, whole = training.run_sweep(mesh_runs.decoder_runs(), 8, chunk=2)
  np.testing.assert_allclose(np.concatenate(history, axis=1), whole["loss"], rtol=1e-4)


@pytest.mark.parametrize("length", [1, 3])
def test_devices_speak_once_a_step(length):
  """No device speaks to the host, and the gradients, the loss and its counts are one sum; in a
  chunk of steps, that sum is in the body of its loop."""
  runs = mesh_runs.decoder_runs(Placement(make_mesh(8, 1)))
  assert mesh_runs.collectives(runs, length) == {"all-reduce": 1}


def test_parts_of_parameters_are_gathered_once_a_step():
  runs = mesh_runs.decoder_runs(Placement(make_mesh(8, 1), shard_parameters=True), draw="natural")
  parts = mesh_runs.spread_shapes(runs)
  # A sum followed by a slice, which accelerators make a reduce-scatter of, and one for the scalars.
  assert mesh_runs.collectives(runs) == {"all-gather": len(parts), "all-reduce": 1}
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(runs.shapes().mixer))


def test_matrices_in_parts_need_only_sums():
  runs = mesh_runs.decoder_runs(Placement(make_mesh(1, 2)), draw="natural")
  assert set(mesh_runs.collectives(runs)) == {"all-reduce"}


def test_meshes():
  assert dict(make_mesh().shape) == {"data": 8, "model": 1}
  assert dict(make_mesh(-1, 2).shape) == {"data": 4, "model": 2}
  spec = {"data": 1, "model": 1, "shard_parameters": True}
  assert placement(spec) is ONE_DEVICE
  assert placement({**spec, "data": 4}).mesh.size == 4


@pytest.mark.parametrize(
  ("data", "model", "message"),
  [
    (0, 1, r"mesh.data is 0; allowed: \[1, inf\]"),
    (-1, 3, "mesh.model is 3; expected a divisor of the 8 devices"),
    (4, 0, "mesh.model is 0"),
    (8, 2, "mesh.data x mesh.model is 8 x 2; there are 8 devices"),
  ],
)
def test_bad_meshes(data, model, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(data, model)


def test_bad_placements():
  with pytest.raises(ValueError, match="parallel is 'shard', which spreads runs over devices"):
    mesh_runs.decoder_runs(Placement(make_mesh(2, 1)), how="shard")
  with pytest.raises(ValueError, match="batch_size is 16; the mesh's 3 devices times 1"):
    mesh_runs.decoder_runs(Placement(make_mesh(3, 1)))


def test_a_dry_run_counts_what_one_device_holds():
  runs = [mesh_runs.decoder_runs(Placement(make_mesh(n, 1), n > 1)) for n in (1, 8)]
  one, eight = (sum(map(dry_run.bytes_of, jax.tree.leaves(r.shapes()))) for r in runs)
  assert eight < 0.2 * one  # an eighth of the matrices, and the vectors whole
