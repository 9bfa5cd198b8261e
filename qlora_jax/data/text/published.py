"""Published files, from a download or a folder, and the TFDS storage of their rows.

A record is a block of rows, as in `qlora_jax.data.storage`, because TFDS needs the same time for a
short record as for a long one. Text is stored as UTF-8.
"""

import dataclasses
import hashlib
import http.client
import pathlib
import urllib.request
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from qlora_jax import errors, files
from qlora_jax.data import storage
from qlora_jax.data.text import records

Files = Mapping[str, str]  # SHA-256 by path of each published file

TIMEOUT = 60  # seconds without data


@dataclasses.dataclass
class Config(tfds.core.BuilderConfig):
  """A builder's configuration.

  Attributes:
    manual_folder: folder with the files; None to download them.
  """

  manual_folder: str | None = None


def config(files: Files, manual_folder: str | pathlib.Path | None) -> Config:
  """Returns the configuration for the published files or for a folder.

  A folder with the published content uses the same prepared data as the download. Prepared data of
  any other content have the digest of the content in their name, so that they are never confused.

  Raises:
    UserError: the folder or a file in it is missing.
  """
  if manual_folder is None:
    return Config(name="published")
  folder = pathlib.Path(manual_folder)
  digests = {}
  for path in files:
    if not (folder / path).is_file():
      raise errors.UserError(f"manual_folder {folder} has no file {path}")
    digests[path] = hashlib.sha256((folder / path).read_bytes()).hexdigest()
  if all(digests[path] == sha256 for path, sha256 in files.items()):
    return Config(name="published", manual_folder=str(folder))
  digest = hashlib.sha256("".join(digests.values()).encode()).hexdigest()[:12]
  return Config(name=f"manual-{digest}", manual_folder=str(folder))


def locate(
  builder_config: Config | None,
  dl_manager: tfds.download.DownloadManager,
  base: str,
  files: Files,
) -> dict[str, pathlib.Path]:
  """Returns the path of every file; downloads the files if the configuration has no folder.

  Downloads are stored in the manager's folder, named by their checksum, and reused. The manager's
  download function is not used: it repeats a failed request ten times and logs each attempt.

  Raises:
    UserError: a download failed, or its checksum differs from the published file's.
  """
  if builder_config is not None and builder_config.manual_folder is not None:
    return {path: pathlib.Path(builder_config.manual_folder, path) for path in files}
  folder = pathlib.Path(dl_manager.download_dir)
  folder.mkdir(parents=True, exist_ok=True)
  return {path: download(f"{base}/{path}", sha256, folder) for path, sha256 in files.items()}


def download(url: str, sha256: str, folder: pathlib.Path) -> pathlib.Path:
  """Downloads a published file to `folder`, named by its checksum, or reuses it.

  Raises:
    UserError: the download failed or has another checksum.
  """
  path = folder / f"{sha256[:16]}-{url.rpartition('/')[2]}"
  if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
    return path
  try:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
      content = response.read()
  except (OSError, http.client.HTTPException) as error:
    reason = " ".join(str(getattr(error, "reason", error)).split())
    raise errors.UserError(
      f"cannot download {url} ({reason}); check the network, or put the files into a folder and "
      "set manual_folder to it"
    ) from error
  actual = hashlib.sha256(content).hexdigest()
  if actual != sha256:
    raise errors.UserError(
      f"{url} has SHA-256 {actual[:16]}..., the published file has {sha256[:16]}...; the "
      "download is discarded"
    )
  files.write_bytes(path, content)
  return path


def dataset_info(
  builder: tfds.core.DatasetBuilder, *, description: str, citation: str, homepage: str, license: str
) -> tfds.core.DatasetInfo:
  """Declares the features of a block of rows.

  task, prompt, source  text [rows]
  num_answers           int32 [rows]
  answers               text [sum of num_answers]
  """
  text = tfds.features.Sequence(tfds.features.Text())
  return tfds.core.DatasetInfo(
    builder=builder,
    description=description,
    citation=citation,
    homepage=homepage,
    license=license,
    features=tfds.features.FeaturesDict(
      {
        "task": text,
        "prompt": text,
        "source": text,
        "answers": text,
        "num_answers": tfds.features.Tensor(shape=(None,), dtype=np.int32),
      }
    ),
    metadata=tfds.core.MetadataDict(block_rows=storage.BLOCK_ROWS),
    disable_shuffling=True,
  )


def blocks(rows: Iterable[records.Row]) -> Iterator[tuple[int, storage.Columns]]:
  """Divides rows into consecutive blocks; yields (block number, block)."""
  rows = list(rows)
  for position, start in enumerate(range(0, len(rows), storage.BLOCK_ROWS)):
    block = rows[start : start + storage.BLOCK_ROWS]
    yield (
      position,
      {
        "task": [row.task for row in block],
        "prompt": [row.prompt for row in block],
        "source": [row.source for row in block],
        "answers": [answer for row in block for answer in row.answers],
        "num_answers": np.array([len(row.answers) for row in block], np.int32),
      },
    )


def read(
  builder_class: type[tfds.core.GeneratorBasedBuilder],
  builder_config: Config,
  data_dir: str | pathlib.Path,
  splits: tuple[str, ...],
) -> dict[str, tuple[records.Row, ...]]:
  """Reads whole splits; the first use prepares them.

  Raises:
    UserError: a download failed or has the wrong checksum, or a file is malformed.
  """
  stored = storage.read(builder_class, builder_config, data_dir, splits)
  return {split: _rows(columns) for split, columns in stored.items()}


def _rows(columns: storage.Columns) -> tuple[records.Row, ...]:
  texts = {
    name: [value.decode() for value in columns[name]]
    for name in ("task", "prompt", "source", "answers")
  }
  ends = np.cumsum(columns["num_answers"])
  starts = ends - columns["num_answers"]
  return tuple(
    records.Row(task, prompt, tuple(texts["answers"][start:end]), source)
    for task, prompt, source, start, end in zip(
      texts["task"], texts["prompt"], texts["source"], starts, ends, strict=True
    )
  )
