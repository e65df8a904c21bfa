"""llama-index: its chat engine over OpenAILike, and its responses."""

from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses
from observe import BASE_URL, CONVERSATION, KEY, MODEL, OVER_LONG, TITLE_REQUEST, TOOL_RESULT, observe, read_picture
from pydantic import BaseModel

OPTIONS = {"model": MODEL, "api_base": BASE_URL, "api_key": KEY, "max_retries": 0, "timeout": 120.0}
llm = OpenAILike(is_chat_model=True, is_function_calling_model=True, should_use_structured_outputs=True, **OPTIONS)
kept = []


class Title(BaseModel):
    """A title of the conversation."""

    title: str


def look_up_colour() -> str:
    """Return the colour of the thing."""
    return TOOL_RESULT


def answer_all(engine: SimpleChatEngine) -> dict:
    return {"answers": [engine.chat(words).response for words in CONVERSATION]}


@observe("conversation")
def converse():
    engine = SimpleChatEngine.from_defaults(llm=llm)
    saw = answer_all(engine)
    kept[:] = engine.chat_history
    return saw


@observe("streaming")
def stream():
    engine, answers, counts = SimpleChatEngine.from_defaults(llm=llm), [], []
    for words in CONVERSATION:
        parts = list(engine.stream_chat(words).response_gen)
        counts.append(len(parts))
        answers.append("".join(parts))
    return {"answers": answers, "chunks": counts}


@observe("responses")
def respond():
    return answer_all(SimpleChatEngine.from_defaults(llm=OpenAILikeResponses(is_chat_model=True, **OPTIONS)))


@observe("usage")
def count_tokens():
    usage = llm.chat([ChatMessage(role="user", content="hello")]).raw.usage
    return [[usage.prompt_tokens, usage.completion_tokens]]


@observe("picture")
def describe_picture():
    blocks = [TextBlock(text="describe this"), ImageBlock(image=read_picture(), image_mimetype="image/png")]
    return llm.chat([ChatMessage(role="user", blocks=blocks)]).message.content


@observe("tools")
def offer_tools():
    response = llm.chat_with_tools([FunctionTool.from_defaults(look_up_colour)], user_msg="what colour is it?")
    calls = llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
    return {"answer": response.message.content, "calls": len(calls)}


@observe("forced tool")
def force_tool():
    tools = [FunctionTool.from_defaults(look_up_colour)]
    return llm.chat_with_tools(tools, user_msg="what colour is it?", tool_required=True).message.content


@observe("structured output")
def ask_for_json():
    messages = [*kept, ChatMessage(role="user", content=TITLE_REQUEST)]
    return llm.as_structured_llm(Title).chat(messages).raw.model_dump()


@observe("title")
def ask_for_title():
    return llm.chat([*kept, ChatMessage(role="user", content=TITLE_REQUEST)]).message.content


@observe("over-long text")
def send_too_long():
    return llm.chat([ChatMessage(role="user", content=OVER_LONG)]).message.content
