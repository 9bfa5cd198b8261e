"""Compiled programs: shared on disk by all processes and later runs, and let go of in one.

A program for the CPU is hundreds of memory mappings, of which Linux gives a process 65,530 unless
told otherwise. A process that compiles hundreds of programs, for the settings of a sweep say, would
end in a segmentation fault inside the compiler.
"""

import gc
import os
import pathlib

import jax

_MAPPINGS = pathlib.Path("/proc/self/maps")
_LIMIT = pathlib.Path("/proc/sys/vm/max_map_count")
_MIN_SECONDS = 0.3  # programs that compile faster are not worth a file


def default_dir() -> pathlib.Path:
  """`$XDG_CACHE_HOME/qlora_jax/compiled`, or the same under `~/.cache`."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base, "qlora_jax", "compiled")


def enable(directory: pathlib.Path | None = None) -> None:
  """Turns JAX's persistent compilation cache on, unless the user has set one of their own.

  A directory that cannot be written is JAX's to warn of: the run goes on and compiles.
  """
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(directory or default_dir()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)


def relieve(share: float = 0.25) -> bool:
  """Lets go of all compiled programs where they hold more than `share` of the mappings there are.

  What is needed again is compiled again, or read from disk.

  Returns:
    Whether it did.
  """
  if not (_MAPPINGS.exists() and _LIMIT.exists()):
    return False
  if _MAPPINGS.read_bytes().count(b"\n") < share * int(_LIMIT.read_text()):
    return False
  jax.clear_caches()
  gc.collect()
  return True
