"""The built-in families of adapters, one file each; `registry.py` has the record and the registry.

Every file of this folder is a family: it defines `METHODS`, a tuple of `registry.Method`.
"""

import importlib
import pkgutil

_ORDER = ("full", "lora", "dora", "lora_xs", "comol", "lily", "queryable")  # of tables; others last


def _files() -> list[str]:
  names = [module.name for module in pkgutil.iter_modules(__path__)]
  return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


BUILT_IN = tuple(
  method for name in _files() for method in importlib.import_module(f"{__name__}.{name}").METHODS
)
