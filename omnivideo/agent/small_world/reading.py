"""Read one action of a turn: what the MLLM is asked, or what the user is told or asked instead."""

import re
from collections.abc import Sequence
from dataclasses import replace

from omnivideo.agent import english_rules, media_words
from omnivideo.agent.commands import NUMBERS, find_command
from omnivideo.agent.small_world import replies, talk
from omnivideo.agent.small_world.change_requests import (
    build_scene_of_count,
    build_task_reading,
    correct_background,
    find_missing_target,
    names_places,
    read_changes,
    read_reversal,
    read_versions,
)
from omnivideo.agent.small_world.edits import read_edit
from omnivideo.agent.small_world.lexicon import (
    Token,
    load_lexicon,
    normalize_text,
    split_words,
    tokenize,
)
from omnivideo.agent.small_world.question_reading import read_question_action
from omnivideo.agent.small_world.questions import is_question
from omnivideo.agent.small_world.readings import Context, Reading
from omnivideo.agent.small_world.scenes import DescribedScene, has_values, is_worded_as_change, read_scene
from omnivideo.agent.small_world.wordings import load_pattern
from omnivideo.contracts import Medium

PLACE_WORDS = ("to", "beside", "near", "by", "alongside", "behind")  # before "it": "next to it"
QUESTION_WORD = re.compile(
    r"(?:what|which|who|whose|where|why|when|how|is|are|was|were|does|do|did|has|have|am|any|anything)\b"
)
ABILITY_QUESTION = re.compile(r"(?:(?:can|could|do) you )?(?:do|make|draw|create|show|handle)\b")
DURATION = re.compile(
    r"\b(?:\d+(?:\.\d+)?[ -]?s\b|(?:\d+(?:\.\d+)?[ -]?|(?:one|two|three|four|five|six|eight|ten|twenty|thirty)[ -]"
    r"|half an? )(?:secs?|seconds?|mins?|minutes?|hours?|frames?)\b|an? (?:minute|hour)\b)(?! ago\b)"
)
SECOND_NUMBERS = NUMBERS | {"nine": 9, "ten": 10}
ADDED_SECONDS = re.compile(
    rf"\b(\d+(?:\.\d+)?|{'|'.join(sorted(SECOND_NUMBERS, key=len, reverse=True))})"
    r"[ -](?:more |extra |other )?(?:seconds?|secs?|s)\b"
)
ADDING = re.compile(r"\b(?:longer|add|extend|another|more|extra|continue|prolong|lengthen|by)\b")
ATTACH = re.compile(r"\b(?:attach|append|add|glue|put)\b")
ATTACHED_TO = re.compile(r"\b(?:to|after|behind|at the end of)\b")  # behind such a word
BOUNCING = {"bounce", "bouncing", "bounces"}
CORNERS = re.compile(r"\b(?:with|has|having) (?:only |exactly )?(no|one|two|three|four|five|six) corners\b")


def read_action(text: str, context: Context) -> list[Reading]:
    """Return what is to be done for an action of a turn; several readings for several changes."""
    if command := find_command(text, context.artifacts):
        return [Reading("command", text, command=command)]
    if not any(letter.isalnum() for letter in text):  # no words: signs, or a picture of a character
        has_result = context.medium is not None
        question = replies.build_unclear_question() if has_result else replies.build_empty_question()
        return [Reading("ask", text, message=question)]
    if talk.is_foreign(text):
        return [Reading("decline", text, message=replies.ONLY_ENGLISH)]
    if shown_again := load_pattern("show_again").fullmatch(normalize_text(text).strip(" .!?")):
        text = f"go back to the {shown_again[1]}"
    if english_rules.is_go_back_request(text):
        return [Reading("do", text)]
    normalized, tokens = normalize_text(text), tokenize(text)
    is_request = bool(load_pattern("polite_request").match(normalized)) and not re.search(
        r"\bwhat (?:size|colour|shape)\b", normalized
    )
    said = talk.find_praise(text, bool(context.medium)) if has_world_words(tokens) else talk.find_small_talk(text)
    is_asked = is_question(normalized) and not is_request and said not in talk.CERTAIN
    if is_asked and (reading := read_question_action(text, normalized, tokens, context)):
        return [reading]
    if is_asked and context.medium and not any(token.has("longer", "task") for token in tokens):
        is_worded = QUESTION_WORD.match(normalized) or load_pattern("question_start").match(normalized)
        if is_worded:  # what is seen may be the answer
            noun = "video" if context.medium == "video" else "picture"
            return [Reading("do", f"describe the {noun}", goal="understand", medium="text", reference="current")]
        if unknown := [token.text for token in tokens if not token.is_known]:
            return [build_unknown(text, tokens, unknown, context)]
    if said:
        if said == "languages":
            return [Reading("say", text, goal="understand", medium="text", message=replies.NOT_ENGLISH)]
        return [Reading("do", said, goal="understand", medium="text", reference="new")]
    if is_asked and not context.medium and QUESTION_WORD.match(normalized) and has_world_words(tokens):
        return [Reading("ask", text, message=replies.NOTHING_QUESTION)]
    if question := find_wrong_corners(normalized, tokens):
        return [Reading("ask", text, message=question)]
    impossible = [token.text for token in tokens if token.has("impossible")]
    if impossible:
        return [Reading("decline", text, message=replies.build_unknown_reply(impossible, context.preset, len(tokens)))]
    is_task = context.medium is not None and any(token.has("task") for token in tokens)
    if not is_task and is_in_trained_words(text, normalized, tokens, context):
        return [Reading("do", text)]
    return read_request(text, normalized, tokens, context)


