"""shell-gpt: `sgpt --chat`, whose history is in a file."""

import os
import subprocess
import sys
from pathlib import Path

from observe import BASE_URL, CONVERSATION, FOLDER, KEY, MODEL, OVER_LONG, TITLE_REQUEST, observe

# Run by the interpreter, because the first line of the script names where the environment was made.
COMMAND = [sys.executable, str(Path(sys.executable).parent / "sgpt")]
SETTINGS = {
    "API_BASE_URL": BASE_URL, "OPENAI_API_KEY": KEY, "DEFAULT_MODEL": MODEL, "CHAT_CACHE_PATH": str(FOLDER / "chats"),
    "CACHE_PATH": str(FOLDER / "cache"), "OS_NAME": "Linux", "SHELL_NAME": "bash",
}  # fmt: skip


def call(*arguments: str, **settings: str) -> str:
    environment = {**os.environ, **SETTINGS, **settings}
    command = [*COMMAND, "--no-cache", "--no-md", *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-800:])
    return done.stdout


@observe("conversation")
def converse():
    return {"answers": [call("--chat", "whole", words, DISABLE_STREAMING="true") for words in CONVERSATION]}


@observe("streaming")
def stream():
    return {"answers": [call("--chat", "streamed", words) for words in CONVERSATION]}


@observe("title")
def ask_for_title():
    return call("--chat", "whole", TITLE_REQUEST)


@observe("over-long text")
def send_too_long():
    return call(OVER_LONG)
