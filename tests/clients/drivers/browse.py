"""Hold a conversation in a page of a chat program, in headless Chromium."""

import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page, Playwright

# What a person sees of an answer: its words, its pictures with their widths once they are loaded, and its links.
MEASURE = """answer => ({
  text: answer.innerText,
  pictures: [...answer.querySelectorAll("img")].filter(image => image.alt && !image.alt.includes("profile"))
    .map(image => [image.alt, image.complete ? image.naturalWidth : -1]),
  links: [...answer.querySelectorAll("a")].map(link => link.href),
})"""


def launch_browser(playwright: Playwright) -> Browser:
    """Start Debian's Chromium, which playwright does not bring here."""
    return playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])


def read_answer(page: Page, answers: Locator, seconds: float = 180.0, still_seconds: float = 2.0) -> dict[str, Any]:
    """Wait until the last answer no longer grows and its pictures have loaded; return what it shows."""
    deadline, last_change, shown = time.monotonic() + seconds, time.monotonic(), {}
    while time.monotonic() < min(deadline, last_change + still_seconds):
        now_shown = answers.last.evaluate(MEASURE) if answers.count() else {"text": "", "pictures": [], "links": []}
        is_loading = any(width <= 0 for _, width in now_shown["pictures"]) or not now_shown["text"].strip()
        if is_loading or now_shown != shown:
            last_change, shown = time.monotonic(), now_shown
        page.wait_for_timeout(100)
    return shown


def to_answer(shown: dict[str, Any]) -> str:
    """Return an answer as the test of conversations reads it: words, what the pictures show, and addresses."""
    hidden = [alt for alt, width in shown["pictures"] if width <= 0]
    if hidden:
        raise AssertionError(f"a picture is not visible: {hidden}")
    return "\n".join([shown["text"], *(alt for alt, _ in shown["pictures"]), *shown["links"]])


def save_screenshot(page: Page, folder: Path, name: str) -> None:
    page.screenshot(path=str(folder / f"{name}.png"))
