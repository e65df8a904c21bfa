"""Read a whole turn: its actions in order, or one refusal or question if any of them cannot be done."""

import re
from dataclasses import replace

from omnivideo.agent import english_rules
from omnivideo.agent.commands import find_command
from omnivideo.agent.small_world import replies, talk
from omnivideo.agent.small_world.changed_scenes import describe_changed_scene
from omnivideo.agent.small_world.edits import read_edit
from omnivideo.agent.small_world.lexicon import Token, correct_spelling, load_lexicon, normalize_text, tokenize
from omnivideo.agent.small_world.reading import is_in_trained_words, read_action
from omnivideo.agent.small_world.readings import Context, Reading
from omnivideo.agent.small_world.referring import list_object_names, name_referents, read_current_scene
from omnivideo.agent.small_world.retractions import take_back_words
from omnivideo.agent.small_world.scenes import NUMBER_WORDS, ObjectRequest, read_scene
from omnivideo.agent.small_world.specifications import reword_specification
from omnivideo.agent.small_world.splitting import has_shape, separate_items, split_results, split_turn
from omnivideo.agent.small_world.wordings import load_pattern, load_rewritings
from omnivideo.turns import ExecutedCommand

ABOUT_RESULT = ("addition", "comparison", "one_more")  # what is said of a result even in words of requests for new ones
REPEATABLE_KINDS = ("recolour", "background", "reshape", "motion")  # changes of which a turn makes only one of a thing
REDO = re.compile(r"\bre-?do\b|\bre-?apply\b")
MAX_CHANGED_RESULTS = 4  # by one "both" or "all"
ADDITION = re.compile(r"^(?:and|with|plus|also) (?:an?|another|two|three) ")
CONNECTING_WORDS = {"and", "but", "that is", "all", "completely", "also", "entirely"}


def read_turn(text: str, context: Context) -> list[Reading]:
    """Return the readings of a turn's actions in order. If one is refused or unclear, nothing else is done."""
    if command := find_command(text, context.artifacts):
        return [Reading("command", text, command=redo_undone(command, text, context))]
    if talk.is_foreign(text):
        return [Reading("decline", text, message=replies.ONLY_ENGLISH)]
    text = separate_items(correct_spelling(text))
    text = reword_specification(text, has_result=context.medium is not None) or text
    readings, removed, at_start = list[Reading](), list[str](), context
    is_about_result = context.medium and any(load_pattern(name).search(normalize_text(text)) for name in ABOUT_RESULT)
    if is_about_result or not is_in_trained_words(text, normalize_text(text), tokenize(text), context):
        text = reword_by_context(talk.drop_framing(take_back_words(text)), context)
    parts = split_results(text) or split_changes(text, context) or split_turn(text)
    if len(parts) == 1 and load_pattern("follow_up").match(normalize_text(text)):
        parts = [text]
    elif len(parts) == 1 and context.medium and ADDITION.match(normalize_text(text)):
        parts = [f"add {parts[0].removeprefix('with ')}"]
    wishes = [part for part in parts if context.medium is None or not is_statement(part)]
    if not wishes:
        return [Reading("ask", text, message=replies.build_unclear_question())]
    for part in wishes:
        earlier_removed = tuple(removed)
        for reading in read_action(part, context):
            if reading.kind in ("ask", "decline"):
                return [replace(reading, text=text)]
            if again := [name for name in reading.targets if name in earlier_removed]:
                return [Reading("ask", text, message=replies.build_contradiction_question("removed", again[0]))]
            if removed and reading.targets == ("it",) and is_only_object(removed[-1], at_start):
                return [Reading("ask", text, message=replies.build_contradiction_question("removed", removed[-1]))]
            removed += [name for name in reading.removed if name not in removed]
            if reading.text.startswith("remove it"):
                removed.append("it")
            readings.append(reading)
            context = replace(update_context(context, reading), is_changed=True)
    return resolve_repeated_changes(readings, text)


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
    if len(read_current_scene(context).objects) == 1:
        normalized = replace_wordings(normalized, "change_rewritings")
        normalized = name_one_more(normalized, context)
    normalized = name_referents(replace_comparison(normalized, context), context)
    if (match := load_pattern("addition").match(normalized)) and "background" not in normalized:
        return f"add {normalized[match.end() :]}"
    if "the other one" in normalized and context.number > 1 and read_scene(tokenize(context.describe())).count == 1:
        number = context.number - 1
        return normalized.replace("the other one", f"the {list(english_rules.ORDINAL_INDEX)[min(number, 10) - 1]} one")
    return text if normalized == normalize_text(text) else normalized


def name_one_more(text: str, context: Context) -> str:
    """Return "add a red star" for "a red one as well", if there are only stars."""
    (obj,) = read_current_scene(context).objects
    shape, count = obj.shape, (obj.count or 1) - 1
    if count and load_pattern("one_less").fullmatch(text):
        return f"make that {NUMBER_WORDS[count]}"
    match = load_pattern("one_more").fullmatch(text)
    if match is None or not shape:
        return text
    is_added = match["more"] or "another" in match["object"] or re.search(r"and|also|plus|add|put|with", match["lead"])
    return f"{'add' if is_added else 'draw'} {match['object']}{shape}"


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


