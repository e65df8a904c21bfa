"""Hold a conversation in Gradio's chat, in headless Chromium. It runs in Gradio's own environment, without our package.

    python gradio_chat.py ADDRESS KEY CHROMIUM FOLDER

FOLDER receives a screenshot after each step, and `steps.json`: what each answer shows.
"""

import json
import sys
import time
from pathlib import Path

import gradio
from playwright.sync_api import Page, sync_playwright

CLIP, EDIT, QUESTION = "a small red circle moving right", "make it blue", "how does it move?"
BOT = '[data-testid="bot"]'
MEASURE = """bot => ({
  text: bot.innerText,
  pictures: [...bot.querySelectorAll("img")].filter(image => image.alt)
    .map(image => [image.alt, image.complete ? image.naturalWidth : -1]),
  links: [...bot.querySelectorAll("a")].map(link => link.href),
})"""


class ChatPage:
    """The page of the chat; each step is one thing that a person does."""

    def __init__(self, page: Page, folder: Path):
        self.page, self.folder, self.steps = page, folder, list[dict]()

    def send(self, name: str, text: str, picture: Path | None = None) -> None:
        if picture:
            self.page.set_input_files('input[type="file"]', str(picture))
            self.page.wait_for_selector(".thumbnails, .thumbnail-item", timeout=10_000)
        self.submit(text)
        self.record(name)

    def submit(self, text: str) -> None:
        count = self.page.locator(BOT).count()
        box = self.page.locator("textarea").last
        box.fill(text)
        box.press("Enter")
        self.page.wait_for_function(
            "([selector, count]) => document.querySelectorAll(selector).length > count",
            arg=[BOT, count],
            timeout=60_000,
        )

    def regenerate(self) -> None:
        self.page.get_by_label("Retry").last.click()
        self.page.wait_for_timeout(500)
        self.record("regenerate")

    def record(self, name: str) -> None:
        """Wait until the answer no longer grows and its pictures have loaded, and write down what it shows."""
        deadline, last_change, shown = time.monotonic() + 60, time.monotonic(), {}
        while time.monotonic() < min(deadline, last_change + 1.5):
            bots = self.page.locator(BOT)
            now_shown = bots.last.evaluate(MEASURE) if bots.count() else {"text": "", "pictures": [], "links": []}
            is_loading = any(width <= 0 for _, width in now_shown["pictures"]) or not now_shown["text"].strip()
            if is_loading or now_shown != shown or self.page.locator("textarea").last.is_disabled():
                last_change, shown = time.monotonic(), now_shown
            self.page.wait_for_timeout(100)
        self.page.screenshot(path=str(self.folder / f"{len(self.steps) + 1}-{name}.png"))
        errors = self.page.locator(".toast-body.error").all_inner_texts()
        self.steps.append({"name": name, "errors": errors, **shown})


def main(address: str, key: str, chromium: str, folder: Path) -> None:
    chat = gradio.load_chat(f"{address}/v1/", model="tiny", token=key, file_types=["text_encoded", "image"])
    _, url, _ = chat.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 900, "height": 1100})
        page.goto(url)
        page.wait_for_selector("textarea")
        view = ChatPage(page, folder)
        view.send("clip", CLIP)
        view.send("edit", EDIT)
        view.send("question", QUESTION)
        view.regenerate()
        view.send("too long", "a red circle " * 400)
        view.send("after", QUESTION)
        # The last step, because Gradio 6.31 itself fails on a history with a picture ("dict has no attribute lower").
        view.send("upload", "describe this", folder / "upload.png")
        browser.close()
    (folder / "steps.json").write_text(json.dumps(view.steps, indent=1))
    chat.close()


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
