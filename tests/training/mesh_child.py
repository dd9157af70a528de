"""One of several: python -m tests.training.mesh_child PORT PROCESSES INDEX DEVICES NAME.

Prints, in process 0, the losses of the runs of `mesh_runs` of this name on a mesh of all devices as
JSON; the parameters of the decoder are in parts.
"""

import json
import sys

import jax

from balance_jax.training import hosts


def main(port, processes, index, devices, name):
  jax.config.update("jax_num_cpu_devices", int(devices))
  hosts.start(f"localhost:{port}", int(processes), int(index))
  from balance_jax.training.sharding import Placement, make_mesh
  from tests.training import mesh_runs

  losses = mesh_runs.losses_of(mesh_runs.RUNS[name](Placement(make_mesh(), name == "decoder")))
  if hosts.is_main():
    print(json.dumps(losses.tolist()))


if __name__ == "__main__":
  main(*sys.argv[1:])
