"""The border: from the command line and an ml_collections config to plain values, once."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict


class FlagsError(ValueError):
  """The command line cannot be used; the message says why."""


def parse_flags(flag_values: flags.FlagValues, argv: list[str]) -> tuple[dict[str, Any], str]:
  """Reads --config and --workdir.

  Args:
    flag_values: with the flags "config" (a config file) and "workdir" defined.
    argv: the command line, the program first.

  Returns:
    (resolved config, workdir).

  Raises:
    FlagsError: an unknown flag or key (with the nearest ones), a value of the wrong type, a flag
      that is missing, a required field without a value.
  """
  try:
    rest = flag_values(argv)
    given, workdir = flag_values["config"].value, flag_values["workdir"].value
    # Inside, because a config file that does not load raises only when it is read.
    config = resolve(given) if given is not None else None
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    # The message itself, as str() of a KeyError is its repr; ml_collections nests them.
    message = error
    while isinstance(message, BaseException) and message.args:
      message = message.args[0]
    raise FlagsError(" ".join(str(message).split())) from error
  if rest[1:]:
    raise FlagsError(f"unexpected argument {rest[1]!r}; flags start with --")
  for name, value in (("config", config), ("workdir", workdir)):
    if not value and not (name == "workdir" and flag_values["dry_run"].value):
      raise FlagsError(
        f"--{name} is missing; usage: python -m balance_jax.main --config=FILE --workdir=DIR"
      )
  return config, workdir


def cache_directory(name: str) -> str:
  """A folder of balance_jax below $XDG_CACHE_HOME, by default ~/.cache."""
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return str(Path(cache).expanduser() / "balance_jax" / name)


def resolve(config: config_dict.ConfigDict) -> dict[str, Any]:
  """The config as nested plain dicts, with references followed and required fields present.

  Raises:
    FlagsError: a required field (placeholder) has no value; names the key.
  """
  return {key: _plain(config[key], key) for key in config}


def _plain(value: Any, path: str) -> Any:
  if isinstance(value, config_dict.ConfigDict):
    return {key: _plain(value[key], f"{path}.{key}".lstrip(".")) for key in value}
  if isinstance(value, Mapping):
    return {key: _plain(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
  if value is None:
    raise FlagsError(f"config.{path} has no value; give it with --config.{path}=...")
  return tuple(value) if isinstance(value, list) else value
