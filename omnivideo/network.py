"""Trust and proxies of every HTTP client: one TLS context, and one rule for which requests go through a proxy.

The rule: the usual variables (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY) name the proxies. This machine and names
without a dot, such as those of containers beside this one, are never reached through one. Addresses that users name
(media, webhooks) are fetched directly, because they are checked first.
"""

import importlib.util
import ipaddress
import os
import ssl
import urllib.request
from functools import cache
from importlib.resources import files
from urllib.parse import urlsplit, urlunsplit

from omnivideo.errors import InvalidInput

LOCAL_SUFFIXES = (".localhost", ".local")
TRUST_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
ALLOWED_PROXIES = "allowed: an address that begins with http:// or https://"


@cache
def create_tls_context() -> ssl.SSLContext:
    """Return the context that checks servers' certificates; all clients of this process share it.

    It trusts SSL_CERT_FILE and SSL_CERT_DIR if they are set, otherwise the system's authorities, or those of certifi
    on a system without any. Raises InvalidInput if a variable names nothing that can be read.
    """
    paths = read_trust_paths()
    try:
        if not (paths.cafile or paths.capath):
            return ssl.create_default_context(cafile=find_authorities_file())
        return ssl.create_default_context()
    except ssl.SSLError:
        raise InvalidInput("SSL_CERT_FILE", "it holds no certificates; give a file in the format PEM") from None


def read_trust_paths() -> ssl.DefaultVerifyPaths:
    """Return where the trusted authorities are. Raises InvalidInput if a variable names nothing that can be read."""
    for name in TRUST_VARIABLES:
        if (path := os.environ.get(name)) and not os.access(path, os.R_OK):
            raise InvalidInput(name, f"{path!r} cannot be read; give the authorities' certificates, or unset it")
    return ssl.get_default_verify_paths()


def find_authorities_file() -> str | None:
    """Return the file of the trusted authorities, for libraries that take no context; None if there is only a folder.

    Raises InvalidInput if a variable names nothing that can be read.
    """
    paths = read_trust_paths()
    if paths.cafile or paths.capath or not importlib.util.find_spec("certifi"):
        return paths.cafile
    return str(files("certifi") / "cacert.pem")


def is_local(host: str) -> bool:
    """Return whether a host is this machine, or one beside it, which no proxy is asked for."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.lower().endswith(LOCAL_SUFFIXES)
    return address.is_loopback or address.is_link_local or address.is_unspecified


def find_proxy(url: str) -> str | None:
    """Return the address of the proxy for requests to a URL, or None if they are sent directly.

    Raises an InvalidInput that names the variable if its proxy cannot be used.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_local(host) or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    for name in (parts.scheme, "all"):
        if proxy := proxies.get(name):
            return check_proxy(f"{name.upper()}_PROXY", proxy)
    return None


def check_proxy(variable: str, proxy: str) -> str:
    """Return a proxy's address with its scheme; raise InvalidInput if no client here can use it."""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = urlunsplit(parts)
    try:
        is_address = bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError:
        is_address = False
    if not is_address:
        raise InvalidInput(variable, f"it is not the address of a proxy; {ALLOWED_PROXIES}, or unset it")
    if parts.scheme in ("http", "https"):
        return address
    shown = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")  # without a password
    raise InvalidInput(variable, f"the proxy {shown} cannot be used; {ALLOWED_PROXIES}, or unset it")


def find_certificate_problem(error: BaseException | None) -> str | None:
    """Return why a server's certificate was refused, if that is what an error is about."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message or "it cannot be verified"
        seen.add(id(error))
        nested = next((argument for argument in error.args if isinstance(argument, BaseException)), None)
        error = error.__cause__ or error.__context__ or nested
    return None


CERTIFICATE_ADVICE = "trust its authority with SSL_CERT_FILE"