def find_wrong_corners(normalized: str, tokens: Sequence[Token]) -> str:
    """Return a question if a shape is said to have another number of corners than it has; else ""."""
    shapes = [shape for token in tokens if (shape := token.get("shape") or token.get("plural"))]
    match = CORNERS.search(normalized)
    if match is None or len(shapes) != 1:
        return ""
    corners = load_lexicon().facts.corners[shapes[0]]
    return "" if corners == match[1] else f"A {shapes[0]} has {corners} corners. What should I draw?"


def has_world_words(tokens: Sequence[Token]) -> bool:
    return any(token.has("shape", "plural", "colour", "ground", "resize", "verb", "size", "motion") for token in tokens)


def is_in_trained_words(text: str, normalized: str, tokens: Sequence[Token], context: Context) -> bool:
    """Return whether a request describes things indirectly, in words that the MLLM was trained on."""
    is_indirect = english_rules.is_indirect(text) or load_pattern("indirect").search(normalized)
    if (
        not is_indirect
        or (context.medium and load_pattern("correction").match(normalized))
        or (context.medium and any(token.has("reference", "resize", "add", "remove") for token in tokens))
    ):
        return False
    if not load_pattern("indirect").search(normalized) and read_scene(tokens).conflicts:
        return False  # "a large circle, it should be tiny"
    words = re.findall(r"[a-z0-9'-]+", text.lower())
    lexicon = load_lexicon()
    known = lexicon.described | english_rules.load_plain_words()
    if load_pattern("untrained").search(normalized) or (
        context.medium and load_pattern("untrained_change").search(normalized)
    ):
        return False
    if (
        context.medium
        and any(token.has("ground") for token in tokens)
        and not any(token.has("colour") for token in tokens)
    ):
        return False  # "a background like the square": which one is not known
    has_subject = any(token.has("shape", "plural", "thing", "reference") for token in tokens)
    return has_subject and len(words) > 3 and known.issuperset(words)


# ---------------------------------------------------------------- requests


