"""Instruction texts: twelve paraphrases per target and per domain.

The first eight are *seen*: training and validation rows use them. The last four are *held out*:
only test rows use them. The texts of `multi_target` and `regimes` are written by hand, because
there only the instruction identifies the target. All other texts are sentence frames, filled with a
name of the quantity and a name of the circumstances. Held-out texts use frames and a name of the
circumstances that no seen text uses.
"""

import numpy as np

NUM_SEEN = 8
NUM_HELDOUT = 4
NUM_PARAPHRASES = NUM_SEEN + NUM_HELDOUT

_SEEN_FRAMES = (
  "Predict {what} {when}.",
  "Estimate {what} {when}.",
  "What would you expect {what} to be {when}?",
  "Give your best guess of {what} {when}.",
  "Work out {what} {when} from the inputs.",
  "We need a forecast of {what} {when}.",
  "Your task: regress {what} {when} on the given features.",
  "{When}, how large is {what}?",
)
_HELDOUT_FRAMES = (
  "Using the measurements given, infer {what} {when}.",
  "Tell me the most likely value of {what} {when}.",
  "Please compute an estimate for {what} {when}.",
  "The answer should be {what} {when}.",
)


def _compose(quantities: tuple[str, ...], circumstances: tuple[str, ...]) -> tuple[str, ...]:
  """Fills the frames; only held-out texts use the last circumstance."""
  texts = []
  for position, frame in enumerate(_SEEN_FRAMES + _HELDOUT_FRAMES):
    what = quantities[position % len(quantities)]
    seen = circumstances[position % (len(circumstances) - 1)]
    when = seen if position < NUM_SEEN else circumstances[-1]
    texts.append(frame.format(what=what, when=when, When=when[0].upper() + when[1:]))
  return tuple(texts)


_CURVE = ("the response", "the output of the benchmark function", "the target value")
_BIKES = (
  "the number of bikes rented in the hour",
  "hourly bike-share demand",
  "the count of riders who take out a bike",
)
_HOUSES = (
  "the log sale price of the house",
  "the home's logged price",
  "the log of the price paid",
)
_AVOCADOS = (
  "the average price of an avocado",
  "the mean retail price of one avocado",
  "the week's average avocado price",
)
_FLIGHTS = (
  "the arrival delay in minutes",
  "the lateness of the flight on arrival",
  "the number of minutes between scheduled and actual arrival",
)

_SYNTHETIC_SOURCES = {
  "friedman1": _compose(
    _CURVE,
    (
      "under the original Friedman-1 surface",
      "with the unmodified first Friedman function",
      "for the plain Friedman benchmark",
      "before any change was made to the first Friedman problem",
    ),
  ),
  "friedman2": _compose(
    _CURVE,
    (
      "for the original impedance circuit",
      "with the unmodified second Friedman function",
      "under the standard impedance formula",
      "before the circuit of the second Friedman problem was altered",
    ),
  ),
  "friedman3": _compose(
    _CURVE,
    (
      "for the original phase angle",
      "with the unmodified third Friedman function",
      "under the standard phase formula",
      "before the circuit of the third Friedman problem was altered",
    ),
  ),
  "sines": _compose(
    _CURVE,
    (
      "for the slow waves",
      "with the original sum of sines",
      "at the base frequencies",
      "before the oscillations were made faster",
    ),
  ),
}

