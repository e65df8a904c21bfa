"""Read one chat request: a turn of a conversation, or a request that is answered in words at once."""

from typing import Any

from omnivideo.agent.planner_prompts import load_prompts
from omnivideo.agent.references import MEDIUM_NAMES
from omnivideo.api.chat.history import ThreadFinder
from omnivideo.api.chat.links import remove_addresses
from omnivideo.api.chat.media import list_missing_files, read_documents, read_turn_media
from omnivideo.api.chat.messages import ChatMessage, Exchange, ShownConversation, read_conversation
from omnivideo.api.chat.task_answers import answer_by_rule
from omnivideo.api.chat.tasks import ConversationTask, build_task, find_task, write_task_answer
from omnivideo.api.chat.wrappers import Document, NamedFile
from omnivideo.api.dependencies import ServiceContext
from omnivideo.api.errors import APIError
from omnivideo.contracts import THINK_END, Artifact, Lane, MLLMRequest
from omnivideo.errors import InvalidInput
from omnivideo.turns import MAX_BACKGROUND_CHARS, TurnRecord

TEXT_ONLY_SUFFIX = "-text"  # of the name of the model that never generates
EMPTY_MESSAGE_ANSWER = "Your message is empty. What should I make?"
# Programs append it to the complete answer.
NOTHING_TO_CONTINUE_ANSWER = "\n\nThat answer is complete. What should I make next?"
CONTINUE_REQUEST = (
    "Continue the answer below exactly where it stops, and write only what follows.\n\n"
    "The user said: {words}\n\nThe answer so far: {answer}"
)
MAX_TOOL_RESULT_CHARS = 2_000
MAX_DOCUMENT_CHARS = MAX_BACKGROUND_CHARS // 2  # of all documents together
MAX_INSTRUCTION_CHARS = MAX_BACKGROUND_CHARS // 6


