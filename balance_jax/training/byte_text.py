"""Byte-level text and a decoder for it, as the tasks that train on text share them."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from balance_jax import _checks, data
from balance_jax.losses import cross_entropy
from balance_jax.training.batch import Batch
from balance_jax.training.measure import evaluation_batches

# A source of zeros, for what needs the shapes of the data only.
STAND_IN = "stand_in"

READERS = ("memory", *data.reader.HOW)

_CAPS = ("logit_soft_cap", "output_soft_cap")


def load_rows(spec: Mapping[str, Any], split: str) -> data.GroupTable | data.GroupReader:
  """The rows of one split, in memory or read from disk as they are needed.

  Args:
    spec: `config.data`: "source", "languages", "directory", "group_key", "text_key", "window";
      "reader", "workers" and "max_corrupt" say how the rows are read.
    split: "train", "validation" or "test".

  Raises:
    ValueError: too little text for the window, or as `data.load_documents`.
    DatasetNotInstalledError, CorruptedDataError: see `data.load_documents`.
  """
  _checks.check_choice("data.reader", spec["reader"], READERS)
  if spec["reader"] == "memory" or spec["source"] == STAND_IN:
    return load_table(spec, split)
  how = {"how": spec["reader"], "workers": spec["workers"], "max_corrupt": spec["max_corrupt"]}
  with _named(spec, split):
    return data.load_rows(**_request(spec, split), window=spec["window"], **how)


def load_table(spec: Mapping[str, Any], split: str) -> data.GroupTable:
  """As `load_rows`, in memory."""
  if spec["source"] == STAND_IN:
    rows = np.zeros((8, spec["window"] + 1), np.uint8)
    names = spec["languages"] or ("text",)
    return data.GroupTable.from_rows({name: {"tokens": rows} for name in names})
  documents = data.load_documents(**_request(spec, split))
  with _named(spec, split):
    return data.group_table(documents, window=spec["window"])


def _request(spec: Mapping[str, Any], split: str) -> dict[str, Any]:
  return {
    "source": spec["source"],
    "split": split,
    "languages": spec["languages"] or None,
    "data_dir": spec["directory"] or None,
    "group_key": spec["group_key"],
    "text_key": spec["text_key"],
  }


@contextlib.contextmanager
def _named(spec: Mapping[str, Any], split: str):
  """Says of which data a complaint is."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"data.source {spec['source']}, split {split}: {error}") from error


def held_out(spec: Mapping[str, Any], split: str, batch_size: int) -> Batch:
  """The first `spec["eval_rows"]` rows of every group of a split, as `evaluation_batches`."""
  return evaluation_batches(
    load_rows(spec, split), rows_per_group=spec["eval_rows"], batch_size=batch_size
  )


def make_decoder(spec: Mapping[str, Any]):
  """The `Decoder` over bytes of a `config.model`, whose entries are those of `DecoderConfig`.

  A soft-cap of 0 stands for none, as a config has no None.
  """
  from balance_jax import models

  spec = {name: value for name, value in spec.items() if name not in _CAPS or value != 0.0}
  return models.Decoder(models.DecoderConfig(vocab_size=data.VOCAB_SIZE, **spec))


def initializer(decoder, window: int):
  """init(key) -> parameters for rows of `window` tokens."""
  return lambda key: decoder.init(key, jnp.zeros((1, window), jnp.int32))


def cross_entropy_loss(decoder):
  """per_example_loss(params, rows, key) -> float (B,): mean cross entropy of the next bytes."""

  def per_example_loss(params, rows, key):
    del key  # no dropout
    tokens = rows["tokens"]
    return cross_entropy(decoder.apply(params, tokens[:, :-1]), tokens[:, 1:]).mean(axis=-1)

  return per_example_loss
