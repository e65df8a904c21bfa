"""Read the compose files of deploy/ as compose does, without a Docker engine."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
REQUIRED = {name: "x" * 24 for name in (
    "POSTGRES_PASSWORD", "REDIS_PASSWORD", "GARAGE_RPC_SECRET", "OMNIVIDEO_S3_ACCESS_KEY", "OMNIVIDEO_S3_SECRET_KEY",
    "OMNIVIDEO_ADMIN_KEY", "OMNIVIDEO_MLLM_KEY", "WEBUI_SECRET_KEY",
)}  # fmt: skip


def interpolate(text: str, given: dict[str, str]) -> str:
    """Substitute variables as compose does, nested ones included: ${A}, ${A:-else}, ${A:+then} and ${A:?why}.

    `$$` becomes `$`. Raise KeyError for a missing ${A:?why}.
    """

    def one(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if kind == ":+":
            return rest if given.get(name) else ""
        if given.get(name):
            return given[name]
        if kind == ":?":
            raise KeyError(name)
        return rest or ""

    inner = re.compile(r"(?<!\$)\$\{(\w+)(?:(:[-?+])([^${}]*))?\}")
    while inner.search(text):
        text = inner.sub(one, text)
    return text.replace("$$", "$")


def compose(name: str = "compose.yaml", **given: str) -> dict:
    return yaml.safe_load(interpolate((DEPLOY / name).read_text(), REQUIRED | given))
