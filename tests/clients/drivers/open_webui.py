"""Open WebUI with the environment and the health check of deploy/compose.open-webui.yaml, in headless Chromium.

FOLDER/settings.json has that environment, with the service's address in place of the container's.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from browse import launch_browser, read_answer, save_screenshot, to_answer
from observe import CONVERSATION, FOLDER, OVER_LONG, observe, read_picture
from playwright.sync_api import Page, Playwright, sync_playwright

SETTINGS = json.loads((FOLDER / "settings.json").read_text())
PORT = SETTINGS["PORT"]
HEALTH_CHECK = [part.replace("8080", PORT) for part in json.loads(SETTINGS.pop("HEALTH_CHECK"))]
HOME = f"http://127.0.0.1:{PORT}"
START = f"from open_webui import app; app(['serve', '--host', '127.0.0.1', '--port', '{PORT}'])"
MESSAGES = "#messages-container [id^=message-]:not(.user-message)"
LAST = f"[...document.querySelectorAll('{MESSAGES}')].at(-1)"  # old messages leave the page
HAS_BEGUN = f"() => /Generating|left/.test({LAST}?.innerText ?? '')"
PERSON = {"name": "Ada", "email": "ada@example.com", "password": "correct-horse-battery"}


def start_open_webui() -> subprocess.Popen:
    environment = {**os.environ, **SETTINGS, "DATA_DIR": str(FOLDER / "data")}
    with (FOLDER / "open-webui.log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-c", START], env=environment, stdout=log, stderr=log, cwd=FOLDER)


def request(path: str, body: dict | None = None, token: str = "") -> dict:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    data = json.dumps(body).encode() if body is not None else None
    with urllib.request.urlopen(urllib.request.Request(HOME + path, data, headers), timeout=30) as answer:
        return json.loads(answer.read())


def wait_until_healthy(process: subprocess.Popen, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if subprocess.run(HEALTH_CHECK, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(1)
    raise TimeoutError((FOLDER / "open-webui.log").read_text()[-2000:])


class ChatPage:
    """The page of a new chat; each method is one thing that a person does."""

    def __init__(self, page: Page):
        self.page, self.num_steps = page, 0

    def submit(self, text: str) -> None:
        self.page.locator("#chat-input").fill(text)
        self.page.locator("#send-message-button").click()

    def send(self, text: str, picture: bytes | None = None) -> dict:
        if picture:
            upload = {"name": "square.png", "mimeType": "image/png", "buffer": picture}
            self.page.set_input_files('input[type="file"]', files=[upload])
            self.page.wait_for_timeout(1500)
        with self.expect_message():
            self.submit(text)
        return self.read()

    def regenerate(self) -> dict:
        with self.expect_message():
            self.page.get_by_label("Regenerate").last.click()
            self.page.get_by_text("Try Again", exact=True).click()
        return self.read()

    def continue_answer(self) -> dict:
        with self.page.expect_request("**/api/chat/completions"):
            self.page.get_by_label("Continue Response").last.click()
        self.page.wait_for_timeout(1000)
        return self.read()

    @contextmanager
    def expect_message(self) -> Iterator[None]:
        """Wait until the page has another last answer than before."""
        before = self.page.evaluate(f"() => {LAST}?.id")
        yield
        has_other = f"before => {LAST} && {LAST}.id !== before && {LAST}.querySelector('.markdown-prose')"
        self.page.wait_for_function(has_other, arg=before, timeout=90_000)

    def stop(self, text: str) -> None:
        """Send a message, and press the button that stops its answer once something is being generated."""
        self.submit(text)
        self.page.wait_for_function(HAS_BEGUN, timeout=90_000, polling=50)
        self.page.get_by_label("Stop", exact=True).click()
        self.page.wait_for_timeout(1000)

    def read(self) -> dict:
        shown = read_answer(self.page, self.page.locator(MESSAGES).last.locator(".markdown-prose"))
        self.num_steps += 1
        save_screenshot(self.page, FOLDER, f"open-webui-{self.num_steps}")
        return shown


def hold_conversation(page: Page, token: str) -> None:
    chat = ChatPage(page)

    @observe("streaming")
    def converse():
        return {"answers": [to_answer(chat.send(words)) for words in CONVERSATION]}

    @observe("regenerate")
    def regenerate():
        return to_answer(chat.regenerate())

    @observe("continue")
    def continue_answer():
        return to_answer(chat.continue_answer())

    @observe("over-long text")
    def send_too_long():
        return to_answer(chat.send(OVER_LONG))

    @observe("stop")
    def stop():
        chat.stop(CONVERSATION[0])
        return to_answer(chat.send(CONVERSATION[2]))

    @observe("picture")
    def describe_picture():
        return to_answer(chat.send("describe this", read_picture()))

    @observe("title")
    def read_title():
        for _ in range(60):  # it asks for the title after the first answer
            title = request("/api/v1/chats/", token=token)[0]["title"]
            if title != "New Chat":
                break
            page.wait_for_timeout(500)
        return title


def open_page(playwright: Playwright, token: str) -> Page:
    """Return the page of a new chat, signed in."""
    page = launch_browser(playwright).new_page(viewport={"width": 1100, "height": 1300})
    page.add_init_script(f"localStorage.token = {json.dumps(token)}")
    page.goto(HOME)
    page.set_default_timeout(60_000)
    try:
        page.wait_for_selector("#chat-input", timeout=120_000)
        page.get_by_role("button", name="Okay, Let's Go!").click()  # the release notes, shown to an administrator
        page.wait_for_selector("#chat-input:visible")
    finally:
        save_screenshot(page, FOLDER, "open-webui-0")
    return page


def main() -> None:
    process = start_open_webui()
    try:
        wait_until_healthy(process)
        token = request("/api/v1/auths/signup", PERSON)["token"]

        @observe("models")
        def list_models():
            return [model["id"] for model in request("/api/models", token=token)["data"]]

        with sync_playwright() as playwright:
            hold_conversation(open_page(playwright, token), token)
    finally:
        process.terminate()
        process.wait(30)


main()