def read_request(text: str, normalized: str, tokens: Sequence[Token], context: Context) -> list[Reading]:
    """Return the readings of a request for something new or for changes."""
    other_medium = context.medium and media_words.find_requested_medium(text, context.medium)
    if other_medium == "image" or (other_medium and context.preset.animates_pictures):
        return [Reading("do", text)]  # a still of a clip needs no model
    reference, named_tokens = find_ordinal(text, tokens, context)
    tasks = [token.get("task") or "" for token in (*tokens, *named_tokens) if token.has("task")]
    if tasks and context.medium:
        return [read_task(text, tasks[0], context)]
    if (timed := read_timed_extension(normalized, tokens, reference, context)) is not None:
        return [timed]
    if DURATION.search(normalized):
        return [Reading("decline", text, message=replies.DURATION_ANSWER)]
    tokens = named_tokens
    unknown = [token.text for token in tokens if not token.is_known]
    if unknown:
        return [read_unknown_motion(text, unknown, context) or build_unknown(text, tokens, unknown, context)]
    is_correction = bool(load_pattern("correction").match(normalized))
    if is_scene_request(tokens, context, is_correction=is_correction):
        return [read_scene_action(text, normalized, tokens, context)]
    if context.medium is None:
        message = replies.build_empty_question() if not has_world_words(tokens) else ""
        return [Reading("ask", text, message=message or "There is nothing to change yet. What should I create?")]
    if load_pattern("one_of_several").search(normalized):
        return [Reading("ask", text, message=f"Which one do you mean? I see {context.describe()}.")]
    if versions := read_versions(normalized, context):
        return versions
    if (reversal := read_reversal(text, normalized, tokens, reference, context)) is not None:
        return reversal
    edit = read_edit(tokens, is_still=context.medium == "image", is_correction=is_correction)
    if edit.conflicts:
        return [Reading("ask", text, message=replies.build_contradiction_question(*edit.conflicts[0]))]
    changes = [change for change in edit.changes if change.text != f"medium {context.medium}"]
    if is_correction and names_places(tokens, context):
        return [Reading("decline", text, message=replies.build_impossible_reply("place", context.preset))]
    if is_correction:
        changes = [correct_background(change, context) for change in changes]
    if not changes and context.medium == "image" and says_open_motion(tokens):
        return [read_task(text, "image-to-video", context)]
    if not changes:
        return [Reading("ask", text, message=replies.build_unclear_question())]
    is_count = len(changes) == 1 and changes[0].kind == "count" and not load_pattern("sequence").search(normalized)
    if is_count and (scene := build_scene_of_count(changes[0], context)):
        return [Reading("do", scene.to_text(), goal="generate", medium=context.medium or "", reference="new")]
    if not reference and (missing := find_missing_target(changes, context)):
        return [Reading("ask", text, message=missing)]
    readings = read_changes(text, normalized, changes, reference, context)
    targets = tuple(change.target for change in changes)
    return [replace(reading, targets=targets, removed=tuple(edit.removed)) for reading in readings]


def read_timed_extension(normalized: str, tokens: Sequence[Token], reference: str, context: Context) -> Reading | None:
    """Return the reading of "make it two seconds longer"; None for other requests, and where it is not possible."""
    seconds = ADDED_SECONDS.search(normalized)
    if seconds is None or not ADDING.search(normalized) or context.medium != "video":
        return None
    if "video-extension" not in context.preset.sampling or has_world_words(tokens):
        return None
    number = float(SECOND_NUMBERS.get(seconds[1]) or seconds[1])
    extension = build_task_reading(replies.EXTENSION_REQUEST, "video-extension", reference)
    return replace(extension, seconds=number)


def find_ordinal(text: str, tokens: Sequence[Token], context: Context) -> tuple[str, Sequence[Token]]:
    """Return the number of the artifact that "the second clip" names, and the tokens with "it" in its place."""
    match = english_rules.find_by_ordinal(text, context.artifacts)
    if match and match.artifact is None:  # the user is asked which one is meant
        return "described", tokenize(re.sub(re.escape(match.words), "it", text, flags=re.IGNORECASE))
    if match and match.artifact:
        number = max(index for index, artifact in enumerate(context.artifacts, start=1) if artifact == match.artifact)
        return str(number), tokenize(re.sub(re.escape(match.words), "it", text, flags=re.IGNORECASE))
    described = english_rules.DESCRIPTION_REFERENCE.search(text)
    if described and not described[0].lower().endswith("still"):  # "staying still" names no picture
        return "described", tokenize(text.replace(described[0], " it "))
    return "", tokens


def build_unknown(text: str, tokens: Sequence[Token], unknown: list[str], context: Context) -> Reading:
    """Return a refusal of a request with unknown words; a question if it does not look like a request."""
    num_words = len([word for word in split_words(normalize_text(text)) if word[0].isalnum()])
    message = replies.build_unknown_reply(unknown, context.preset, num_words)
    names_world = any(token.has("shape", "plural", "colour", "ground") for token in tokens)
    is_wish = tokens[0].has("make", "draw", "add", "remove", "replace", "swap", "put", "medium")
    is_wish = is_wish or tokens[0].text in ("a", "an", "the", "one", "two")
    asks_for_ability = ABILITY_QUESTION.match(normalize_text(text)) is not None
    if asks_for_ability or (not is_question(normalize_text(text)) and (names_world or is_wish)):
        return Reading("decline", text, message=message)
    return Reading("ask", text, message=f"I am not sure what you mean: {message} What should I make?")


