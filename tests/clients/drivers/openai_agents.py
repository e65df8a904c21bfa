"""openai-agents, whose default is /v1/responses, with its own sessions."""

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from observe import BASE_URL, CONVERSATION, KEY, MODEL, OVER_LONG, TITLE_REQUEST, TOOL_RESULT, encode_picture, observe
from openai import AsyncOpenAI
from pydantic import BaseModel

client = AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=120)
set_default_openai_client(client)
set_tracing_disabled(True)
loop = asyncio.Runner()  # one event loop, because the client keeps its connections
assistant = Agent(name="assistant", model=MODEL)
chat_assistant = Agent(name="assistant", model=OpenAIChatCompletionsModel(MODEL, client))
kept_session = SQLiteSession("kept")


class Title(BaseModel):
    title: str


@function_tool
def look_up_colour() -> str:
    """Return the colour of the thing."""
    return TOOL_RESULT


async def answer_all(agent: Agent, session: SQLiteSession) -> list[str]:
    return [(await Runner.run(agent, words, session=session)).final_output for words in CONVERSATION]


@observe("responses")
def respond():
    return {"answers": loop.run(answer_all(assistant, SQLiteSession("responses")))}


@observe("conversation")
def converse():
    return {"answers": loop.run(answer_all(chat_assistant, kept_session))}


@observe("streaming")
def stream():
    async def answer_streamed():
        session, answers, counts = SQLiteSession("streamed"), [], []
        for words in CONVERSATION:
            result = Runner.run_streamed(chat_assistant, words, session=session)
            counts.append(len([event async for event in result.stream_events()]))
            answers.append(result.final_output)
        return {"answers": answers, "chunks": counts}

    return loop.run(answer_streamed())


@observe("streamed responses")
def stream_responses():
    async def answer_streamed():
        session, answers, counts = SQLiteSession("streamed responses"), [], []
        for words in CONVERSATION:
            result = Runner.run_streamed(assistant, words, session=session)
            counts.append(len([event async for event in result.stream_events()]))
            answers.append(result.final_output)
        return {"answers": answers, "chunks": counts}

    return loop.run(answer_streamed())


@observe("usage")
def count_tokens():
    results = [loop.run(Runner.run(agent, "hello")) for agent in (assistant, chat_assistant)]
    usages = [result.context_wrapper.usage for result in results]
    return [[usage.input_tokens, usage.output_tokens] for usage in usages]


@observe("picture")
def describe_picture():
    parts = [
        {"type": "input_text", "text": "describe this"},
        {"type": "input_image", "image_url": encode_picture(), "detail": "auto"},
    ]
    return loop.run(Runner.run(assistant, [{"role": "user", "content": parts}])).final_output


@observe("tools")
def offer_tools():
    agent = Agent(name="assistant", model=MODEL, tools=[look_up_colour])
    result = loop.run(Runner.run(agent, "what colour is it?"))
    calls = [item for item in result.new_items if item.type == "tool_call_item"]
    return {"answer": result.final_output, "calls": len(calls)}


@observe("forced tool")
def force_tool():
    settings = ModelSettings(tool_choice="required")
    agent = Agent(name="assistant", model=MODEL, tools=[look_up_colour], model_settings=settings)
    return loop.run(Runner.run(agent, "what colour is it?")).final_output


@observe("structured output")
def ask_for_json():
    agent = Agent(name="assistant", model=MODEL, output_type=Title)
    return loop.run(Runner.run(agent, TITLE_REQUEST, session=kept_session)).final_output.model_dump()


@observe("over-long text")
def send_too_long():
    return loop.run(Runner.run(assistant, OVER_LONG)).final_output
