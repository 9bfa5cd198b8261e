"""Compiled programs: shared on disk between processes, and cleared before memory maps run out.

A program for the CPU needs hundreds of memory maps, of which Linux gives a process 65,530 by
default. A process that compiles hundreds of programs, such as those of a sweep's arms, would end
in a segmentation fault inside the compiler.
"""

import gc
import os
import pathlib

import jax

_MAPPINGS = pathlib.Path("/proc/self/maps")
_LIMIT = pathlib.Path("/proc/sys/vm/max_map_count")
_MIN_SECONDS = 0.3  # programs that compile faster are not stored


def default_dir() -> pathlib.Path:
  """`$XDG_CACHE_HOME/qlora_jax/compiled`, or the same under `~/.cache`."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base, "qlora_jax", "compiled")


def enable(directory: pathlib.Path | None = None) -> None:
  """Turns on JAX's persistent compilation cache, where the user has not set a directory for it.

  Where the directory cannot be written, JAX warns and compiles.
  """
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(directory or default_dir()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)


def clear_if_needed(share: float = 0.25) -> bool:
  """Clears JAX's caches where the process holds more than `share` of the memory maps it may have.

  Programs that are needed again are compiled again, or read from disk.

  Returns:
    Whether the caches were cleared.
  """
  if not (_MAPPINGS.exists() and _LIMIT.exists()):
    return False
  if _MAPPINGS.read_bytes().count(b"\n") < share * int(_LIMIT.read_text()):
    return False
  jax.clear_caches()
  gc.collect()
  return True
