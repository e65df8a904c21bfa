"""Gradio with the example of docs/clients.md, in headless Chromium."""

import json

from browse import launch_browser, read_answer, save_screenshot, to_answer
from observe import BASE_URL, CONVERSATION, FOLDER, KEY, OVER_LONG, TITLE_REQUEST, observe, read_picture
from playwright.sync_api import Page, sync_playwright

ANSWERS = '[data-testid="bot"]'


class ChatPage:
    """The page of the chat; each method is one thing that a person does."""

    def __init__(self, page: Page):
        self.page, self.num_steps = page, 0

    def submit(self, text: str) -> None:
        """Send a message, and wait until its answer begins."""
        count = self.page.locator(ANSWERS).count()
        box = self.page.locator("textarea").last
        box.fill(text)
        box.press("Enter")
        self.page.wait_for_function(
            "([selector, count]) => document.querySelectorAll(selector).length > count", arg=[ANSWERS, count]
        )

    def send(self, text: str) -> str:
        self.submit(text)
        return self.read()

    def upload(self, text: str, picture: bytes) -> str:
        file = {"name": "square.png", "mimeType": "image/png", "buffer": picture}
        self.page.set_input_files('input[type="file"]', files=[file])
        self.page.wait_for_selector(".thumbnails, .thumbnail-item")
        return self.send(text)

    def regenerate(self) -> str:
        self.page.get_by_label("Retry").last.click()
        self.page.wait_for_timeout(500)
        return self.read()

    def stop(self, text: str) -> None:
        """Send a message, and press the button that stops its answer."""
        self.page.locator("textarea").last.fill(text)
        self.page.locator("textarea").last.press("Enter")
        self.page.locator(".stop-button").click()
        self.page.wait_for_timeout(500)

    def read(self) -> str:
        self.page.wait_for_function("() => ![...document.querySelectorAll('textarea')].at(-1).disabled")
        shown = read_answer(self.page, self.page.locator(ANSWERS), still_seconds=1.0)
        self.num_steps += 1
        save_screenshot(self.page, FOLDER, f"gradio-{self.num_steps}")
        errors = self.page.locator(".toast-body.error").all_inner_texts()
        if errors:
            raise RuntimeError(f"the page shows an error: {errors}")
        return to_answer(shown)


def hold_conversation(page: Page) -> None:
    chat = ChatPage(page)

    @observe("streaming")
    def converse():
        return {"answers": [chat.send(words) for words in CONVERSATION]}

    @observe("regenerate")
    def regenerate():
        return chat.regenerate()

    @observe("title")
    def ask_for_title():
        return chat.send(TITLE_REQUEST)

    @observe("over-long text")
    def send_too_long():
        return chat.send(OVER_LONG)

    @observe("stop")
    def stop():
        chat.stop(CONVERSATION[0])
        return chat.send(CONVERSATION[2])

    # The last step, because Gradio 6.31 itself fails on a message after one with a picture.
    @observe("picture")
    def describe_picture():
        return chat.upload("describe this", read_picture())


def main() -> None:
    example = json.loads((FOLDER / "settings.json").read_text())["EXAMPLE"]  # of docs/clients.md
    example = example.replace("http://127.0.0.1:8000/v1", BASE_URL).replace("no-key", KEY)
    page_of_docs: dict = {}
    exec(example.replace("chat.launch()", ""), page_of_docs)
    chat = page_of_docs["chat"]
    _, url, _ = chat.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    with sync_playwright() as playwright:
        browser = launch_browser(playwright)
        page = browser.new_page(viewport={"width": 900, "height": 1700})
        page.set_default_timeout(180_000)  # on a busy machine, a step takes a minute
        page.goto(url)
        page.wait_for_selector("textarea")
        hold_conversation(page)
        browser.close()
    chat.close()


main()
