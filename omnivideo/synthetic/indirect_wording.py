"""The wordings of hints in indirect requests, by the kind of the hint and the field that it stands for.

In the forms, {x} is a thing or a value, and the other names agree with one object or with several.
"""

from omnivideo.synthetic.captions import NUMBER_WORDS
from omnivideo.synthetic.knowledge import COUNTS

SINGULAR_WORDS = {"it": "it", "its": "its", "moves": "moves", "does": "does", "is": "is", "looks": "looks"}
PLURAL_WORDS = {"it": "they", "its": "their", "moves": "move", "does": "do", "is": "are", "looks": "look"}
ASSOCIATION_FORMS = {
    "shape": ("like {x}", "shaped like {x}", "with the shape of {x}", "that {looks} like {x}", "in the form of {x}"),
    "colour": ("the colour of {x}", "the colour of {x}", "coloured like {x}", "with the colour of {x}",
               "in the colour of {x}", "{its} colour is that of {x}"),
    "size": ("the size of {x}", "as big or small as {x}", "with the size of {x}", "{its} size is that of {x}",
             "sized like {x}"),
    "motion": ("{it} {moves} like {x}", "moving like {x}", "{it} {does} what {x} does", "with the motion of {x}",
               "doing what {x} does", "{its} motion is that of {x}"),
    "count": ("as many {nouns} as {x}", "as many {nouns} as {x}", "{nouns}, as many as {x}",
              "the same number of {nouns} as {x}", "{nouns}, the same number as {x}"),
    "background": ("on a background the colour of {x}", "on a background coloured like {x}",
                   "against a background in the colour of {x}", "in front of a backdrop the colour of {x}",
                   "on the colour of {x}"),
}  # fmt: skip
ARITHMETIC_FORMS = ("{x} {nouns}", "{nouns}, {x} of them", "{nouns}, {x} in number", "{nouns}, as many as {x}")
MOTION_VALUE_WORDS = {"still": "staying still", "growing": "growing", "shrinking": "shrinking"} | {
    name: f"moving {name}" for name in ("left", "right", "up", "down")
}
NEGATION_FORMS = {
    "shape": ("shaped like {x}", "in the form of {x}", "with the shape of {x}"),
    "colour": ("coloured {x}", "{its} colour is {x}", "in a colour that is {x}", "in {x}"),
    "motion": ("{it} {is} {x}", "{its} motion is {x}", "that {is} {x}"),
    "background": ("on a background that is {x}", "against a background of {x}", "in front of a backdrop of {x}"),
}
ALTERNATIVE_FORMS = ("{a} or {b}, but not {c}", "either {a} or {b}, but not {c}", "{a} or {b}, though not {c}",
                     "not {c}, but {a} or {b}")  # fmt: skip
OPPOSITE_FORMS = {
    "size": ("the opposite of {x} in size", "{its} size is the opposite of {x}", "with a size opposite to {x}"),
    "motion": ("{its} motion is the opposite of {x}", "doing the opposite of {x}", "{it} {does} the opposite of {x}",
               "with the opposite motion to {x}"),
    "background": ("on the opposite of a {x} background", "on a background that is the opposite of {x}",
                   "against the opposite of {x}"),
}  # fmt: skip
OPPOSITE_HOP_FORMS = {
    "size": ("the opposite size of {x}", "{its} size is the opposite of that of {x}", "with the opposite size of {x}"),
    "motion": ("{it} {does} the opposite of what {x} does", "with the opposite motion of {x}",
               "{it} {moves} the opposite way of {x}", "{its} motion is the opposite of that of {x}"),
    "background": ("on a background with the opposite colour of {x}", "on the opposite colour of {x}"),
}  # fmt: skip
# By the rule that continues from a number: the wordings; {x} is e.g. "a bicycle has wheels".
CONTINUATION_FORMS = {
    "one more than": ("{nouns}, one more than {x}", "one more {noun} than {x}"),
    "one less than": ("{nouns}, one less than {x}", "one {noun} less than {x}"),
    "twice": ("twice as many {nouns} as {x}", "{nouns}, twice as many as {x}"),
    "half of": ("half as many {nouns} as {x}", "{nouns}, half as many as {x}"),
}
COMPARISON_STEPS = {
    ("shape", "circle"): ("fewer corners than a triangle", "fewer corners than any other"),
    ("shape", "triangle"): ("more corners than a circle but fewer than a square",
                            "fewer corners than a square but more than a circle"),
    ("shape", "square"): ("more corners than a triangle but fewer than a star",
                          "fewer corners than a star but more than a triangle"),
    ("shape", "star"): ("more corners than a square", "more corners than any other"),
    ("size", "small"): ("smaller than a large one", "less big than a large one"),
    ("size", "large"): ("bigger than a small one", "larger than a small one"),
    **{("count", COUNTS[n - 1]): (f"more than {NUMBER_WORDS[n - 1]} but fewer than {NUMBER_WORDS[n + 1]}",
                                  f"fewer than {NUMBER_WORDS[n + 1]} but more than {NUMBER_WORDS[n - 1]}")
       for n in (2, 3, 4)},
}  # fmt: skip
COMPARISON_FORMS = {
    "shape": ("with {x}", "with {x}", "having {x}"),
    "size": ("{x}", "{it} {is} {x}"),
    "count": ("{x} {nouns}", "{nouns}, {x}", "{nouns}, {x} of them"),
}
