"""TFDS builder of the synthetic tasks; every row is a pure function of (task, seed).

A task's configuration (`regimes`) has the splits that all seeds share: the source's training and
validation rows, and the target's test rows. A seed's configuration (`regimes-seed003`) has an
independent draw of target inputs, noise and paraphrases for training and validation.
"""

import pathlib
import zlib

import numpy as np
import tensorflow_datasets as tfds

from qlora_jax import errors
from qlora_jax.data import functions, instructions_text, noise, storage

NUM_ROWS = {
  "source_train": 8192,
  "source_validation": 2048,
  "test": 4096,
  "train": 8192,
  "validation": 2048,
}
SHARED_SPLITS = ("source_train", "source_validation", "test")
SEED_SPLITS = ("train", "validation")


class SyntheticRegression(tfds.core.GeneratorBasedBuilder):
  """Noise-free targets, and unit noise of every kind; see docs/data.md."""

  # Set here: TFDS finds it with importlib_resources, which is not one of its dependencies.
  code_path = pathlib.Path(__file__)
  VERSION = tfds.core.Version("1.0.0")  # increase it when a draw changes
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=task) for task in functions.TASKS]  # noqa: RUF012

  def _info(self) -> tfds.core.DatasetInfo:
    task, _ = parse_config(self.builder_config.name)
    return storage.dataset_info(
      self,
      num_features=functions.synthetic_task(task).num_features,
      num_noise_kinds=len(noise.KINDS),
      description=f"Synthetic noisy regression, task {task}. Noise columns: {noise.KINDS}.",
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    _, seed = parse_config(self.builder_config.name)
    splits = SHARED_SPLITS if seed is None else SEED_SPLITS
    return {split: self._generate_examples(split) for split in splits}

  def _generate_examples(self, split):
    task, seed = parse_config(self.builder_config.name)
    yield from storage.blocks(draw_rows(task, split, seed))


def config(task: str, seed: int | None = None) -> tfds.core.BuilderConfig:
  """Returns the configuration of the shared splits, or of one seed's splits."""
  functions.synthetic_task(task)
  if seed is None:
    return next(c for c in SyntheticRegression.BUILDER_CONFIGS if c.name == task)
  if seed < 0:
    raise errors.UserError(f"data seed is {seed}; it must be at least 0")
  return tfds.core.BuilderConfig(name=f"{task}-seed{seed:03d}")


def parse_config(name: str) -> tuple[str, int | None]:
  """Splits a configuration's name into task and seed; the seed of shared splits is None."""
  task, _, seed = name.partition("-seed")
  return task, int(seed) if seed else None


def draw_rows(task_name: str, split: str, seed: int | None = None) -> storage.Columns:
  """Draws the rows of one split.

  The source's rows depend only on the source function. Tasks with the same source therefore share
  these rows and one pre-trained base network.

  Args:
    task_name: a key of `functions.TASKS`.
    split: a key of `NUM_ROWS`.
    seed: the data seed of `train` and `validation`; ignored for the shared splits.

  Returns:
    The columns that `storage.dataset_info` declares.
  """
  task = functions.synthetic_task(task_name)
  num_rows, num_targets = NUM_ROWS[split], len(task.targets)
  is_source = split.startswith("source_")
  stream = f"{task.source_name if is_source else task_name}/{split}"
  rng = np.random.default_rng([zlib.crc32(stream.encode()), seed if split in SEED_SPLITS else 0])
  # Drawn as float32, so that the target is a function of exactly the stored input.
  x = rng.random((num_rows, task.num_features), dtype=np.float32).astype(np.float64)
  noise_draw = noise.draw(x, rng)
  if is_source:
    target_id = np.full(num_rows, num_targets)
    clean = task.source(x)
  else:
    target_id = rng.permutation(np.arange(num_rows) % num_targets)
    clean = functions.target_values(task, x, target_id)
  return {
    "features": x.astype(np.float32),
    "clean": clean.astype(np.float32),
    "noise": noise_draw,
    "target_id": target_id.astype(np.int32),
    "paraphrase_id": instructions_text.draw_paraphrases(target_id, rng, heldout=split == "test"),
  }
