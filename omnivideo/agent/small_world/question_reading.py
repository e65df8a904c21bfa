"""Read a question: what the MLLM is asked about which artifact, or which fact is asked for."""

import re
from collections.abc import Sequence

from omnivideo.agent import english_rules
from omnivideo.agent.small_world import replies
from omnivideo.agent.small_world.lexicon import Token, load_lexicon, tokenize
from omnivideo.agent.small_world.questions import read_question
from omnivideo.agent.small_world.readings import Context, Reading
from omnivideo.agent.small_world.wordings import load_pattern


def read_question_action(text: str, normalized: str, tokens: Sequence[Token], context: Context) -> Reading | None:
    """Return the reading of a question; None if it is not understood as one."""
    unknown = [token.text for token in tokens if not token.is_known]
    if context.medium is None:
        # A question in words of the world only is about a result; the MLLM would make one up.
        is_worded_as_question = load_pattern("question_start").match(normalized)
        if is_worded_as_question and not unknown and not load_pattern("knowledge").search(normalized):
            return Reading("ask", text, message=replies.NOTHING_QUESTION)
        words = re.findall(r"[a-z0-9'-]+", text.lower())
        if (load_lexicon().described | english_rules.load_plain_words()).issuperset(words):
            return Reading("do", text)
        return None
    if match := load_pattern("follow_up").match(normalized):
        normalized = match["rest"]
    reference = ""
    if named := english_rules.find_by_ordinal(normalized, context.artifacts):
        if named.artifact is None:  # the user is asked which one is meant
            return Reading("do", text)
        reference = str(context.artifacts.index(named.artifact) + 1)
        normalized = re.sub(rf"(?:\b(?:in|on|of|from|about) )?{re.escape(named.words)}", "", normalized).strip()
        normalized = normalized.replace(" ?", "?")
        tokens = tokenize(normalized)
    elif english_rules.find_description(normalized):
        return Reading("do", text)
    question = read_question(
        normalized, tokens, context.medium, context.last_request if context.last_request.endswith("?") else ""
    )
    if question.fact is not None:
        return Reading(
            "fact", text, goal="understand", medium="text", reference=reference or "current", fact=question.fact
        )
    if question.text and not unknown:
        return Reading("do", question.text, goal="understand", medium="text", reference=reference or "current")
    return None
