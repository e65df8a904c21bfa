"""The table "client x feature" of docs/service.md, from the results of the last run of `make test-clients`."""

import json
from pathlib import Path

from tests.support.client_features import FEATURES
from tests.support.client_programs import CLIENTS, ClientProgram

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


def render_cell(entry: dict, feature: str) -> str:
    """Return "yes", "refused: FIELD", nothing where the client has no such thing, or both services' words."""
    words = {service: entry[service].get(feature, "") for service in entry if service != "version"}
    shown = {service: "yes" if word == "worked" else word for service, word in words.items()}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{service}: {word or 'no such thing'}" for service, word in shown.items())


def render_table(results: dict[str, dict]) -> str:
    lines = [f"| client | {' | '.join(FEATURES)} |", "|---" * (len(FEATURES) + 1) + "|"]
    for client in CLIENTS:
        entry = results.get(client.name, {"never": {"skipped": "it was never run"}})
        skipped = {service: words["skipped"] for service, words in entry.items() if "skipped" in words}
        cells = [render_cell(entry, feature) for feature in FEATURES]
        if skipped:
            cells[0] = "skipped: " + "; ".join(sorted(set(skipped.values())))
        lines.append(f"| {client.title} {client.pin} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def split_page(page: str) -> tuple[str, str, str]:
    """Return the page before the table, the table, and the page after it."""
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    return before + BEGIN, table, END + after


def write_table() -> None:
    before, _, after = split_page(PAGE.read_text())
    PAGE.write_text(before + render_table(load_results()) + after)
