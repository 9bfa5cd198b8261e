"""How each method looks in every figure and table: name, colour, line, marker and place.

Colour tells the family (Okabe-Ito, told apart by colour-blind readers); line style and marker tell
the members of a family apart, and every method in a greyscale print.
"""

import contextlib
import dataclasses
from collections.abc import Iterable

import matplotlib
import matplotlib.markers

INK = "#24292f"  # text, axes, and the methods that are reference points
PAPER = "#ffffff"
FAINT = "#d0d7de"  # grid lines, zero lines
MUTED = "#8c959f"  # methods in the background

_BLUE, _SKY, _GREEN = "#0072b2", "#56b4e9", "#009e73"
_VERMILLION, _ORANGE, _PURPLE = "#d55e00", "#e69f00", "#cc79a7"

# Two inks of the inlined figures follow the page's light or dark theme; see `html.py`.
THEME_COLOURS = {INK: "--ink", PAPER: "--paper", FAINT: "--faint", MUTED: "--muted"}


@dataclasses.dataclass(frozen=True)
class Method:
  """One method's name and looks. `main` methods are drawn in front where all would not fit."""

  key: str
  label: str
  color: str
  line: str | tuple
  marker: str | tuple
  main: bool = False
  description: str = ""


_DASH_DOT_DOT = (0, (5, 1.5, 1, 1.5, 1, 1.5))
_LONG_DASH = (0, (8, 2))

_METHODS = (
  Method("none", "Frozen base", INK, ":", "x", True, "the pretrained network, unchanged"),
  Method("full", "Full fine-tuning", INK, "-", "s", True, "every weight of the base is trained"),
  Method(
    "full_input",
    "Full with instruction",
    INK,
    "--",
    (4, 1, 0),
    True,
    "full fine-tuning, with the instruction's embedding added to the network's input",
  ),
  Method("lora", "LoRA", _BLUE, "-", "o", True, "one low-rank update for each weight matrix"),
  Method(
    "lora_input",
    "LoRA with instruction",
    _BLUE,
    "--",
    "^",
    True,
    "LoRA, with the instruction's embedding added to the network's input",
  ),
  Method("rslora", "rsLoRA", _BLUE, "-.", "v", False, "LoRA scaled by 1/sqrt(rank)"),
  Method(
    "dora",
    "DoRA",
    _SKY,
    "-",
    "D",
    True,
    "LoRA on the direction of each weight column, with a trained length",
  ),
  Method(
    "lora_xs",
    "LoRA-XS",
    _SKY,
    "--",
    "<",
    False,
    "a small trained core between frozen factors taken from the weight",
  ),
  Method(
    "comol",
    "CoMoL",
    _GREEN,
    "-",
    "P",
    True,
    "a routed mixture of low-rank cores in each weight matrix, nothing shared",
  ),
  Method(
    "lily",
    "Lily",
    _GREEN,
    "--",
    "X",
    True,
    "low-rank experts shared across layers, routed by each layer",
  ),
  Method(
    "queryable",
    "Queryable",
    _VERMILLION,
    "-",
    "*",
    True,
    "a query routes over one shared memory of low-rank atoms",
  ),
  Method(
    "queryable_prior",
    "Queryable + prior",
    _VERMILLION,
    "--",
    "h",
    True,
    "Queryable, with the instruction as a prior over the atoms",
  ),
  Method(
    "queryable_kl",
    "Queryable + KL",
    _VERMILLION,
    "-.",
    "8",
    False,
    "Queryable, with a penalty that pulls the routing towards the instruction's prior",
  ),
  Method(
    "queryable_query",
    "Queryable + query",
    _ORANGE,
    "-",
    "p",
    False,
    "Queryable, with the instruction in the query",
  ),
  Method(
    "queryable_prior_query",
    "Queryable + prior + query",
    _ORANGE,
    "--",
    "H",
    False,
    "Queryable, with the instruction in the prior and in the query",
  ),
  Method(
    "queryable_topk",
    "Queryable (top-k)",
    _ORANGE,
    "-.",
    ">",
    False,
    "Queryable, keeping only the few atoms with the largest weights",
  ),
  Method(
    "queryable_recurrent",
    "Queryable (recurrent)",
    _ORANGE,
    ":",
    "1",
    False,
    "Queryable, with a recurrent summary of the earlier blocks",
  ),
  Method(
    "queryable_no_summary",
    "Queryable (no summary)",
    _VERMILLION,
    _LONG_DASH,
    "d",
    False,
    "Queryable, without a summary of the earlier blocks in the query",
  ),
  Method(
    "static",
    "Static mixture",
    _PURPLE,
    "-",
    "+",
    True,
    "control: the shared atoms in one learned mixture a block, whatever the input",
  ),
  Method(
    "uniform",
    "Uniform mixture",
    _PURPLE,
    "--",
    "2",
    False,
    "control: the shared atoms with equal weights",
  ),
)
_BY_KEY = {m.key: m for m in _METHODS}
_ORDER = {m.key: i for i, m in enumerate(_METHODS)}
_OTHER_LINES = ("-", "--", "-.", ":", _LONG_DASH, _DASH_DOT_DOT)
_OTHER_MARKERS = ("3", "4", "|", ".", "_", "o")

