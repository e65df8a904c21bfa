"""Run an unmodified client before a service, and check what it saw."""

import json
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.support.client_features import FEATURES, REFUSALS
from tests.support.client_programs import DRIVERS, ClientProgram
from tests.support.client_services import KEY, RunningService
from tests.support.compose_files import ROOT, compose
from tests.support.servers import free_port

DRIVER_SECONDS = 1500


def write_settings(client: ClientProgram, address: str, folder: Path) -> None:
    """Give a driver a free port and what the documentation says: an environment, an example or a workflow."""
    settings = {"PORT": str(free_port())}
    if client.title == "Open WebUI":
        page = compose("compose.open-webui.yaml", OMNIVIDEO_ADMIN_KEY=KEY)["services"]["open-webui"]
        settings |= page["environment"] | {"OPENAI_API_BASE_URL": f"{address}/v1"}
        settings["HEALTH_CHECK"] = json.dumps(page["healthcheck"]["test"][1:])  # without CMD
    if client.title == "Gradio":
        (settings["EXAMPLE"],) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "clients.md").read_text(), re.S)
    if client.title == "n8n":
        settings["WORKFLOW"] = (ROOT / "examples" / "n8n_chat.json").read_text()
    (folder / "settings.json").write_text(json.dumps(settings))


def run_driver(client: ClientProgram, address: str, folder: Path) -> tuple[dict, str]:
    """Run the client's driver without our package; return what it observed, and the end of its output."""
    drivers = client.folder / "drivers"  # beside node_modules, where Node looks for packages
    shutil.rmtree(drivers, ignore_errors=True)
    shutil.copytree(DRIVERS, drivers)
    write_settings(client, address, folder)
    interpreter = client.find_interpreter()
    environment = {
        "PATH": f"{interpreter.parent}:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8",
        "NO_PROXY": "*", "TERM": "xterm",
    }  # fmt: skip
    command = [interpreter, drivers / client.driver, address, KEY, folder]
    log = folder / "driver.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        process.wait(DRIVER_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the driver has started, such as n8n, ends with it
        process.wait()
    observations = folder / "observations.json"
    return json.loads(observations.read_text()) if observations.exists() else {}, log.read_text()[-4000:]


def judge_feature(feature: str, observation: dict, service: RunningService) -> str:
    """Return the table's word for what a client saw; "failed: ..." is a fault of the service or of the driver."""
    if feature in REFUSALS:
        error = observation.get("error", "")
        return f"refused: {REFUSALS[feature]}" if REFUSALS[feature] in error else f"failed: {observation}"
    if "error" in observation:
        return f"failed: {observation['error']}"
    try:
        FEATURES[feature][0](observation["saw"], service)
    except (AssertionError, IndexError, KeyError, TypeError, ValueError, StopIteration) as error:
        return f"failed: {type(error).__name__}: {error} in {observation}"
    return "worked"


def check_client(client: ClientProgram, service: RunningService, folder: Path) -> dict[str, str]:
    """Run a client's driver; return the table's word for each feature that it observed.

    Raises AssertionError if one failed, or if something was generated that the driver did not ask for.
    """
    before = service.count_jobs()
    observations, log = run_driver(client, service.address, folder)
    assert observations, log
    result = {
        feature: judge_feature(feature, observations[feature], service)
        for feature in FEATURES
        if feature in observations
    }
    assert result.keys() == observations.keys(), "a driver observes what nobody checks"
    failed = {feature: word for feature, word in result.items() if word.startswith("failed")}
    assert not failed, f"{json.dumps(failed, indent=1)}\n{log}"
    assert service.count_jobs() - before == sum(FEATURES[feature][1] for feature in result), observations
    return result
