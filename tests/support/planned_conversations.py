"""Conversations in which what the planner plans is carried out on descriptions: no model runs and nothing is rendered.

A planned result is taken to show what its request says. So the list of phrases can be judged in seconds, and what is
judged is the reading of words alone.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from omnivideo.agent.command_results import execute_command
from omnivideo.agent.english_rules import (
    QUESTION,
    find_by_ordinal,
    find_description,
    is_change_request,
    is_go_back_request,
    matches_description,
)
from omnivideo.agent.media_words import find_requested_medium
from omnivideo.agent.small_world.changed_scenes import change_scene, read_worded_changes
from omnivideo.agent.small_world.lexicon import tokenize
from omnivideo.agent.small_world.readings import Context, Reading
from omnivideo.agent.small_world.replies import build_help
from omnivideo.agent.small_world.scenes import DescribedScene, read_scene
from omnivideo.agent.small_world.turn_reading import read_turn
from omnivideo.contracts import Artifact
from omnivideo.evaluation.phrases.entries import Phrase
from omnivideo.evaluation.phrases.judge import PhraseOutcome, ProducedArtifact, Verdict, judge_phrase
from omnivideo.evaluation.phrases.runner import list_capabilities
from omnivideo.ports import MediaTools
from omnivideo.presets import TINY
from omnivideo.synthetic.facts import ObjectDetection, SceneDetection
from omnivideo.synthetic.scenes import FRAME_SIZE
from omnivideo.turns import ExecutedCommand

MAX_RESULTS = 4  # of one turn
ANSWER = "what the MLLM answers"
OFFSETS = {"left": (-16, 0), "right": (16, 0), "top": (0, -16), "bottom": (0, 16)}
RELATIONS = {"left of": (-8, 0), "right of": (8, 0), "above": (0, -8), "below": (0, 8)}


@dataclass
class Result:
    """A planned picture or clip, and the numbers of the results that it is made from."""

    scene: DescribedScene
    medium: str
    sources: tuple[int, ...] = ()

    def describe(self) -> str:
        return self.scene.to_text().partition(" of ")[2]


class PlannedMediaTools(MediaTools):
    """Names the file that would be written."""

    def convert_artifact(self, artifact: Artifact, suffix: str) -> Artifact:
        return artifact.model_copy(update={"key": f"{artifact.key}.{suffix}"})


@dataclass
class PlannedConversation:
    """The results of a conversation and the number of the current one, 0 for none."""

    results: list[Result] = field(default_factory=list)
    current: int = 0
    last_request: str = ""

    def say(self, text: str) -> PhraseOutcome:
        """Carry out a message, and return what the assistant would have done with it."""
        earlier = len(self.results)
        readings = read_turn(text, self.build_context())
        reply, commands, is_declined, is_unclear = [], [], False, False
        for reading in readings:
            if reading.command is not None:
                message, is_refused = self.execute(reading.command)
                reply.append(message)
                is_declined |= is_refused
                commands += [] if is_refused else [reading.command]
            elif reading.kind in ("ask", "decline", "say", "fact"):
                reply.append(reading.message or ANSWER)
                is_declined |= reading.kind == "decline"
            elif (number := self.find_named_result(reading)) is None:
                is_unclear = True
                reply.append("Which one do you mean?")
            elif not self.carry_out(reading, number):
                reply.append(ANSWER)
        self.last_request = text
        return PhraseOutcome(
            reply="\n".join(reply),
            is_question=is_unclear or any(reading.kind == "ask" for reading in readings),
            declined=is_declined,
            commands=tuple(commands),
            artifacts=tuple(self.build_produced(number) for number in range(earlier + 1, len(self.results) + 1)),
            earlier=earlier,
            current=self.current,
        )

    def build_context(self) -> Context:
        result = self.results[self.current - 1] if self.current else None
        return Context(
            TINY,
            [make_artifact(number, other) for number, other in enumerate(self.results, start=1)],
            result and result.medium,
            self.last_request,
            self.current,
            lambda: result.describe() if result else "",
        )

    def find_named_result(self, reading: Reading) -> int | None:
        """Return the number of the result that a reading refers to, 0 for none; None if there is no such result."""
        if reading.reference.isdigit():
            return int(reading.reference)
        if reading.goal or reading.reference or not self.results:
            return self.current
        artifacts = [make_artifact(number, result) for number, result in enumerate(self.results, start=1)]
        if named := find_by_ordinal(reading.text, artifacts):
            return artifacts.index(named.artifact) + 1 if named.artifact else None
        if (described := find_description(reading.text)) is None:
            return self.current
        words, medium = described
        return next(
            (
                number
                for number, result in reversed(list(enumerate(self.results, start=1)))
                if medium in (None, result.medium) and matches_description(words, result.describe())
            ),
            None,
        )

    def carry_out(self, reading: Reading, current: int) -> bool:
        """Add the result of a reading of a result, and return whether it has one."""
        if is_go_back_request(reading.text):
            self.current = current
            return False
        if reading.goal == "understand":
            return False
        is_asked = not reading.goal and bool(QUESTION.search(reading.text))
        medium = current and find_requested_medium(reading.text, self.results[current - 1].medium)
        if is_asked and not medium:
            return False
        is_edit = reading.goal == "edit" or (not reading.goal and current and is_change_request(reading.text))
        if reading.joined:
            self.add(replace(self.results[reading.joined[0] - 1], sources=reading.joined))
        elif medium and not reading.goal:
            self.add(replace(self.results[current - 1], medium=medium, sources=(current,)))
        elif is_edit:
            source = self.results[current - 1]
            changes = read_worded_changes(reading.text, source.medium)
            self.add(Result(change_scene(source.scene, changes), source.medium, (current,)))
        else:
            scene = read_scene(tokenize(reading.text))
            self.add(Result(scene, reading.medium or ("video" if scene.is_video else "image")))
        return True

    def add(self, result: Result) -> None:
        self.results.append(result)
        self.current = len(self.results)

    def execute(self, command: ExecutedCommand) -> tuple[str, bool]:
        """Carry out a command, and return what it says and whether it is refused."""
        artifacts = [make_artifact(number, result) for number, result in enumerate(self.results, start=1)]
        state = {
            "artifacts": [artifact.model_dump() for artifact in artifacts],
            "current_key": str(self.current) if self.current else None,
            "turns": [], "results": [],
        }  # fmt: skip
        if command.name == "vary":
            count = int(command.arguments.get("count", 1))
            if not self.current or not 1 <= count <= MAX_RESULTS:
                return "I can make 1 to 4 variations at once.", True
            source = self.results[self.current - 1]
            for _ in range(count):
                self.add(replace(source))
            return "", False
        outcome = execute_command(state, command, build_help(), PlannedMediaTools(), MAX_RESULTS)
        if "current_key" in outcome.updates:
            self.current = int(outcome.updates["current_key"] or 0)
        return outcome.message, outcome.is_refused

    def build_produced(self, number: int) -> ProducedArtifact:
        result = self.results[number - 1]
        return ProducedArtifact.model_construct(
            number=number,
            medium=result.medium,
            frames=9 if result.medium == "video" else 1,
            sources=result.sources,
            facts=detect_planned_scene(result),
        )


def make_artifact(number: int, result: Result) -> Artifact:
    frames = 9 if result.medium == "video" else 1
    return Artifact(
        key=str(number), medium=result.medium, width=64, height=64, frames=frames, fps=8, caption=result.describe(),
        created_by="test", source=str(result.sources[0]) if result.sources else None, manifest="made",
    )  # fmt: skip


def say_planned(phrase: Phrase) -> PhraseOutcome:
    """Say the messages before a phrase and the phrase itself, and return what would be done with it."""
    conversation = PlannedConversation()
    for message in phrase.before:
        conversation.say(message)
    return conversation.say(phrase.text)


def judge_planned(phrase: Phrase) -> Verdict:
    """Judge what is planned for a phrase; what the MLLM would answer is not known and not judged."""
    outcome = say_planned(phrase)
    if ANSWER in outcome.reply:
        phrase = Phrase.model_validate(remove_patterns(phrase.model_dump(mode="json")))
    return judge_phrase(phrase, outcome, list_capabilities(TINY))


def remove_patterns(value: Any) -> Any:
    """Return a phrase's document without what the words of a reply must match."""
    if isinstance(value, dict):
        return {name: remove_patterns(item) for name, item in value.items() if name != "patterns"}
    return [remove_patterns(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- scenes


def detect_planned_scene(result: Result) -> SceneDetection:
    """Return the facts of a planned scene. What is not said has no value; the default places stand apart."""
    detections = []
    for index, obj in enumerate(result.scene.objects):
        sides = (obj.region or "").split()
        x = FRAME_SIZE / 2 + sum(OFFSETS[side][0] for side in sides if side in OFFSETS)
        y = FRAME_SIZE / 2 + sum(OFFSETS[side][1] for side in sides if side in OFFSETS)
        if result.scene.relation and index == result.scene.relation[0]:
            x, y = x + RELATIONS[result.scene.relation[1]][0], y + RELATIONS[result.scene.relation[1]][1]
        motion = obj.motion if result.medium == "video" else None
        detection = ObjectDetection(obj.shape, obj.colour, obj.size or "", motion, x, y)
        detections += [detection] * (1 if obj.count is None else obj.count)
    return SceneDetection(result.scene.background, tuple(detections), 1.0)
