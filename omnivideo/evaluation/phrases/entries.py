"""`held_out.jsonl` is never edited, never used in development; rules and weights are developed on `development.jsonl`.

The two halves of a list of things that people say, one entry a line. All entries were written first, and then divided
within each kind by the SHA-256 of their ids, so both halves come from the same distribution.

An entry states what is expected as cases: the first one applies whose required capabilities the preset declares. So a
preset that learns a task or a kind of edit needs no change of the list.
"""

from collections.abc import Set
from importlib.resources import files
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from omnivideo.contracts import Medium

Half = Literal["development", "held_out"]
Kind = Literal[
    "command", "small_talk", "impossible", "contradictory", "elliptical", "language", "correction", "several",
    "sizes_speeds", "editing", "request", "question", "new_task", "vague",
]  # fmt: skip
Capability = Literal[
    # tasks
    "text-to-image", "text-to-video", "image-editing", "video-editing",
    "image-to-video",  # animate a still
    "video-extension",  # make a clip longer
    "keyframes-to-video",  # the first and the last frame are given
    "join-clips",
    # kinds of edits; path is a motion in two legs, such as right, then up
    "edit:recolour", "edit:reshape", "edit:add", "edit:remove", "edit:background", "edit:motion", "edit:resize",
    "edit:replace", "edit:swap", "edit:speed", "edit:path",
    "frames:17",  # new clips of 17 frames
    # what full-size presets can do and the small world cannot
    "open-world",  # any subject and any change of it, not only coloured shapes
    "other-languages",  # requests in other languages than English
]  # fmt: skip
CommandName = Literal["undo", "restart", "help", "recap", "resend", "vary", "save", "list", "cancel", "export"]
Argument = Literal["which", "count", "format", "file"]


class EntryModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# ---------------------------------------------------------------- the facts of a result


class ExpectedObject(EntryModel):
    """The facts of one object; None allows any value. `motion` may have two legs, as in "right then up"."""

    shape: str | None = None
    colour: str | None = None
    size: Literal["small", "large"] | None = None
    motion: str | None = None
    speed: Literal["slow", "normal", "fast"] | None = None


class ExpectedScene(EntryModel):
    """The facts of a result: exactly these objects.

    `relation` is that of the first to the second object. `region` names the sides of the frame on which the first
    object lies.
    """

    objects: tuple[ExpectedObject, ...]
    background: str | None = None
    relation: Literal["left of", "right of", "above", "below"] | None = None
    region: tuple[Literal["left", "right", "top", "bottom"], ...] = ()


# ---------------------------------------------------------------- the expected behaviour


class Expectation(EntryModel):
    """What every behaviour has: regular expressions, all of which the reply must match, ignoring case."""

    patterns: tuple[str, ...] = ()


class MediaExpectation(Expectation):
    """A new result. Its facts are free if `scene` is None, its length if `frames` is empty (the accepted numbers)."""

    medium: Medium
    scene: ExpectedScene | None = None
    frames: tuple[int, ...] = ()


class Generate(MediaExpectation):
    """One new result that is made from no earlier one, or `count` of them; None is any number from one."""

    behaviour: Literal["generate"]
    count: int | None = 1


class Edit(MediaExpectation):
    """A new result that is made from earlier ones, by their numbers from 1; none given is the last one."""

    behaviour: Literal["edit"]
    sources: tuple[int, ...] = ()


class Answer(Expectation):
    """An answer in words; nothing is generated."""

    behaviour: Literal["answer"]


class Ask(Expectation):
    """A question to the user; nothing is generated."""

    behaviour: Literal["ask"]


class Decline(Expectation):
    """A statement that this is not possible; nothing is generated."""

    behaviour: Literal["decline"]


class Command(Expectation):
    """A command with at least these arguments; `which` is the number of a result.

    `current` is the number of the current result afterwards, 0 for none. `results` is what the command generates, from
    any source.
    """

    behaviour: Literal["command"]
    name: CommandName
    arguments: dict[Argument, int | str] = {}
    current: int | None = None
    results: Generate | None = None


Step = Annotated[Generate | Edit | Answer | Ask | Decline | Command, Field(discriminator="behaviour")]


class StepSequence(Expectation):
    """Several behaviours in one turn; the results come in this order.

    An edit without sources is one of the result of the step before, or of the last result if there is none.
    """

    behaviour: Literal["sequence"]
    steps: tuple[Step, ...] = Field(min_length=2)


Reaction = Annotated[
    Generate | Edit | Answer | Ask | Decline | Command | StepSequence,
    Field(discriminator="behaviour"),
]


class Case(EntryModel):
    """What is expected of a preset with these capabilities: any of the reactions."""

    requires: tuple[Capability, ...] = ()
    any_of: tuple[Reaction, ...] = Field(min_length=1)


class Phrase(EntryModel):
    """Something that people say, the messages of the conversation before it, and what they then expect.

    The messages before are in the world's own words. Each that is not a question gives one result.
    """

    id: str
    kind: Kind
    before: tuple[str, ...] = ()
    text: str
    expect: tuple[Case, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def check_that_one_case_always_applies(self) -> Self:
        if [case for case in self.expect if not case.requires] != [self.expect[-1]]:
            raise ValueError("exactly the last case must have no requirements")
        return self

    def select_case(self, capabilities: Set[str]) -> Case:
        """Return the first case whose requirements are among the capabilities."""
        return next(case for case in self.expect if set(case.requires) <= capabilities)


def load_phrases(half: Half) -> tuple[Phrase, ...]:
    """Return the entries of one half of the list."""
    text = (files("omnivideo.evaluation.phrases") / f"{half}.jsonl").read_text(encoding="utf-8")
    return tuple(Phrase.model_validate_json(line) for line in text.splitlines())
