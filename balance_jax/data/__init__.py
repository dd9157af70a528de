"""Data by group: text and image sources, prepared data sets, device table, host reader, crops."""

from balance_jax.data.augment import augment, random_crop, random_flip
from balance_jax.data.digests import CorruptedDataError
from balance_jax.data.documents import load_documents
from balance_jax.data.image_sources import IMAGE_SOURCES
from balance_jax.data.images import (
  ImageData,
  image_table,
  imbalanced_counts,
  load_images,
  take_classes,
  to_float,
)
from balance_jax.data.prepared import only_what_is_there
from balance_jax.data.reader import GroupReader
from balance_jax.data.row_files import load_rows
from balance_jax.data.sources import SOURCES, DatasetNotInstalledError
from balance_jax.data.table import GroupTable, group_table
from balance_jax.data.text import END_OF_DOCUMENT, VOCAB_SIZE, decode, encode

__all__ = [
  "END_OF_DOCUMENT",
  "IMAGE_SOURCES",
  "SOURCES",
  "VOCAB_SIZE",
  "CorruptedDataError",
  "DatasetNotInstalledError",
  "GroupReader",
  "GroupTable",
  "ImageData",
  "augment",
  "decode",
  "encode",
  "group_table",
  "image_table",
  "imbalanced_counts",
  "load_documents",
  "load_images",
  "load_rows",
  "only_what_is_there",
  "random_crop",
  "random_flip",
  "take_classes",
  "to_float",
]
