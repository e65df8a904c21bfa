"""The table "client x feature" of docs/service.md, from the results of the last run of `make test-clients`."""

import json
from pathlib import Path

from tests.support.client_features import FEATURES
from tests.support.client_programs import CLIENTS, ClientProgram
from tests.support.client_services import SERVICES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "clients" / "results.json"
PAGE = ROOT / "docs" / "service.md"
BEGIN, END = "<!-- clients: table -->\n", "<!-- end of the clients' table -->"


def load_results() -> dict[str, dict]:
    """Return, for each client's name, the version that ran and for each service the features' words."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def record_result(client: ClientProgram, service: str, words: dict[str, str]) -> None:
    """Write down what a client did with a service; a skipped run keeps an older result of the same version."""
    results = load_results()
    entry = results.get(client.name, {})
    if entry.get("version") != client.pin:
        entry = {"version": client.pin}
    if "skipped" in words and service in entry:
        return
    entry[service] = words
    order = [known.name for known in CLIENTS]
    results = {name: (results | {client.name: entry})[name] for name in order if name in results or name == client.name}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def render_cell(words: dict[str, dict[str, str]], feature: str) -> str:
    """Return "yes", "refused: FIELD", or the services' words where they differ, or where one has not been asked yet."""
    shown = {service: seen.get(feature, "") for service, seen in words.items()}
    shown = {service: "yes" if word == "worked" else word for service, word in shown.items()}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{service}: {word}" for service, word in shown.items() if word)


def render_table(results: dict[str, dict]) -> str:
    lines = [f"| client | {' | '.join(FEATURES)} | not run |", "|---" * (len(FEATURES) + 2) + "|"]
    for client in CLIENTS:
        entry = {service: results.get(client.name, {}).get(service, {"skipped": "not run yet"}) for service in SERVICES}
        ran = {service: words for service, words in entry.items() if "skipped" not in words}
        cells = [render_cell(ran, feature) if ran else "" for feature in FEATURES]
        skipped = [f"{service}: {words['skipped']}" for service, words in entry.items() if "skipped" in words]
        lines.append(f"| {client.title} {client.pin} | {' | '.join(cells)} | {'; '.join(skipped)} |")
    return "\n".join(lines) + "\n"


def split_page(page: str) -> tuple[str, str, str]:
    """Return the page before the table, the table, and the page after it."""
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    return before + BEGIN, table, END + after


def write_table() -> None:
    before, _, after = split_page(PAGE.read_text())
    PAGE.write_text(before + render_table(load_results()) + after)
