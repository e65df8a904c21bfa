"""The scene that a request describes: objects, background and medium, and what contradicts itself in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from omnivideo.agent.small_world.lexicon import Token, load_lexicon

NUMBER_WORDS = ("no", "one", "two", "three", "four")
TURN_WORDS = ("then", "before", "afterwards", "after", "next")
GROUND_PREPOSITIONS = ("on", "against", "in front of", "over", "upon", "onto")
GROUND_FILLERS = (
    "a", "an", "the", "all", "plain", "solid", "pure", "completely", "purely", "that", "is", "which", "entirely",
    "also", "totally", "only",
)  # fmt: skip
TOTAL_WORDS = ("total", "exactly", "only", "all", "namely", "altogether", "just")
MOTION_PHRASES = {
    "still": "staying still", "left": "moving left", "right": "moving right", "up": "moving up", "down": "moving down",
    "growing": "growing", "shrinking": "shrinking",
}  # fmt: skip
REGION_PHRASES = {
    "middle": "in the middle", "left": "on the left", "right": "on the right", "top": "at the top",
    "bottom": "at the bottom",
}  # fmt: skip
RELATION_PHRASES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class ObjectRequest:
    """What a request says of one object, or of `count` equal ones; None is not said."""

    shape: str | None = None
    count: int | None = None
    colour: str | None = None
    size: str | None = None
    motion: str | None = None
    second_motion: str | None = None
    speed: str | None = None
    region: str | None = None
    is_definite: bool = False

    def to_text(self, *, with_motion: bool = True) -> str:
        """Return e.g. "a small red circle at the top moving left"."""
        count = self.count or 1
        noun = f"{self.shape}s" if count > 1 else self.shape or "shape"
        words = " ".join(filter(None, (self.size, self.colour, noun)))
        article = name_number(count) if count > 1 else "an" if words[0] in "aeiou" else "a"
        region = REGION_PHRASES.get(self.region or "", f"in the {self.region}") if self.region else ""
        motion = self.motion_to_text() if with_motion else ""
        return " ".join(filter(None, (article, words, region, motion)))

    def motion_to_text(self) -> str:
        if self.motion is None:
            return ""
        text = MOTION_PHRASES[self.motion]
        if self.speed and " " in text and self.motion != "still":
            verb, _, direction = text.partition(" ")
            text = f"{verb} {'slowly' if self.speed == 'slow' else 'quickly'} {direction}"
        second = {"still": "stopping"}.get(self.second_motion or "", self.second_motion)
        return f"{text} then {second}" if second else text


@dataclass
class DescribedScene:
    """The scene of a request; `conflicts` are pairs of values of which only one is possible."""

    objects: list[ObjectRequest] = field(default_factory=list)
    background: str | None = None
    medium: str | None = None
    relation: tuple[int, str] | None = None  # the index of the first object, and its relation to the next one
    conflicts: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(1 if obj.count is None else obj.count for obj in self.objects)

    @property
    def is_video(self) -> bool:
        has_motion = any(obj.motion or obj.speed for obj in self.objects)
        return self.medium == "video" or (self.medium is None and has_motion)

    def to_text(self) -> str:
        """Return the request in the MLLM's words, e.g. "draw a video of a red circle moving left"."""
        parts = [obj.to_text(with_motion=self.is_video) for obj in self.objects]
        if self.relation and len(parts) == 2:
            text = f"{parts[0]} {RELATION_PHRASES[self.relation[1]]} {parts[1]}"
        else:
            text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        ground = f" on a {self.background} background" if self.background else ""
        return f"draw a {'video' if self.is_video else 'picture'} of {text}{ground}"


