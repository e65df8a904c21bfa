"""The service's settings, from the environment (`OMNIVIDEO_...`): one truth each."""

from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from omnivideo.errors import InvalidInput

DAY = 86_400


class Service(BaseSettings):
    """`home` holds threads and artifacts; `database` is a postgresql:// address, or empty for SQLite in `home`."""

    model_config = SettingsConfigDict(env_prefix="OMNIVIDEO_", frozen=True, extra="ignore")

    home: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "omnivideo")
    database: str = Field(default="", pattern=r"^$|^postgres(ql)?://")
    lifetime: int = Field(default=30 * DAY, ge=60)  # seconds that an artifact nothing refers to is kept


def service(**given: object) -> Service:
    """The environment's settings with what is given in place; raises InvalidInput that names the setting."""
    try:
        return Service(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"OMNIVIDEO_{str(first['loc'][0]).upper()}", first["msg"]) from None
