"""The changes that a request asks for: what is changed, and into what.

A request is read clause by clause. A clause has a target ("the circle", "it"), new values ("green", "bigger") and new
objects ("a red star"); a new verb or another target begins the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from omnivideo.agent.small_world.changes import IMPERATIVE_MOTIONS, Clause, WordedChange, build_changes
from omnivideo.agent.small_world.lexicon import Token, load_lexicon, name_target
from omnivideo.agent.small_world.scenes import (
    GROUND_FILLERS,
    GROUND_PREPOSITIONS,
    ObjectRequest,
    read_scene,
)

KEPT = "as it is"  # what a value is kept as that is not named
COPULAS = ("should be", "become", "becomes", "turned", "made", "changed", "painted")
GROUND_ENDS = ("shape", "plural", "ground", "reference", "add", "remove", "make", "put")
EDIT_VERBS = ("add", "remove", "replace", "swap")
CONJUNCTIONS = ("and", "but", "then", ",", ";", ".", "only", "while")
CORRECTIONS = ("sorry", "i meant", "i mean", "mean", "meant", "wait", "no", "actually", "rather")
NEGATIONS = ("not", "no", "never", "neither", "nor")
PLACE_FILLERS = ("in", "at", "on", "the", "to", "into")  # before a region
DETERMINERS = ("the", "its", "their", "that", "this", "those", "these", "both", "all", "his", "same")
PLACE_WORDS = ("to", "beside", "near", "by", "alongside", "behind", "with")  # before what is there: "next to it"
ATTRIBUTES = {
    "places": "place", "place": "place", "positions": "place", "position": "place",
    "colours": "colour", "colour": "colour",
    "shapes": "shape", "sizes": "size",
}  # fmt: skip
# What follows a number of objects that are not named again: "make that two, please", but not "give it four corners".
COUNT_ENDS = (
    "", ",", ".", ";", ":", "!", "of", "please", "now", "then", "instead", "and", "but", "in", "on", "more", "not",
    "it", "them", "total", "altogether", "only", "rather", "again", "too", "also", "with", "there", "here", "or",
    "if", "for",
)  # fmt: skip
TARGET_MODIFIERS = ("colour", "size", "number", "region")


@dataclass
class EditRequest:
    """The changes of a request, in order; `kept` has the values that it says must stay."""

    changes: list[WordedChange] = field(default_factory=list)
    conflicts: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    kept_targets: list[str] = field(default_factory=list)
    has_target: bool = False
    removed: list[str] = field(default_factory=list)


class EditReader:
    """Reads the tokens of a request for changes from left to right."""

    def __init__(self, tokens: Sequence[Token], *, is_still: bool = False, is_correction: bool = False):
        self.tokens = list(tokens)
        self.result = EditRequest()
        self.clause = Clause()
        self.clauses: list[Clause] = []
        self.position = 0
        self.is_kept = False
        self.is_negated = False
        self.negated_value = ""  # the name of the value that is said not to be meant
        self.is_still = is_still
        self.is_replaced = False  # after "instead of": what is named is replaced
        self.is_corrected = is_correction or (bool(tokens) and tokens[-1].text == "instead")
        self.is_turn = False
        self.attribute = ""  # "colours" in "swap their colours"

    def read(self) -> EditRequest:
        while self.position < len(self.tokens):
            self.position += self.read_token(self.tokens[self.position]) or 1
        self.flush()
        self.clauses = [part for clause in self.clauses for part in clause.split_targets()]
        for clause in self.clauses:
            self.result.changes += build_changes(clause, self.attribute)
            if clause.verb == "remove" and clause.target not in ("", "it", "them"):
                self.result.removed.append(clause.target)
            elif clause.target in self.result.removed:
                self.result.conflicts.append(("removed", clause.target))
            if clause.verb == "remove" and {clause.target, "it"} & set(self.result.kept_targets):
                self.result.conflicts.append(("removed", clause.target or "it"))
        for name, value in self.result.kept.items():
            changed = [clause.values[name] for clause in self.clauses if name in clause.values]
            if name == "shape":
                changed += [obj.shape for clause in self.clauses for obj in clause.new_objects if obj.shape]
            permitted = {value} if value != "moving" else set(IMPERATIVE_MOTIONS) - {"still"}  # "keep it moving"
            self.result.conflicts += [(value, new) for new in changed if new not in permitted]
        return self.result

    def flush(self) -> None:
        if not self.clause.is_empty():
            self.clauses.append(self.clause)
        self.clause = Clause(verb=self.clause.verb, target=self.clause.target if self.clause.target == "it" else "")

    # ------------------------------------------------------------ one token

    def read_token(self, token: Token) -> int:
        if not token.is_known:
            self.result.unknown.append(token.text)
        if token.text in CONJUNCTIONS:
            self.is_kept = self.is_negated = False
        following = self.tokens[self.position + 1] if self.position + 1 < len(self.tokens) else None
        if token.text == "no" and following is not None and following.has("shape", "plural"):  # "no star"
            self.clause.verb = "remove"
            return 1
        if token.text in CORRECTIONS:
            self.is_corrected = True
        if token.text in ("then", "afterwards", "after"):
            self.is_turn = True
        if token.text in ("keep", "leave", "keeps", "keeping"):
            self.is_kept = True
            return 1
        if (token.text in NEGATIONS and not self.is_interjection()) or (
            token.text == "instead" and self.text_at(1) == "of"
        ):
            self.is_negated, self.is_replaced = True, token.text == "instead"
            return 1
        attribute = ATTRIBUTES.get(token.text.removeprefix("the "))
        if attribute and self.is_kept:  # "keep the colour"
            self.result.kept[attribute] = KEPT
            return 1
        if attribute and self.clause.verb in ("swap", "replace"):
            self.clause.verb, self.attribute = "swap", attribute
            return 1
        return self.read_verb(token) or self.read_noun_phrase(token) or self.read_value(token)

    def read_verb(self, token: Token) -> int:
        verb = next((name for name in (*EDIT_VERBS, "put", "make") if token.has(name)), "")
        following = self.tokens[self.position + 1] if self.position + 1 < len(self.tokens) else None
        if token.has("go") and following is not None and following.has("direction", "speed"):  # "move left"
            return 0
        if (
            verb == "remove"
            and following is not None
            and following.text.endswith("ing")
            and following.has("add", "make")
        ):
            self.result.conflicts.append(("a change", "none"))  # "without adding anything"
        if not verb or (token.has("motion") and self.text_at(1) != "the") or token.has("resize"):
            return 0
        if self.clause.target or self.clause.values or self.clause.new_objects:
            is_replacement = (
                self.clause.verb == "remove" and verb in ("put", "add") and self.has_word("instead", "place")
            )
            if is_replacement:
                self.clause.verb = "replace"
                return 1
            is_same = verb in ("put", "make") and not self.clause.values and not self.clause.new_objects
            if not is_same:
                self.flush()
        self.clause.verb = verb
        return 1

    def read_noun_phrase(self, token: Token) -> int:
        """Read a target or a new object, and return the number of its tokens; 0 if there is none."""
        if token.has("ground") and not self.is_kept:
            return self.read_ground()
        if token.has("ground"):
            self.result.kept["background"] = KEPT
            return 1
        if token.has("reference", "rest") and not self.is_relative() and not self.is_before_shape():
            self.set_target("them" if token.get("reference") == "them" else "it")
            return 1
        is_definite = token.text in DETERMINERS
        if is_definite or token.has("shape", "plural"):
            end = self.find_noun(self.position + is_definite)
            if end is not None:
                return self.read_definite(token, end)
        is_number = token.has("number") and not token.has("thing") and not self.is_interjection()
        if token.text in ("a", "an", "another") or is_number:
            end = self.find_noun(self.position + 1)
            if end is not None:
                return self.read_new_object(end)
        if token.has("colour", "size") and not self.is_background_here():
            end = self.find_noun(self.position + 1)
            if end is not None:
                return self.read_definite(token, end)
        return 0

    def read_definite(self, token: Token, end: int) -> int:
        words = self.tokens[self.position : end + 1]
        is_bare = token.text not in DETERMINERS
        before = self.text_at(-1)
        if (
            is_bare
            and self.clause.verb != "remove"
            and (self.is_corrected or before in ("into", "to", "as") or self.clause.verb == "add" or self.clause.target)
        ):
            return self.read_new_object(end)
        if self.is_negated and not self.is_replaced:
            self.is_negated = False
            return end - self.position + 1
        self.is_negated = False
        self.set_target(name_target(words))
        return end - self.position + 1

    def read_new_object(self, end: int) -> int:
        stop = end + 1
        while stop < len(self.tokens) and self.tokens[stop].has("motion", "go", "direction", "region", "speed"):
            stop += 1
        place = stop + sum(token.text in PLACE_FILLERS for token in self.tokens[stop : stop + 2])
        if stop < place < len(self.tokens) and self.tokens[place].has("region"):  # "in the top right"
            stop = place + 1
        words = self.tokens[self.position : stop]
        objects = read_scene(words).objects
        if (
            len(objects) == 1 and objects[0].shape is None and self.clause.new_objects
        ):  # "a blue square and a green one"
            objects = [replace(objects[0], shape=self.clause.new_objects[-1].shape)]
        if self.is_kept and objects and objects[0].shape:
            self.result.kept["shape"] = objects[0].shape
        if not (self.is_negated or self.is_kept):
            self.clause.new_objects += objects or [ObjectRequest()]
        self.is_negated = False
        return stop - self.position

    def read_value(self, token: Token) -> int:
        is_motion = token.has("motion") or (token.text == "shrink" and not self.is_still)
        if token.has("resize") and is_motion and self.clause.target:  # "make it shrink", not "shrink it"
            return self.set_value("motion", token.get("motion") or "shrinking")
        for category, name in (("longer", "length"), ("resize", "size"), ("size", "size"), ("speed", "speed")):
            if value := token.get(category):
                return self.set_value(name, value)
        if colour := token.get("colour"):
            is_ground = self.is_background_here()
            count = self.set_value("background" if is_ground else "colour", colour)
            following = self.tokens[self.position + 1 : self.position + 2]
            return count + bool(is_ground and following and following[0].has("ground"))
        if token.has("go"):
            return self.read_moving()
        if token.has("direction") and self.clause.verb == "put" and self.is_still:
            return self.set_value(
                "region",
                {"up": "top", "down": "bottom"}.get(token.get("direction") or "", token.get("direction") or ""),
            )
        if (motion := token.get("motion")) or (
            motion := token.get("direction") or "" if self.is_direction(token) else ""
        ):
            return self.set_value(
                "second_motion" if self.is_turn and "motion" in self.clause.values else "motion", motion
            )
        if region := token.get("region"):
            return self.set_value("region", region)
        if medium := token.get("medium"):
            return self.set_value("medium", medium)
        is_number = token.has("number") and not token.has("thing") and not self.is_interjection()
        if is_number and self.text_at(1) in COUNT_ENDS:
            return self.set_value("count", token.get("number") or "")
        return 0

    def is_direction(self, token: Token) -> bool:
        return token.has("direction") and not (
            token.text in ("up", "down") and self.clause.verb == "make" and not self.clause.target
        )

    def read_moving(self) -> int:
        if self.is_kept:
            self.result.kept.setdefault("motion", "moving")
        for offset in (1, 2, 3):
            index = self.position + offset
            if index >= len(self.tokens) or not (
                self.tokens[index].has("direction", "speed")
                or self.tokens[index].text in ("only", "this", "time", "to", "it", "straight")
            ):
                break
            if speed := self.tokens[index].get("speed"):
                self.set_value("speed", speed)
            elif direction := self.tokens[index].get("direction"):
                self.set_value(
                    "second_motion" if self.is_turn and "motion" in self.clause.values else "motion", direction
                )
                return offset + 1
        return 1

    def read_ground(self) -> int:
        """Read "the background" with a colour after it."""
        for index in range(self.position + 1, min(self.position + 6, len(self.tokens))):
            is_copula = self.tokens[index].text in COPULAS  # "the background should be white"
            is_owner = self.text_at(index - self.position - 1) == "of"  # "the background of it"
            if not is_copula and not is_owner and self.tokens[index].has(*GROUND_ENDS):
                break
            if colour := self.tokens[index].get("colour"):
                self.set_value("background", colour)
                return index - self.position + 1
        return 1

    # ------------------------------------------------------------ helpers

    def text_at(self, offset: int) -> str:
        index = self.position + offset
        return self.tokens[index].text if 0 <= index < len(self.tokens) else ""

    def has_word(self, *words: str) -> bool:
        return any(token.text in words for token in self.tokens[self.position :])

    def is_after_conjunction(self) -> bool:
        return self.text_at(-1) in (",", "and", "plus") or (self.text_at(-1) == "also" and self.text_at(-2) == "and")

    def is_interjection(self) -> bool:
        """Return whether "no" here stands by itself, as in "no, make it red"."""
        before = [token.text for token in self.tokens[: self.position]]
        return self.text_at(0) == "no" and (
            self.text_at(1) in (",", "i", "it", "no") or all(word in ("no", ",") for word in before)
        )

    def is_before_shape(self) -> bool:
        """Return whether "that" here belongs to a shape, as in "that small star"."""
        if self.text_at(0) not in ("that", "this", "these", "those", "both"):
            return False
        end = self.find_noun(self.position + 1)
        return end is not None and self.tokens[end].has("shape", "plural")

    def is_relative(self) -> bool:
        """Return whether "that" here begins a clause about what stands before: "a circle that is blue"."""
        previous = self.tokens[self.position - 1] if self.position else None
        return (
            self.text_at(0) in ("that", "this")
            and previous is not None
            and previous.has("shape", "plural", "thing", "ground")
        )

    def find_noun(self, start: int) -> int | None:
        """Return the index of the shape or "one" that ends a noun phrase from `start` on, or None."""
        for index in range(start, len(self.tokens)):
            token = self.tokens[index]
            if token.has("shape", "plural") or (
                token.has("thing") and (index > start or token.text != "one" or start > self.position)
            ):
                return index
            if not token.has(*TARGET_MODIFIERS) and token.text not in (
                "very",
                "really",
                "whole",
                "entire",
                "same",
                "other",
                "the",
            ):
                return None
        return None

    def is_background_here(self) -> bool:
        following = [token.text for token in self.tokens[self.position + 1 : self.position + 2]]
        if following and (following[0] == "behind" or self.tokens[self.position + 1].has("ground")):
            return True
        index = self.position - 1
        while index >= 0 and self.tokens[index].text in GROUND_FILLERS:
            index -= 1
        if index >= 0 and (self.tokens[index].has("ground") or self.tokens[index].text in GROUND_PREPOSITIONS):
            return True
        ahead = [token.text for token in self.tokens[self.position + 1 : self.position + 3]]
        ground = self.tokens[self.position + 3 : self.position + 4]
        return ahead in (["for", "the"], ["as", "the"], ["in", "the"], ["as", "a"]) and bool(
            ground and ground[0].has("ground")
        )

    def set_target(self, target: str) -> None:
        self.result.has_target = True
        if self.is_kept:
            is_place = self.text_at(1) in ("there", "here", "in", "where", "", ".", ",")
            self.result.kept_targets += [target] if target != "it" or is_place else []
            return
        before = self.tokens[self.position - 1] if self.position else None
        if before is not None and self.clause.new_objects and (before.has("relation") or before.text in PLACE_WORDS):
            self.clause.place_by(before.get("relation") or "")
            return
        clause = self.clause
        has_other = clause.target not in ("", target) and clause.verb != "swap"
        if has_other and (clause.values or clause.new_objects):
            self.flush()
            self.clause.target = target
        elif clause.verb == "swap" and clause.target and clause.target != target:
            clause.target += f" and {target}"
        elif clause.target and target not in ("it", "them", clause.target) and self.is_after_conjunction():
            clause.add_target(target)  # "the circle and the star"
        elif not clause.target or target not in ("it", "them"):
            clause.target = target

    def set_value(self, name: str, value: str) -> int:
        if self.is_negated:
            self.is_negated, self.negated_value = False, name
            return 1
        facts = load_lexicon().facts
        is_alternative = name == "colour" and self.negated_value == "background" and value in facts.backgrounds
        if is_alternative and (value not in facts.object_colours or self.clause.verb != "make"):
            name = "background"  # "not white behind it, grey"
        if self.is_kept:
            self.result.kept[name] = value
            return 1
        current = self.clause.values.get(name)
        if current not in (None, value) and not self.is_corrected:
            self.result.conflicts.append((current or "", value))
        self.clause.values[name] = value
        return 1


def read_edit(tokens: Sequence[Token], *, is_still: bool = False, is_correction: bool = False) -> EditRequest:
    """Return the changes that the tokens ask for; in a still picture, "to the left" is a place."""
    return EditReader(tokens, is_still=is_still, is_correction=is_correction).read()
