"""Answers to requests about a conversation by rules from its history, for a model that cannot follow instructions."""

import json
import re
from collections.abc import Sequence
from typing import Any

from omnivideo.api.chat.links import remove_addresses
from omnivideo.api.chat.messages import REASONING
from omnivideo.api.chat.tasks import ConversationTask
from omnivideo.api.chat.wrappers import split_wrappers

DEFAULT_TITLE = "New Conversation"
SMALL_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "at",
        "by",
        "can",
        "create",
        "describe",
        "do",
        "does",
        "draw",
        "for",
        "from",
        "generate",
        "how",
        "i",
        "in",
        "is",
        "it",
        "its",
        "make",
        "many",
        "me",
        "now",
        "of",
        "on",
        "or",
        "please",
        "show",
        "that",
        "the",
        "them",
        "then",
        "there",
        "this",
        "to",
        "turn",
        "what",
        "which",
        "with",
        "you",
        "your",
    ]
)
COLOURS = ("blue", "green", "yellow", "red", "purple", "orange")
MAX_TITLE_WORDS, MAX_TAGS, MAX_WORD_CHARS = 5, 4, 40
WORD_LIMIT = re.compile(r"\b(\d+)(?:\s*-\s*(\d+))?[ -]words?\b", re.IGNORECASE)
CHARACTER_LIMIT = re.compile(r"\b(\d+) characters?\b", re.IGNORECASE)


def answer_by_rule(task: ConversationTask) -> str:
    """Return the answer in the form that is asked for: JSON of the schema, or words."""
    said = [clean_text(text) for role, text in task.speeches if role == "user"]
    said = [text for text in said if text]
    summary = write_summary(task, said)
    answers: dict[str, Any] = {
        "title": write_title(said, task.text), "tags": list_tags(said), "follow_ups": list_follow_ups(said),
        "queries": [], "autocomplete": "", "emoji": "\N{SLIGHTLY SMILING FACE}", "summary": summary, "answer": summary,
        "image_prompt": said[-1] if said else DEFAULT_TITLE, "language": "English",
    }  # fmt: skip
    answer: Any = answers[task.kind]
    if task.json_schema is not None:
        return json.dumps(fill_schema(task.json_schema, answer, answers), ensure_ascii=False)
    if isinstance(answer, list):
        return ("\n" if task.kind == "follow_ups" else ", ").join(answer) or "none"
    return answer or summary


def clean_text(text: str) -> str:
    """Return a speech in plain words, on one line."""
    plain = remove_addresses(REASONING.sub(" ", split_wrappers(text).words))
    return " ".join(re.sub(r"[*_`#>|\"“”]+", " ", plain).split())


def write_title(said: Sequence[str], request: str) -> str:
    """Return the first words of the conversation as a title, within the limits that the request states."""
    words = re.findall(r"[\w'-]+", said[0])[:12] if said else DEFAULT_TITLE.split()
    max_words = MAX_TITLE_WORDS
    if limit := WORD_LIMIT.search(request):
        max_words = min(max_words, int(limit[2] or limit[1]))
    title = " ".join(word[:MAX_WORD_CHARS].capitalize() for word in words[: max(1, max_words)]) or DEFAULT_TITLE
    if limit := CHARACTER_LIMIT.search(request):
        shorter = title[: int(limit[1]) + 1].rpartition(" ")[0] if len(title) > int(limit[1]) else title
        title = shorter or title[: int(limit[1])]
    return title


def list_tags(said: Sequence[str]) -> list[str]:
    """Return the words that the conversation is about, the most frequent first."""
    counts: dict[str, int] = {}
    for word in re.findall(r"[^\W\d_]{3,}", " ".join(said).lower()):
        if word not in SMALL_WORDS:
            counts[word] = counts.get(word, 0) + 1
    frequent = sorted(counts, key=lambda word: -counts[word])[:MAX_TAGS]
    return ["Video", *(word[:MAX_WORD_CHARS].capitalize() for word in frequent)] if frequent else ["General"]


def list_follow_ups(said: Sequence[str]) -> list[str]:
    """Return three requests that can follow, none of which was made already."""
    before = {text.lower().rstrip("?.!") for text in said}
    colours = [colour for colour in COLOURS if not any(colour in text for text in before)] or list(COLOURS)
    suggestions = [f"Make it {colours[0]}", "Describe it", "How many things are there?", "Make it bigger", "Undo"]
    return [text for text in suggestions if text.lower().rstrip("?") not in before][:3]


def write_summary(task: ConversationTask, said: Sequence[str]) -> str:
    """Return what the user has asked for, and how often it was answered."""
    if not said:
        return "Nothing has been said yet."
    num_answers = sum(role == "assistant" for role, _ in task.speeches)
    requests = "; ".join(text[:200] for text in said[-20:])
    return f"The user asked for: {requests}. The assistant has answered {num_answers} time{'s' * (num_answers != 1)}."


def fill_schema(schema: dict[str, Any], answer: Any, answers: dict[str, Any], name: str = "") -> Any:
    """Return a value of a JSON schema: the answer, the answer that a field's name asks for, or an empty value."""
    chosen = answers.get({"tag": "tags", "text": "", "name": "title"}.get(name, name), answer)
    if "enum" in schema:
        return schema["enum"][0] if schema["enum"] else None
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    match kind[0] if isinstance(kind, list) and kind else kind:
        case "object":
            properties = schema.get("properties") or {}
            return {key: fill_schema(field, answer, answers, key) for key, field in properties.items()}
        case "array":
            items = schema.get("items") or {"type": "string"}
            values = chosen if isinstance(chosen, list) else [chosen]
            return values if items.get("type", "string") == "string" else []
        case "boolean":
            return False
        case "integer" | "number":
            return 0
        case "null":
            return None
    return ", ".join(chosen) if isinstance(chosen, list) else chosen
