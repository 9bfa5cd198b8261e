"""Storage of examples: blocks of rows in array_record files, written once per configuration.

TFDS needs about 150 microseconds to write or read a record of any size, and a row has only about a
hundred bytes. A record is therefore a block of up to 256 consecutive rows. The rows of a split
keep their order.
"""

import contextlib
import io
import pathlib
from collections.abc import Iterator

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from qlora_jax import files

Columns = dict[str, np.ndarray]

BLOCK_ROWS = 256


def dataset_info(
  builder: tfds.core.DatasetBuilder,
  *,
  num_features: int,
  num_noise_kinds: int,
  description: str,
  citation: str = "",
  homepage: str = "",
) -> tfds.core.DatasetInfo:
  """Declares the features of a block.

  features       float32 [rows, d], raw (not standardised)
  clean          float32 [rows], noise-free target; the observed target of a real table
  noise          float32 [rows, kinds]; absent without noise kinds
  target_id      int32 [rows], position in `Task.target_names + Task.source_names`
  paraphrase_id  int32 [rows], position in `Task.paraphrases`
  """
  tensor = tfds.features.Tensor
  features = {
    "features": tensor(shape=(None, num_features), dtype=np.float32),
    "clean": tensor(shape=(None,), dtype=np.float32),
    "target_id": tensor(shape=(None,), dtype=np.int32),
    "paraphrase_id": tensor(shape=(None,), dtype=np.int32),
  }
  if num_noise_kinds:
    features["noise"] = tensor(shape=(None, num_noise_kinds), dtype=np.float32)
  return tfds.core.DatasetInfo(
    builder=builder,
    description=description,
    citation=citation,
    homepage=homepage,
    features=tfds.features.FeaturesDict(features),
    metadata=tfds.core.MetadataDict(block_rows=BLOCK_ROWS),
    disable_shuffling=True,
  )


def blocks(columns: Columns) -> Iterator[tuple[int, Columns]]:
  """Divides columns of equal length into consecutive blocks; yields (block number, block)."""
  num_rows = len(columns["clean"])
  for position, start in enumerate(range(0, num_rows, BLOCK_ROWS)):
    yield position, {name: column[start : start + BLOCK_ROWS] for name, column in columns.items()}


def read(
  builder_class: type[tfds.core.GeneratorBasedBuilder],
  config: tfds.core.BuilderConfig,
  data_dir: str | pathlib.Path,
  splits: tuple[str, ...],
) -> dict[str, Columns]:
  """Reads whole splits through Grain; the first use prepares the configuration.

  A lock file serialises processes that read the same configuration: the first process prepares it,
  the others wait and then read it.

  Args:
    builder_class: the TFDS builder.
    config: configuration of the builder; it may be missing from `BUILDER_CONFIGS`.
    data_dir: directory of all prepared data sets; created if missing.
    splits: names of the splits to read.

  Returns:
    The columns of each split, in stored order.
  """
  prepared_folder = pathlib.Path(data_dir) / f"{builder_class.name}-{config.name}"
  with files.lock(prepared_folder), _quiet():
    # Created inside the lock: a builder looks for prepared data only in its constructor.
    builder = builder_class(config=config, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(file_format="array_record")  # returns at once if prepared
  return {split: _read_split(builder, split) for split in splits}


def _read_split(builder: tfds.core.DatasetBuilder, split: str) -> Columns:
  records = grain.MapDataset.source(builder.as_data_source(split=split))
  stored_blocks = [records[position] for position in range(len(records))]
  return {
    name: np.concatenate([block[name] for block in stored_blocks]) for name in stored_blocks[0]
  }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Suppresses the output and the warnings that TFDS prints for every new configuration."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)
