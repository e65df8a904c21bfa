"""Answers that need no look at the pixels: what the file, the world or the thread says."""

from collections.abc import Callable, Sequence

from omnivideo.agent.small_world.lexicon import load_lexicon, tokenize
from omnivideo.agent.small_world.questions import FileFact
from omnivideo.agent.small_world.scenes import read_scene
from omnivideo.contracts import Artifact


def answer_fact(
    fact: FileFact, artifact: Artifact, artifacts: Sequence[Artifact], describe: Callable[[Artifact], str]
) -> str:
    """Return the answer about an artifact of a thread; `describe` returns the MLLM's description of one."""
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
    corners = load_lexicon().facts.corners
    shapes = list(dict.fromkeys(obj.shape for obj in read_scene(tokenize(describe(artifact))).objects if obj.shape))
    sentences = [f"A {shape} has {corners[shape]} corners." for shape in shapes]
    return " ".join(sentences) or "I do not see a shape."
