"""The service's settings, read from the environment (`OMNIVIDEO_...`)."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from omnivideo.errors import SECONDS_PER_DAY, InvalidInput
from omnivideo.presets import Precision
from omnivideo.validation import describe_errors


def check_idle_seconds(seconds: int) -> int:
    if seconds and seconds < 3600:
        raise ValueError("allowed: 0, or 3600 or more")
    return seconds


# Patterns with their descriptions, which error messages contain.
HttpUrl = Annotated[
    str,
    Field(pattern=r"^$|^https?://[^\s]+$", description="an address that begins with http:// or https://, or nothing"),
]
DatabaseUrl = Annotated[
    str,
    Field(
        pattern=r"^$|^postgres(ql)?://", description="an address that begins with postgresql://, or nothing for SQLite"
    ),
]
BrokerUrl = Annotated[
    str,
    Field(
        pattern=r"^$|^(redis|rediss|amqp|amqps)://",
        description="an address that begins with redis://, rediss://, amqp:// or amqps://, or nothing",
    ),
]
BucketName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$",
        description="the name of a bucket: 3 to 63 lower-case letters, digits, dots or dashes",
    ),
]
Key = Annotated[str, Field(pattern=r"^$|^.{16,200}$", description="a key of 16 to 200 characters, or nothing")]
IdleSeconds = Annotated[int, AfterValidator(check_idle_seconds)]
# Each can come from a file, which OMNIVIDEO_..._FILE names.
SECRET_SETTINGS = ("database", "broker", "s3_access_key", "s3_secret_key", "admin_key", "mllm_key")


def split_commas(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


# Names of version 0.1: refused with the new name, since a setting that is silently ignored is worse than an error.
RENAMED_SETTINGS = {
    "OMNIVIDEO_LIFETIME": "OMNIVIDEO_ARTIFACT_LIFETIME_SECONDS",
    "OMNIVIDEO_HOOK_HOSTS": "OMNIVIDEO_WEBHOOK_HOSTS",
    "OMNIVIDEO_FETCH_SECONDS": "OMNIVIDEO_FETCH_TIMEOUT_SECONDS",
    "OMNIVIDEO_UPLOAD_MOST": "OMNIVIDEO_MAX_UPLOAD_BYTES",
    "OMNIVIDEO_QUEUE_MOST": "OMNIVIDEO_MAX_QUEUED_JOBS",
    "OMNIVIDEO_KEY_MOST": "OMNIVIDEO_MAX_OPEN_JOBS_PER_KEY",
    "OMNIVIDEO_LOST_AFTER": "OMNIVIDEO_HEARTBEAT_TIMEOUT",
    "OMNIVIDEO_RESUME_STEPS": "OMNIVIDEO_SAVE_STATE_EVERY_STEPS",
    "OMNIVIDEO_RESUME_SECONDS": "OMNIVIDEO_SAVE_STATE_EVERY_SECONDS",
    "OMNIVIDEO_TOGETHER": "OMNIVIDEO_MAX_BATCH_SIZE",
}

# Names that other programs read: the shell scripts, the tests and the benchmarks.
OTHER_VARIABLES = frozenset(
    {
        "OMNIVIDEO_CLIENTS",
        "OMNIVIDEO_EXAMPLES",
        "OMNIVIDEO_GOLDEN",
        "OMNIVIDEO_GRADIO_PYTHON",
        "OMNIVIDEO_KILLS",
        "OMNIVIDEO_SCREENSHOTS",
        "OMNIVIDEO_TEST_CALL_PATHS",
        "OMNIVIDEO_TEST_STEPS",
        "OMNIVIDEO_VLLM_DEVICE",
        "OMNIVIDEO_VLLM_INSTALL",
        "OMNIVIDEO_VLLM_PYTHON",
    }
)
# Kubernetes describes each service of a namespace to its pods in variables that begin with the service's name.
KUBERNETES_VARIABLE = re.compile(
    r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$"
)
LogFormat = Literal["auto", "text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


class SecretFileSource(PydanticBaseSettingsSource):
    """Reads each secret from the file that OMNIVIDEO_..._FILE names; the file precedes the secret's own variable."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[str | None, str, bool]:
        variable = f"OMNIVIDEO_{field_name.upper()}_FILE"
        path = os.environ.get(variable, "") if field_name in SECRET_SETTINGS else ""
        return (read_secret(variable, Path(path)) if path else None), field_name, False

    def __call__(self) -> dict[str, str]:
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


