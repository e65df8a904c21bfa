"""Render pages in headless Chromium."""

import json
import re
import subprocess
from html import unescape
from pathlib import Path

from markdown_it import MarkdownIt

from tests.support.servers import program

# After everything has loaded, the page writes down what its pictures and links have become.
MEASURE = """
<script>addEventListener("load", () => { document.body.dataset.measured = JSON.stringify({
  pictures: [...document.images].map(image => [image.alt, image.naturalWidth, image.naturalHeight]),
  links: [...document.links].map(link => link.href), text: document.body.innerText }) })</script>
"""


def chromium() -> str:
    return program("chromium", "chromium", "what a browser shows was not tested")


def measure_markdown(text: str, folder: Path) -> dict:
    """Render Markdown in a browser. Return its pictures (alternative text, width, height), its links and its text."""
    page = folder / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{MarkdownIt().render(text)}{MEASURE}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [chromium(), *options, "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    measured = re.search(r'data-measured="([^"]*)"', dom)
    assert measured, dom[-500:]
    return dict(json.loads(unescape(measured[1])))