def read_unknown_motion(text: str, unknown: Sequence[str], context: Context) -> Reading | None:
    """Return the reading of a picture's motion that has no word in the world ("let it spin"); None for other requests.

    Where pictures can be animated, only bouncing is read: whatever moves bounces off the edges of the frame.
    """
    motion = media_words.MOTION_REQUEST.search(text) if context.medium == "image" else None
    if motion is None or not all(word in motion[0].lower() for word in unknown):
        return None
    is_animated = "image-to-video" in context.preset.sampling
    return None if is_animated and not BOUNCING.issuperset(unknown) else read_task(text, "image-to-video", context)


def says_open_motion(tokens: Sequence[Token]) -> bool:
    """Return whether words say that something is to move, but not where to: "make it move"."""
    has_subject = any(token.has("reference", "rest", "shape", "plural", "thing") for token in tokens)
    return has_subject and any(token.has("go") for token in tokens)


def read_task(text: str, task: str, context: Context) -> Reading:
    """Return the reading of a request to animate a picture, to go from one picture to another, or to join clips."""
    if task == "join-clips":
        return read_joining(text, context)
    if task not in context.preset.sampling:
        return Reading("decline", text, message=replies.build_impossible_reply(task, context.preset))
    pictures = [number for number, artifact in enumerate(context.artifacts, start=1) if artifact.medium == "image"]
    if task == "keyframes-to-video":
        if len(pictures) < 2:
            return Reading("ask", text, message=replies.TWO_PICTURES_QUESTION)
        return build_task_reading(text, "keyframes-to-video", str(pictures[-2]), pictures[-1])
    reference = find_ordinal(text, (), context)[0]
    is_picture = int(reference) in pictures if reference.isdigit() else context.medium == "image"
    if not is_picture and reference != "described":
        return Reading("do", text)  # a clip moves already; its motion may change
    return build_task_reading(text, "image-to-video", reference)


def read_joining(text: str, context: Context) -> Reading:
    """Return the reading of a request to make one clip of several: those that are named, all, or the last two."""
    clips = [number for number, artifact in enumerate(context.artifacts, start=1) if artifact.medium == "video"]
    words = normalize_text(text)
    named = [index for word in words.split() if (index := english_rules.ORDINAL_INDEX.get(word)) is not None]
    joined = list(dict.fromkeys(clips[index] for index in named if -len(clips) <= index < len(clips)))
    if len(joined) < 2:
        count = len(clips) if re.search(r"\ball\b", words) else 3 if re.search(r"\bthree\b", words) else 2
        joined = clips[-count:]
    elif (attach := ATTACH.search(words)) and ATTACHED_TO.search(words, attach.end()):  # "attach the second to ..."
        joined.reverse()
    if len(joined) < 2:
        return Reading("ask", text, message=replies.TWO_CLIPS_QUESTION)
    reference, numbers = str(joined[0]), tuple(joined)
    return Reading("do", text, goal="edit", medium="video", reference=reference, joined=numbers)


# ---------------------------------------------------------------- something new


def is_scene_request(tokens: Sequence[Token], context: Context, *, is_correction: bool) -> bool:
    """Return whether the tokens ask for something new and not for a change of the current artifact."""
    has_shape = any(token.has("shape", "plural") for token in tokens)
    if context.medium is None:
        first = next((index for index, token in enumerate(tokens) if token.has("shape", "plural")), len(tokens))
        if any(token.has("resize") or token.text == "then" for token in tokens):
            first = len(tokens)
        is_change = any(token.has("remove", "replace", "swap") for token in tokens) or any(
            token.has("reference") and not is_relative(tokens, index) for index, token in enumerate(tokens[:first])
        )  # "it" after a shape can only be that shape
        return not is_change and (has_shape or any(token.has("medium") for token in tokens))
    is_put = tokens[0].has("put") and not any(token.has("ground") for token in tokens)
    if is_put or is_worded_as_change(tokens):
        return False
    texts = [token.text for token in tokens]
    definite = any(
        (token.has("reference", "rest") and not is_relative(tokens, index))
        or (token.text in ("the", "its", "their") and names_object(tokens, index))
        for index, token in enumerate(tokens)
    )
    if definite or not has_shape:
        return (
            not definite
            and any(token.has("medium") for token in tokens)
            and "same" not in texts
            and not has_values(tokens)
        )
    if is_correction:
        scene = read_scene(tokens)
        return any(obj.colour for obj in scene.objects)
    return True


