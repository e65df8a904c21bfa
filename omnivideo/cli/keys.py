"""The commands for API keys: what each key may do and use, and what it has used."""

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from omnivideo.cli.app import console, error_console
from omnivideo.cli.service import build_wiring
from omnivideo.errors import SECONDS_PER_DAY, InvalidInput

if TYPE_CHECKING:
    from omnivideo.records import APIKeyRecord, Scope
    from omnivideo.storage.database.keys import APIKeyRepository
    from omnivideo.wiring import ServiceWiring

app = typer.Typer(no_args_is_help=True)
OPEN_SERVICE_WARNING = (
    "warning: OMNIVIDEO_ADMIN_KEY is empty, so the service answers everyone, with or without a key;"
    " set it where the service runs, and restart the service"
)
LIMIT_MAXIMA = {
    "requests_per_minute": 1_000_000, "open_jobs": 1_000_000, "device_seconds_per_day": 10**9,
    "stored_bytes_per_day": 10**15,
}  # fmt: skip
LIMITS, ACCESS = "Limits: a number, none, or default (as the settings say)", "Access"
USAGE_COLUMNS = (
    "clips", "images", "steps", "device_seconds", "prompt_tokens", "answer_tokens", "stored_bytes",
)  # fmt: skip

KeyIdArgument = Annotated[str, typer.Argument(help="Id of the key, as `keys list` prints it.")]
ScopesOption = Annotated[
    str | None,
    typer.Option(help="What the key may do: read, generate, administer; with commas between.", rich_help_panel=ACCESS),
]
ExpiryOption = Annotated[
    int | None,
    typer.Option(min=0, max=36_500, help="Days until the key expires; 0 is never.", rich_help_panel=ACCESS),
]
RequestsOption = Annotated[str | None, typer.Option(help="Requests.", rich_help_panel=LIMITS)]
JobsOption = Annotated[str | None, typer.Option(help="Queued and running clips and images.", rich_help_panel=LIMITS)]
SecondsOption = Annotated[str | None, typer.Option(help="Seconds of workers.", rich_help_panel=LIMITS)]
BytesOption = Annotated[str | None, typer.Option(help="Bytes, uploaded and generated.", rich_help_panel=LIMITS)]


def open_keys(wiring: "ServiceWiring") -> "APIKeyRepository":
    from omnivideo.storage.database.keys import APIKeyRepository

    return APIKeyRepository(wiring.engine)


def parse_limits(**options: str | None) -> dict[str, Any]:
    """Return the columns of the limits that are given: null for the default of the settings, 0 for no limit."""
    return {name: parse_limit(name, text) for name, text in options.items() if text is not None}


def parse_limit(name: str, text: str) -> float | None:
    if text in ("default", "none"):
        return None if text == "default" else 0
    try:
        value = float(text) if name == "device_seconds_per_day" else int(text)
    except ValueError:
        value = -1
    if not (math.isfinite(value) and 0 < value <= LIMIT_MAXIMA[name]):
        option = name.replace("_", "-")
        raise InvalidInput(option, f"it is {text[:100]!r}; allowed: 1 to {LIMIT_MAXIMA[name]}, none, default")
    return value


def parse_scopes(text: str) -> "list[Scope]":
    from omnivideo.records import SCOPES

    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or set(names) - set(SCOPES):
        raise InvalidInput("scopes", f"it is {text[:100]!r}; allowed: {', '.join(SCOPES)}, with commas between")
    return cast("list[Scope]", names)


@app.command("add")
def add_api_key(
    name: Annotated[str, typer.Argument(help="Name of the key's owner.")],
    scopes: ScopesOption = None,
    expires_in_days: ExpiryOption = None,
    requests_per_minute: RequestsOption = None,
    open_jobs: JobsOption = None,
    device_seconds_per_day: SecondsOption = None,
    stored_bytes_per_day: BytesOption = None,
) -> None:
    """Create a key and print it. It cannot be shown again."""
    from omnivideo.records import DEFAULT_SCOPES

    own_limits = parse_limits(
        requests_per_minute=requests_per_minute,
        open_jobs=open_jobs,
        device_seconds_per_day=device_seconds_per_day,
        stored_bytes_per_day=stored_bytes_per_day,
    )
    allowed = DEFAULT_SCOPES if scopes is None else parse_scopes(scopes)
    lifetime_seconds = expires_in_days * SECONDS_PER_DAY if expires_in_days else None
    wiring = build_wiring()
    key_id, key = open_keys(wiring).create_key(name, allowed, lifetime_seconds, own_limits)
    console.print(f"{key_id}  {key}", highlight=False, soft_wrap=True)
    if not wiring.settings.admin_key:
        error_console.print(OPEN_SERVICE_WARNING, style="yellow", highlight=False, markup=False, soft_wrap=True)


