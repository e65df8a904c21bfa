"""Requests about a conversation, which chat programs make for themselves: titles, tags, summaries and others.

They are not part of any conversation, so they are answered in words, in the form that they ask for, and kept in no
thread. A model that can plan answers them; for one that cannot, rules answer from the history (task_answers.py).
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from omnivideo.api.chat.messages import Exchange, ShownConversation
from omnivideo.contracts import THINK_END, MLLMRequest
from omnivideo.ports import MLLM

TaskKind = Literal[
    "title", "tags", "follow_ups", "queries", "autocomplete", "emoji", "image_prompt", "summary", "answer"
]
TASK_WORDS: dict[TaskKind, re.Pattern[str]] = {
    "autocomplete": re.compile(r"autocomplet", re.IGNORECASE),
    "queries": re.compile(r"search (?:quer|is necessary)|\bqueries\b", re.IGNORECASE),
    "follow_ups": re.compile(r"follow[- ]?ups?\b", re.IGNORECASE),
    "tags": re.compile(r"\btags?\b|\bkeywords?\b", re.IGNORECASE),
    "image_prompt": re.compile(r"prompt for an? \w+ generation", re.IGNORECASE),
    "emoji": re.compile(r"fitting emoji", re.IGNORECASE),
    "title": re.compile(r"\btitle\b|\bname\b|\btopic\b|\bheadline\b", re.IGNORECASE),
    "summary": re.compile(r"\bsummar\w+|\brecap\b", re.IGNORECASE),
}
JSON_KEYS: dict[TaskKind, str] = {
    "title": "title", "tags": "tags", "follow_ups": "follow_ups", "queries": "queries", "autocomplete": "text",
    "emoji": "emoji", "image_prompt": "prompt", "summary": "summary", "answer": "text",
}  # fmt: skip
LIST_KINDS: tuple[TaskKind, ...] = ("tags", "follow_ups", "queries")
KINDS_BY_KEY = {key: kind for kind, key in JSON_KEYS.items() if key != "text"}
CHAT_HISTORY = re.compile(r"<chat_history>(?P<history>.*?)(?:</chat_history>|\Z)", re.DOTALL)
TASK_HEADING = re.compile(r"\A\s*#{1,4} *task\b", re.IGNORECASE)
# A template of retrieval has the same heading; it wraps the person's words in a context.
RETRIEVAL = re.compile(r"<(?:context|source|user_query|query)\b|\buser(?:'s)? query\b", re.IGNORECASE)
CONVERSATION_NOUN = r"(?:conversation|chat(?: history)?|discussion|dialogue|exchange)\b"
ABOUT_CONVERSATION = re.compile(
    rf"\b(?:title|name|tags?|keywords|topic|follow[- ]?ups?|summar\w+|recap|search quer\w+)\b"
    rf".{{0,80}}?\b{CONVERSATION_NOUN}"
    rf"|\b{CONVERSATION_NOUN}.{{0,160}}?\b(?:title|name|tags?|keywords|topic|summar\w+|recap)\b",
    re.IGNORECASE | re.DOTALL,
)
EMOJI_REQUEST = re.compile(r"\bthrough a fitting emoji\b", re.IGNORECASE)
MEDIA_NOUN = re.compile(r"\b(?:clips?|videos?|pictures?|images?|animations?|drawings?|photos?)\b", re.IGNORECASE)
JSON_REQUEST = re.compile(r"\bjson\b", re.IGNORECASE)
JSON_KEY = re.compile(r"\{\s*+[\"'](?P<key>\w++)[\"']\s*+:\s*+(?P<is_list>\[)?")
MAX_HISTORY_CHARS = 12_000


@dataclass(frozen=True)
class ConversationTask:
    """A request about a conversation.

    `speeches` is the conversation, as (role, text). `json_schema` is the form that is asked for; None asks for words.
    """

    kind: TaskKind
    text: str
    speeches: tuple[tuple[Literal["user", "assistant"], str], ...]
    json_schema: dict[str, Any] | None = None
    instructions: str = ""


def find_task(
    conversation: ShownConversation, text: str, response_format: dict[str, Any] | None
) -> ConversationTask | None:
    """Return the request about the conversation that a request is, or None if it is part of the conversation.

    `text` is the last message as the client sent it.
    """
    wants_json = response_format is not None and response_format.get("type") in ("json_object", "json_schema")
    is_task = conversation.ending == "system" or wants_json
    is_task = is_task or (conversation.ending == "user" and is_about_conversation(text))
    return build_task(conversation, text, response_format) if is_task else None


def is_about_conversation(text: str) -> bool:
    """Return whether a user's message is a chat program's request about the conversation."""
    if CHAT_HISTORY.search(text) or EMOJI_REQUEST.search(text):
        return True
    if TASK_HEADING.match(text):
        return not RETRIEVAL.search(text)
    return bool(ABOUT_CONVERSATION.search(text[:1000])) and not MEDIA_NOUN.search(strip_transcript(text)[:1000])


def strip_transcript(text: str) -> str:
    """Return a request without the conversation that it quotes."""
    text = CHAT_HISTORY.sub("", text)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.split(r"^\s*(?:conversation|user|human)[ \t]*:", text, maxsplit=1, flags=re.IGNORECASE | re.MULTILINE)[0]


def build_task(
    conversation: ShownConversation, text: str, response_format: dict[str, Any] | None = None
) -> ConversationTask:
    """Return a request about a conversation, with its kind, its form and the conversation."""
    request = strip_transcript(text)
    json_request = JSON_REQUEST.search(request)
    example = JSON_KEY.search(request, json_request.end()) if json_request else None
    # The field that is asked for says what a request is; its other words change from version to version.
    kind = (example and KINDS_BY_KEY.get(example["key"])) or find_kind(request)
    speeches = read_transcript(text) or list_speeches(conversation.history)
    schema = None if response_format is None else schema_from_format(kind, response_format)
    if schema is None and json_request:
        is_list = bool(example["is_list"]) if example else kind in LIST_KINDS
        schema = build_schema(example["key"] if example else JSON_KEYS[kind], is_list)
    return ConversationTask(kind, text, tuple(speeches), schema, conversation.instructions)


def find_kind(request: str) -> TaskKind:
    """Return the kind whose words stand first in a request."""
    places = {kind: match.start() for kind, words in TASK_WORDS.items() if (match := words.search(request))}
    return min(places, key=places.__getitem__, default="answer")


def schema_from_format(kind: TaskKind, response_format: dict[str, Any]) -> dict[str, Any] | None:
    """Return the JSON schema of a `response_format`, or None if it asks for words."""
    match response_format.get("type"):
        case "json_schema":
            details = response_format.get("json_schema")
            schema = details.get("schema") if isinstance(details, dict) else None
            return schema if isinstance(schema, dict) else {"type": "object"}
        case "json_object":
            return build_schema(JSON_KEYS[kind], kind in LIST_KINDS)
    return None


def build_schema(key: str, is_list: bool) -> dict[str, Any]:
    """Return the schema of an object with one field, a text or a list of texts."""
    field = {"type": "array", "items": {"type": "string"}} if is_list else {"type": "string"}
    return {"type": "object", "properties": {key: field}, "required": [key], "additionalProperties": False}


# ---------------------------------------------------------------- the conversation in a request


SPEAKERS: dict[str, Literal["user", "assistant"]] = {
    "user": "user", "human": "user", "assistant": "assistant", "ai": "assistant", "bot": "assistant",
}  # fmt: skip
SPEECH = re.compile(
    r"^[ \t]*(?:\*\*)?(?P<role>user|human|assistant|ai|bot)(?:\*\*)?[ \t]*:(?:\*\*)?[ \t]*"
    r"(?P<text>.*?)(?=^[ \t]*(?:\*\*)?(?:user|human|assistant|ai|bot)(?:\*\*)?[ \t]*:|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
FENCED = re.compile(r"```[^\n`]*+\n(?P<body>.*?)\n?```", re.DOTALL)
SPEECH_RULE = re.compile(r"\n[ \t]*+-{5,}+[ \t]*+\n")


def read_transcript(text: str) -> list[tuple[Literal["user", "assistant"], str]]:
    """Return the conversation that a request quotes, as (role, text); empty if it quotes none."""
    block = CHAT_HISTORY.search(text)
    quoted = block["history"].strip() if block else text
    speeches = [(SPEAKERS[match["role"].lower()], match["text"].strip()) for match in SPEECH.finditer(quoted)]
    if speeches or block:
        return speeches or [("user", quoted)]
    if fenced := FENCED.search(text):  # texts that alternate, between rules
        parts = SPEECH_RULE.split(fenced["body"])
        return [("assistant" if index % 2 else "user", part.strip()) for index, part in enumerate(parts)]
    return []


def list_speeches(history: tuple[Exchange, ...]) -> list[tuple[Literal["user", "assistant"], str]]:
    speeches: list[tuple[Literal["user", "assistant"], str]] = []
    for exchange in history:
        speeches.append(("user", exchange.user.words))
        if exchange.is_answered:
            speeches.append(("assistant", exchange.answer))
    return speeches


# ---------------------------------------------------------------- the model's answer


def write_task_answer(mllm: MLLM, task: ConversationTask) -> str:
    """Return the answer of a model that follows instructions."""
    text = task.text
    if not read_transcript(text) and task.speeches:
        transcript = "\n".join(f"{role}: {speech}" for role, speech in task.speeches)[-MAX_HISTORY_CHARS:]
        text = f"The conversation so far:\n{transcript}\n\n{text}"
    schema = None if task.json_schema is None else json.dumps(task.json_schema)
    request = MLLMRequest(text=text, system=task.instructions or None, json_schema=schema)
    answer = "".join(mllm.stream_text(request))
    return answer.rpartition(THINK_END)[2].strip()