def read_secret(variable: str, path: Path) -> str:
    """Return the only line of a file. Raises an InvalidInput that names the variable."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise InvalidInput(variable, "the file cannot be read; give the path of a text file") from None
    if len(lines) != 1 or not lines[0].strip():
        raise InvalidInput(variable, "the file must hold the secret in one line, and nothing else")
    return lines[0].strip()


class ServiceSettings(BaseSettings):
    """The service's settings. Everything is embedded by default: SQLite, files in `home`, the MLLM and a worker."""

    model_config = SettingsConfigDict(env_prefix="OMNIVIDEO_", frozen=True, extra="ignore")

    home: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "omnivideo")
    preset: str = "tiny"
    weights: str = ""  # a folder in our layout; empty: the weights shipped for the preset
    precision: Precision = "preset"
    database: DatabaseUrl = ""
    broker: BrokerUrl = ""
    mllm: HttpUrl = ""
    mllm_key: Key = Field(default="", repr=False)  # what the MLLM's server requires of its clients; empty: nothing
    mllm_timeout_seconds: float = Field(default=25.0, ge=1, le=600)  # of silence until the MLLM's server hangs
    artifact_lifetime_seconds: int = Field(default=30 * SECONDS_PER_DAY, ge=60)  # of an unreferenced artifact
    turn_lifetime_seconds: int = Field(default=30 * SECONDS_PER_DAY, ge=3600)  # of an ended turn with its events
    # Of an ended job or batch; jobs are kept as long as artifacts at least.
    job_lifetime_seconds: int = Field(default=90 * SECONDS_PER_DAY, ge=3600)
    thread_lifetime_seconds: IdleSeconds = 0  # of a thread after its last turn; 0: until it is deleted

    s3: HttpUrl = ""
    s3_bucket: BucketName = "omnivideo"
    s3_access_key: str = ""
    s3_secret_key: str = Field(default="", repr=False)
    s3_region: str = "us-east-1"
    s3_public: HttpUrl = ""  # the address in signed URLs; empty: `s3`

    admin_key: Key = Field(default="", repr=False)  # empty: no API keys are required
    public_url: HttpUrl = ""  # the address in every link that leaves the service; empty: the request's
    link_lifetime_seconds: int = Field(default=SECONDS_PER_DAY, ge=60, le=30 * SECONDS_PER_DAY)  # of a signed link
    # Origins whose pages may call the service, separated by commas; * for any.
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)] = ()
    # Names under which a service without keys may be called besides those of this machine, separated by commas.
    allowed_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)] = ()
    # Addresses or networks of proxies whose X-Forwarded headers are believed, separated by commas; * for any.
    trusted_proxies: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)] = ("127.0.0.1",)
    # Hosts that media may be fetched from, separated by commas.
    media_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)] = ()
    # Internal hosts that webhooks may reach, separated by commas.
    webhook_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)] = ()
    fetch_timeout_seconds: float = Field(default=20.0, ge=0.1, le=300)  # of one media URL
    # Ports that media may be fetched from besides 80 and 443.
    media_ports: Annotated[tuple[int, ...], NoDecode, BeforeValidator(split_commas)] = ()
    max_upload_bytes: int = Field(default=200 * 2**20, ge=2**10, le=512 * 2**20)

    # Bytes of the large bodies that one process holds at the same time; others wait.
    upload_budget_bytes: int = Field(default=2**30, ge=2**20, le=2**40)

    max_generations_per_turn: int = Field(default=4, ge=1, le=100)  # more are asked about first
    disconnect_grace_seconds: float = Field(
        default=10.0, ge=0, le=3600
    )  # until work that nobody waits for is cancelled

    max_queued_jobs: int = Field(default=10_000, ge=1)  # of all owners
    # Of each key that has no own limits (`omnivideo keys limit`); 0: no limit.
    max_open_jobs_per_key: int = Field(default=2_000, ge=0)  # queued or running
    max_requests_per_minute_per_key: int = Field(default=0, ge=0, le=1_000_000)
    max_device_seconds_per_day_per_key: float = Field(default=0.0, ge=0, le=1e9)  # of workers
    max_stored_bytes_per_day_per_key: int = Field(default=0, ge=0, le=10**15)  # uploaded and generated
    heartbeat_timeout: float = Field(default=15.0, ge=0.5, le=3600)  # seconds until a silent worker counts as lost
    save_state_every_steps: int = Field(default=8, ge=1)  # denoising steps between saved states
    save_state_every_seconds: float = Field(default=2.0, ge=0, le=3600)  # minimum time between saved states
    # Seconds that a clip with a resume point waits for a worker with the same weights; then any worker starts it anew.
    resume_timeout: float = Field(default=60.0, ge=0, le=86_400)
    max_batch_size: int = Field(default=0, ge=0, le=64)  # clips of the batch lane in one pass; 0: the preset's

    metrics_port: int = Field(default=0, ge=0, le=65_535)  # for /metrics without a key; 0: none
    log_format: LogFormat = "auto"  # text in a terminal, otherwise JSON
    log_level: LogLevel = "info"
    traces: Literal["off", "otlp"] = "off"  # otlp: to the server that the variables OTEL_EXPORTER_OTLP_... name

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, SecretFileSource(settings_cls), env_settings

    def model_post_init(self, context: object) -> None:
        if self.s3 and not (self.s3_access_key and self.s3_secret_key):
            raise InvalidInput("OMNIVIDEO_S3_SECRET_KEY", "it is empty; an S3 store needs both of its keys")


