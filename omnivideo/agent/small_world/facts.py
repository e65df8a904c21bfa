"""Answers that need no look at the pixels: what the file, the world or the thread says."""

from collections.abc import Callable, Sequence

from omnivideo.agent.small_world.lexicon import load_lexicon, tokenize
from omnivideo.agent.small_world.questions import FileFact
from omnivideo.agent.small_world.scenes import ObjectRequest, read_scene
from omnivideo.contracts import Artifact


def answer_fact(
    fact: FileFact,
    artifact: Artifact,
    artifacts: Sequence[Artifact],
    describe: Callable[[Artifact], str],
    question: str = "",
) -> str:
    """Return the answer about an artifact of a thread; `describe` returns the MLLM's description of one.

    The `question` says whose presence is asked for.
    """
    if fact == "length":
        if artifact.medium == "image":
            return "It is a picture: one frame."
        seconds = artifact.frames / artifact.fps
        return f"It has {artifact.frames} frames: {seconds:.1f} seconds at {artifact.fps:g} frames per second."
    if fact == "size":
        return f"It is {artifact.width} x {artifact.height} pixels."
    if fact == "medium":
        noun = "picture" if artifact.medium == "image" else f"video of {artifact.frames} frames"
        return f"It is a {noun}."
    if fact == "earlier":
        earlier = next((other for other in artifacts if other.key == artifact.source), None)
        return f"Before that it was {describe(earlier)}." if earlier else "It has not been changed."
    if fact == "presence":
        return answer_presence(question, describe(artifact))
    corners = load_lexicon().facts.corners
    shapes = list(dict.fromkeys(obj.shape for obj in read_scene(tokenize(describe(artifact))).objects if obj.shape))
    sentences = [f"A {shape} has {corners[shape]} corners." for shape in shapes]
    return " ".join(sentences) or "I do not see a shape."


def answer_presence(question: str, description: str) -> str:
    """Return whether what a question asks for is in a description: the MLLM describes better than it says yes or no."""
    seen = read_scene(tokenize(description)).objects
    asked = [obj for obj in read_scene(tokenize(question)).objects if obj.shape or obj.colour]
    is_there = bool(asked) and all(any(is_included(obj, other) for other in seen) for obj in asked)
    return f"{'Yes' if is_there else 'No'}: I see {description}."


def is_included(asked: ObjectRequest, seen: ObjectRequest) -> bool:
    """Return whether a seen object, or so many equal ones, is what is asked for."""
    values = ((asked.shape, seen.shape), (asked.colour, seen.colour), (asked.size, seen.size))
    return all(wanted in (None, found) for wanted, found in values) and (asked.count or 1) <= (seen.count or 1)
