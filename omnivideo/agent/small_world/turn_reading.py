"""Read a whole turn: its actions in order, or one refusal or question if any of them cannot be done."""

import re
from collections.abc import Sequence
from dataclasses import replace

from omnivideo.agent import english_rules
from omnivideo.agent.commands import find_command
from omnivideo.agent.small_world import replies, talk
from omnivideo.agent.small_world.additions import find_other_number, name_addition, name_one_more
from omnivideo.agent.small_world.change_requests import join_motions
from omnivideo.agent.small_world.change_splitting import split_bare_changes, split_changes
from omnivideo.agent.small_world.changed_scenes import describe_changed_scene
from omnivideo.agent.small_world.conditions import resolve_condition
from omnivideo.agent.small_world.corrections import retarget_change
from omnivideo.agent.small_world.edits import KEPT, read_edit
from omnivideo.agent.small_world.lexicon import Token, correct_spelling, load_lexicon, normalize_text, tokenize
from omnivideo.agent.small_world.observations import is_observation, is_statement
from omnivideo.agent.small_world.reading import is_in_trained_words, is_scene_request, read_action
from omnivideo.agent.small_world.readings import Context, Reading
from omnivideo.agent.small_world.referring import name_referents, read_current_scene
from omnivideo.agent.small_world.retractions import take_back_words
from omnivideo.agent.small_world.scenes import ObjectRequest, read_scene
from omnivideo.agent.small_world.specifications import reword_specification
from omnivideo.agent.small_world.turn_checks import find_question
from omnivideo.agent.small_world.wordings import load_pattern, load_rewritings
from omnivideo.contracts import Medium
from omnivideo.turns import ExecutedCommand

ABOUT_RESULT = ("addition", "comparison", "one_more")  # what is said of a result even in words of requests for new ones
REPEATABLE_KINDS = ("recolour", "background", "reshape", "motion")  # changes of which a turn makes only one of a thing
REDO = re.compile(r"\bre-?do\b|\bre-?apply\b")
MARK = re.compile(r"[,.;:!?=\n]")
ATTRIBUTES = ("colour", "size", "motion", "go", "direction", "speed", "region", "ground")
CONTENT = (
    *ATTRIBUTES, "shape", "plural", "resize", "longer", "task", "reference", "rest", "make", "draw", "add", "remove",
    "replace", "swap", "relation",
)  # fmt: skip
MAX_ITEMS, DIGITS, LETTERS = 9, "123456789", "abcdefgh"
LINE_MARK = re.compile(
    r"(?:\(?[1-9a-h][.)]|[-*\u2022\u2013]|(?:step|no\.?) ?[1-9][:.)]?)[ \t]", re.IGNORECASE
)  # of a line without blanks before it
NUMBER_MARK = re.compile(r"(?:(?<=\s)|^)\(?([1-9a-h])(?:[.)](?=\s))")
LINE_START = re.compile(
    rf"(?:(?:and|then|now|also|finally|please) ){{0,3}}(?:{english_rules.ACTION_START}|an?|i|one|two|three|four)\b",
    re.IGNORECASE,
)
CONNECTING_WORDS = {"and", "but", "that is", "all", "completely", "also", "entirely"}


