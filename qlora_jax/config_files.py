"""The one loader of config files, which are given as FILE.py[:VARIANT]."""

import importlib.util
import pathlib
import traceback
import types

import ml_collections
from absl import flags

from qlora_jax import errors, sweeps


def module(text: str) -> tuple[types.ModuleType, list[str]]:
  """The executed file, and a list with the variant, empty if there is no colon.

  Raises:
    errors.UserError: there is no such file.
  """
  path, *variant = text.split(":", 1)
  if not pathlib.Path(path).is_file():
    raise errors.UserError(
      f"--config: {path} cannot be read; use one such as configs/regression.py:demo"
    )
  spec = importlib.util.spec_from_file_location("config_file", path)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded, variant


def config(text: str) -> ml_collections.ConfigDict:
  """The locked config.

  Raises:
    errors.UserError: no such file, or no such variant.
  """
  loaded, variant = module(text)
  return loaded.get_config(*variant).lock()


def points(text: str, variant: str | None = None) -> list[dict]:
  """The points of `get_hyper`, of the variant in `text` if none is given."""
  loaded, own = module(text)
  return loaded.get_hyper(sweeps, variant if variant is not None else "".join(own))


class FlagParser(flags.ArgumentParser):
  """Parses the flag --config. Its error ends with a UserError's message, or with a traceback."""

  syntactic_help = "a config file with :variant"

  def parse(self, text: str) -> ml_collections.ConfigDict:
    try:
      return config(text)
    except (TypeError, ValueError) as error:  # absl shows only the message
      raise ValueError(traceback.format_exc()) from error

  def flag_type(self) -> str:
    return "config file"
