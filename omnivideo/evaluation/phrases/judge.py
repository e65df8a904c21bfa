"""Judge what the assistant did with a phrase: right, a wrong clip, or another wrong reaction.

The judge is pure: what drives a conversation fills in a `PhraseOutcome`. Its facts are optional; without them only the
behaviour is judged, because the lengths and the facts of the list are those of the small world.
"""

import itertools
import re
from collections.abc import Iterator, Sequence, Set
from typing import Literal

from omnivideo.contracts import Medium
from omnivideo.evaluation.phrases.entries import (
    Answer,
    Ask,
    Command,
    CommandName,
    Decline,
    Edit,
    EntryModel,
    ExpectedObject,
    ExpectedScene,
    Generate,
    MediaExpectation,
    Phrase,
    Reaction,
    Step,
    StepSequence,
)
from omnivideo.synthetic.facts import ObjectDetection, SceneDetection, relation_holds
from omnivideo.synthetic.scenes import FRAME_SIZE
from omnivideo.turns import ExecutedCommand

INFORMING_COMMANDS: frozenset[CommandName] = frozenset({"help", "recap", "list"})  # as good as an answer in words
REGION_TOLERANCE = 2.0  # px by which the centre of an object must be off the middle of the frame

Judgement = Literal["right", "wrong_other", "wrong_clip"]  # from best to worst


class ProducedArtifact(EntryModel):
    """A result of the turn: its number in the conversation, and the numbers of the results that it was made from."""

    number: int
    medium: Medium
    frames: int
    sources: tuple[int, ...] = ()
    facts: SceneDetection | None = None


class PhraseOutcome(EntryModel):
    """What the assistant did with a phrase.

    `earlier` is the number of results before the phrase, so the results of the turn are numbered from `earlier` + 1.
    `current` is the number of the current result after the turn, 0 for none.
    """

    reply: str = ""
    is_question: bool = False
    declined: bool = False
    commands: tuple[ExecutedCommand, ...] = ()
    artifacts: tuple[ProducedArtifact, ...] = ()
    earlier: int = 0
    current: int = 0


class Verdict(EntryModel):
    """`wrong_clip` means that something was generated that is not what was asked, or that nothing should have been."""

    judgement: Judgement
    reason: str = ""


def judge_phrase(phrase: Phrase, outcome: PhraseOutcome, capabilities: Set[str]) -> Verdict:
    """Judge an outcome by the most favourable of the reactions that the phrase allows with these capabilities."""
    verdicts = [judge_reaction(reaction, outcome) for reaction in phrase.select_case(capabilities).any_of]
    for judgement in ("right", "wrong_other"):
        if best := [verdict for verdict in verdicts if verdict.judgement == judgement]:
            return best[0]
    return Verdict(judgement="wrong_clip", reason="; or ".join(verdict.reason for verdict in verdicts))


def judge_reaction(reaction: Reaction, outcome: PhraseOutcome) -> Verdict:
    steps = reaction.steps if isinstance(reaction, StepSequence) else (reaction,)
    if problem := find_problem_of_results(steps, outcome):
        return Verdict(judgement="wrong_clip" if outcome.artifacts else "wrong_other", reason=problem)
    problems = itertools.chain(
        find_problems_of_commands(steps, outcome),
        find_problems_of_reply(steps, outcome),
        find_missing_patterns((reaction, *steps), outcome.reply),
    )
    problem = next(problems, "")
    return Verdict(judgement="wrong_other" if problem else "right", reason=problem)


# ---------------------------------------------------------------- results


def find_problem_of_results(steps: Sequence[Step], outcome: PhraseOutcome) -> str:
    """Return why the results of the turn are not those of the steps, or "" if they are.

    A result that an expected one was made from, such as the first of two edits, may stand before it.
    """
    pending, last, matched = list(outcome.artifacts), outcome.earlier, list[int]()
    for step in steps:
        media = step.results if isinstance(step, Command) else step
        if not isinstance(media, Generate | Edit):
            continue
        count = media.count if isinstance(media, Generate) else 1
        numbers, problem = list[int](), "nothing was generated" if not outcome.artifacts else "too little was generated"
        while pending and (count is None or len(numbers) < count):
            sources = find_expected_sources(step, last)
            problems = [find_problem_of_artifact(media, artifact, sources, outcome) for artifact in pending]
            if "" not in problems:
                problem = problems[-1]
                break
            index = problems.index("")
            numbers.append(pending[index].number)
            del pending[: index + 1]
        if len(numbers) < (count or 1):
            return problem
        matched += numbers
        last = matched[-1]
    accounted_for = {ancestor for number in matched for ancestor in iterate_ancestors(number, outcome)}
    extra = [artifact.number for artifact in outcome.artifacts if artifact.number not in accounted_for]
    return f"result {extra[0]} should not have been generated" if extra else ""


def find_expected_sources(step: Step, last: int) -> tuple[int, ...] | None:
    """Return the numbers of the results that the step's result is made from, or None for any."""
    if isinstance(step, Command):
        return None
    return (step.sources or (last,)) if isinstance(step, Edit) else ()


