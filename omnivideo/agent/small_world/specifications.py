"""Requests in the form of a list of attributes: "shape: star, colour: red, background: black"."""

import re

from omnivideo.agent.english_rules import MAX_WORDING_CHARS
from omnivideo.agent.small_world.lexicon import tokenize

ITEM_END = re.compile(r"[,;\n.](?!\w)")
ITEM = re.compile(r"\s*(?:the )?([a-z]+(?: colou?r)?)(?:\s*[:=]\s*|\s+is\s+|\s+)(\S.*?)(?: please)?\s*")
KEYS = {
    "shape": "shape", "object": "shape", "subject": "shape", "figure": "shape", "form": "shape", "item": "shape",
    "content": "shape", "colour": "colour", "color": "colour", "tint": "colour", "hue": "colour", "fill": "colour",
    "shade": "colour", "size": "size", "scale": "size", "background": "background", "bg": "background",
    "backdrop": "background", "bkg": "background", "ground": "background", "background colour": "background",
    "background color": "background", "canvas": "background", "motion": "motion", "direction": "motion",
    "movement": "motion", "moves": "motion", "moving": "motion", "animation": "motion", "type": "medium",
    "medium": "medium", "format": "medium", "kind": "medium", "output": "medium", "media": "medium",
    "number": "count", "count": "count", "quantity": "count", "amount": "count", "how many": "count",
    "position": "region", "place": "region", "location": "region",
}  # fmt: skip


def reword_specification(text: str, *, has_result: bool) -> str:
    """Return a list of attributes as a sentence; "" for other texts.

    A list that names a shape is a request for something new, any other one a change of the result.
    """
    if len(text) > MAX_WORDING_CHARS:
        return ""
    values = dict[str, str]()
    for item in filter(str.strip, ITEM_END.split(text.lower())):
        match = ITEM.fullmatch(item)
        if (match is None or match[1] not in KEYS) and not any(
            token.has("shape", "plural", "colour", "ground") for token in tokenize(item)
        ):
            continue  # "i need an illustration", "thanks"
        if match is None or match[1] not in KEYS or KEYS[match[1]] in values:
            return ""
        values[KEYS[match[1]]] = match[2]
    if len(values) < 2:
        return ""
    if has_result and "shape" in values and not {"background", "medium", "count"} & set(values):
        return word_scene({"count": "turn it into a"} | values)
    if "shape" in values:
        return word_scene(values)
    return word_changes(values) if has_result else ""


def word_scene(values: dict[str, str]) -> str:
    """Return a request for the scene with these attributes."""
    count = values.get("count", "a")
    noun = re.sub(r"^(?:an?|one) ", "", values["shape"])
    words = " ".join(filter(None, (count, values.get("size"), values.get("colour"), noun)))
    region = values.get("region", "")
    region = region if not region or region.startswith(("in ", "on ", "at ")) else f"at the {region}"
    parts = (words, region, word_motion(values.get("motion", "")))
    ground = f"on a {values['background'].removesuffix(' background')} background" if "background" in values else ""
    medium = f"a {values['medium'].removeprefix('a ')} of" if "medium" in values else ""
    return " ".join(filter(None, (medium, *parts, ground)))


def word_changes(values: dict[str, str]) -> str:
    """Return a request for the changes to these attributes."""
    changes = [f"make it {value}" for name, value in values.items() if name in ("colour", "size")]
    if "motion" in values:
        changes.append(f"make it {word_motion(values['motion'])}")
    if "background" in values:
        changes.append(f"change the background to {values['background']}")
    return " and ".join(changes) if len(changes) == len(values) else ""


def word_motion(value: str) -> str:
    tokens = tokenize(value)
    return f"moving {value}" if tokens and tokens[0].has("direction") else value