def is_statement(text: str) -> bool:
    """Return whether a text says what there is, such as "so it is a red circle", and asks for nothing."""
    normalized = re.sub(r"(?<![ ,])[ ,]++(?:but|and|so)$", "", normalize_text(text).strip(" .!"))
    if load_pattern("correction").match(normalized) or talk.find_praise(text, has_result=True):
        return False
    if talk.find_praise(normalized, has_result=True):
        return True  # "it is a nice star but"
    return load_pattern("statement").fullmatch(normalized) is not None


def is_only_object(name: str, context: Context) -> bool:
    """Return whether the current result shows one object, so that "it" can only be the one that was removed."""
    return name not in ("it", "them") and read_scene(tokenize(context.describe())).count == 1


def split_changes(text: str, context: Context) -> list[str]:
    """Return the changes of a text that names what is seen, such as "keep only the star"; [] for other texts."""
    if context.medium is None:
        return []
    normalized = normalize_text(text).strip(" .!?")
    if parts := split_by_results(normalized, context):
        return parts
    if match := load_pattern("gapped_results").fullmatch(normalized):  # "make the first one green and the second red"
        noun = "" if re.match(r" (?:one|picture|image|clip|video)\b", match["rest"]) else " one"
        return [match["lead"] + match["first"], f"{match['lead']}{match['second']}{noun}{match['rest']}"]
    if context.number > 1 and (match := load_pattern("restored").fullmatch(normalized)):
        return ["undo", match["rest"]]
    if match := load_pattern("exchanged_colour").fullmatch(normalized):
        return exchange_colours(match[1], match[2], context)
    if match := load_pattern("kept_object").fullmatch(normalized):
        kept = {obj.shape for obj in read_scene(tokenize(match[1])).objects}
        names = list_object_names(context)
        others = [name for name in names if not kept & {obj.shape for obj in read_scene(tokenize(name)).objects}]
        return [f"remove {name}" for name in others] if len(others) < len(names) else []
    return split_bare_changes(text, context)


def split_by_results(normalized: str, context: Context) -> list[str]:
    """Return a change of each result for "make both of them green", if the current one shows a single object."""
    match, number = load_pattern("both_results").search(normalized), len(context.artifacts)
    tokens = tokenize(normalized)
    is_change = any(token.has("colour", "ground", "shape") for token in tokens) and not any(
        token.has("task", "impossible", "add", "remove", "swap") for token in tokens
    )
    if not (match and is_change and 2 <= number <= MAX_CHANGED_RESULTS):
        return []
    if read_scene(tokenize(context.describe())).count > 1:
        return []
    ordinals = list(english_rules.ORDINAL_INDEX)[:number]
    return [f"{normalized[: match.start()]}the {ordinal} one{normalized[match.end() :]}" for ordinal in ordinals]


def exchange_colours(old: str, new: str, context: Context) -> list[str]:
    """Return the change of what has the old colour."""
    tokens = [*tokenize(old), *tokenize(new)]
    if not all(token.has("colour") for token in tokens):
        return []
    scene, colour = read_scene(tokenize(context.describe())), tokens[0].get("colour")
    if scene.background == colour:
        return [f"change the background to {new}"]
    return [f"make the {obj.shape} {new}" for obj in scene.objects if obj.colour == colour]


def split_bare_changes(text: str, context: Context) -> list[str]:
    """Return "make the circle yellow" for each part of "circle yellow, star green"; [] for other texts."""
    groups: list[list[Token]] = [[]]
    for token in tokenize(text):
        if token.text in (",", "and", ";", "."):
            groups.append([])
        else:
            groups[-1].append(token)
    groups = [group for group in groups if group]
    for noun, *values in groups:
        if not (noun.has("shape") and len(values) == 1 and values[0].has("colour", "size")):
            return []
    shapes = {obj.shape for obj in read_scene(tokenize(context.describe())).objects} if groups else set()
    if not groups or not {group[0].get("shape") for group in groups} <= shapes:
        return []
    return [f"make the {noun.text} {value.text}" for noun, value in groups]


def update_context(context: Context, reading: Reading) -> Context:
    """Return what the next action of the turn can refer to."""
    if reading.command is not None:
        return replace(context, medium=None) if reading.command.name == "restart" else context
    if reading.goal == "understand":
        return replace(context, last_request=reading.text)
    if reading.goal == "edit" and not reading.reference.isdigit():
        describe, medium = context.describe, context.medium or ""
        context = replace(context, describe=lambda: describe_changed_scene(describe(), reading.text, medium))
    elif reading.goal in ("generate", "") and has_shape(reading.text) and context.medium is None:
        context = replace(context, describe=lambda: reading.text)
    if reading.medium in ("image", "video"):
        return replace(context, medium=reading.medium)
    scene = read_scene(tokenize(reading.text))
    return replace(context, medium=context.medium or ("video" if scene.is_video else "image"))


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