def find_renamed_settings() -> list[InvalidInput]:
    """Return an error with the new name for each setting of version 0.1 in the environment."""
    return [
        InvalidInput(old_name, f"it has been called {new_name} since version 0.2; rename it")
        for old_name, new_name in RENAMED_SETTINGS.items()
        if old_name in os.environ
    ]


def find_unknown_settings() -> list[InvalidInput]:
    """Return an error for each variable in the environment that looks like a setting and is none.

    The error has the nearest name. Variables of Kubernetes and of our tests are left alone.
    """
    fields = [name.upper() for name in ServiceSettings.model_fields]
    given = [name for name in os.environ if name.upper().startswith("OMNIVIDEO_")]
    files = [f"OMNIVIDEO_{name.upper()}_FILE" for name in SECRET_SETTINGS]
    known = {*(f"OMNIVIDEO_{field}" for field in fields), *files, *OTHER_VARIABLES, *RENAMED_SETTINGS}
    unknown = [name for name in given if name.upper() not in known and not KUBERNETES_VARIABLE.search(name)]
    errors = []
    for name in unknown:
        nearest = difflib.get_close_matches(name.upper().removeprefix("OMNIVIDEO_"), fields, n=1)
        advice = (
            f"did you mean OMNIVIDEO_{nearest[0]}?" if nearest else "unset it; deploy/.env.example lists all settings"
        )
        errors.append(InvalidInput(name, f"there is no such setting; {advice}"))
    return errors


def load_settings(**overrides: object) -> ServiceSettings:
    """Return the environment's settings, with the `overrides` that are not None applied.

    Raises an InvalidInput that names the setting, and also the right name if the environment has an old or a misspelt
    one.
    """
    for error in [*find_renamed_settings(), *find_unknown_settings()]:
        raise error
    try:
        return ServiceSettings(**{name: value for name, value in overrides.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as validation_error:
        errors = validation_error.errors()
        given = {str(part): None for error in errors for part in error["loc"][:1]}
        name, message = describe_errors(errors, given, ServiceSettings.model_fields)
        raise InvalidInput(f"OMNIVIDEO_{name.upper()}", message) from None
