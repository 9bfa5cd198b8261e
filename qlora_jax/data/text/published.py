"""Published files by download or from a folder, and how their rows are stored by TFDS.

A record holds a block of rows, as in `qlora_jax.data.storage`, because TFDS spends as much on a
short record as on a long one. Text is stored as UTF-8.
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

Files = Mapping[str, str]  # path of each published file, and its SHA-256

TIMEOUT = 60  # seconds without a byte


@dataclasses.dataclass
class Config(tfds.core.BuilderConfig):
  """A builder's configuration.

  Attributes:
    manual_folder: folder that holds the files; None to download them.
  """

  manual_folder: str | None = None


def config(files: Files, manual_folder: str | pathlib.Path | None) -> Config:
  """Returns the configuration of published files or of a folder.

  A folder with the published content shares its prepared data with the download; any other content
  is prepared under a name made of its digest, so that prepared data are never mistaken.

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
  """Returns every file's place on disk, after downloading it if no folder is given.

  A download goes to the manager's folder under the name of its checksum, and is used again if it
  is there. The manager itself would repeat a failed request ten times and log every one.

  Raises:
    UserError: a download failed, or has another checksum than the published file.
  """
  if builder_config is not None and builder_config.manual_folder is not None:
    return {path: pathlib.Path(builder_config.manual_folder, path) for path in files}
  folder = pathlib.Path(dl_manager.download_dir)
  folder.mkdir(parents=True, exist_ok=True)
  return {path: download(f"{base}/{path}", sha256, folder) for path, sha256 in files.items()}


def download(url: str, sha256: str, folder: pathlib.Path) -> pathlib.Path:
  """A published file in `folder`, named by its checksum; raises a UserError for any other."""
  place = folder / f"{sha256[:16]}-{url.rpartition('/')[2]}"
  if place.is_file() and hashlib.sha256(place.read_bytes()).hexdigest() == sha256:
    return place
  try:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
      content = response.read()
  except (OSError, http.client.HTTPException) as error:
    reason = " ".join(str(getattr(error, "reason", error)).split())
    raise errors.UserError(
      f"cannot download {url} ({reason}); check the network, or put the files into a folder and "
      "name it as manual_folder"
    ) from error
  found = hashlib.sha256(content).hexdigest()
  if found != sha256:
    raise errors.UserError(
      f"{url} has SHA-256 {found[:16]}..., the published file has {sha256[:16]}...; nothing of it "
      "is used"
    )
  files.write_bytes(place, content)
  return place


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
  """Cuts rows into consecutive blocks, keyed by their position."""
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
  """Reads whole splits, preparing them first if nobody has yet.

  Raises:
    UserError: a download failed or has the wrong checksum, or a file is not as published.
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
