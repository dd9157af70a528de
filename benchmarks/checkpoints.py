"""What a checkpoint costs a run: the steps of a turn with a save in it, against those without.

A wide MLP with Adam, so that the state is `--megabytes` large. Three turns alternate: no save; a
save that the run waits for; a save that is written while the run goes on (what experiments do).
Reported: the seconds by which a save makes a turn longer, in per cent of a minute.

Command: python benchmarks/checkpoints.py
About seven minutes on two cores; writes up to 2 GB into a temporary folder.
"""

import argparse
import statistics
import tempfile

import common
import jax
import optax
import workloads

from balance_jax import mixing, training
from balance_jax.training.checkpoint import Checkpointer

FEATURES, CLASSES, BATCH = 64, 10, 16


def make_turns(megabytes, steps, chunks, directory):
  """(name -> one turn, bytes of the state)."""
  hidden = int(megabytes * 1e6 / 4 / 3 / (FEATURES + CLASSES + 1))  # parameters, two moments
  loss, init_params, groups = workloads.mlp(hidden, FEATURES, CLASSES)
  table = workloads.table_of(groups)
  step = training.make_step(
    loss, optax.adam(1e-4), mixing.uniform(table.sizes), table, batch_size=BATCH, metrics=("loss",)
  )
  state = training.init_state(jax.random.key(0), init_params(jax.random.key(1)), step)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
  checkpoints = Checkpointer(directory)

  def turn(save, wait):
    nonlocal state
    for chunk in range(chunks):
      state, _ = training.run(step, state, steps, chunk=steps)
      if save and chunk == 0:
        checkpoints.save(int(state.step), state)
        if wait:
          checkpoints.finish()
    # The save must end within the turn, or the next one pays for it.
    assert not save or checkpoints.finished_step == int(state.step) - (chunks - 1) * steps

  return {
    "none": lambda: turn(False, False),
    "wait": lambda: turn(True, True),
    "go on": lambda: turn(True, False),
  }, size


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--megabytes", type=int, nargs="+", default=[120, 480])
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--seconds", type=float, default=10.0, help="of a turn, about")
  parser.add_argument("--out", default="")
  args = parser.parse_args()
  result = {}
  for megabytes in args.megabytes:
    with tempfile.TemporaryDirectory() as directory:
      probe, _ = make_turns(megabytes, 5, 1, directory)
      a_step = common.medians(common.alternate({"none": probe["none"]}, 2))["none"] / 5
      steps = max(1, round(0.25 / a_step))
      turns, size = make_turns(megabytes, steps, round(args.seconds / 0.25), directory)
      times = common.alternate(turns, args.repeats)
    extra = {
      name: [
        with_save - without for with_save, without in zip(times[name], times["none"], strict=True)
      ]
      for name in ("wait", "go on")
    }
    result[f"{megabytes} MB"] = {
      "bytes": size,
      "seconds_of_a_turn": statistics.median(times["none"]),
      "percent_of_a_minute": {
        name: {
          "median": round(statistics.median(values) / 0.6, 2),
          "all": [round(value / 0.6, 2) for value in values],
        }
        for name, values in extra.items()
      },
    }
    print(megabytes, "MB:", result[f"{megabytes} MB"]["percent_of_a_minute"])
  common.write("checkpoints", {"states": result}, ("jax", "orbax-checkpoint"), args.out)


if __name__ == "__main__":
  main()
