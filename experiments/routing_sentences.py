"""Sentences that say what routing does: each needs a measured gain, or says that it has none.

A sentence with a word of routing and a word of effect or an interval, such as "the routing lowers
the error", is a claim. It is allowed with a marker that names an arm whose measured gain lies above
zero:

  The routing lowers the error on regimes. <!-- routing: bases regimes queryable -->

It is also allowed where every part with a word of effect has a phrase of a negative or inert
result. A row of claims needs one of the verdicts that the rule in `routing_gain` gives. A question
is no claim. A sentence about something else, such as the routing's time, has the marker
`<!-- routing: no claim -->`; it must not name a score or an interval.
"""

import ast
import json
import pathlib
import re
from collections.abc import Iterator

from experiments import committed, routing_gain

NO_CLAIM = "no claim"
_ROUTING = re.compile(r"\b(re)?rout(e|ed|es|er|ers|ing|ings)\b|\bsoftmax weights\b", re.IGNORECASE)
_EFFECT = re.compile(
  r"\b(gain(s|ed|ing)?|help(s|ed|ful|ing)?|adds?|added|pa(y|ys|id)|lower(s|ed|ing)?|reduc\w+"
  r"|decreas\w+|improv\w+|better|best|beat(s|en)?|win(s|ning)?|won|outperform\w*|benefit\w*"
  r"|contribut\w+|difference|matter(s|ed)?|useful|of use|worth|boost\w*|driv(e|es|en)|carr(y|ies)"
  r"|explain(s|ed)?|owe[sd]?|thanks to|because of|due to|comes? from|does it|is what|raises?"
  r"|effects?|need(s|ed)?|worse|fewer|smaller|higher|less|halv(e|es|ed|ing)|doubl\w+|cuts?|drops?"
  r"|falls?|hurts?|works?|essential|crucial|accounts? for|solves?|enables?|responsible)\b",
  re.IGNORECASE,
)
_NEGATIVE = re.compile(
  r"\b(do|does|did|is|are|was|were|has|have|had|can|could|may|need) not\b(?! only)|\bcannot\b"
  r"|\bnot (tested|measured|significant|supported|needed|known|only in)\b|\binert\b|\bnot tested\b"
  r"|\b(adds?|says?|tells?|gains?|costs?) nothing\b|\bno (routing )?gain\b|\bno claim\b"
  r"|\bno (significant )?difference\b|\bno better\b|\binconclusive\b",
  re.IGNORECASE,
)
# The quantity's name, which says nothing of its sign.
_NAME = re.compile(r"\bwhat the routing gains\b|\brouting gain: the study has no\b", re.IGNORECASE)
_MARKER = re.compile(r"<!-- routing: (.*?) -->")
_BETWEEN = re.compile(r"(?<=[.!?])[*_)\]\"']*\s+(?=[A-Z*`\[(_\"'&-])")
_TAG = re.compile(
  r"<style.*?</style>|<script.*?</script>|<(?!!-- routing:)[^>]*>|{[%#].*?[%#]}", re.DOTALL
)
_PARTS = re.compile(
  r"[,;:()]|\s[-–—]\s|\b(?:but|and|while|whereas|although|though|where|so that)\b"
)
_PRONOUN = re.compile(r"^[*_]*(it|this|that|these|they|its|their|so)\b", re.IGNORECASE)
_INTERVAL = re.compile(r"\[[+−-]?\d[\d.,]*, ?[+−-]?\d")
_SCORE = re.compile(r"\b(errors?|MSE|nats|exact match|accuracy|likelihood|loss)\b", re.IGNORECASE)
_MADE = re.compile(  # tables made from results
  r"<!-- table: (?!claims )\w+ -->.*?<!-- end -->", re.DOTALL
)
_VERDICTS = {routing_gain.NOT_MEASURED, routing_gain.INERT, routing_gain.ALIKE}
_SKIPPED = re.compile(r"```.*?```|`[^`\n]*`|<!-- (?:table: \w+|end) -->|\]\([^)\n]*\)", re.DOTALL)


def unsupported(text: str) -> list[str]:
  """Claims about routing in a Markdown text without a measured gain, each with the reason."""
  problems, about_routing = [], False
  for sentence in _sentences(text):
    markers, words = _MARKER.findall(sentence), _MARKER.sub("", sentence)
    names_routing = bool(_ROUTING.search(words))
    about_routing = names_routing or (about_routing and bool(_PRONOUN.search(words)))
    if markers:
      problems += [f"{words}: {reason}" for reason in _reasons(markers, words)]
    elif about_routing and not _makes_no_claim(words):
      problems.append(f"{words}: no marker of a measured routing gain")
  return problems


def texts() -> Iterator[tuple[str, str]]:
  """Name and text of all that readers see: pages, notebooks, and strings of the report."""
  root = committed.ROOT
  pages = [root / "README.md", *root.glob("docs/**/*.md")]
  for path in sorted(pages):
    yield str(path.relative_to(root)), path.read_text()
  for path in sorted(root.glob("notebooks/*.ipynb")):
    cells = json.loads(path.read_text())["cells"]
    markdown = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    yield str(path.relative_to(root)), "\n\n".join(markdown)
  for path in sorted(root.glob("experiments/report/*.py")):
    yield str(path.relative_to(root)), "\n\n".join(_strings(path))
  for path in sorted(root.glob("experiments/report/*.j2")):
    yield str(path.relative_to(root)), _TAG.sub("\n\n", path.read_text())


def _makes_no_claim(words: str) -> bool:
  """Whether a sentence about routing is no claim, or reports a negative or inert result."""
  if words.rstrip("*_ ").endswith("?") or _VERDICTS & {cell.strip() for cell in words.split("|")}:
    return True
  parts = [part for part in _PARTS.split(_NAME.sub("_", words)) if _EFFECT.search(part)]
  if not parts:
    return not _INTERVAL.search(words)
  return all(_NEGATIVE.search(part) for part in parts)


def _reasons(markers: list[str], words: str) -> Iterator[str]:
  for where in markers:
    if where == NO_CLAIM:
      if _INTERVAL.search(words) or _SCORE.search(words):
        yield "marked as no claim, but it names a score or an interval"
    else:
      try:
        if not routing_gain.allowed(where):
          yield routing_gain.verdict(where, "")
      except ValueError as error:
        yield str(error)


def _sentences(text: str) -> Iterator[str]:
  """Sentences, list items, headings and table rows, with the markers that follow them."""
  text = _MADE.sub(" ", text)
  text = _SKIPPED.sub(lambda match: " " if match[0].startswith("```") else "_", text)
  # A marker after the full stop belongs to the sentence before it.
  text = re.sub(r"([.!?:])\s*((?:<!-- routing: .*? -->\s*)+)", r" \2\1 ", text)
  for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\d+\. |\||#))", text):
    for sentence in _BETWEEN.split(" ".join(block.split())):
      if sentence:
        yield sentence


def _strings(path: pathlib.Path) -> list[str]:
  """Text constants of a module without docstrings; a formatted value is written as `_`."""
  tree, constants, inside = ast.parse(path.read_text()), [], set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Expr):  # docstrings
      inside.add(node.value)
    if isinstance(node, ast.JoinedStr):
      inside.update(node.values)
      if node not in inside:
        parts = (part.value if isinstance(part, ast.Constant) else "_" for part in node.values)
        constants.append("".join(map(str, parts)))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
      constants.append(node.value)
  return constants