def read_turn(text: str, context: Context) -> list[Reading]:
    """Return the readings of a turn's actions in order. If one is refused or unclear, nothing else is done."""
    if context.medium and (retargeted := retarget_change(text, context)):
        return retargeted
    if command := find_command(text, context.artifacts):
        return [Reading("command", text, command=redo_undone(command, text, context))]
    if talk.is_foreign(text):
        return [Reading("decline", text, message=replies.ONLY_ENGLISH)]
    text, question = resolve_condition(text, context) if context.medium else (text, "")
    is_opinion = load_pattern("opinion").fullmatch(normalize_text(text)) is not None
    if not question and context.medium and (is_opinion or is_observation(text)):
        question = replies.OBSERVATION_QUESTION.format(context.describe())
    if question:
        return [Reading("ask", text, message=question)]
    if context.medium and (praise := talk.find_praise(text, has_result=True)):  # before "great" is dropped
        return [Reading("do", praise, goal="understand", medium="text", reference="new")]
    said, is_plain = text, context.medium is None and is_plain_sentence(text)
    if not is_plain:
        text = reword(said, context)
    readings, removed, at_start = list[Reading](), list[str](), context
    parts = split_results(text) or (split_changes(text, context) if context.medium else []) or split_turn(text)
    if len(parts) == 1 and load_pattern("follow_up").match(normalize_text(text)):
        parts = [text]
    elif len(parts) == 1 and context.medium and (number := find_other_number(text, context)):
        parts = [f"make that {number}"]
    elif len(parts) == 1 and context.medium and (addition := name_addition(text)):
        parts = [addition]
    if context.medium and len(parts) > 1:
        parts = [change for part in parts for change in split_bare_changes(part, context) or [part]]
        parts = join_motions(parts, context)
    conflicts = read_edit(tokenize(text)).conflicts if context.medium else []
    if denied := [conflict for conflict in conflicts if conflict[0] == KEPT]:  # "keep the colour, make it green"
        return [Reading("ask", text, message=replies.build_contradiction_question(*denied[0]))]
    if len(parts) > 1 and context.medium:
        parts = [part for part in parts if not is_only_kept(part)] or parts
    wishes = [part for part in parts if context.medium is None or not is_statement(part)]
    if not wishes:
        return [Reading("ask", text, message=replies.build_unclear_question())]
    for part in wishes:
        earlier_removed = tuple(removed)
        for reading in read_action(name_one_more(part, context) if context.medium else part, context):
            if reading.kind in ("ask", "decline"):
                return [replace(reading, text=text)]
            if again := [name for name in reading.targets if name in earlier_removed]:
                return [Reading("ask", text, message=replies.build_contradiction_question("removed", again[0]))]
            names_it = any(token.text in ("it", "that", "this") for token in tokenize(part))  # not "what is left"
            if removed and names_it and reading.targets == ("it",):
                return [Reading("ask", text, message=replies.build_contradiction_question("removed", removed[-1]))]
            removed += [name for name in reading.removed if name not in removed]
            if reading.text.startswith("remove it"):
                removed.append("it")
            readings.append(reading)
            context = replace(update_context(context, reading), is_changed=True)
    if not is_plain and (question := find_question(readings, said, " ; ".join(wishes), at_start)):
        return [Reading("ask", text, message=question)]
    return resolve_repeated_changes(readings, text)


def is_plain_sentence(text: str) -> bool:
    """Return whether a text without marks is a request in the MLLM's own words, which needs no rewording."""
    normalized = normalize_text(text)
    return MARK.search(text) is None and english_rules.is_plain_wording(text, normalized, load_pattern("scene_form"))


def reword(text: str, context: Context) -> str:
    """Return a text without what is taken back or said around it, and with lists and references in plain words."""
    text = separate_items(correct_spelling(text))
    text = reword_specification(text, has_result=context.medium is not None) or text
    is_about_result = context.medium and any(load_pattern(name).search(normalize_text(text)) for name in ABOUT_RESULT)
    if is_about_result or not is_in_trained_words(text, normalize_text(text), tokenize(text), context):
        return reword_by_context(talk.drop_framing(take_back_words(text)), context)
    return text


def resolve_repeated_changes(readings: list[Reading], text: str) -> list[Reading]:
    """Return the readings of a turn that changes nothing twice, or a question.

    A change that is taken back at once, as in "make it red. sorry, make it blue", is left out.
    """
    normalized = normalize_text(text)
    if len(readings) > 1 and any(reading.command and reading.command.name == "cancel" for reading in readings):
        return [Reading("ask", text, message=replies.build_unclear_question())]
    if len(readings) < 2 or load_pattern("sequence").search(normalized):
        return readings
    last = dict[tuple[str, str, str], tuple[int, str]]()
    replaced = set[int]()
    for index, reading in enumerate(readings):
        may_change = reading.kind == "do" and reading.goal in ("edit", "")
        for change in read_edit(tokenize(reading.text)).changes if may_change else []:
            if change.kind not in REPEATABLE_KINDS:
                continue
            key = (change.kind, change.target, reading.reference if reading.reference.isdigit() else "")
            earlier, value = last.get(key, (index, change.value))
            if value != change.value and not load_pattern("retraction").search(normalized):
                question = replies.build_contradiction_question(value, change.value)
                return [Reading("ask", text, message=question)]
            replaced |= {earlier} - {index}
            last[key] = (index, change.value)
    return [reading for index, reading in enumerate(readings) if index not in replaced]


