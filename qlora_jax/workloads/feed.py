"""Batches of a cohort: splits in memory, rows in Grain's order.

All trials of one seed see the same rows in the same order, whatever their arm or learning rate, so
that arms are compared in pairs. Every step can be read at random, so that a trial resumes exactly.
"""

import dataclasses
import functools

import numpy as np

from qlora_jax.data import pipeline
from qlora_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Feed:
  """The data of a cohort.

  Attributes:
    splits: for each data seed, its arrays by split name.
    instructions: float32 [texts, E], the projected embedding of every paraphrase.
    batch_size, steps: of a trial.
  """

  splits: dict[int, dict[str, pipeline.Arrays]]
  instructions: np.ndarray
  batch_size: int
  steps: int

  @functools.cached_property
  def _orders(self) -> dict[int, np.ndarray]:
    return {
      seed: pipeline.batch_order(len(split["train"]), self.batch_size, self.steps, seed)
      for seed, split in self.splits.items()
    }

  def chunk(self, seeds: tuple[int, ...], start: int, count: int) -> step_lib.Batch:
    """Batches [seeds, K, B, ...] of the steps `start` to `start + count`."""
    parts = []
    for seed in seeds:
      rows = self._orders[seed][start : start + count]
      parts.append(self._batch(self.splits[seed]["train"], rows))
    return step_lib.Batch(*(np.stack(leaves) for leaves in zip(*parts, strict=True)))

  def whole(self, seed: int, split: str) -> step_lib.Batch:
    """A whole split [n, ...]."""
    return self._batch(self.splits[seed][split], slice(None))

  def rows(self, arrays: pipeline.Arrays) -> step_lib.Batch:
    """Rows of any split, with the instructions that they name [n, ...]."""
    return self._batch(arrays, slice(None))

  def _batch(self, arrays: pipeline.Arrays, rows) -> step_lib.Batch:
    return step_lib.Batch(
      arrays.features[rows], arrays.targets[rows], self.instructions[arrays.paraphrase_id[rows]]
    )