# What a method's key ends with where one name was run in several ways: label, what it means.
_VARIANTS = {
  "prompt": ("+ prompt", "the instruction's text stands in the prompt"),
  "shuffled": ("(shuffled)", "control: the router is given the instructions of other tasks"),
}
_PROMPT_LINES = {"-": (0, (6, 1.2, 1.2, 1.2)), "--": (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2))}

# The method that the headline is about, by task; the empty name stands for every other task. On
# multi_target only the instruction tells the targets apart, so it is the variant that reads it.
SUBJECTS = {"": "queryable", "multi_target": "queryable_prior"}
# Of a language model: with the instruction in the prompt, as LoRA has it, and as prior.
DECIDING = "queryable_prior+prompt"


def subject(task: str, present: Iterable[str]) -> str | None:
  """The method of `present` that the report is about on `task`: fixed, never the best one."""
  present = ordered(present)
  prompted = [key for key in present if key.endswith("+prompt") and key.startswith(SUBJECTS[""])]
  if prompted:
    return DECIDING if DECIDING in prompted else prompted[0]
  if SUBJECTS.get(task) in present:
    return SUBJECTS[task]
  return next((m for m in present if m.startswith(SUBJECTS[""])), None)


def method(key: str) -> Method:
  """The looks of `key`; a method that this file does not know is grey under its own name."""
  if key in _BY_KEY:
    return _BY_KEY[key]
  name, _, variant = key.rpartition("+")
  if name and variant in _VARIANTS:
    return _variant(method(name), key, variant)
  place = sum(map(ord, key))
  line = _OTHER_LINES[place % len(_OTHER_LINES)]
  return Method(key, key, MUTED, line, _OTHER_MARKERS[place % len(_OTHER_MARKERS)])


def _variant(look: Method, key: str, variant: str) -> Method:
  """The same colour and marker: hollow with a prompt, on a dotted line for the control."""
  label, meaning = _VARIANTS[variant]
  line, marker = ":", look.marker
  if variant == "prompt":
    line = _PROMPT_LINES.get(look.line, look.line)
    marker = matplotlib.markers.MarkerStyle(look.marker, fillstyle="none")
  description = "; ".join(text for text in (look.description, meaning) if text)
  return dataclasses.replace(
    look, key=key, label=f"{look.label} {label}", line=line, marker=marker, description=description
  )


def ordered(keys: Iterable[str]) -> list[str]:
  """The distinct keys in the order of every legend and table; unknown ones last, by name."""
  return sorted(set(keys), key=lambda key: (_ORDER.get(key.split("+")[0], len(_ORDER)), key))


def highlighted(keys: Iterable[str], limit: int = 9) -> list[str]:
  """The methods to draw in front: all if they are few, otherwise the main ones, or the first."""
  keys = ordered(keys)
  return keys if len(keys) <= limit else [k for k in keys if method(k).main] or keys[:limit]


@contextlib.contextmanager
def context():
  """matplotlib settings of every figure: small type, thin spines, text as outlines in SVG."""
  settings = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 3.2,
    "text.parse_math": False,  # a dollar in a task's name is a dollar
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",  # no font need be installed where the report is read
    "svg.hashsalt": "qlora_jax",  # the same study gives the same bytes
  }
  with matplotlib.rc_context(settings):
    yield