def names_object(tokens: Sequence[Token], index: int) -> bool:
    """Return whether "the" at this index begins the name of an object, such as "the small red one"."""
    for token in tokens[index + 1 : index + 5]:
        if token.has("shape", "plural", "thing", "ground"):
            return True
        if not token.has("colour", "size", "number", "region"):
            return False
    return False


def is_relative(tokens: Sequence[Token], index: int) -> bool:
    """Return whether "that" here begins a clause about the noun before it, or "it" is another object of the scene."""
    if not any(token.has("shape", "plural", "ground") for token in tokens[:index]):
        return False
    num_shapes = sum(token.has("shape", "plural") for token in tokens[:index])
    is_place = index > 0 and (tokens[index - 1].has("relation") or tokens[index - 1].text in PLACE_WORDS)
    if num_shapes > 1 and is_place and not tokens[0].has("add", "make", "put"):
        return True  # "a blue square and a red star next to it"
    if tokens[index].text == "that" or (tokens[index].text == "them" and index and tokens[index - 1].text == "of"):
        return True
    following = tokens[index + 1 : index + 2]
    is_clause = bool(following) and (
        following[0].text in ("is", "are", "should", "does", "has", "all")
        or following[0].has("go", "motion", "colour", "size")
    )
    return (
        tokens[index].text in ("it", "they", "both", "all of them", "this")
        and is_clause
        and not tokens[0].has("make", "put")
    )


def read_scene_action(text: str, normalized: str, tokens: Sequence[Token], context: Context) -> Reading:
    """Return the reading of a request for something new."""
    scene = read_scene(tokens)
    if problem := find_scene_problem(scene, normalized):
        return Reading("decline", text, message=f"{problem} {load_lexicon().facts.contents}")
    if scene.medium == "image" and any(obj.motion not in (None, "still") for obj in scene.objects):
        return Reading(
            "ask", text, message="A picture does not move. Should I make a clip, or a picture without the motion?"
        )
    if scene.conflicts:
        return Reading("ask", text, message=replies.build_contradiction_question(*scene.conflicts[0]))
    if any(obj.colour and obj.colour == scene.background for obj in scene.objects):
        return Reading("ask", text, message=replies.INVISIBLE_QUESTION.format(scene.background))
    if any(obj.second_motion for obj in scene.objects) and "path" not in context.preset.edits:
        return Reading("decline", text, message=replies.build_impossible_reply("path", context.preset))
    for leftover, question in replies.SCENE_QUESTIONS.items():
        if leftover in scene.leftovers and (leftover != "direction" or not any(obj.motion for obj in scene.objects)):
            return Reading("ask", text, message=question)
    if not scene.objects or "shape" in scene.leftovers or any(obj.count == 0 for obj in scene.objects):
        return Reading("ask", text, message=replies.build_empty_question())
    has_reference = any(token.has("reference") for token in tokens)
    if not has_reference and english_rules.is_plain_wording(text, normalized, load_pattern("scene_form")):
        return Reading("do", text)
    medium: Medium = "video" if scene.is_video else "image"
    return Reading("do", scene.to_text(), goal="generate", medium=medium, reference="new")


def find_scene_problem(scene: DescribedScene, normalized: str) -> str:
    """Return what of a scene does not exist in the world, as a sentence; "" if all of it does."""
    if re.search(r"\bblack and white\b(?! background)|\bmonochrome\b|\bgreyscale\b", normalized):
        return "I cannot make black and white pictures."
    colours = [
        obj.colour for obj in scene.objects if obj.colour and obj.colour not in load_lexicon().facts.object_colours
    ]
    if colours:
        return f"{colours[0].capitalize()} is no colour of my shapes."
    if scene.background and scene.background not in load_lexicon().facts.backgrounds:
        return f"I cannot draw a {scene.background} background."
    if scene.count > load_lexicon().facts.max_objects:
        return f"I can show at most four shapes, not {scene.count}."
    return ""