@app.command("limit")
def limit_api_key(
    key_id: KeyIdArgument,
    scopes: ScopesOption = None,
    expires_in_days: ExpiryOption = None,
    requests_per_minute: RequestsOption = None,
    open_jobs: JobsOption = None,
    device_seconds_per_day: SecondsOption = None,
    stored_bytes_per_day: BytesOption = None,
) -> None:
    """Change what a key may do and use, from the next second on, and print it. What is not given stays as it is."""
    values = parse_limits(
        requests_per_minute=requests_per_minute,
        open_jobs=open_jobs,
        device_seconds_per_day=device_seconds_per_day,
        stored_bytes_per_day=stored_bytes_per_day,
    )
    if scopes is not None:
        values["scopes"] = " ".join(parse_scopes(scopes))
    lifetime_seconds = None if expires_in_days is None else float(expires_in_days * SECONDS_PER_DAY)
    key = open_keys(build_wiring()).update_key(key_id, lifetime_seconds, **values)
    if key is None:
        raise InvalidInput("key", f"there is no key {key_id!r}")
    print_key(key)


@app.command("list")
def list_api_keys() -> None:
    """List all keys by id and name, with what differs from an ordinary key."""
    for key in open_keys(build_wiring()).list_keys():
        print_key(key)


def print_key(key: "APIKeyRecord") -> None:
    from omnivideo.records import DEFAULT_SCOPES

    details = [] if key.scopes == DEFAULT_SCOPES else [f"scopes {','.join(key.scopes)}"]
    details += [f"{name} {f'{value:.12g}' if value else 'none'}" for name, value in key.own_limits.items()]
    if key.expires_at is not None:
        details.append(f"expires {datetime.fromtimestamp(key.expires_at, UTC):%Y-%m-%d %H:%M} UTC")
    details += ["revoked"] * key.revoked
    console.print("  ".join([key.id, key.name, *details]), highlight=False, markup=False, soft_wrap=True)


@app.command("revoke")
def revoke_api_key(key_id: KeyIdArgument) -> None:
    """Revoke a key, so that requests with it are refused."""
    if open_keys(build_wiring()).update_key(key_id, revoked=True) is None:
        raise InvalidInput("key", f"there is no key {key_id!r}")
    console.print("revoked")


@app.command("delete")
def delete_api_key(key_id: KeyIdArgument) -> None:
    """Delete a key and everything that was made with it. Sweeps remove the data within a day."""
    from omnivideo.storage.database.retention import RetentionRepository

    wiring = build_wiring()
    keys = open_keys(wiring)
    if keys.update_key(key_id, revoked=True) is None:  # first, so that nothing is made with it any more
        raise InvalidInput("key", f"there is no key {key_id!r}")
    RetentionRepository(wiring.engine).mark_owner_deleted(key_id)
    keys.delete_key(key_id)
    console.print("deleted")


@app.command("usage")
def show_usage(
    key_id: Annotated[str | None, typer.Argument(help="Id of a key. Default: all keys.")] = None,
    days: Annotated[int, typer.Option(min=1, max=400, help="Days until today (UTC).")] = 30,
) -> None:
    """Print what keys have used by day: clips, images, steps, seconds of workers, tokens and bytes."""
    rows = build_wiring().usage.list_usage(key_id, days)
    table = [("date", "key", *(name.replace("_", " ") for name in USAGE_COLUMNS))]
    for row in rows:
        counts = (getattr(row, name) for name in USAGE_COLUMNS)
        table.append(
            (row.date, row.owner, *(f"{count:.1f}" if isinstance(count, float) else str(count) for count in counts))
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        text = "  ".join(cell.ljust(width) if index < 2 else cell.rjust(width)
                         for index, (cell, width) in enumerate(zip(line, widths, strict=True)))  # fmt: skip
        console.print(text, highlight=False, markup=False, soft_wrap=True)


@app.callback()
def describe_key_commands() -> None:
    """Create, list, limit, revoke and delete API keys, and show what they have used."""
