"""The images that the stack's are built from: a base of Debian's packages, and one image with three servers.

The machine of the tests has no container registry, so nothing is pulled: the settings for builds behind a mirror name
these images. Redis and PostgreSQL are Debian's, and rclone stands in for Garage; they take compose.yaml's commands.
"""

import functools
import http.server
import ipaddress
import os
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tests.deploy.stack.engine import Engine

STAND_INS = Path(__file__).parent / "stand_ins"
BASE, SERVER_BASE = "omnivideo-test/base:1", "omnivideo-test/server-base:1"
SERVERS = "omnivideo-test/servers:4"
BASE_PACKAGES = "python3.11,python3.11-venv,python3-pip,ca-certificates,tzdata,netbase,libnuma1"
SERVER_PACKAGES = "redis-server,postgresql-15"
CERTIFICATES = ("PIP_CERT", "SSL_CERT_FILE")
# Debian's python3 under the names of the official image, and without the mark that keeps pip out.
PREPARE_BASE = (
    "for name in python python3; do ln -sf /usr/bin/python3.11 /usr/local/bin/$name; done"
    " && ln -sf /usr/bin/pip3 /usr/local/bin/pip && rm -f /usr/lib/python3*/EXTERNALLY-MANAGED"
)


def build_debian_image(engine: Engine, folder: Path, name: str, packages: str, instructions: str = "") -> None:
    """Build an image of Debian's packages, unless the engine has it."""
    if engine("GET", f"/images/{name}/json", missing_ok=True).get("Id"):
        return
    context = folder / name.replace("/", "-").replace(":", "-")
    shutil.rmtree(context, ignore_errors=True)
    context.mkdir(parents=True)
    leave_out = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale")]
    command = ["mmdebstrap", "--variant=minbase", f"--include={packages}", *leave_out, "bookworm", "system.tar"]
    subprocess.run(command, cwd=context, check=True, capture_output=True, timeout=900)
    (context / "Dockerfile").write_text(f"FROM scratch\nADD system.tar /\n{instructions}\n")
    engine.run_docker("build", "--quiet", "--tag", name, str(context))
    shutil.rmtree(context)


def build_images_to_start_from(engine: Engine, folder: Path) -> dict[str, str]:
    """Build the base of our images and the image of the servers; return the settings of .env that name them."""
    build_debian_image(engine, folder, BASE, BASE_PACKAGES, f"RUN {PREPARE_BASE}")
    build_debian_image(engine, folder, SERVER_BASE, SERVER_PACKAGES)
    context = folder / "stand-ins"
    shutil.rmtree(context, ignore_errors=True)
    shutil.copytree(STAND_INS, context)
    shutil.copy(Path(sysconfig.get_path("scripts")) / "rclone", context / "rclone")
    engine.run_docker("build", "--quiet", "--build-arg", f"BASE={SERVER_BASE}", "--tag", SERVERS, str(context))
    servers = ("REDIS_IMAGE", "POSTGRES_IMAGE", "GARAGE_IMAGE", "BUSYBOX_IMAGE")
    return {"BASE_IMAGE": BASE} | dict.fromkeys(servers, SERVERS)


def find_gateway(engine: Engine) -> str:
    """Return this machine's address in the engine's bridge; it is the first one of the subnet.

    An engine of Debian 12 states the gateway from its second start on.
    """
    (subnet,) = [
        part["Subnet"] for part in engine("GET", "/networks/bridge")["IPAM"]["Config"] if ":" not in part["Subnet"]
    ]
    return str(next(ipaddress.ip_network(subnet).hosts()))


@contextmanager
def serve_wheels(engine: Engine, folder: Path) -> Iterator[dict[str, str]]:
    """Serve the wheels that lie only on this machine to builds; yield settings of .env for builds behind a mirror."""
    configuration, links = folder / "pip.conf", os.environ.get("PIP_FIND_LINKS", "")
    settings = {"PIP_CONFIGURATION": str(configuration)}
    if certificates := next((os.environ[name] for name in CERTIFICATES if os.environ.get(name)), ""):
        settings["CA_CERTIFICATES"] = certificates
    lines, server = ["[global]"], None
    if Path(urlsplit(links).path).is_dir():
        gateway = find_gateway(engine)
        handler = functools.partial(QuietHandler, directory=urlsplit(links).path)
        server = http.server.ThreadingHTTPServer((gateway, 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines += [f"find-links = http://{gateway}:{server.server_port}/", f"trusted-host = {gateway}"]
        if list(Path(urlsplit(links).path).glob("torch-*")):
            settings["TORCH_INDEX"] = "https://pypi.org/simple"
    elif links:
        lines += [f"find-links = {links}"]
    configuration.write_text("\n".join(lines) + "\n")
    try:
        yield settings
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...