def find_problem_of_artifact(
    media: MediaExpectation, artifact: ProducedArtifact, sources: tuple[int, ...] | None, outcome: PhraseOutcome
) -> str:
    """Return why a result is not the expected one, or "" if it is."""
    if artifact.medium != media.medium:
        return f"result {artifact.number} is of the medium {artifact.medium}, not {media.medium}"
    found = find_sources(artifact.number, sources or (), outcome)
    if sources is not None and found != sources:
        return f"result {artifact.number} is made from {list(found)}, not from {list(sources)}"
    if artifact.facts is None:
        return ""
    if media.frames and artifact.frames not in media.frames:
        return f"result {artifact.number} has {artifact.frames} frames, not {' or '.join(map(str, media.frames))}"
    if media.scene is not None and not is_scene_met(media.scene, artifact.facts):
        return f"result {artifact.number} shows something else"
    return ""


def find_sources(number: int, wanted: tuple[int, ...], outcome: PhraseOutcome) -> tuple[int, ...]:
    """Return what a result was made from, in order: the wanted results, and those from before the turn."""
    produced = {artifact.number: artifact.sources for artifact in outcome.artifacts}
    found = list[int]()
    for source in produced[number]:
        is_origin = source in wanted or source not in produced
        found += (source,) if is_origin else find_sources(source, wanted, outcome)
    return tuple(dict.fromkeys(found))


def iterate_ancestors(number: int, outcome: PhraseOutcome) -> Iterator[int]:
    """Yield a result of the turn and all results of the turn that it was made from."""
    for artifact in outcome.artifacts:
        if artifact.number == number:
            yield number
            for source in artifact.sources:
                yield from iterate_ancestors(source, outcome)


# ---------------------------------------------------------------- facts


def is_scene_met(scene: ExpectedScene, detection: SceneDetection) -> bool:
    """Return whether a result shows exactly the expected objects, in any order."""
    if scene.background not in (None, detection.background) or len(detection.objects) != len(scene.objects):
        return False
    return any(is_scene_met_in_order(scene, order) for order in itertools.permutations(detection.objects))


def is_scene_met_in_order(scene: ExpectedScene, detections: Sequence[ObjectDetection]) -> bool:
    if not all(map(is_object_met, scene.objects, detections)):
        return False
    if scene.region and not lies_in_region(detections[0], scene.region):
        return False
    return scene.relation is None or relation_holds(scene.relation, detections[0], detections[1])


def is_object_met(expected: ExpectedObject, detection: ObjectDetection) -> bool:
    second_motion = getattr(detection, "second_motion", None)
    motion = f"{detection.motion} then {second_motion}" if second_motion else detection.motion
    pairs = (
        (expected.shape, detection.shape),
        (expected.colour, detection.colour),
        (expected.size, detection.size),
        (expected.motion, motion),
        (expected.speed, getattr(detection, "speed", None)),
    )
    return all(wanted in (None, found) for wanted, found in pairs)


def lies_in_region(detection: ObjectDetection, region: Sequence[str]) -> bool:
    """Return whether the centre of an object lies on all these sides of the middle of the frame."""
    low, high = FRAME_SIZE / 2 - REGION_TOLERANCE, FRAME_SIZE / 2 + REGION_TOLERANCE
    sides = {
        "left": detection.x < low,
        "right": detection.x > high,
        "top": detection.y < low,
        "bottom": detection.y > high,
    }
    return all(sides[side] for side in region)


# ---------------------------------------------------------------- words and commands


def find_problems_of_commands(steps: Sequence[Step], outcome: PhraseOutcome) -> Iterator[str]:
    """Yield each expected command that was not executed, and each executed one that was not expected."""
    unexpected = list(outcome.commands)
    for step in steps:
        if not isinstance(step, Command):
            continue
        matches = [command for command in unexpected if is_command_met(step, command)]
        if not matches:
            yield f"the command {step.name} {step.arguments or ''}".rstrip() + " was not executed"
            continue
        unexpected.remove(matches[0])
        if step.current not in (None, outcome.current):
            yield f"the current result is {outcome.current}, not {step.current}"
    permitted: set[CommandName] = set()
    if any(isinstance(step, Answer) for step in steps):
        permitted |= INFORMING_COMMANDS
    if any(isinstance(step, Edit) for step in steps):
        permitted.add("undo")  # a correction may undo a change and make another one
    for command in unexpected:
        if command.name not in permitted:
            yield f"the command {command.name} was executed"


def is_command_met(expected: Command, command: ExecutedCommand) -> bool:
    """Return whether a command has the expected name and at least the expected arguments, ignoring case."""
    return expected.name == command.name and all(
        str(command.arguments.get(name, "")).casefold() == str(value).casefold()
        for name, value in expected.arguments.items()
    )


def find_problems_of_reply(steps: Sequence[Step], outcome: PhraseOutcome) -> Iterator[str]:
    """Yield what keeps the reply from being an answer, a question or a refusal, where one is expected."""
    for step in steps:
        if isinstance(step, Answer):
            if not outcome.reply.strip() and not outcome.commands:
                yield "there is no answer"
            if len(steps) == 1 and (outcome.is_question or outcome.declined):
                yield "the reply is a question" if outcome.is_question else "the request was declined"
        elif isinstance(step, Ask) and not outcome.is_question:
            yield "the user was not asked"
        elif isinstance(step, Decline) and not outcome.declined:
            yield "the request was not declined"


def find_missing_patterns(expectations: Sequence[Reaction], reply: str) -> Iterator[str]:
    for pattern in dict.fromkeys(pattern for expectation in expectations for pattern in expectation.patterns):
        if not re.search(pattern, reply, re.IGNORECASE):
            yield f"the reply does not match {pattern!r}"
