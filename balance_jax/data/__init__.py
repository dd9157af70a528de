"""Data by group: text sources, prepared data sets, byte tokens and the grouped device table."""

from balance_jax.data.builder import load_documents
from balance_jax.data.digests import CorruptedDataError
from balance_jax.data.sources import SOURCES, DatasetNotInstalledError
from balance_jax.data.table import GroupTable, group_table
from balance_jax.data.text import END_OF_DOCUMENT, VOCAB_SIZE, decode, encode

__all__ = [
  "END_OF_DOCUMENT",
  "SOURCES",
  "VOCAB_SIZE",
  "CorruptedDataError",
  "DatasetNotInstalledError",
  "GroupTable",
  "decode",
  "encode",
  "group_table",
  "load_documents",
]
