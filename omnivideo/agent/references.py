"""Find the artifact that an action refers to, by the MLLM's plan or by the request's words; ask if it is unclear."""

from dataclasses import dataclass

from langgraph.types import interrupt

from omnivideo.agent import english_rules
from omnivideo.agent.answer_text import remove_reasoning
from omnivideo.agent.mllm_plan import CURRENT, LAST, NEW, UNCLEAR
from omnivideo.contracts import Artifact, Medium, MLLMRequest
from omnivideo.ports import MLLM

MEDIUM_NAMES: dict[Medium, str] = {"image": "picture", "video": "video"}


@dataclass
class ReferenceSearch:
    """The search for the artifact that an action refers to, with the questions asked during the search.

    `descriptions` holds the MLLM's description of each artifact that it has described, by key.
    """

    mllm: MLLM
    describe_prompt: str
    artifacts: list[Artifact]
    descriptions: dict[str, str]
    clarifications: list[tuple[str, str]]

    def ask_user(self, question: str) -> str:
        """Interrupt the turn until the user replies, and return the reply."""
        reply = str(interrupt(question))
        self.clarifications.append((question, reply))
        return reply

    def artifact_from_plan(self, reference: str, current_key: str | None = None) -> Artifact | None:
        """Return the artifact of a plan's reference: "new", "current", "last", "unclear", or an artifact's number."""
        if reference == NEW or not self.artifacts:
            return None
        if reference == CURRENT:
            return next((artifact for artifact in reversed(self.artifacts) if artifact.key == current_key), None)
        if reference == UNCLEAR:
            return self.ask_which_artifact("")
        return self.artifacts[-1 if reference == LAST else int(reference) - 1]

    def resolve_by_words(self, text: str, current_key: str | None) -> Artifact | None:
        artifacts = self.artifacts
        if not artifacts:
            return None
        if named := english_rules.find_by_ordinal(text, artifacts):
            return named.artifact or self.ask_which_artifact(f"There is no {named.words.removeprefix('the ')} here. ")
        if described := english_rules.find_description(text):
            return self.find_by_description(*described)
        if english_rules.is_reference(text):
            return next((artifact for artifact in reversed(artifacts) if artifact.key == current_key), None)
        return None

    def find_by_description(self, description: str, medium: Medium | None) -> Artifact:
        """Return the latest artifact whose description by the MLLM has all the words of `description`."""
        for artifact in reversed(self.artifacts):
            if medium in (None, artifact.medium) and english_rules.matches_description(
                description, self.describe_artifact(artifact)
            ):
                return artifact
        return self.ask_which_artifact(f"There is no {description.strip()} here. ")

    def ask_which_artifact(self, preamble: str) -> Artifact:
        """Ask which artifact is meant, at most twice; without an answer, return the last one."""
        descriptions = [self.describe_artifact(artifact) for artifact in self.artifacts]
        question = preamble + english_rules.build_choice_question(self.artifacts, descriptions)
        for _ in range(2):
            if artifact := english_rules.artifact_from_reply(self.ask_user(question), self.artifacts, descriptions):
                return artifact
        return self.artifacts[-1]

    def describe_artifact(self, artifact: Artifact) -> str:
        if artifact.key not in self.descriptions:
            request = MLLMRequest(
                text=self.describe_prompt.format(medium=MEDIUM_NAMES[artifact.medium]), artifacts=(artifact,)
            )
            self.descriptions[artifact.key] = remove_reasoning("".join(self.mllm.stream_text(request)))
        return self.descriptions[artifact.key]
