"""The structure that the documentation describes is the structure of the tree."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "structure.md"
ROWS = re.findall(r"^\| (.+) \| `([\w./]+)(?:::(\w+))?` \|$", PAGE.read_text(), re.MULTILINE)
LONGEST = 400


def definitions(path):
  return {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}


def test_the_table_is_read():
  assert len(ROWS) >= 20 and len({topic for topic, *_ in ROWS}) == len(ROWS)


@pytest.mark.parametrize("topic, path, name", ROWS)
def test_the_file_to_open_is_there(topic, path, name):
  del topic
  assert (ROOT / path).is_file()
  assert not name or name in definitions(ROOT / path)


def trees():
  """The tree of twelve lines, wherever a page shows it."""
  for page in (PAGE, ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
    for block in re.findall(r"```\n(configs/.*?)```", page.read_text(), re.DOTALL):
      yield page, block


def test_the_tree_has_twelve_lines_and_is_the_same_on_each_page():
  pages, blocks = zip(*trees(), strict=True)
  assert len(pages) == 3 and len(set(blocks)) == 1
  lines = blocks[0].splitlines()
  assert len(lines) == 12
  for line in lines:
    assert (ROOT / line.split()[0]).exists()
  shown = blocks[0]
  for package in (path.parent for path in ROOT.glob("qlora_jax/*/__init__.py")):
    assert re.search(rf"\b{package.name}\b", shown), package


@pytest.mark.parametrize("folder", ["qlora_jax", "experiments", "configs", "benchmarks", "tests"])
def test_no_file_is_longer_than_a_reader_takes_in(folder):
  long = {
    str(path.relative_to(ROOT)): length
    for path in (ROOT / folder).rglob("*.py")
    if (length := len(path.read_text().splitlines())) > LONGEST
  }
  assert not long