_SYNTHETIC_TARGETS = {
  "friedman1": _compose(
    _CURVE,
    (
      "under the shifted Friedman-1 surface",
      "after the coefficients of the first Friedman function changed",
      "for the modified Friedman benchmark",
      "once the bowl has moved and the linear terms have swapped",
    ),
  ),
  "friedman2": _compose(
    _CURVE,
    (
      "for the altered impedance circuit",
      "after the coefficients of the second Friedman function changed",
      "with a larger resistance and a weaker inductance",
      "once the components of the circuit have been replaced",
    ),
  ),
  "friedman3": _compose(
    _CURVE,
    (
      "for the altered phase angle",
      "after the coefficients of the third Friedman function changed",
      "with the phase of the modified circuit",
      "once the components behind the angle have been replaced",
    ),
  ),
  "sines": _compose(
    _CURVE,
    (
      "for the fast waves",
      "after the sines were sped up and shifted in phase",
      "at the raised frequencies",
      "once the oscillations have become quicker",
    ),
  ),
  "regimes": (
    "Predict the response when every region of the input has its own correction.",
    "Estimate the output; the adjustment depends on which region the example lies in.",
    "Apply the correction that belongs to the part of the space where the input falls.",
    "The relation changes from regime to regime: predict the value for this one.",
    "Give the target under region-specific shifts.",
    "Depending on its octant, each input follows a different rule. Predict the result.",
    "Work out the value after the local, regime-dependent change.",
    "Forecast the response of a system that behaves differently in eight zones.",
    "Find which cell of the input space this is and return the corrected value for it.",
    "Say what the output is, given that neighbourhoods have been altered separately.",
    "The surface was modified piece by piece; report its height here.",
    "Infer the value under the rule that governs this corner of the domain.",
  ),
  "first_feature_trend_up": (
    "Predict with an added upward trend in the first feature.",
    "The output now also grows with the first input. Predict it.",
    "Estimate the response when a rising line in feature one is added.",
    "Add a positive slope along the first variable, then give the value.",
    "Larger values of feature 1 raise the target further. What is the target?",
    "Assume an extra linear increase in the first coordinate.",
    "Predict the value, with a climb along the first feature on top of the usual surface.",
    "Account for a new upward drift in input one.",
    "Include a straight-line gain proportional to the first feature.",
    "Report the response once it has been tilted upwards along the first axis.",
    "The first covariate has gained a positive linear effect; give the outcome.",
    "As the first input goes up, so should the answer, by an additional constant rate.",
  ),
  "fourth_feature_trend_down": (
    "Predict with an added downward trend in the fourth feature.",
    "The output now falls as the fourth input grows. Predict it.",
    "Estimate the response when a declining line in feature four is added.",
    "Add a negative slope along the fourth variable, then give the value.",
    "Larger values of feature 4 lower the target. What is the target?",
    "Assume an extra linear decrease in the fourth coordinate.",
    "Predict the value, with a descent along the fourth feature on top of the usual surface.",
    "Account for a new downward drift in input four.",
    "Subtract a straight-line loss proportional to the fourth feature.",
    "Report the response once it has been tilted downwards along the fourth axis.",
    "The fourth covariate has gained a negative linear effect; give the outcome.",
    "As the fourth input goes up, the answer should drop by an additional constant rate.",
  ),
  "third_feature_wave": (
    "Predict with an added oscillation along the third feature.",
    "The output now rises and falls periodically with the third input. Predict it.",
    "Estimate the response when a sine wave in feature three is added.",
    "Add a two-cycle sinusoid of the third variable, then give the value.",
    "The target swings up and down as feature 3 increases. What is the target?",
    "Assume a periodic ripple in the third coordinate.",
    "Predict the value, with a wave over the third feature on top of the usual surface.",
    "Account for a new cyclic effect of input three.",
    "Include a sinusoidal fluctuation driven by the third feature.",
    "Report the response once ripples run along the third axis.",
    "The third covariate has gained a seasonal, wave-like effect; give the outcome.",
    "Moving the third input makes the answer oscillate around its former value.",
  ),
  "first_second_interaction": (
    "Predict with an added interaction between the first and second features.",
    "The output now depends on the product of the first two inputs. Predict it.",
    "Estimate the response when features one and two reinforce each other.",
    "Add the centred product of the first and second variables, then give the value.",
    "The target is higher when features 1 and 2 are both high or both low. What is it?",
    "Assume a multiplicative coupling of the first two coordinates.",
    "Predict the value, with a joint effect of the first pair of features on top.",
    "Account for a new cross term of inputs one and two.",
    "Include a synergy term: first feature times second feature.",
    "Report the response once a saddle in the first two axes has been added.",
    "The leading two covariates now modulate one another; give the outcome.",
    "When the first and second inputs agree the answer goes up, otherwise it goes down.",
  ),
  "fifth_feature_step": (
    "Predict with an added step where the fifth feature passes one half.",
    "The output now jumps when the fifth input exceeds its midpoint. Predict it.",
    "Estimate the response when a threshold on feature five is added.",
    "Add a constant above the middle of the fifth variable and subtract it below.",
    "The target switches level depending on whether feature 5 is high or low. What is it?",
    "Assume a sudden jump in the fifth coordinate.",
    "Predict the value, with an on-off effect of the fifth feature on top.",
    "Account for a new discontinuity in input five.",
    "Include a two-level shift decided by the fifth feature alone.",
    "Report the response once a cliff cuts across the fifth axis.",
    "The fifth covariate now acts like a switch; give the outcome.",
    "Past the halfway mark of the fifth input the answer is abruptly higher.",
  ),
  "second_feature_bowl": (
    "Predict with an added bowl in the second feature.",
    "The output is now larger at both extremes of the second input. Predict it.",
    "Estimate the response when a quadratic in feature two is added.",
    "Add a parabola centred on the middle of the second variable, then give the value.",
    "The target rises as feature 2 moves away from its centre. What is the target?",
    "Assume a U-shaped effect of the second coordinate.",
    "Predict the value, with a valley over the second feature on top of the usual surface.",
    "Account for a new squared deviation of input two.",
    "Include a convex curve that is lowest halfway along the second feature.",
    "Report the response once the second axis has been bent upwards at its ends.",
    "The second covariate has gained a symmetric, cup-like effect; give the outcome.",
    "Extreme values of the second input, high or low, push the answer up.",
  ),
}