class SceneReader:
    """Reads the tokens of a description from left to right."""

    def __init__(self, tokens: Sequence[Token]):
        self.tokens = list(tokens)
        self.scene = DescribedScene()
        self.pending = ObjectRequest()
        self.position = 0
        self.is_turn = False  # after "then": the next motion is the second one
        self.relation: str | None = None
        self.awaits_direction = False  # after a verb of moving without one
        self.focus = -1  # the index of the object that an attribute is one of; -1 is the last one

    def read(self) -> DescribedScene:
        while self.position < len(self.tokens):
            self.position += self.read_token(self.tokens[self.position]) or 1
        if self.pending != ObjectRequest() and not self.scene.objects:
            self.scene.leftovers.append("shape")
            self.scene.objects.append(self.pending)
        elif self.pending != ObjectRequest():
            self.merge_into_last(self.pending)
        if self.relation and len(self.scene.objects) == 2 and self.tokens[-1].text == "it":
            self.scene.objects.reverse()  # "a blue star and a red circle above it"
            self.scene.relation = (0, self.relation)
        return self.scene

    # ------------------------------------------------------------ one token

    def read_token(self, token: Token) -> int:
        """Read a token with what belongs to it, and return the number of tokens, or 0 for one."""
        following = self.peek(1)
        if token.text in TURN_WORDS:
            self.is_turn = True
        if not token.is_known:
            self.scene.unknown.append(token.text)
        if token.text in ("not", "never") or (token.text == "instead" and following and following.text == "of"):
            self.scene.leftovers.append("negation")
        if token.has("ground"):
            return self.read_ground()
        if token.has("colour") and (self.is_background_colour() or self.is_last_colour(token)):
            self.set_background(token.get("colour") or "")
            return 2 if following and following.has("ground") else 1
        if token.has("shape", "plural"):
            self.read_shape(token)
        elif token.has("relation") and self.scene.objects and not self.is_object_pending():
            self.relation = token.get("relation")
        elif token.has("go"):
            return self.read_moving()
        elif token.has("motion") and not (token.text == "still" and self.is_medium_here()):
            self.set_motion(token.get("motion") or "")
        elif token.has("medium"):
            self.scene.medium = self.scene.medium or token.get("medium")
        else:
            self.read_attribute(token)
        return 0

    def read_attribute(self, token: Token) -> None:
        before, following = self.tokens[self.position - 1].text if self.position else "", self.peek(1)
        if token.has("number") and following is not None and following.has("medium"):
            return  # "three pictures of"
        if token.has("number") and (not token.has("thing") or self.is_object_ahead() or before in TOTAL_WORDS):
            self.read_number(int(token.get("number") or 0))
        elif token.has("colour"):
            self.set_value("colour", token.get("colour") or "")
        elif token.has("size"):
            self.set_value("size", token.get("size") or "")
        elif token.has("speed"):
            self.set_value("speed", token.get("speed") or "")
        elif token.has("region"):
            self.set_value("region", token.get("region") or "")
        elif token.has("direction"):
            self.read_direction(token.get("direction") or "")

    def read_direction(self, direction: str) -> None:
        last = self.find_last()
        before = self.tokens[self.position - 1].text if self.position else ""
        if last is not None and last.motion is None and self.awaits_direction:  # "a moving square, to the right"
            self.scene.leftovers.remove("direction")
            self.awaits_direction = False
            self.set_motion(direction)
        elif last is not None and (self.is_turn or (last.motion and before in ("and", "or", "but", ","))):
            self.set_motion(direction)  # the second one, or one that contradicts the first
        elif direction in ("left", "right") and self.scene.objects:
            self.set_value("region", direction)

    def read_shape(self, token: Token) -> None:
        shape, is_plural = token.get("shape") or token.get("plural"), not token.has("shape")
        count = self.pending.count
        if count is None and is_plural:
            self.scene.leftovers.append("number")
        before = [token.text for token in self.tokens[max(0, self.position - 4) : self.position]]
        if self.scene.objects and shape and ("that" in before or "which" in before) and "is" in before:
            self.scene.conflicts.append((self.scene.objects[-1].shape or "", shape))
        if self.position and self.tokens[self.position - 1].has("shape") and shape:  # "a square circle"
            self.scene.conflicts.append((self.tokens[self.position - 1].get("shape") or "", shape))
        if (index := self.find_named_before(shape)) is not None:
            return self.return_to_object(index)
        if self.repeats_last_object(shape):
            last = self.scene.objects[-1].count or 1
            if count not in (None, last):
                self.scene.conflicts.append((name_number(last), name_number(count)))
            self.pending = ObjectRequest()
            return
        if self.scene.objects and self.scene.objects[-1] == ObjectRequest(shape, self.scene.objects[-1].count):
            restated = (self.scene.objects[-1].count or 1, count or 1)
            if self.pending == ObjectRequest(count=count) and restated[0] != restated[1]:  # "one star, two stars"
                self.scene.conflicts.append((name_number(restated[0]), name_number(restated[1])))
        self.scene.objects.append(replace(self.pending, shape=shape, count=count))
        self.pending, self.focus = ObjectRequest(), -1
        self.is_turn = False
        if self.relation is not None:
            self.scene.relation, self.relation = (len(self.scene.objects) - 2, self.relation), None

    def find_named_before(self, shape: str | None) -> int | None:
        """Return the index of the object that "the circle" here names once more, or None."""
        start = self.position - 1
        while start >= 0 and self.tokens[start].has("colour", "size"):
            start -= 1
        if start < 0 or self.tokens[start].text != "the":
            return None
        matches = [
            index
            for index, obj in enumerate(self.scene.objects)
            if (obj.shape, self.pending.colour or obj.colour, self.pending.size or obj.size)
            == (shape, obj.colour, obj.size)
        ]
        return matches[0] if len(matches) == 1 else None

    def return_to_object(self, index: int) -> None:
        """Let what follows be said of an object that has been named before."""
        if self.relation is not None and self.focus not in (-1, index):
            relation = (self.focus, self.relation)
            if self.scene.relation not in (None, relation):
                self.scene.conflicts.append((RELATION_PHRASES[(self.scene.relation or relation)[1]], "the other way"))
            self.scene.relation = self.scene.relation or relation
            self.relation = None
        self.pending, self.focus = ObjectRequest(), index

    def repeats_last_object(self, shape: str | None) -> bool:
        """Return whether a number of the same shapes as before is stated again: "two circles, exactly one circle"."""
        words = [token.text for token in self.tokens[max(0, self.position - 4) : self.position]]
        words += [token.text for token in self.tokens[self.position + 1 : self.position + 4]]
        is_restated = any(word in TOTAL_WORDS for word in words)
        return bool(
            self.scene.objects and is_restated and self.scene.objects[-1].shape == shape and not self.pending.colour
            and self.pending.count
        )  # fmt: skip

    def read_number(self, number: int) -> None:
        words = [token.text for token in self.tokens[self.position + 1 : self.position + 3]]
        before = [token.text for token in self.tokens[max(0, self.position - 3) : self.position]]
        is_total = words[:2] in (["of", "them"], ["in", "all"], ["in", "total"]) or any(
            w in TOTAL_WORDS for w in before
        )
        if self.scene.objects and (is_total or not self.is_object_ahead()):
            last = self.scene.objects[-1].count
            if last not in (None, number):
                self.scene.conflicts.append((name_number(last or 1), name_number(number)))
            elif last is None:
                self.replace_last(count=number)
        else:
            self.pending = replace(self.pending, count=number)

    def read_moving(self) -> int:
        """Read a verb of moving and its direction, with a speed between or after them."""
        for offset in (1, 2, 3):
            token = self.peek(offset)
            if token is None or not (token.has("speed", "direction", "relation") or token.text in ("straight", "on")):
                break
            if token.has("speed"):
                self.set_value("speed", token.get("speed") or "")
            elif direction := token.get("direction"):
                self.set_motion(direction)
                return offset + 1
        self.scene.leftovers.append("direction")
        self.awaits_direction = True
        return 1

    def read_ground(self) -> int:
        """Read "background" with a colour after it, as in "the background should be pink"."""
        for offset in (1, 2, 3, 4):
            token = self.peek(offset)
            if token is None or token.has("shape", "plural", "ground"):
                break
            if colour := token.get("colour"):
                self.set_background(colour)
                return offset + 1
        return 1

    # ------------------------------------------------------------ where a word belongs

    def peek(self, offset: int) -> Token | None:
        index = self.position + offset
        return self.tokens[index] if 0 <= index < len(self.tokens) else None

    def is_object_ahead(self) -> bool:
        """Return whether only colours and sizes stand between here and a shape."""
        for token in self.tokens[self.position + 1 :]:
            if token.has("shape", "plural"):
                return True
            if not token.has("colour", "size", "number") and token.text not in ("very", "really", "plain", "simple"):
                return False
        return False

    def is_object_pending(self) -> bool:
        return self.pending != ObjectRequest()

    def is_medium_here(self) -> bool:
        """Return whether "still" names a picture, as in "a still of a star"."""
        following = self.peek(1)
        return following is not None and following.text == "of"

    def is_background_colour(self) -> bool:
        """Return whether the colour here is that of the background: "on pink", "pink background", "grey behind it"."""
        following, before = self.peek(1), [token.text for token in self.tokens[: self.position]]
        if following is not None and (following.has("ground") or following.text in ("behind", "surroundings")):
            return True
        if self.is_object_ahead():
            return False
        while before and before[-1] in GROUND_FILLERS:
            before.pop()
        return bool(before) and (before[-1] in GROUND_PREPOSITIONS or before[-1] in ("backdrop", "background"))

    def is_last_colour(self, token: Token) -> bool:
        """Return whether the colour at the end is one that only backgrounds have: "a yellow circle, grey"."""
        facts, last = load_lexicon().facts, self.find_last()
        is_ground = token.get("colour") in facts.backgrounds and token.get("colour") not in facts.object_colours
        is_apart = self.position > 0 and self.tokens[self.position - 1].text == ","
        following = self.peek(1)
        is_last = following is None or following.text in (".", "!", "please")
        return is_ground and is_apart and is_last and last is not None and last.colour is not None

    # ------------------------------------------------------------ setting values

    def find_last(self) -> ObjectRequest | None:
        return self.scene.objects[self.focus] if self.scene.objects else None

    def replace_last(self, **values: object) -> None:
        self.scene.objects[self.focus] = replace(self.scene.objects[self.focus], **values)  # type: ignore[arg-type]

    def merge_into_last(self, pending: ObjectRequest) -> None:
        for name in ("colour", "size", "speed", "region"):
            if value := getattr(pending, name):
                self.set_last_value(name, value)

    def set_value(self, name: str, value: str) -> None:
        """Set an attribute of the object that is being named, or else of the one before."""
        if not self.scene.objects or self.is_object_ahead():
            current = getattr(self.pending, name)
            if current not in (None, value):
                self.scene.conflicts.append((current, value))
            self.pending = replace(self.pending, **{name: value})  # type: ignore[arg-type]
        else:
            self.set_last_value(name, value)

    def set_last_value(self, name: str, value: str) -> None:
        """Set an attribute of the last object; of all that have none if the request says "all yellow"."""
        words = [token.text for token in self.tokens[max(0, self.position - 2) : self.position]]
        if "all" in words or "both" in words or "each" in words:
            for index, obj in enumerate(self.scene.objects):
                if getattr(obj, name) is None:
                    self.scene.objects[index] = replace(obj, **{name: value})  # type: ignore[arg-type]
        current = getattr(self.scene.objects[self.focus], name)
        if current not in (None, value):
            self.scene.conflicts.append((current, value))
        self.replace_last(**{name: value})

    def set_background(self, colour: str) -> None:
        if self.scene.background not in (None, colour):
            self.scene.conflicts.append((self.scene.background or "", colour))
        self.scene.background = colour

    def set_motion(self, motion: str) -> None:
        """Set the first motion of an object, or the second one after "then"."""
        if not self.scene.objects or self.is_object_ahead():
            self.pending = replace(self.pending, motion=motion)
            return
        last = self.scene.objects[self.focus]
        if last.motion is None:
            self.replace_last(motion=motion)
        elif self.is_turn:
            self.replace_last(second_motion=motion)
        elif last.motion != motion:
            self.scene.conflicts.append((last.motion, motion))
        self.is_turn = False