def redo_undone(command: ExecutedCommand, text: str, context: Context) -> ExecutedCommand:
    """Return the command that shows the result again that was undone, if "redo" follows an undo."""
    number = context.number + 1
    if command.name != "vary" or not REDO.search(text.lower()) or number > len(context.artifacts):
        return command
    return ExecutedCommand(name="resend", arguments={"which": number})


def reword_by_context(text: str, context: Context) -> str:
    """Return what a text means where there is a result: "it needs a star" adds one, "the other one" is the one before.

    A text that means nothing else there is returned as it is.
    """
    normalized = normalize_text(text)
    if (match := load_pattern("one_result").search(normalized)) and has_shape(normalized[: match.start()]):
        return re.sub(r"[;.] (?=an? |one |two )", ", ", normalized[: match.start()]) + normalized[match.end() :]
    if context.medium is None:
        reworded = replace_wordings(normalized, "new_rewritings")
        return text if reworded == normalized else reworded
    reworded = replace_wordings(normalized, "change_rewritings")
    if reworded != normalized and len(read_current_scene(context).objects) == 1:
        normalized = reworded
    normalized = name_referents(replace_comparison(normalized, context), context)
    if (match := load_pattern("addition").match(normalized)) and "background" not in normalized:
        return f"add {normalized[match.end() :]}"
    if "the other one" in normalized and context.number > 1 and read_scene(tokenize(context.describe())).count == 1:
        number = context.number - 1
        return normalized.replace("the other one", f"the {list(english_rules.ORDINAL_INDEX)[min(number, 10) - 1]} one")
    return text if normalized == normalize_text(text) else normalized


def replace_wordings(text: str, name: str) -> str:
    for pattern, replacement in load_rewritings(name):
        text = pattern.sub(replacement, text)
    return text


def replace_comparison(text: str, context: Context) -> str:
    """Return "blue" for "the same colour as the square", if the square is blue."""
    match = load_pattern("comparison").search(text)
    if match is None:
        return text
    scene = read_scene(tokenize(context.describe()))
    named = read_scene(tokenize(match["object"])).objects
    matches = [obj for obj in scene.objects if named and obj.shape == named[0].shape]
    if tokenize(match["object"])[-1].has("ground"):
        matches = [ObjectRequest(colour=scene.background)]
    value = getattr(matches[0], match["attribute"]) if len(matches) == 1 else None
    return f"{text[: match.start()]}{value}{text[match.end() :]}" if value else text


def update_context(context: Context, reading: Reading) -> Context:
    """Return what the next action of the turn can refer to."""
    if reading.command is not None:
        return replace(context, medium=None) if reading.command.name == "restart" else context
    if reading.goal == "understand":
        return replace(context, last_request=reading.text)
    context = replace(context, last_request=reading.text)
    is_made = reading.goal in ("generate", "") and has_shape(reading.text)
    is_made = is_made and is_scene_request(tokenize(reading.text), context, is_correction=False)
    if reading.goal == "edit" and not reading.reference.isdigit():
        describe, medium = context.describe, context.medium or ""
        context = replace(context, describe=lambda: describe_changed_scene(describe(), reading.text, medium))
    elif is_made:
        context = replace(context, describe=lambda: reading.text)
    if reading.medium in ("image", "video"):
        return replace(context, medium=reading.medium)
    scene = read_scene(tokenize(reading.text))
    made: Medium = "video" if scene.is_video else "image"
    return replace(context, medium=made if is_made else context.medium or made)


# ---------------------------------------------------------------- the actions of a turn


