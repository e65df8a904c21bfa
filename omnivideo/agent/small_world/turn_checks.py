"""Whether the readings of a turn account for its words, so that the user is asked instead of shown a wrong result."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from omnivideo.agent import english_rules
from omnivideo.agent.small_world import replies
from omnivideo.agent.small_world.changed_scenes import change_scene, is_target, read_planned_scene, read_worded_changes
from omnivideo.agent.small_world.changes import WordedChange
from omnivideo.agent.small_world.lexicon import Token, load_lexicon, normalize_text, tokenize
from omnivideo.agent.small_world.readings import Context, Reading
from omnivideo.agent.small_world.referring import read_current_scene
from omnivideo.agent.small_world.scenes import DescribedScene, read_scene
from omnivideo.agent.small_world.wordings import load_pattern, load_weighty_words

# What is named shortly after them is not meant, or stays as it is.
NEGATING_WORDS = {
    "not", "no", "instead", "never", "without", "than", "from", "remove", "keep", "leave", "was", "were",
}  # fmt: skip
DENYING_WORDS = {"not", "never", "without"}  # shortly before a verb
# Shortly before things that are not changed: "the colour of the circle", "next to the square", "so is the star".
RELATING_WORDS = {
    "of", "as", "like", "beside", "by", "near", "with", "behind", "next", "between", "around", "alongside", "same",
    "but", "except", "if", "because", "since", "fine", "stays", "match", "matches", "for", "?",
}  # fmt: skip
CHANGES_OF_OBJECTS = ("recolour", "reshape", "resize", "motion", "speed", "path", "remove", "place")
CHANGES_OF_VALUES = ("recolour", "reshape", "motion", "background")  # whose result the words alone say
VALUE_CATEGORIES = ("colour", "shape", "plural", "speed", "direction", "motion", "region", "relation")
# Words for one place or direction count as one value, since a reading may name it by another category.
SHARED_VALUES = {
    "left of": {"left"}, "right of": {"right"}, "above": {"up"}, "below": {"down"}, "top": {"up"}, "bottom": {"down"},
    "top left": {"up", "left"}, "top right": {"up", "right"},
    "bottom left": {"down", "left"}, "bottom right": {"down", "right"},
}  # fmt: skip
REFERRING_WORDS = ("same", "previous", "other", "third", "too")  # to what there is
FURTHER_WORDS = ("more", "other", "new", "extra", "further", "additional", "equal", "of")  # between number and shape
DETERMINERS = ("the", "these", "those", "both", "all", "of", "no", "into", "to", "be", "not", "than")
ADDING_WORDS = ("another", "more", "second", "third", "fourth", "extra", "also", "too", "well", "additional", "like")
NEIGHBOUR_WORDS = ("with", "beside", "near", "alongside", "besides", "nearby", "adjacent")  # to what there is
UNKNOWN_PLACES = ("behind", "between", "around", "same")  # of a new object, and what else it has
EDIT_KINDS = ("resize", "speed", "path", "place", "swap")  # those that not every preset declares
MOTIONS_OF_SIZE = {"grow": "growing", "shrink": "shrinking"}


def find_question(readings: Sequence[Reading], said: str, text: str, context: Context) -> str:
    """Return what the user is asked if the readings do not account for what was said; "" if they do.

    `text` is what was read of it, without what is said around a request. `context` is that before the turn.
    """
    made = [reading for reading in readings if reading.kind == "do" and is_result(reading, context)]
    if not made or len(made) < len(readings) or any(reading.task or reading.joined for reading in made):
        return ""
    is_generated = all(is_new(reading, context) for reading in made)
    is_about_result = is_generated and context.medium is not None and refers_to_result(said, text, context)
    is_unclear = is_part_left_out(made, text, context) or has_weighty_word(text) or is_denied(made, said)
    if is_about_result or is_unclear or (is_generated and is_half_said(made, said, context)):
        return replies.build_unclear_question()
    if is_new(made[0], context) and len(made) > 1 and context.medium:
        drawn, made = made[0].text, made[1:]
        context = replace(context, describe=lambda: drawn, artifacts=(), number=0)
    if any(is_new(reading, context) for reading in made):
        return ""
    references = {int(reading.reference) for reading in made if reading.reference.isdigit()}
    if references and len(references) == 1 and made[0].reference.isdigit():
        context = replace(context, number=references.pop(), is_changed=True)  # the description is of another result
    elif references:
        return ""
    if adds_what_is_there(made, said, context):
        return replies.build_unclear_question()
    changes = [change for reading in made for change in read_worded_changes(reading.text, context.medium or "")]
    if any(change.kind in EDIT_KINDS and change.kind not in context.preset.edits for change in changes):
        return replies.build_unclear_question()
    return find_question_about_changes(changes, context)


def is_result(reading: Reading, context: Context) -> bool:
    """Return whether a reading is of a new result or a change whose words are known."""
    is_worded = context.medium is not None and load_pattern("edit_form").fullmatch(normalize_text(reading.text))
    return reading.goal in ("generate", "edit") or (reading.goal == "" and bool(is_worded)) or is_new(reading, context)


def is_new(reading: Reading, context: Context) -> bool:
    """Return whether a reading is of something new: by its goal, or in the MLLM's words where there is a result."""
    form = load_pattern("scene_form")
    is_worded = context.medium is not None and reading.goal == "" and form.fullmatch(normalize_text(reading.text))
    return reading.goal == "generate" or (bool(is_worded) and bool(read_scene(tokenize(reading.text)).objects))


