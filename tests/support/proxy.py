"""nginx with TLS in a network namespace of its own, in front of a service on this machine.

The namespace has its own /etc/hosts, in which `api` is this machine, as in the configuration that docs/operations.md
shows.
"""

import base64
import hashlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.servers import program

NAMESPACE, HOST_LINK, PROXY_LINK = "omnivideo-proxy", "ov-host", "ov-proxy"
HOST_ADDRESS, PROXY_ADDRESS = "10.213.7.1", "10.213.7.2"
IN_NAMESPACE = ["ip", "netns", "exec", NAMESPACE]
NAMESPACE_FILES = Path("/etc/netns", NAMESPACE)  # `ip netns exec` mounts them over those of /etc
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
UNTESTED = "a service behind nginx was not tested"
NGINX_CONF = """
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 256; }}
http {{
    include /etc/nginx/mime.types;
    log_format requests '$request_method $uri $status';
    access_log {folder}/access.log requests;
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/proxied;
    include documented.conf;
}}
"""


def read_documented_configuration() -> tuple[str, str]:
    """Return the nginx configuration of docs/operations.md, and the name of its server."""
    text = re.search(r"```nginx\n(.*?)```", OPERATIONS.read_text(), re.DOTALL)
    assert text, "docs/operations.md shows a configuration"
    name = re.search(r"server_name (\S+);", text[1])
    assert name, "the configuration names the server"
    return text[1], name[1]


def run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, timeout=30).stdout


def remove_namespace() -> None:
    with suppress(subprocess.CalledProcessError):
        run("ip", "netns", "delete", NAMESPACE)
    with suppress(subprocess.CalledProcessError):
        run("ip", "link", "delete", HOST_LINK)
    shutil.rmtree(NAMESPACE_FILES, ignore_errors=True)


@contextmanager
def proxy_network() -> Iterator[None]:
    """Connect a network namespace with this machine, or skip the test."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip(f"network namespaces need root and iproute2: {UNTESTED}")
    remove_namespace()
    try:
        run("ip", "netns", "add", NAMESPACE)
        run("ip", "link", "add", HOST_LINK, "type", "veth", "peer", "name", PROXY_LINK, "netns", NAMESPACE)
        run("ip", "address", "add", f"{HOST_ADDRESS}/30", "dev", HOST_LINK)
        run("ip", "link", "set", HOST_LINK, "up")
        run("ip", "-n", NAMESPACE, "address", "add", f"{PROXY_ADDRESS}/30", "dev", PROXY_LINK)
        for link in ("lo", PROXY_LINK):
            run("ip", "-n", NAMESPACE, "link", "set", link, "up")
    except subprocess.CalledProcessError as error:
        remove_namespace()
        pytest.skip(f"network namespaces cannot be made here ({error.stderr.strip()}): {UNTESTED}")
    try:
        NAMESPACE_FILES.mkdir(parents=True)
        (NAMESPACE_FILES / "hosts").write_text(f"127.0.0.1 localhost\n{HOST_ADDRESS} api\n")
        yield
    finally:
        remove_namespace()


def make_certificate(folder: Path, name: str) -> str:
    """Write a self-signed certificate and its key. Return the digest by which Chromium accepts it."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    run(
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
        "-addext", f"subjectAltName=DNS:{name}", "-keyout", key, "-out", certificate,
    )  # fmt: skip
    public_key = run("openssl", "x509", "-in", certificate, "-pubkey", "-noout")
    der = base64.b64decode("".join(public_key.strip().splitlines()[1:-1]))
    return base64.b64encode(hashlib.sha256(der).digest()).decode()


@contextmanager
def run_nginx(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Run nginx in the namespace. Yield its address, and the options with which Chromium reaches and accepts it."""
    nginx = program("nginx", "nginx-light", UNTESTED)
    configuration, name = read_documented_configuration()
    digest = make_certificate(folder, name)
    (folder / "documented.conf").write_text(configuration)
    (folder / "nginx.conf").write_text(NGINX_CONF.format(folder=folder))
    command = [*IN_NAMESPACE, nginx, "-c", str(folder / "nginx.conf"), "-g", "daemon off; user root;"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=30, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        options = [
            f"--host-resolver-rules=MAP {name} {PROXY_ADDRESS}",
            f"--ignore-certificate-errors-spki-list={digest}",
        ]
        yield f"https://{name}", options
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
