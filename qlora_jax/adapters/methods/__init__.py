"""The built-in families of adapters, one file each; `registry.py` has the record and the registry.

Every file of this folder is a family: it defines `METHODS`, a tuple of `registry.Method`.
"""

import importlib
import pkgutil

from qlora_jax.adapters import registry

_ORDER = ("full", "lora", "dora", "lora_xs", "comol", "lily", "queryable")  # of tables; others last


def load() -> tuple[registry.Method, ...]:
  """The families of all files of this folder, in the order of tables."""
  names = sorted(module.name for module in pkgutil.iter_modules(__path__))
  names.sort(key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
  modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
  return tuple(method for module in modules for method in module.METHODS)


BUILT_IN = load()
