"""What the user is told: what is unknown or not possible, and what is."""

from collections.abc import Iterable, Sequence

from omnivideo.agent.capabilities import TASK_PHRASES
from omnivideo.agent.small_world.lexicon import load_lexicon
from omnivideo.presets import Preset

EDIT_PHRASES = {
    "recolour": "colours", "reshape": "shapes", "resize": "sizes", "background": "backgrounds", "motion": "motions",
    "speed": "speeds", "place": "places", "swap": "what two objects exchange", "path": "motions in two legs",
}  # fmt: skip
IMPOSSIBLE_PHRASES = {
    "recolour": "change colours", "reshape": "change shapes", "add": "add objects", "remove": "remove objects",
    "background": "change backgrounds", "motion": "change motions", "resize": "change sizes",
    "replace": "replace objects", "swap": "swap colours, shapes or places", "place": "move objects to another place",
    "speed": "change speeds", "path": "make motions in two legs",
    "video-extension": "make clips longer", "length": "change the length of clips", 
    "image-to-video": "animate pictures",
    "keyframes-to-video": "make the clip between two pictures",
    "medium": "turn a clip into a picture",
}  # fmt: skip
NOT_ENGLISH = "I understand English only."
ONLY_ENGLISH = (
    "I understand English only. / Ich verstehe nur Englisch. / Je ne comprends que l'anglais. / Solo entiendo inglés. "
    "/ 我只懂英语 / 英語だけ分かります / Понимаю только английский."
)
DURATION_ANSWER = (
    "I cannot choose from words how long a clip lasts. All my clips have the same number of frames; the option"
    " `seconds` of a request sets how long they take."
)
EXTENSION_REQUEST = "make it longer"
STILL_LENGTH_QUESTION = "A picture has no length. Should I animate it, or what else should I do with it?"
TWO_CLIPS_QUESTION = "That takes two clips, and I see fewer. What should I make?"
TWO_PICTURES_QUESTION = "That takes two pictures, and I see fewer. What should I make?"
NOTHING_QUESTION = "There is nothing to look at yet. What should I create?"
OBSERVATION_QUESTION = "I see {}. What should I change?"
COUNT_QUESTION = "How many should there be? I can show up to four."
DIRECTION_QUESTION = "Which way should it move: left, right, up or down?"
SCENE_QUESTIONS = {
    "direction": DIRECTION_QUESTION, "number": COUNT_QUESTION,
    "negation": "I know what it should not be. What should I draw instead?",
}  # fmt: skip
HELP_OPEN = (
    "Say what you would like to see, change or know. You can also say: undo, start over, show me the first one again, "
    "give me three variations, save it as final.mp4, as a gif, what did you just do?"
)


def build_unclear_question() -> str:
    """Return the question for a request that is not understood."""
    return f"I am not sure what you mean. What should I make or change? {load_lexicon().facts.contents}"


def build_empty_question() -> str:
    """Return the question for a request that says nothing of what to draw."""
    return f"What should I draw? For example: {load_lexicon().facts.example}."


INVISIBLE_QUESTION = "It could not be seen on a {} background. Which other colour should it have?"
INVISIBLE_CHANGE_QUESTION = "It could not be seen: I see {}. Which other colour should it have?"


def build_help() -> str:
    """Return what the world has and which commands there are."""
    return f"{load_lexicon().facts.contents} {HELP_OPEN}"


def join_words(words: Iterable[str], conjunction: str = "and") -> str:
    items = list(words)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {conjunction} {items[-1]}" if items else ""


def describe_edits(preset: Preset) -> str:
    """Return what can be changed, as a sentence."""
    changes = [EDIT_PHRASES[kind] for kind in preset.edits if kind in EDIT_PHRASES]
    others = [f"{kind} objects" for kind in ("add", "remove", "replace") if kind in preset.edits]
    return f"I can change {join_words(changes)}" + (f", and {join_words(others)}." if others else ".")


def build_unknown_reply(unknown: Sequence[str], preset: Preset, num_words: int) -> str:
    """Return that words are unknown, and what is known."""
    quoted = join_words([f"{word!r}" for word in dict.fromkeys(unknown)], "or")
    language = f" {NOT_ENGLISH}" if 2 * len(unknown) >= num_words else ""
    return f"I do not know {quoted}.{language} {load_lexicon().facts.contents} {describe_edits(preset)}"


def build_impossible_reply(kind: str, preset: Preset) -> str:
    """Return that a kind of change is not possible, and what is."""
    tasks = join_words(TASK_PHRASES[task] for task in preset.sampling if task in TASK_PHRASES)
    return f"I cannot {IMPOSSIBLE_PHRASES.get(kind, 'do that')}. I can {tasks}. {describe_edits(preset)}"


def build_contradiction_question(first: str, second: str) -> str:
    """Return the question which of two values is meant."""
    if first == "removed":
        return f"Should I remove {second}, or keep it and change it?"
    if first == "as it is":
        return f"Should that stay as it is, or become {second}?"
    return f"Do you mean {first} or {second}?"
