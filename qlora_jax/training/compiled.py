"""Compiled programs on disk, shared by all processes and by later runs of this machine."""

import os
import pathlib
import sys

import jax

_MIN_SECONDS = 0.3  # programs that compile faster are not worth a file


def default_dir() -> pathlib.Path:
  """`$XDG_CACHE_HOME/qlora_jax/compiled`, or the same under `~/.cache`."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base, "qlora_jax", "compiled")


def enable(directory: pathlib.Path | None = None) -> None:
  """Turns JAX's persistent compilation cache on, unless the user has set one of their own.

  A directory that cannot be written is JAX's to warn of: the run goes on and compiles. A process
  that has loaded torch, a notebook say, does without: it was seen to abort in a write.
  """
  if "torch" in sys.modules:
    return
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(directory or default_dir()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