# ---------------------------------------------------------------- the words


def is_part_left_out(made: Sequence[Reading], text: str, context: Context) -> bool:
    """Return whether a text names what no reading has: a number of results, or a value that is new.

    What is said not to be meant, or stands there already, need not be in a reading.
    """
    number = load_pattern("result_number").search(normalize_text(text))
    is_generated = all(is_new(reading, context) for reading in made)
    if number and is_generated and len(made) != int(load_lexicon().phrases[number["number"]][0][1]):
        return True
    is_only_addition = names_verb("add", text) and not any(map(names_verb, ("remove", "replace", "swap"), [text] * 3))
    if is_only_addition and not is_generated and not any(names_verb("add", reading.text) for reading in made):
        return True
    has_addition = any(names_verb("add", reading.text) or names_verb("put", reading.text) for reading in made)
    if has_addition and not is_generated and any(token.text in UNKNOWN_PLACES for token in tokenize(text)):
        return True
    is_reversed = load_pattern("reversal").search(normalize_text(text)) is not None
    is_moving = any(token.has("direction", "motion") for reading in made for token in tokenize(reading.text))
    is_missing = is_number_left_out(text, made) or (not is_generated and is_object_left_out(text, made))
    if is_missing or (is_reversed and not is_moving):
        return True
    is_more = {"another", "too", "also", "well"} & {token.text for token in tokenize(text)} and not is_generated
    is_added = any(names_verb("add", reading.text) for reading in made)
    if is_more and not is_added and load_pattern("indefinite_one").search(normalize_text(text)):
        return True
    named = list_named_values(text) - list_named_values(" ; ".join(reading.text for reading in made), is_wish=False)
    if named and not is_generated:
        named -= list_named_values(context.describe(), is_wish=False)
    return bool(named)


def is_object_left_out(text: str, made: Sequence[Reading]) -> bool:
    """Return whether a text names a thing that no reading is about: "make the circle green and the square too"."""
    tokens, readings = tokenize(text), [token for reading in made for token in tokenize(reading.text)]
    if any(token.get("reference") == "them" for token in readings):
        return False
    about = {token.get("shape") or token.get("plural") for token in readings}
    for index, token in enumerate(tokens):
        start = index
        while start and tokens[start - 1].has("colour", "size"):
            start -= 1
        before = {other.text for other in tokens[max(0, start - 5) : start]}
        is_related = any(other.has("relation") for other in tokens[max(0, start - 3) : start])
        is_definite = token.has("shape") and start and tokens[start - 1].text == "the"
        is_meant = is_definite and not is_related and not before & (NEGATING_WORDS | RELATING_WORDS)
        if is_meant and token.get("shape") not in about:
            return True
    return False