_TABLE_DOMAINS = {
  "spring": _compose(
    _BIKES,
    ("in spring", "on a spring day", "in the months after winter", "from late March to June"),
  ),
  "fall": _compose(
    _BIKES,
    ("in the fall", "on an autumn day", "in the months after summer", "from late September on"),
  ),
  "winter": _compose(
    _BIKES,
    ("in winter", "on a winter day", "in the coldest months", "from late December to March"),
  ),
  "summer": _compose(
    _BIKES,
    ("in summer", "on a summer day", "in the warmest months", "from late June to September"),
  ),
  "seattle": _compose(
    _HOUSES,
    ("within the city of Seattle", "inside Seattle", "in a Seattle zip code", "in the big city"),
  ),
  "eastside": _compose(
    _HOUSES,
    (
      "on the Eastside",
      "east of Lake Washington",
      "around Bellevue and Redmond",
      "across the lake from Seattle",
    ),
  ),
  "south_and_rural": _compose(
    _HOUSES,
    (
      "in south King County",
      "in the southern suburbs and rural towns",
      "around Kent and Auburn",
      "in the outlying parts of the county",
    ),
  ),
  "northeast": _compose(
    _AVOCADOS,
    (
      "in the Northeast",
      "in a northeastern city",
      "around New York and Boston",
      "on the upper Atlantic coast",
    ),
  ),
  "midwest": _compose(
    _AVOCADOS,
    (
      "in the Midwest",
      "in a midwestern city",
      "around Chicago and Detroit",
      "near the Great Lakes",
    ),
  ),
  "south": _compose(
    _AVOCADOS,
    ("in the South", "in a southern city", "around Atlanta and Houston", "from Texas to Florida"),
  ),
  "west": _compose(
    _AVOCADOS,
    (
      "in the West",
      "in a western city",
      "around Los Angeles and Seattle",
      "near the Pacific coast and the Rockies",
    ),
  ),
  "newark": _compose(
    _FLIGHTS,
    (
      "for a departure from Newark",
      "for a plane leaving EWR",
      "out of Newark Liberty",
      "from the New Jersey airport",
    ),
  ),
  "kennedy": _compose(
    _FLIGHTS,
    (
      "for a departure from Kennedy",
      "for a plane leaving JFK",
      "out of John F. Kennedy airport",
      "from the airport on Jamaica Bay",
    ),
  ),
  "laguardia": _compose(
    _FLIGHTS,
    (
      "for a departure from LaGuardia",
      "for a plane leaving LGA",
      "out of LaGuardia airport",
      "from the airport in northern Queens",
    ),
  ),
}


def source_paraphrases(source_name: str) -> tuple[str, ...]:
  """Returns the twelve texts of a synthetic source function or of a table's source domain."""
  return (_SYNTHETIC_SOURCES | _TABLE_DOMAINS)[source_name]


def target_paraphrases(target_name: str) -> tuple[str, ...]:
  """Returns the twelve texts of a synthetic target or of a table's target domain."""
  return (_SYNTHETIC_TARGETS | _TABLE_DOMAINS)[target_name]


def draw_paraphrases(
  target_id: np.ndarray, rng: np.random.Generator, *, heldout: bool
) -> np.ndarray:
  """Draws one text per row, from the seen or the held-out texts of the row's target.

  Args:
    target_id: int [n], position in `Task.target_names + Task.source_names`.
    rng: generator, advanced by the draw.
    heldout: True draws held-out texts (for test rows), False seen texts.

  Returns:
    int32 [n], row of `Task.paraphrases`: twelve per target, then twelve per source.
  """
  first, count = (NUM_SEEN, NUM_HELDOUT) if heldout else (0, NUM_SEEN)
  text = first + rng.integers(count, size=len(target_id))
  return (target_id * NUM_PARAPHRASES + text).astype(np.int32)
