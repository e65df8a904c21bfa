"""What a thread's checkpoint holds: plain JSON, so that any saver can keep it and a later version can read it."""

import operator
from typing import Annotated, Any, TypedDict


class State(TypedDict, total=False):
    # The conversation so far.
    seed: int  # of the thread; every clip's seed follows from it
    turns: Annotated[list[dict[str, Any]], operator.add]  # contracts.Turn
    artifacts: Annotated[list[dict[str, Any]], operator.add]  # contracts.Artifact, in the order of their making
    current: str | None  # the key of what "it" is
    descriptions: dict[str, str]  # what the model sees on an artifact, where it was asked
    # The turn that runs.
    text: str
    attachments: list[dict[str, Any]]
    options: dict[str, Any]  # contracts.TurnOptions
    pieces: list[str]  # the acts' words
    abouts: list[str]  # what each is about, where the model has planned it
    at: int  # the act that runs
    asked: list[tuple[str, str]]
    done: list[dict[str, Any]]  # contracts.Done
    # The act that runs.
    act: dict[str, Any]  # contracts.Act
    over: bool  # whether it is done with
    routed: dict[str, Any]  # contracts.Routed
    trace: dict[str, Any] | None  # contracts.Trace
    statement: str | None  # what the check asks about
    tries: list[dict[str, Any]]  # contracts.Try
    failures: int  # turns of this thread that failed
