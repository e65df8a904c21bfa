"""`llm`, the command, with the service as one of its "extra OpenAI models"."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from observe import BASE_URL, CONVERSATION, FOLDER, KEY, MODEL, OVER_LONG, PICTURE, TITLE_REQUEST, observe

# Run by the interpreter, because the first line of the script names where the environment was made.
COMMAND = [sys.executable, str(Path(sys.executable).parent / "llm")]
HOME = FOLDER / "llm"
HOME.mkdir()
(HOME / "extra-openai-models.yaml").write_text(
    f"- model_id: omni\n  model_name: {MODEL}\n  api_base: {BASE_URL}\n  api_key_name: omnivideo\n"
    "  vision: true\n  supports_schema: true\n  supports_tools: true\n"
)
(HOME / "keys.json").write_text(json.dumps({"omnivideo": KEY}))


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLM_USER_PATH": str(HOME)}
    done = subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done


def read_usage(done: subprocess.CompletedProcess[str]) -> list[int]:
    counts = re.search(r"([\d,]+) input, ([\d,]+) output", done.stderr)
    return [int(count.replace(",", "")) for count in counts.groups()]


@observe("conversation")
def converse():
    first, *rest = CONVERSATION
    whole = [call("-m", "omni", "--no-stream", first).stdout]
    return {"answers": whole + [call("-c", "--no-stream", words).stdout for words in rest]}


@observe("title")
def ask_for_title():
    return call("-c", TITLE_REQUEST).stdout


@observe("streaming")
def stream():
    first, *rest = CONVERSATION
    answers = [call("-m", "omni", first).stdout] + [call("-c", words).stdout for words in rest]
    return {"answers": answers}


@observe("usage")
def count_tokens():
    return [read_usage(call("-m", "omni", "-u", *options, "hello")) for options in (("--no-stream",), ())]


@observe("picture")
def describe_picture():
    return call("-m", "omni", "-a", str(PICTURE), "describe this").stdout


@observe("structured output")
def ask_for_json():
    return json.loads(call("-c", "--schema", "title str", TITLE_REQUEST).stdout)


@observe("tools")
def offer_tools():
    return {"answer": call("-m", "omni", "-T", "llm_version", "what colour is it?").stdout, "calls": 0}


@observe("over-long text")
def send_too_long():
    return call("-m", "omni", OVER_LONG).stdout
