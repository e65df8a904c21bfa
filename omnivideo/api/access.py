"""Who sends a request, and whether its key may do that now: its scopes, and its requests per minute.

The limits on clips and on what is stored are checked where they are created, for every route.

A service without keys listens on this machine only, but every page that its user opens can send requests there: by a
form, or under a name of the page's own that resolves to 127.0.0.1 (DNS rebinding). It refuses both. A key protects
from both, since a browser never sends it by itself.
"""

import base64
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi.security.utils import get_authorization_scheme_param

from omnivideo.api.errors import APIError, format_quota
from omnivideo.api.stores import APIKeyStore, UsageStore
from omnivideo.errors import LimitReached
from omnivideo.records import REQUEST_WINDOW_SECONDS, SCOPES, APIKeyRecord, KeyLimits, RequestWindow, Scope
from omnivideo.settings import ServiceSettings

READING_METHODS = ("GET", "HEAD")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
HOST_WITH_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::\d{1,5})?")
PASSWORD_CHALLENGE = 'Basic realm="omnivideo: the password is an API key"'


@dataclass(frozen=True)
class Access:
    """The key of a request, its limits, and the headers that tell the client what is left of them."""

    key: APIKeyRecord
    limits: KeyLimits
    headers: dict[str, str]


class AccessControl:
    """Checks the keys of requests. `default_limits` are those of keys that have no own ones.

    Without keys, everybody is `local_owner` and may do everything within the default limits.
    """

    def __init__(self, keys: APIKeyStore, usage: UsageStore, default_limits: KeyLimits, local_owner: str):
        self.keys, self.usage, self.default_limits = keys, usage, default_limits
        self.local_key = APIKeyRecord(
            id=local_owner, name=local_owner, created_at=0.0, revoked=False, expires_at=None, scopes=SCOPES,
            own_limits={},
        )  # fmt: skip

    @property
    def needs_database(self) -> bool:
        return self.keys.is_required or self.default_limits.requests_per_minute > 0

    def admit(self, authorization: str | None, method: str) -> Access:
        """Return the access of a request, which is counted.

        Raises APIError (401 for a key that is not valid, 403 for one without the scope), and LimitReached.
        """
        key = self.find_key(authorization)
        require_scope(key, "read" if method in READING_METHODS else "generate")
        limits = key.merge_limits(self.default_limits)
        quota = limits.requests_per_minute
        if not quota:
            return Access(key, limits, {})
        window = self.usage.count_request(key.id)
        if window.request_count > quota:
            message = f"requests: this key may send {quota} a minute; try again in {math.ceil(window.seconds_left)} s"
            raise LimitReached(message, window.seconds_left, "requests", quota, REQUEST_WINDOW_SECONDS)
        return Access(key, limits, build_request_headers(quota, window))

    def find_key(self, authorization: str | None) -> APIKeyRecord:
        """Return the key of a request's header. Raises APIError (401)."""
        if not self.keys.is_required:
            return self.local_key
        scheme, key = get_authorization_scheme_param(authorization)
        record = self.keys.find_key(key) if scheme.lower() == "bearer" and key else None
        if record is None:
            unauthorized = APIError(401, "the API key is missing, wrong or revoked, or has expired")
            unauthorized.code, unauthorized.headers["WWW-Authenticate"] = "invalid_api_key", "Bearer"
            raise unauthorized
        return record


def accept_password(authorization: str | None) -> str | None:
    """Return a header with a password, of any user name, as one with that key; return other headers unchanged."""
    scheme, credentials = get_authorization_scheme_param(authorization)
    if scheme.lower() != "basic":
        return authorization
    try:
        return f"Bearer {base64.b64decode(credentials, validate=True).decode().partition(':')[2]}"
    except ValueError:
        return None


def require_scope(key: APIKeyRecord, scope: Scope) -> None:
    """Raise APIError (403) if the key does not have the scope."""
    if scope not in key.scopes:
        message = f"this key may only {' and '.join(key.scopes)}; the request needs a key that may {scope}"
        raise APIError(403, message, None, "insufficient_scope")


def build_request_headers(quota: int, window: RequestWindow) -> dict[str, str]:
    """Return the headers of the IETF's draft, and those of OpenAI's API, for the requests that are left."""
    left, seconds = max(0, quota - window.request_count), math.ceil(window.seconds_left)
    return format_quota("requests", quota, REQUEST_WINDOW_SECONDS, left, seconds) | {
        "x-ratelimit-limit-requests": str(quota),
        "x-ratelimit-remaining-requests": str(left),
        "x-ratelimit-reset-requests": f"{seconds}s",
    }


# ---------------------------------------------------------------- pages of other sites


def check_site(settings: ServiceSettings, method: str, headers: Mapping[str, str]) -> APIError | None:
    """Return the error of a request under a foreign host name, or of a change that another site's page requests.

    The names of header fields are in lower case. A service that requires keys accepts everything here.
    """
    if settings.admin_key:
        return None
    allowed_hosts = list_allowed_hosts(settings)
    host = headers.get("host", "")
    if strip_port(host) not in allowed_hosts:
        message = f"Host: {host[:100]!r} is not this service; allowed: {', '.join(allowed_hosts)}"
        return APIError(403, message, "Host", "host_not_allowed")
    if method in (*READING_METHODS, "OPTIONS") or "*" in settings.cors_origins:
        return None
    origin = headers.get("origin")
    if origin is None:
        is_foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    else:
        is_foreign = urlsplit(origin).netloc.lower() != host.lower() and origin not in settings.cors_origins
    if is_foreign:
        message = (
            "Origin: pages of other sites may change nothing here; allowed: this service and OMNIVIDEO_CORS_ORIGINS"
        )
        return APIError(403, message, "Origin", "origin_not_allowed")
    return None


def list_allowed_hosts(settings: ServiceSettings) -> list[str]:
    """Return the names of this service: of this machine, of its public address, and those in the settings."""
    public_host = strip_port(urlsplit(settings.public_url).netloc) if settings.public_url else None
    return list(dict.fromkeys([*LOCAL_HOSTS, *([public_host] if public_host else []), *settings.allowed_hosts]))


def strip_port(host: str) -> str:
    """Return a host without its port, in lower case and without the dot at its end; "" if it is none."""
    match = HOST_WITH_PORT.fullmatch(host)
    return match[1].lower().rstrip(".") if match else ""
