"""How each method looks in every figure and table: name, colour, line, marker and place.

The looks are declared with the methods (`qlora_jax/adapters/registry.py`); here are their variants,
their order and the figures' settings. Colour identifies the family (Okabe-Ito, which colour-blind
readers can distinguish); line style and marker distinguish the members of a family, and every
method in a greyscale print.
"""

import contextlib
import dataclasses
from collections.abc import Iterable

import matplotlib
import matplotlib.markers

from qlora_jax.adapters import registry

INK = "#24292f"  # text, axes, and the methods that are reference points
PAPER = "#ffffff"
FAINT = "#d0d7de"  # grid lines, zero lines
MUTED = "#8c959f"  # methods in the background

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
  """The looks of `key`; an unregistered method is grey under its own name."""
  preset = registry.presets().get(key)
  if preset is not None:
    return Method(
      key,
      preset.label,
      preset.color,
      preset.line,
      preset.marker,
      preset.main,
      preset.description,
    )
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
  places = {name: place for place, name in enumerate(registry.legend())}
  return sorted(set(keys), key=lambda key: (places.get(key.split("+")[0], len(places)), key))


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
