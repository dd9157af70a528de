"""Saving and restoring the whole state of a run with orbax.

A checkpoint holds the state (typed keys and every dtype included) and a small JSON value. Orbax
writes into a temporary folder and renames it, so an interrupted save leaves the last one intact.
"""

from pathlib import Path
from typing import Any

import jax

from balance_jax import _checks


class Checkpointer:
  """Numbered checkpoints of one run; use it as a context manager.

  Args:
    directory: folder of the checkpoints; made when missing.
    max_to_keep: how many of the newest to keep, >= 1.
  """

  def __init__(self, directory, max_to_keep: int = 2):
    import orbax.checkpoint as ocp  # heavy, so only where checkpoints are used

    _checks.check_number("max_to_keep", max_to_keep, low=1, integer=True)
    self._ocp = ocp
    # Synchronous: the state is donated to the next step, so it must be on disk before that starts.
    options = ocp.CheckpointManagerOptions(
      max_to_keep=max_to_keep, enable_async_checkpointing=False
    )
    self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

  def save(self, step: int, state: Any, extra: Any = None) -> None:
    """Writes a checkpoint.

    Args:
      step: its number; a step already saved is left as it is.
      state: pytree of arrays.
      extra: any JSON value, such as what the host has to remember.
    """
    if step in self._manager.all_steps():
      return
    args = self._ocp.args
    self._manager.save(
      step, args=args.Composite(state=args.StandardSave(state), extra=args.JsonSave([extra]))
    )
    self._manager.wait_until_finished()

  def latest_step(self) -> int | None:
    """Number of the newest checkpoint, or None."""
    return self._manager.latest_step()

  def restore(self, target: Any, step: int | None = None) -> tuple[Any, Any]:
    """Reads a checkpoint back.

    Args:
      target: pytree of arrays or `jax.ShapeDtypeStruct` with the shapes and dtypes to expect; a
        sharding in it decides where the arrays go.
      step: its number; the newest by default.

    Returns:
      (state, extra).

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: from orbax, when tree or shapes differ from the target.
    """
    step = self.latest_step() if step is None else step
    if step is None:
      raise FileNotFoundError(f"no checkpoint in {self._manager.directory}")
    args = self._ocp.args
    abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, target)
    restored = self._manager.restore(
      step, args=args.Composite(state=args.StandardRestore(abstract), extra=args.JsonRestore())
    )
    return restored.state, restored.extra[0]

  def close(self) -> None:
    self._manager.close()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()
