"""No import circle between the modules of the library, the studies, the configs and launch.py."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def paths():
  folders = (ROOT / name for name in ("qlora_jax", "experiments", "configs"))
  return [
    ROOT / "launch.py",
    *(path for folder in folders for path in sorted(folder.rglob("*.py"))),
  ]


def name_of(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source, modules):
  """Modules that a source imports, in functions as well."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "import by full name"
      members = {f"{node.module}.{alias.name}" for alias in node.names}
      names |= {name if name in modules else node.module for name in members}
  return names & modules


def check(sources):
  modules = set(sources)
  graph = {name: imported(source, modules) for name, source in sources.items()}
  tuple(graphlib.TopologicalSorter(graph).static_order())


def test_no_module_imports_itself_through_others():
  check({name_of(path): path.read_text() for path in paths()})


def test_a_circle_through_a_function_is_found():
  sources = {"a": "from p import b", "p.b": "def f():\n  import c", "c": "from a import x"}
  with pytest.raises(graphlib.CycleError):
    check(sources | {"p": ""})