class ChatRequest:
    """What one chat request says, and the ways to answer it."""

    def __init__(
        self,
        context: ServiceContext,
        owner: str,
        model: str,
        messages: list[ChatMessage],
        response_format: dict[str, Any] | None = None,
        lane: Lane = "interactive",
    ):
        self.context, self.owner, self.model, self.lane = context, owner, model, lane
        self.messages, self.response_format = messages, response_format
        self.conversation: ShownConversation = read_conversation(messages)
        self.finder = ThreadFinder(context, owner)

    @property
    def follows_instructions(self) -> bool:
        """Whether the MLLM follows instructions; one that cannot plan knows only the requests of its training."""
        return self.context.conversations.preset.mllm.can_plan

    # ------------------------------------------------------------ answers in words

    def answer_in_words(self) -> str | None:
        """Return the answer to a request that is no turn of a conversation, or None if it is one.

        Nothing is generated and nothing is kept.
        """
        conversation, text = self.conversation, self.messages[-1].text
        if (task := find_task(conversation, text, self.response_format)) is not None:
            return self.answer_task(task)
        if conversation.ending == "assistant":
            return self.continue_answer()
        if conversation.ending == "tool":
            return self.answer_from_tool()
        if self.model.endswith(TEXT_ONLY_SUFFIX):
            return self.answer_text_only()
        return self.explain_missing_parts()

    def answer_task(self, task: ConversationTask) -> str:
        if not self.follows_instructions:
            return answer_by_rule(task)
        self.context.turn_runner.wait_until_idle(self.owner)
        return write_task_answer(self.context.conversations.mllm, task) or answer_by_rule(task)

    def continue_answer(self) -> str:
        """Return what follows an answer that was cut off."""
        unfinished = self.conversation.unfinished_answer.strip()
        if not self.follows_instructions:
            return self.find_rest_of_answer(unfinished) or NOTHING_TO_CONTINUE_ANSWER
        request = CONTINUE_REQUEST.format(words=self.conversation.turn.words, answer=unfinished)
        return self.ask_mllm(request, ()) or NOTHING_TO_CONTINUE_ANSWER

    def find_rest_of_answer(self, unfinished: str) -> str:
        """Return the rest of an answer that one of the owner's threads has; "" if none does or it is complete."""
        conversation = self.conversation
        digest_thread = self.finder.find_turn(conversation)
        answers = [result.answer for result in digest_thread.results if result.answer] if digest_thread else []
        whole = "\n".join(answers)
        return whole[len(unfinished) :].strip() if unfinished and whole.startswith(unfinished) else ""

    def answer_from_tool(self) -> str:
        result = "\n".join(self.conversation.tool_results)[:MAX_TOOL_RESULT_CHARS].strip()
        if not self.follows_instructions or not self.conversation.turn.words:
            return result or "The tool has returned nothing. What should I make?"
        return self.ask_mllm(self.conversation.turn.words, ()) or result

    def answer_text_only(self) -> str:
        turn = self.conversation.turn
        if not turn.words and not turn.media:
            return EMPTY_MESSAGE_ANSWER
        if not self.follows_instructions and not turn.media:
            return answer_by_rule(build_task(self.conversation, turn.words))
        artifacts = read_turn_media(self.context, self.owner, turn, "chat/text")
        return self.ask_mllm(self.choose_text(artifacts), tuple(artifacts)) or "I can only answer in words here."

    def ask_mllm(self, text: str, artifacts: tuple[Artifact, ...]) -> str:
        prompts = load_prompts(self.context.conversations.preset)
        documents = read_documents(self.context, self.owner, self.conversation.turn)
        system = prompts.add_background(None, self.build_background(documents))
        self.context.turn_runner.wait_until_idle(self.owner)
        request = MLLMRequest(text=text, artifacts=artifacts, system=system)
        answer = "".join(self.context.conversations.mllm.stream_text(request))
        return answer.rpartition(THINK_END)[2].strip()

    def explain_missing_parts(self) -> str | None:
        """Return what is missing of a message: files that it names, or anything at all."""
        turn = self.conversation.turn
        documents = read_documents(self.context, self.owner, turn)
        if missing := list_missing_files(self.context, self.owner, turn, documents):
            return describe_missing_files(missing)
        if turn.words or turn.media or turn.links or (turn.files and not documents):
            return None
        if documents:
            return f"I have {documents[0].name or 'the document'}. What should I make or answer?"
        return EMPTY_MESSAGE_ANSWER

    # ------------------------------------------------------------ turns

    def start_turn(self, turn_id: str, **options: Any) -> TurnRecord:
        """Start the turn of the last message in the thread of the messages before it, or in a fork of the thread.

        Raises APIError or InvalidInput if the request is refused.
        """
        try:
            return self.start_turn_in(self.finder.open_thread(self.conversation), turn_id, **options)
        except (APIError, InvalidInput) as error:
            # Another turn runs in the thread, or a picture answers its open question: both continue in a fork.
            if (
                not (isinstance(error, APIError) and error.code == "busy")
                and getattr(error, "field", "") != "attachments"
            ):
                raise
        fork_id = self.finder.open_thread(self.conversation, may_continue=False)
        return self.start_turn_in(fork_id, turn_id, **options)

    def refuse_turn(self, turn_id: str, error: InvalidInput, client_fields: dict[str, Any] | None = None) -> TurnRecord:
        """Create a turn that says what is wrong with the person's words or files, and return it."""
        thread_id = self.finder.open_thread(self.conversation, may_continue=False)
        return self.context.turn_runner.refuse_turn(turn_id, self.owner, thread_id, error, client_fields)

    def start_turn_in(self, thread_id: str, turn_id: str, **options: Any) -> TurnRecord:
        turn = self.conversation.turn
        attachments = read_turn_media(self.context, self.owner, turn, f"{thread_id}/attached")
        background = self.build_background(read_documents(self.context, self.owner, turn))
        return self.context.turn_runner.start_turn(
            turn_id,
            self.owner,
            thread_id,
            self.choose_text(attachments),
            attachments,
            lane=self.lane,
            **options,
            background=background,
        )

    def choose_text(self, attachments: list[Artifact]) -> str:
        """Return the words of the turn; media without words is to be described."""
        if self.conversation.turn.words or not attachments:
            return self.conversation.turn.words
        prompt = load_prompts(self.context.conversations.preset).describe
        return prompt.format(medium=MEDIUM_NAMES[attachments[-1].medium])

    def build_background(self, documents: list[Document]) -> str:
        """Return what an MLLM that follows instructions is told besides the words, within the limit of a turn."""
        conversation, parts = self.conversation, list[str]()
        if conversation.instructions:
            parts.append(f"Instructions:\n{conversation.instructions[:MAX_INSTRUCTION_CHARS]}")
        texts = "\n\n".join(f"Document {document.name}:\n{document.text}" for document in documents)
        if texts:
            parts.append(texts[:MAX_DOCUMENT_CHARS])
        if results := "\n".join(conversation.tool_results):
            parts.append(f"Result of a tool:\n{results[:MAX_TOOL_RESULT_CHARS]}")
        before = "\n".join(map(describe_exchange, conversation.history))
        if before:
            parts.append("Said before:\n" + before[-(MAX_BACKGROUND_CHARS - sum(map(len, parts)) - 200) :])
        return "\n\n".join(parts)

    def remember(self, thread_id: str, num_turns: int) -> None:
        """Store which thread continues this conversation, and after how many of its turns."""
        self.finder.remember(self.conversation, thread_id, num_turns)


def describe_exchange(exchange: Exchange) -> str:
    answer = " ".join(remove_addresses(exchange.answer).split())
    return f"User: {exchange.user.words}" + (f"\nAssistant: {answer}" if answer else "")


def describe_missing_files(files: list[NamedFile]) -> str:
    """Return a sentence that says which files did not come."""
    names = ", ".join(dict.fromkeys(file.name for file in files))
    verb = "were" if len(files) > 1 else "was"
    sentence = f"{names} {verb} named, but did not arrive in a form that I can read. Please attach again."
    return sentence[:1].upper() + sentence[1:]
