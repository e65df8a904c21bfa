"""The images of the stack: ours, built from the Dockerfiles on a base of Debian's packages, and three stand-ins.

The machine of the tests has no container registry, so nothing is pulled. Redis and PostgreSQL are Debian's, and rclone
stands in for Garage; the stand-ins take the names that compose.yaml gives, and its commands.
"""

import functools
import http.server
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

ROOT = Path(__file__).parents[3]
STAND_INS = Path(__file__).parent / "stand_ins"
BASE, SERVERS = "omnivideo-test/base:1", "omnivideo-test/servers:2"
BASE_PACKAGES = "python3.11,python3.11-venv,python3-pip,ca-certificates,tzdata,netbase,libnuma1"
SERVER_PACKAGES = "redis-server,postgresql-15"
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
    if "COPY" in instructions:
        shutil.copytree(STAND_INS, context, dirs_exist_ok=True)
        shutil.copy(Path(sysconfig.get_path("scripts")) / "rclone", context / "rclone")
    engine.run_docker("build", "--quiet", "--tag", name, str(context))
    shutil.rmtree(context)


def build_stand_ins(engine: Engine, folder: Path, names: dict[str, str]) -> None:
    """Build the image of the servers, and tag it with the names that the services of compose.yaml have."""
    build_debian_image(
        engine, folder, SERVERS, SERVER_PACKAGES,
        "COPY rclone /usr/local/bin/\nCOPY garage /\nCOPY --chmod=755 docker-entrypoint.sh /usr/local/bin/\n"
        "RUN chmod 755 /garage /usr/local/bin/* && mkdir -p /data /var/lib/garage/meta /var/lib/garage/data"
        " /var/lib/postgresql/data && chown redis /data && chown postgres /var/lib/postgresql/data"
        " && chown -R 10002:10002 /var/lib/garage\n"
        "ENV LANG=C.UTF-8 PGDATA=/var/lib/postgresql/data"
        " PATH=/usr/lib/postgresql/15/bin:/usr/local/bin:/usr/bin:/bin\n"
        'ENTRYPOINT ["/usr/local/bin/docker-entrypoint.sh"]',
    )  # fmt: skip
    for name in names.values():
        engine.run_docker("tag", SERVERS, name)


@contextmanager
def serve_wheels(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Serve the wheels that lie only on this machine over HTTP; yield pip's configuration and the build's arguments."""
    configuration, arguments = folder / "pip.conf", {}
    lines, links = ["[global]"], os.environ.get("PIP_FIND_LINKS", "")
    server = None
    if Path(urlsplit(links).path).is_dir():
        handler = functools.partial(QuietHandler, directory=urlsplit(links).path)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines += [f"find-links = http://127.0.0.1:{server.server_port}/", "trusted-host = 127.0.0.1"]
        if list(Path(urlsplit(links).path).glob("torch-*")):
            arguments["TORCH_INDEX"] = "https://pypi.org/simple"
    elif links:
        lines += [f"find-links = {links}"]
    configuration.write_text("\n".join(lines) + "\n")
    try:
        yield configuration, arguments
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def build_our_images(engine: Engine, folder: Path, builds: dict[str, dict]) -> None:
    """Build the images of compose.yaml: `builds` maps an image's name to its section `build`."""
    build_debian_image(engine, folder, BASE, BASE_PACKAGES, f"RUN {PREPARE_BASE}")
    certificates = next((os.environ[name] for name in ("PIP_CERT", "SSL_CERT_FILE") if os.environ.get(name)), None)
    with serve_wheels(folder) as (pip_configuration, mirror_arguments):
        for image, build in builds.items():
            arguments = {**build.get("args", {}), "BASE": BASE, **mirror_arguments}
            command = ["build", "--network", "host", "--tag", image, "--file", str(ROOT / build["dockerfile"])]
            for name, value in arguments.items():
                command += ["--build-arg", f"{name}={value}"] if value else []
            command += ["--secret", f"id=pip,src={pip_configuration}"]
            command += ["--secret", f"id=ca,src={certificates}"] if certificates else []
            engine.run_docker(*command, str(ROOT))
