"""LangChain's ChatOpenAI, with chat completions and with responses."""

import functools
import operator

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from observe import (
    BASE_URL,
    CONVERSATION,
    KEY,
    MODEL,
    OVER_LONG,
    TITLE_REQUEST,
    TOOL_RESULT,
    encode_picture,
    hold,
    observe,
)
from pydantic import BaseModel


class Title(BaseModel):
    """A title of the conversation."""

    title: str


@tool
def look_up_colour() -> str:
    """Return the colour of the thing."""
    return TOOL_RESULT


def build_model(**options):
    return ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=120, **options)


chat = build_model()
history = []


@observe("conversation")
def converse():
    def answer(messages):
        history[:] = messages
        return chat.invoke(messages).content

    return hold(answer)


@observe("streaming")
def stream():
    counts = []

    def answer(messages):
        chunks = list(chat.stream(messages))
        counts.append(len(chunks))
        return "".join(chunk.content for chunk in chunks)

    return hold(answer) | {"chunks": counts}


@observe("usage")
def count_tokens():
    whole = chat.invoke("hello").usage_metadata
    streamed = functools.reduce(operator.add, build_model(stream_usage=True).stream("hello")).usage_metadata
    return [[usage["input_tokens"], usage["output_tokens"]] for usage in (whole, streamed)]


@observe("picture")
def describe_picture():
    parts = [{"type": "text", "text": "describe this"}, {"type": "image_url", "image_url": {"url": encode_picture()}}]
    return chat.invoke([HumanMessage(content=parts)]).content


@observe("responses")
def respond():
    model, messages, answers = build_model(use_responses_api=True), [], []
    for words in CONVERSATION:
        messages.append(HumanMessage(content=words))
        messages.append(model.invoke(messages))
        answers.append(messages[-1].text)
    return {"answers": answers}


@observe("tools")
def offer_tools():
    bound = chat.bind_tools([look_up_colour])
    messages = [HumanMessage(content="what colour is it?")]
    offered = bound.invoke(messages)
    call = {"name": "look_up_colour", "args": {}, "id": "call_1", "type": "tool_call"}
    messages.append(AIMessage(content="", tool_calls=[call]))
    messages.append(ToolMessage(content=TOOL_RESULT, tool_call_id="call_1"))
    return {"answer": offered.content, "calls": len(offered.tool_calls), "told": bound.invoke(messages).content}


@observe("forced tool")
def force_tool():
    return chat.bind_tools([look_up_colour], tool_choice="any").invoke("what colour is it?").content


@observe("structured output")
def ask_for_json():
    structured = chat.with_structured_output(Title, method="json_schema")
    return structured.invoke([*history, {"role": "user", "content": TITLE_REQUEST}]).model_dump()


@observe("title")
def ask_for_title():
    return chat.invoke([*history, {"role": "user", "content": TITLE_REQUEST}]).content


@observe("over-long text")
def send_too_long():
    return chat.invoke(OVER_LONG).content
