"""The context of a request, and the reading of an action: what is to be done for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from omnivideo.agent.small_world.questions import FileFact
from omnivideo.contracts import Artifact, Medium
from omnivideo.presets import ContinuationTask, Preset
from omnivideo.turns import ExecutedCommand

ReadingKind = Literal["do", "say", "ask", "decline", "command", "fact"]


@dataclass(frozen=True)
class Context:
    """What a request can refer to: the current artifact, all artifacts, the question asked before, and the preset.

    `describe` returns the MLLM's description of the current artifact.
    """

    preset: Preset
    artifacts: Sequence[Artifact] = ()
    medium: Medium | None = None  # of the current result; None if there is none
    last_request: str = ""
    number: int = 0  # of the current result; 0 if there is none
    describe: Callable[[], str] = lambda: ""
    is_changed: bool = False  # by an earlier action of the turn, which `describe` does not know


@dataclass(frozen=True)
class Reading:
    """What is to be done for one action: the text for the MLLM and, where the words say it, the medium of the result.

    `message` is what the user is told or asked instead. `reference` is the number of the artifact that is meant, "new",
    or "" for what the words of `text` refer to. `task` is that of a clip which begins with given frames, `last_frame`
    the number of the picture that it ends with, and `seconds` what is added to a clip, if it is said. `joined` are the
    numbers of the clips that become one.
    """

    kind: ReadingKind
    text: str
    targets: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    goal: Literal["", "generate", "edit", "understand"] = ""
    medium: Medium | Literal["text", ""] = ""
    message: str = ""
    reference: str = ""
    command: ExecutedCommand | None = None
    fact: FileFact | None = None
    task: ContinuationTask | None = None
    last_frame: int = 0
    seconds: float = 0
    joined: tuple[int, ...] = ()
