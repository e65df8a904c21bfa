"""Whether the readings of a turn leave out a part of it, so that the user is asked instead of shown a wrong result."""

from omnivideo.agent.small_world.changed_scenes import describe_changed_scene
from omnivideo.agent.small_world.lexicon import load_lexicon, normalize_text, tokenize
from omnivideo.agent.small_world.readings import Context, Reading
from omnivideo.agent.small_world.scenes import read_scene
from omnivideo.agent.small_world.wordings import load_pattern

# What is named shortly after them is not meant, or stays as it is.
NEGATING_WORDS = {
    "not", "no", "instead", "never", "without", "than", "from", "remove", "keep", "leave", "was", "were",
}  # fmt: skip


def is_part_left_out(readings: list[Reading], text: str, context: Context) -> bool:
    """Return whether a text names what no reading has: a number of results, or a colour or shape that is new.

    What is said not to be meant, or stands there already, need not be in a reading.
    """
    made = [reading for reading in readings if reading.kind == "do" and reading.goal in ("generate", "edit")]
    if not made or len(made) < len(readings):
        return False
    number = load_pattern("result_number").search(normalize_text(text))
    is_generated = all(reading.goal == "generate" for reading in made)
    if number and is_generated and len(made) != int(load_lexicon().phrases[number["number"]][0][1]):
        return True
    if is_generated:
        return False
    if load_pattern("correction").match(normalize_text(text)) and is_nothing_changed(made, context):
        return True
    named = list_named_values(text) - list_named_values(" ; ".join(reading.text for reading in made), is_wish=False)
    return bool(named) and bool(named - list_named_values(context.describe()))


def is_nothing_changed(readings: list[Reading], context: Context) -> bool:
    """Return whether the current result shows already what changes of it would make."""
    before = context.describe()
    after = before
    for reading in readings:
        if reading.goal != "edit" or reading.reference.isdigit():
            return False
        after = describe_changed_scene(after, reading.text, context.medium or "")
    return after == read_scene(tokenize(before)).to_text().partition(" of ")[2]


def list_named_values(text: str, *, is_wish: bool = True) -> set[str]:
    """Return the colours and shapes that a text names, except those that a wish says are not meant."""
    tokens, values = tokenize(text), set[str]()
    for index, token in enumerate(tokens):
        before = {other.text for other in tokens[max(0, index - 4) : index]}
        if not (is_wish and before & NEGATING_WORDS):
            values |= {value for name, value in token.meanings if name in ("colour", "shape", "plural")}
    return values
