"""Find the artifact that an action refers to, by the MLLM's plan or by the request's words; ask if it is unclear."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from langgraph.types import interrupt

from omnivideo.agent import english_rules
from omnivideo.agent.answer_text import remove_reasoning
from omnivideo.agent.mllm_plan import CURRENT, LAST, NEW, UNCLEAR
from omnivideo.contracts import Artifact, Medium, MLLMRequest
from omnivideo.ports import MLLM

MAX_CHOICES = 10  # the newest artifacts, in a question
MEDIUM_NAMES: dict[Medium, str] = {"image": "picture", "video": "video"}


class StoredArtifacts(Sequence[Artifact]):
    """The artifacts in a thread's state. Each is parsed when it is used first: most turns need the last one only."""

    def __init__(self, documents: Sequence[Mapping[str, Any]]):
        self.documents = documents
        self.parsed: dict[int, Artifact] = {}

    def __len__(self) -> int:
        return len(self.documents)

    @overload
    def __getitem__(self, index: int) -> Artifact: ...

    @overload
    def __getitem__(self, index: slice) -> list[Artifact]: ...

    def __getitem__(self, index: int | slice) -> Artifact | list[Artifact]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        if position not in self.parsed:
            self.parsed[position] = Artifact.parse_stored(self.documents[position])
        return self.parsed[position]

    def find_last(self, key: str | None) -> Artifact | None:
        """Return the last artifact with this key, or None."""
        positions = range(len(self) - 1, -1, -1)
        return next((self[position] for position in positions if self.documents[position]["key"] == key), None)

    def find_number(self, key: str) -> int:
        """Return the number of the first artifact with this key, from 1; 0 if there is none."""
        keys = (document["key"] for document in self.documents)
        return next((number for number, other in enumerate(keys, start=1) if other == key), 0)


@dataclass(frozen=True)
class ReferenceQuestion:
    """The question to ask the user if it is unclear which artifact an action refers to."""

    text: str


@dataclass
class ReferenceSearch:
    """The search for the artifact that an action refers to. It asks the MLLM, but not the user.

    `descriptions` holds the MLLM's description of each artifact that it has described, by key.
    """

    mllm: MLLM
    describe_prompt: str
    artifacts: StoredArtifacts
    descriptions: dict[str, str]

    def artifact_from_plan(self, reference: str, current_key: str | None = None) -> Artifact | ReferenceQuestion | None:
        """Return the artifact of a plan's reference: "new", "current", "last", "unclear", or an artifact's number."""
        if reference == NEW or not self.artifacts:
            return None
        if reference == CURRENT:
            return self.artifacts.find_last(current_key)
        if reference == UNCLEAR:
            return self.build_question("")
        return self.artifacts[-1 if reference == LAST else int(reference) - 1]

    def resolve_by_words(self, text: str, current_key: str | None) -> Artifact | ReferenceQuestion | None:
        artifacts = self.artifacts
        if not artifacts:
            return None
        if named := english_rules.find_by_ordinal(text, artifacts):
            return named.artifact or self.build_question(f"There is no {named.words.removeprefix('the ')} here. ")
        if described := english_rules.find_description(text):
            return self.find_by_description(*described)
        if english_rules.is_reference(text):
            return artifacts.find_last(current_key)
        return None

    def find_by_description(self, description: str, medium: Medium | None) -> Artifact | ReferenceQuestion:
        """Return the latest artifact whose description by the MLLM has all the words of `description`."""
        for artifact in reversed(self.artifacts):
            if medium in (None, artifact.medium) and english_rules.matches_description(
                description, self.describe_artifact(artifact)
            ):
                return artifact
        return self.build_question(f"There is no {description.strip()} here. ")

    def build_question(self, preamble: str) -> ReferenceQuestion:
        """Return the question that lists the newest artifacts."""
        choices = self.artifacts[-MAX_CHOICES:]
        descriptions = [self.describe_artifact(artifact) for artifact in choices]
        return ReferenceQuestion(preamble + english_rules.build_choice_question(choices, descriptions))

    def describe_artifact(self, artifact: Artifact) -> str:
        if artifact.key not in self.descriptions:
            request = MLLMRequest(
                text=self.describe_prompt.format(medium=MEDIUM_NAMES[artifact.medium]), artifacts=(artifact,)
            )
            self.descriptions[artifact.key] = remove_reasoning("".join(self.mllm.stream_text(request)))
        return self.descriptions[artifact.key]


def ask_user(question: str, clarifications: list[tuple[str, str]]) -> str:
    """Interrupt the turn until the user replies; return the reply, and add it to the clarifications."""
    reply = str(interrupt(question))
    clarifications.append((question, reply))
    return reply


def ask_which_artifact(
    question: str,
    artifacts: Sequence[Artifact],
    descriptions: Mapping[str, str],
    clarifications: list[tuple[str, str]],
) -> Artifact:
    """Ask which of the artifacts is meant, at most twice; without an answer, return the last one."""
    choices = artifacts[-MAX_CHOICES:]
    texts = [descriptions.get(artifact.key, "") for artifact in choices]
    for _ in range(2):
        if artifact := english_rules.artifact_from_reply(ask_user(question, clarifications), choices, texts):
            return artifact
    return artifacts[-1]
