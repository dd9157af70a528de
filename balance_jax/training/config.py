"""From an ml_collections config to plain values, once, at the border."""

from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict


def resolve(config: config_dict.ConfigDict) -> dict[str, Any]:
  """The config as nested plain dicts, with references followed and required fields present.

  Raises:
    ValueError: a required field (placeholder) has no value; names the key.
  """
  return _plain(config, "")


def _plain(value: Any, path: str) -> Any:
  if isinstance(value, config_dict.ConfigDict):
    return {key: _plain(value[key], f"{path}.{key}".lstrip(".")) for key in value}
  if isinstance(value, Mapping):
    return {key: _plain(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
  if value is None:
    raise ValueError(f"config.{path} has no value; give it with --config.{path}=...")
  return tuple(value) if isinstance(value, list) else value
