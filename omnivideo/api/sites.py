"""Refuse what web pages of other sites send to a service that requires no keys.

Such a service listens on this machine only, but every page that its user opens can send requests there: by a form, or
under a name of the page's own that resolves to 127.0.0.1 (DNS rebinding). A key protects from both, since a browser
never sends it by itself.
"""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from omnivideo.api.access import READING_METHODS
from omnivideo.api.errors import APIError
from omnivideo.settings import ServiceSettings

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
HOST_WITH_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::\d{1,5})?")


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