def is_number_left_out(text: str, made: Sequence[Reading]) -> bool:
    """Return whether a text names several new objects, as in "add two more squares", and the readings have others."""
    tokens = tokenize(text)
    scenes = [read_scene(tokenize(reading.text)) for reading in made]
    for index, token in enumerate(tokens):
        shape, start = token.get("plural"), index
        while start and (tokens[start - 1].has("colour", "size") or tokens[start - 1].text in FURTHER_WORDS):
            start -= 1
        number = int(tokens[start - 1].get("number") or 0) if start else 0
        before = tokens[start - 1 - (number > 0)].text if start > (number > 0) else ""
        if shape is None or before in DETERMINERS or (number < 2 and not names_verb("add", text)):
            continue
        counts = [sum(obj.count or 1 for obj in scene.objects if obj.shape == shape) for scene in scenes]
        if sum(counts) < max(number, 2) and any(counts):
            return True
    return False


def list_named_values(text: str, *, is_wish: bool = True) -> set[str]:
    """Return the values that a text names, except those that a wish says are not meant."""
    tokens, values = tokenize(text), set[str]()
    for index, token in enumerate(tokens):
        before = {other.text for other in tokens[max(0, index - 4) : index]}
        if is_wish and before & NEGATING_WORDS and not (token.has("speed") and "remove" in before):
            continue
        if not is_wish and token.text in MOTIONS_OF_SIZE:
            values.add(MOTIONS_OF_SIZE[token.text])
        if token.has("medium"):  # "a still"
            continue
        for name, value in token.meanings:
            if name in VALUE_CATEGORIES:
                values |= SHARED_VALUES.get(value, {value})
    return values


def adds_what_is_there(made: Sequence[Reading], said: str, context: Context) -> bool:
    """Return whether an object like one that is there is added, although the text does not say "add" or "another"."""
    if any(token.has("add", "put") or token.text in ADDING_WORDS for token in tokenize(said)):
        return False
    there = {(obj.shape, obj.colour) for obj in read_current_scene(context).objects if obj.colour}
    added = [
        obj for reading in made if names_verb("add", reading.text) for obj in read_scene(tokenize(reading.text)).objects
    ]
    return any((obj.shape, obj.colour) in there for obj in added)


def is_denied(made: Sequence[Reading], said: str) -> bool:
    """Return whether a reading does what is not to be done ("do not add anything"), or leaves one of "no X, no Y"."""
    tokens = tokenize(said)
    denied = {
        verb
        for index, token in enumerate(tokens[1:], start=1)
        for verb in ("add", "remove", "swap")
        if token.has(verb) and {other.text for other in tokens[max(0, index - 2) : index]} & DENYING_WORDS
    }
    unwanted = {token.get("shape") for before, token in pairwise(tokens) if before.text == "no"} - {None}
    removed = [reading.text for reading in made if names_verb("remove", reading.text)]
    is_kept = any(not any(f" {shape}" in text for text in removed) for shape in unwanted) and bool(removed)
    return is_kept or any(names_verb(verb, reading.text) for verb in denied for reading in made)


def names_verb(verb: str, text: str) -> bool:
    return any(token.has(verb) for token in tokenize(text))


def refers_to_result(said: str, text: str, context: Context) -> bool:
    """Return whether a request for something new also refers to a result: "like the first one", "give it a friend"."""
    if english_rules.find_by_ordinal(text, context.artifacts):
        return True
    tokens = tokenize(text)
    first = next((index for index, token in enumerate(tokens) if token.has("shape", "plural")), len(tokens))
    if first == len(tokens):  # "now two of them"
        return False
    if any(token.has("reference") for token in tokens[:first]) or is_half_of_pair(said):
        return True
    if any(token.text in REFERRING_WORDS for token in tokenize(said)):
        return True
    return is_bare_name(tokens, first) and tokens[first].get("shape") in {
        obj.shape for obj in read_current_scene(context).objects
    }


def is_half_said(made: Sequence[Reading], said: str, context: Context) -> bool:
    """Return whether a few words name an object without a colour, where they can also mean a change of a result."""
    objects = [obj for reading in made for obj in read_scene(tokenize(reading.text)).objects if obj.shape]
    is_request = any(token.has("draw", "medium", "reference") for token in tokenize(said))
    return bool(context.medium and objects) and not is_request and not any(obj.colour for obj in objects)


