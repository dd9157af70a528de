"""One of several processes: python -m tests.training.mesh_child PORT PROCESSES INDEX DEVICES.

Prints, in process 0, the losses of the runs of `mesh_runs` on a mesh of all devices as JSON.
"""

import json
import sys

import jax

from balance_jax.training import hosts


def main(port, processes, index, devices):
  jax.config.update("jax_num_cpu_devices", int(devices))
  hosts.start(f"localhost:{port}", int(processes), int(index))
  from balance_jax.training.sharding import Placement, make_mesh
  from tests.training import mesh_runs

  found = {}
  for name, shard in (("decoder", True), ("certified", False)):
    runs = mesh_runs.RUNS[name](Placement(make_mesh(), shard))
    found[name] = mesh_runs.losses_of(runs).tolist()
  if hosts.is_main():
    print(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
