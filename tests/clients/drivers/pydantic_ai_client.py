"""pydantic-ai, with chat completions and with responses."""

from observe import BASE_URL, CONVERSATION, KEY, MODEL, OVER_LONG, TITLE_REQUEST, TOOL_RESULT, observe, read_picture
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=BASE_URL, api_key=KEY)
chat = OpenAIChatModel(MODEL, provider=provider)
agent = Agent(chat)
kept = []


class Title(BaseModel):
    title: str


def answer_all(agent: Agent) -> dict:
    answers, history = [], []
    for words in CONVERSATION:
        result = agent.run_sync(words, message_history=history)
        history = result.all_messages()
        answers.append(result.output)
    kept[:] = history
    return {"answers": answers}


@observe("responses")
def respond():
    return answer_all(Agent(OpenAIResponsesModel(MODEL, provider=provider)))


@observe("conversation")
def converse():
    return answer_all(agent)


@observe("streaming")
def stream():
    answers, history, counts = [], [], []
    for words in CONVERSATION:
        result = agent.run_stream_sync(words, message_history=history)
        parts = list(result.stream_text(delta=True, debounce_by=None))
        counts.append(len(parts))
        answers.append("".join(parts))
        history = result.all_messages()
    return {"answers": answers, "chunks": counts}


@observe("usage")
def count_tokens():
    whole = agent.run_sync("hello").usage
    streamed = agent.run_stream_sync("hello")
    list(streamed.stream_text())
    usages = [usage() if callable(usage) else usage for usage in (whole, streamed.usage)]
    return [[usage.input_tokens, usage.output_tokens] for usage in usages]


@observe("picture")
def describe_picture():
    return agent.run_sync(["describe this", BinaryContent(read_picture(), media_type="image/png")]).output


@observe("tools")
def offer_tools():
    with_tool = Agent(chat)
    called = []

    @with_tool.tool_plain
    def look_up_colour() -> str:
        """Return the colour of the thing."""
        called.append(1)
        return TOOL_RESULT

    return {"answer": with_tool.run_sync("what colour is it?").output, "calls": len(called)}


@observe("forced tool")
def force_tool():
    return Agent(chat, output_type=Title).run_sync("what colour is it?").output.model_dump()


@observe("structured output")
def ask_for_json():
    result = Agent(chat, output_type=NativeOutput(Title)).run_sync(TITLE_REQUEST, message_history=kept)
    return result.output.model_dump()


@observe("title")
def ask_for_title():
    return agent.run_sync(TITLE_REQUEST, message_history=kept).output


@observe("over-long text")
def send_too_long():
    return agent.run_sync(OVER_LONG).output
