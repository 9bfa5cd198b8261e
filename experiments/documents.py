"""Writes the measured tables into the documentation.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Its function is in the record of a
study and reads `experiments/results` alone, so that a test can make every table again and compare.
"""

import re

from experiments import committed, comparisons, study

PAGES = (
  "README.md",
  "docs/results.md",
  "docs/language_results.md",
  "docs/studies/scaling.md",
)
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def claims() -> str:
  """The claims of all studies, each with its verdict and evidence."""
  rows = []
  for record in study.registry().values():
    if record.committed_results.exists:
      claim_list = record.claims(record.committed_results)
      rows += [[record.title, *claim.cells()] for claim in claim_list]
  return comparisons.markdown(["", "claim", "verdict", "evidence"], rows)


def table(name: str) -> str:
  """A table by its name in the documents; raises KeyError if no study has it."""
  if name == "claims":
    return claims()
  for record in study.registry().values():
    if name in record.tables:
      return record.tables[name](record.committed_results)
  raise KeyError(name)


def filled(text: str) -> str:
  """`text` with every marked table made again; raises KeyError for an unknown table."""
  return _MARKED.sub(lambda m: f"{m[1]}{table(m[2])}{m[3]}", text)


def out_of_date() -> list[str]:
  """The pages whose tables differ from the results."""
  texts = {page: (committed.ROOT / page).read_text() for page in PAGES}
  return [page for page, text in texts.items() if filled(text) != text]


def write() -> None:
  """Writes the tables into all pages."""
  for page in PAGES:
    path = committed.ROOT / page
    text = path.read_text()
    new_text = filled(text)
    if new_text != text:
      path.write_text(new_text)