def name_number(number: int | None) -> str:
    return NUMBER_WORDS[number] if number is not None and number < len(NUMBER_WORDS) else str(number)


def read_scene(tokens: Sequence[Token]) -> DescribedScene:
    """Return the scene that the tokens describe."""
    return SceneReader(tokens).read()


def is_worded_as_change(tokens: Sequence[Token]) -> bool:
    """Return whether words of a change stand here: "into a star", "no star", "same clip, blue ball", "use a star"."""
    pairs, is_there = list(pairwise(tokens)), any(token.text == "there" for token in tokens)
    return (
        any(token.has("add", "remove", "replace", "swap", "resize", "longer") for token in tokens)
        or any(token.text in ("as", "into") and following.text in ("a", "an") for token, following in pairs)
        or any(token.text == "same" and following.has("medium", "thing") for token, following in pairs)
        or any(token.text == "no" and following.has("shape", "plural") for token, following in pairs)
        or any(token.text == "instead" and following.text == "of" for token, following in pairs)
        or any(token.text in ("same", "ditto") and following.text in (",", "but", "only") for token, following in pairs)
        or (tokens[-1].text == "instead" and (is_there or not any(token.has("draw", "medium") for token in tokens)))
    )


def has_values(tokens: Sequence[Token]) -> bool:
    return any(token.has("colour", "size", "motion", "speed", "ground") for token in tokens)
