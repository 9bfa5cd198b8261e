"""Regression data for training: whole splits as arrays, and the order of their rows.

    stored blocks --Grain--> columns --source statistics--> standardised, padded `Arrays`

All statistics come from the source's training rows. A mean squared error of 1 therefore equals the
source target's variance, for training rows and for test rows.
"""

import dataclasses
import pathlib
import zlib

import numpy as np

from qlora_jax import errors
from qlora_jax.data import (
  functions,
  instructions_text,
  noise,
  order,
  storage,
  synthetic_regression,
  table_regression,
  tables,
)

batch_order = order.batch_order

SOURCE_NOISE_LEVEL = 0.05
# Bound of standardised features. Without it, a category that is rare in the source domain would be
# a very large number in the target domain.
FEATURE_CLIP = 8.0


@dataclasses.dataclass(frozen=True)
class Arrays:
  """One split in memory.

  Attributes:
    features: float32 [n, feature_dim], standardised; columns past the task's features are 0.
    targets: float32 [n], training target: clean + level * noise; observed for a real table.
    clean: float32 [n], noise-free target; equal to `targets` for a real table.
    target_id: int32 [n], position in `Task.target_names + Task.source_names`.
    paraphrase_id: int32 [n], row of `Task.paraphrases`.
  """

  features: np.ndarray
  targets: np.ndarray
  clean: np.ndarray
  target_id: np.ndarray
  paraphrase_id: np.ndarray

  def __len__(self) -> int:
    return len(self.targets)

  def take(self, rows: np.ndarray) -> "Arrays":
    """Selects rows by their positions [k], or by a mask [n]."""
    return Arrays(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """The facts of a task that need no rows.

  Attributes:
    name: the task or table.
    feature_names: names of the d features.
    target_names: targets or target domains; `target_id` numbers these first.
    source_names: source function or source domains; `target_id` numbers these next.
    source_key: tasks with the same key have the same source rows and can share a base network.
    paraphrases: all texts; twelve per target, then twelve per source.
    seen_paraphrases: int32 [targets + sources, 8], rows that training and validation use.
    heldout_paraphrases: int32 [targets + sources, 4], rows that only the test split uses.
    has_clean: whether the noise-free target is known.
    default_noise: noise kind when the caller names none; None for a real table.
  """

  name: str
  feature_names: tuple[str, ...]
  target_names: tuple[str, ...]
  source_names: tuple[str, ...]
  source_key: str
  paraphrases: tuple[str, ...]
  seen_paraphrases: np.ndarray
  heldout_paraphrases: np.ndarray
  has_clean: bool
  default_noise: str | None


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Means and standard deviations of the source's training rows."""

  feature_mean: np.ndarray
  feature_std: np.ndarray
  target_mean: float
  target_std: float


def task_names() -> tuple[str, ...]:
  """Returns every synthetic task and every table."""
  return (*functions.TASKS, *tables.TABLES)


def describe_task(name: str) -> Task:
  """Describes a task; reads no files.

  Raises:
    UserError: an unknown name; the message lists the known names.
  """
  if name in functions.TASKS:
    task = functions.TASKS[name]
    feature_names = tuple(f"x{i + 1}" for i in range(task.num_features))
    target_names, source_names = tuple(task.targets), (task.source_name,)
    source_key, has_clean, default_noise = task.source_name, True, task.default_noise
  elif name in tables.TABLES:
    table = tables.TABLES[name]
    feature_names = table.feature_names
    target_names, source_names = table.target_names, table.source_names
    source_key, has_clean, default_noise = name, False, None
  else:
    raise errors.UserError(f"unknown data set {name!r}; known: {', '.join(task_names())}")
  texts = [instructions_text.target_paraphrases(target) for target in target_names]
  texts += [instructions_text.source_paraphrases(source) for source in source_names]
  rows = np.arange(sum(map(len, texts)), dtype=np.int32).reshape(len(texts), -1)
  return Task(
    name=name,
    feature_names=feature_names,
    target_names=target_names,
    source_names=source_names,
    source_key=source_key,
    paraphrases=tuple(text for group in texts for text in group),
    seen_paraphrases=rows[:, : instructions_text.NUM_SEEN],
    heldout_paraphrases=rows[:, instructions_text.NUM_SEEN :],
    has_clean=has_clean,
    default_noise=default_noise,
  )


def source_arrays(
  name: str, *, data_dir: str | pathlib.Path, feature_dim: int
) -> dict[str, Arrays]:
  """Reads the rows that the base network is trained on; the first use prepares them.

  Returns:
    'train' and 'validation'; synthetic targets carry Gaussian noise of level 0.05.

  Raises:
    UserError: an unknown name, or a `feature_dim` below the task's number of features.
  """
  task = _checked_task(name, feature_dim)
  columns = _read_shared(name, data_dir, ("source_train", "source_validation"))
  statistics = fit_statistics(columns["source_train"])
  level = SOURCE_NOISE_LEVEL if task.has_clean else 0.0
  return {
    split: _arrays(columns[f"source_{split}"], statistics, feature_dim, "gaussian", level)
    for split in ("train", "validation")
  }


def target_arrays(
  name: str,
  *,
  seed: int,
  data_dir: str | pathlib.Path,
  feature_dim: int,
  noise_kind: str | None = None,
  noise_level: float = 0.0,
  train_rows: int | None = None,
) -> dict[str, Arrays]:
  """Reads the rows that adapters are trained and tested on; the first use prepares them.

  Args:
    name: task or table.
    seed: data seed. Each seed is an independent draw of training and validation rows, noise and
      paraphrases. All seeds have the same test rows.
    data_dir: directory of all prepared data sets.
    feature_dim: width to which features are padded, so that all tasks share compiled programs.
    noise_kind: one of `noise.KINDS`; None for the task's default. Ignored for a real table.
    noise_level: standard deviation of the noise, in standard deviations of the source target.
    train_rows: number of training rows to use, from the first one on; None for all.

  Returns:
    'train', 'validation' and 'test'.

  Raises:
    UserError: an unknown name or noise kind, a negative level, a level above 0 for a real table
      (its targets are observed with noise), or `train_rows` above the number of training rows.
  """
  task = _checked_task(name, feature_dim)
  kind = noise_kind or task.default_noise or noise.KINDS[0]
  noise.kind_index(kind)
  if not 0 <= noise_level < np.inf:
    raise errors.UserError(f"noise_level is {noise_level}; it must be finite and at least 0")
  if noise_level and not task.has_clean:
    raise errors.UserError(f"noise_level is {noise_level}, but {name!r} is observed: set it to 0")
  if seed < 0:
    raise errors.UserError(f"data seed is {seed}; it must be at least 0")
  if task.has_clean:
    columns = _read_shared(name, data_dir, ("source_train", "test"))
    columns |= storage.read(
      synthetic_regression.SyntheticRegression,
      synthetic_regression.config(name, seed),
      data_dir,
      synthetic_regression.SEED_SPLITS,
    )
  else:
    columns = _read_shared(name, data_dir, ("source_train", "test", "pool"))
    columns |= table_regression.split_pool(name, columns.pop("pool"), seed)
  available = len(columns["train"]["clean"])
  if train_rows is not None:
    if not 1 <= train_rows <= available:
      raise errors.UserError(f"train_rows is {train_rows}; {name!r} has 1 to {available}")
    columns["train"] = {key: column[:train_rows] for key, column in columns["train"].items()}
  statistics = fit_statistics(columns["source_train"])
  return {
    split: _arrays(columns[split], statistics, feature_dim, kind, noise_level)
    for split in ("train", "validation", "test")
  }


def known_wordings(task: Task, arrays: Arrays) -> Arrays:
  """The same rows with seen wordings; each row keeps an instruction of the row's target.

  Row i has seen wording i mod 8, so that the choice is the same in every run.
  """
  wording = np.arange(len(arrays)) % task.seen_paraphrases.shape[1]
  return dataclasses.replace(arrays, paraphrase_id=task.seen_paraphrases[arrays.target_id, wording])


def shuffled_wordings(splits: dict[str, Arrays], seed: int) -> dict[str, Arrays]:
  """Control of the instruction: permutes the wordings within each split at random.

  The wordings and their counts stay the same. A row's wording no longer depends on the row's
  target, so that the instruction has no information about the row. The permutation of the test
  rows is the same for every seed.
  """

  def shuffled(split, arrays):
    rng = np.random.default_rng([zlib.crc32(split.encode()), 0 if split == "test" else seed])
    return dataclasses.replace(arrays, paraphrase_id=rng.permutation(arrays.paraphrase_id))

  return {split: shuffled(split, arrays) for split, arrays in splits.items()}


def fit_statistics(source_train: storage.Columns) -> Statistics:
  """Computes feature and target statistics of the source's training rows.

  The target statistics are noise-free where the noise-free target is known. A feature that is
  constant in the source has the standard deviation 1.
  """
  features = source_train["features"].astype(np.float64)
  target = source_train["clean"].astype(np.float64)
  std = features.std(axis=0)
  return Statistics(
    feature_mean=features.mean(axis=0),
    feature_std=np.where(std > 1e-6, std, 1.0),
    target_mean=float(target.mean()),
    target_std=float(target.std()),
  )


def _checked_task(name: str, feature_dim: int) -> Task:
  task = describe_task(name)
  if len(task.feature_names) > feature_dim:
    raise errors.UserError(
      f"feature_dim is {feature_dim}, but {name!r} has {len(task.feature_names)} features; "
      "it must be at least that"
    )
  return task


def _read_shared(
  name: str, data_dir: str | pathlib.Path, splits: tuple[str, ...]
) -> dict[str, storage.Columns]:
  if name in functions.TASKS:
    builder, config = synthetic_regression.SyntheticRegression, synthetic_regression.config(name)
  else:
    builder, config = table_regression.TableRegression, table_regression.config(name)
  return storage.read(builder, config, data_dir, splits)


def _arrays(
  columns: storage.Columns, statistics: Statistics, feature_dim: int, kind: str, level: float
) -> Arrays:
  raw = columns["features"].astype(np.float64)
  standardised = (raw - statistics.feature_mean) / statistics.feature_std
  features = np.zeros((len(raw), feature_dim), np.float32)
  features[:, : raw.shape[1]] = np.clip(standardised, -FEATURE_CLIP, FEATURE_CLIP)
  clean = (columns["clean"] - statistics.target_mean) / statistics.target_std
  targets = clean
  if level:
    targets = clean + level * columns["noise"][:, noise.kind_index(kind)]
  return Arrays(
    features=features,
    targets=targets.astype(np.float32),
    clean=clean.astype(np.float32),
    target_id=columns["target_id"],
    paraphrase_id=columns["paraphrase_id"],
  )