def separate_items(text: str) -> str:
    """Return a text with a semicolon between the items of a list: lines, or parts with numbers."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bare = [line[mark.end() :].strip() if (mark := LINE_MARK.match(line)) else line for line in lines]
    if 1 < len(lines) <= MAX_ITEMS and (bare != lines or all(map(LINE_START.match, lines))):
        lead = bare[0] if bare[0] != lines[0] or bare[1:] == lines[1:] or not lines[0].endswith(":") else ""
        return "; ".join(line.rstrip(" ,;") for line in (lead, *bare[1:]) if line)
    marks = list(NUMBER_MARK.finditer(text))
    if 1 < len(marks) <= MAX_ITEMS and "".join(mark[1] for mark in marks) in (
        DIGITS[: len(marks)],
        LETTERS[: len(marks)],
    ):
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        items = [text[mark.end() : end].strip(" ,;") for mark, end in zip(marks, ends, strict=True)]
        return "; ".join(items)
    return text


# ---------------------------------------------------------------- several results


def split_results(text: str) -> list[str]:
    """Return a request for each of several results of one text; [] for other texts."""
    normalized = normalize_text(text).strip(" .!?")
    if len(normalized) > english_rules.MAX_WORDING_CHARS:
        return []
    if parts := split_named_results(normalized):
        return parts
    if match := load_pattern("separate_results").fullmatch(normalized):
        words = re.sub(
            r"^(?:(?:please|draw|make|create|show me|give me|i want|i need) )+",
            "",
            match[1] or match["counted"] or match[3],
        )
        parts = [part for part in re.split(r",? and then |,? then |,? and |, ", words) if part.strip()]
        if len(parts) > 1 and all(map(has_shape, parts)):
            return parts
    if match := load_pattern("both_media").fullmatch(normalized):
        return [f"a {match[1]} of {match[3]}", f"a {match[2]} of {match[3]}"] if match[1] != match[2] else []
    if match := load_pattern("equal_results").fullmatch(normalized):
        number = int(load_lexicon().phrases[match[1]][0][1])
        parts = [f"a {match[2].removesuffix('s')} of {match[3]}"] * number
    elif match := load_pattern("two_results").fullmatch(normalized):
        parts = [f"a {match[1].removesuffix('s')} of {words}" for words in (match[2], match[3])]
    elif match := load_pattern("listed_results").fullmatch(normalized):
        parts = split_listed_results(match)
    else:
        parts = [
            part.strip(" ,;").removeprefix("first ")
            for piece in load_pattern("separately").split(normalized)
            for part in load_pattern("next_result").split(piece)
            if part.strip()
        ]
        if parts and not has_shape(parts[0]):  # "first", "i want"
            del parts[0]
    if len(parts) > 1 and has_shape(parts[0]):
        parts = repeat_objects(parts)
    return parts if len(parts) > 1 and all(map(has_shape, parts)) else []


def repeat_objects(parts: Sequence[str]) -> list[str]:
    """Return requests of which each names its objects: "a still of the same square" repeats those before."""
    repeated = list(parts[:1])
    for part in parts[1:]:
        objects = read_scene(tokenize(repeated[-1])).objects
        text = " and ".join(obj.to_text(with_motion=False) for obj in objects)
        part = re.sub(r"\b(?:the|that) same \w+", text, part)
        if objects and not has_shape(part):  # "a blue one"
            part = re.sub(r"\bone\b$", str(objects[-1].shape), part)
        repeated.append(part)
    return repeated


def split_named_results(normalized: str) -> list[str]:
    """Return the requests of "picture one: a red circle. picture two: a red square"; [] for other texts."""
    marks = list(load_pattern("named_result").pattern.finditer(normalized))
    if len(marks) < 2 or normalized[: marks[0].start()].strip(" ,;:") not in ("", "please", "draw", "make"):
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(normalized)]
    items = [normalized[mark.end() : end].strip(" ,;.") for mark, end in zip(marks, ends, strict=True)]
    nouns = [mark["noun"] or mark["noun2"] for mark in marks]
    if all(re.match(r"(?:make|turn|change|add|remove|recolour|paint)\b", item) for item in items):
        ordinals = list(english_rules.ORDINAL_INDEX)
        return [f"in the {ordinal} {noun} {item}" for ordinal, noun, item in zip(ordinals, nouns, items, strict=False)]
    return [f"a {noun} of {item}" for noun, item in zip(nouns, items, strict=True)]


def split_listed_results(match: re.Match[str]) -> list[str]:
    """Return the requests of "three separate pictures, circle, square and star, all in blue"; [] if they are others."""
    tokens = list[Token]()
    for token in tokenize(match["objects"]):
        is_listed = tokens and token.has("shape") and tokens[-1].has("shape")  # "circle square and star"
        tokens += [Token(","), token] if is_listed else [token]
    scene, number = read_scene(tokens), int(load_lexicon().phrases[match["number"]][0][1])
    if len(scene.objects) != number or scene.conflicts or any(obj.count not in (None, 1) for obj in scene.objects):
        return []
    noun = match["noun"].removesuffix("s")
    texts = [replace(scene, objects=[obj], relation=None).to_text().partition(" of ")[2] for obj in scene.objects]
    return [f"a {noun} of {text}" for text in texts]


def has_shape(text: str) -> bool:
    return any(token.has("shape", "plural") for token in tokenize(text))


# ---------------------------------------------------------------- one action after the other


def is_only_kept(part: str) -> bool:
    """Return whether a part of a turn only says what stays, as in "keep the shape, change the colour to green"."""
    edit = read_edit(tokenize(part))
    is_kept = part.startswith(("keep ", "leave ")) and bool(edit.kept or edit.kept_targets)
    return is_kept and not (edit.changes or edit.unknown)


def split_turn(text: str) -> list[str]:
    """Split a turn into its actions; words that only describe what stands before them stay with it."""
    parts, ends_with_shape = list[str](), False
    text = load_pattern("taken_object").sub(r"\2 the \1", text)
    for part in english_rules.split_actions(text):
        tokens = tokenize(part)
        has_content = any(token.has(*CONTENT) or not token.is_known for token in tokens)
        if not has_content and not is_complete_by_itself(part):
            continue  # "two separate pictures please"
        if ends_with_shape and is_attribute(tokens):
            parts[-1] += f", {part}"
        elif parts and not ends_with_shape and is_attribute(tokenize(parts[-1])) and is_description(part):
            parts[-1] += f" {part}"  # "small. green. star."
            ends_with_shape = has_shape(part)
        else:
            parts.append(part)
            ends_with_shape = any(token.has("shape", "plural") for token in tokens)
    return parts or [text]


def is_description(part: str) -> bool:
    """Return whether a part of a turn only names a shape or its attributes."""
    return all(token.has("shape", "plural", *ATTRIBUTES) for token in tokenize(part))


def is_complete_by_itself(part: str) -> bool:
    is_talk = english_rules.QUESTION.search(part) or talk.find_small_talk(part)
    command = find_command(part, ())
    return bool(is_talk) or (command is not None and command.name != "cancel")  # "wait, make that yellow"


def is_attribute(tokens: Sequence[Token]) -> bool:
    """Return whether words only name colours, sizes, motions or places: "Blue. Falling."."""
    return bool(tokens) and all(
        token.has(*ATTRIBUTES) or (token.is_known and token.text in ("a", "very", "and", ",", "on", "it", "is"))
        for token in tokens
    ) and not any(token.has("make", "add", "remove", "put") for token in tokens)  # fmt: skip


# ---------------------------------------------------------------- replies


def resolve_reply(request: str, question: str, reply: str) -> str:
    """Return the request that a reply to a question leads to: without the other of two values, or the reply itself."""
    values = read_choice(question)
    if not values or len(reply.split()) > 6:
        return reply
    named = [value for value in values if re.search(rf"\b{re.escape(value)}\b", normalize_text(reply))]
    if len(named) != 1:
        return reply
    other = next(value for value in values if value != named[0])
    phrases = [
        phrase for phrase, meanings in load_lexicon().phrases.items() if any(other == value for _, value in meanings)
    ]
    pattern = "|".join(sorted(map(re.escape, phrases), key=len, reverse=True))
    request = normalize_text(request)
    match = re.search(rf" ?\b(?:{pattern})\b", request)
    return (strip_connecting_words(request[: match.start()]) + request[match.end() :]).strip() if match else request


def read_choice(question: str) -> list[str]:
    """Return the two values that a question offers, or nothing if it is another question."""
    if not question.startswith("Do you mean ") or not question.endswith("?"):
        return []
    first, _, second = question.removeprefix("Do you mean ").removesuffix("?").rpartition(" or ")
    return [first, second] if first and second else []


def strip_connecting_words(text: str) -> str:
    """Return a text without the words at its end that connect what follows: "a ball, and also" becomes "a ball"."""
    words = text.split(" ")
    while len(words) > 1:
        count = next((n for n in (1, 2) if len(words) > n and " ".join(words[-n:]) in CONNECTING_WORDS), 0)
        if not count:
            break
        del words[-count:]
        words[-1] = words[-1].removesuffix(",")
    return " ".join(words)