def is_half_of_pair(text: str) -> bool:
    """Return whether an object stands next to one that is not named: "next to a blue square", "a blue star beside"."""
    tokens = tokenize(text)
    words = [token.text for token in tokens]
    is_placed = any(word in NEIGHBOUR_WORDS for word in (*words[:1], *words[-1:])) or words[:2] == ["next", "to"]
    is_placed = is_placed or any(token.has("relation") for token in tokens)
    return is_placed and len(read_scene(tokens).objects) == 1


def is_bare_name(tokens: Sequence[Token], index: int) -> bool:
    """Return whether the shape at an index is named without an article or a number, as in "circle first"."""
    start = index
    while start and tokens[start - 1].has("colour", "size"):
        start -= 1
    is_asked_for = any(token.has("draw", "medium") for token in tokens)
    has_article = start > 0 and (tokens[start - 1].text in ("a", "an", "another") or tokens[start - 1].has("number"))
    return index < len(tokens) and tokens[index].has("shape") and start == index and not (has_article or is_asked_for)


def has_weighty_word(text: str) -> bool:
    """Return whether a text has a word that means something, although no rule for requests reads it."""
    words = [token.text if not token.meanings else "" for token in tokenize(text)]
    return any(word in load_weighty_words() and before != "what" for before, word in pairwise(["", *words]))


# ---------------------------------------------------------------- the effect


def find_question_about_changes(changes: Sequence[WordedChange], context: Context) -> str:
    """Return a question if changes are of something that is not there, of one of several things, or of nothing.

    The MLLM may see too little or something else. So what is missing must be missing in what was requested, too, and
    nothing is asked where the requests say that the changes are possible, or are not known.
    """
    seen = read_current_scene(context) if not context.artifacts else None
    planned = seen or read_planned_scene(context.artifacts, context.number)
    problem = find_problem_of_changes(changes, planned) if planned and planned.objects else ""
    if planned and problem and problem != "ambiguous" and not context.is_changed:
        planned = seen or read_current_scene(context)
        is_readable = bool(planned.objects) and all(obj.shape for obj in planned.objects)
        problem = find_problem_of_changes(changes, planned) if is_readable else ""
    return PROBLEM_QUESTIONS[problem].format(describe_scene(planned)) if planned and problem else ""


PROBLEM_QUESTIONS = {
    "ambiguous": "Which one do you mean? I see {}.",
    "missing": "That is not there: I see {}. What should I change?",
    "shapeless": "Which shape should it have? I see {}.",
    "empty": "Nothing would be left of {}. What should I show instead?",
    "invisible": replies.INVISIBLE_CHANGE_QUESTION,
    "unchanged": "I see {} already. What should I change?",
}


def find_problem_of_changes(changes: Sequence[WordedChange], scene: DescribedScene) -> str:
    """Return the name of what is wrong with changes of a scene, or ""."""
    before = scene.to_text()
    for change in changes:
        if problem := find_problem_of_target(change, scene):
            return problem
        scene = change_scene(scene, [change])
        if any(obj.shape is None for obj in scene.objects):
            return "shapeless"
        if not scene.objects:
            return "empty"
    if changes and any(obj.colour and obj.colour == scene.background for obj in scene.objects):
        return "invisible"
    is_value_known = bool(changes) and all(change.kind in CHANGES_OF_VALUES for change in changes)
    return "unchanged" if is_value_known and scene.to_text() == before else ""


def find_problem_of_target(change: WordedChange, scene: DescribedScene) -> str:
    if change.kind not in CHANGES_OF_OBJECTS or change.target == "them":
        return ""
    targets = [obj for obj in scene.objects if is_target(obj, change.target)]
    if not targets:
        return "missing"
    is_plural = any(token.has("plural") for token in tokenize(change.target))
    return "ambiguous" if len(targets) > 1 and not is_plural else ""


def describe_scene(scene: DescribedScene) -> str:
    return scene.to_text().partition(" of ")[2]
