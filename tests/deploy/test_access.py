"""Who may reach whom, and who has which secret: the table in docs/operations.md, compose.yaml and the chart agree."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from omnivideo.settings import SECRET_SETTINGS
from tests.deploy.test_deploy import CHART, rendered
from tests.deploy.test_deploy import helm as helm  # the fixture
from tests.support.compose_files import DEPLOY, ROOT, compose

PROCESSES = ("api", "worker", "migrate", "sweep", "mllm")
SERVERS = {"database": "postgres", "broker": "redis", "store": "s3"}  # the chart's names, and those of compose.yaml
SECRETS = {f"OMNIVIDEO_{name.upper()}" for name in SECRET_SETTINGS}
WITH_EGRESS = {"networkPolicy": {"egress": {"enabled": True}}}


def read_table() -> dict[str, tuple[set[str], set[str]]]:
    """Return the servers that each process reaches, and its secrets, from the table in the documentation."""
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.partition("### Who may reach whom")[2].partition("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|", section, flags=re.M)
    return {name: (set(re.findall(r"`(\w+)`", reaches)), set(re.findall(r"`(\w+)`", secrets)))
            for name, reaches, secrets in rows}  # fmt: skip


TABLE = read_table()


def test_the_table_lists_every_process():
    assert set(TABLE) == set(PROCESSES)


def list_reachable_in_compose(process: str) -> set[str]:
    model = compose()
    networks = {name: set(service["networks"]) for name, service in model["services"].items()}
    servers = [*SERVERS.values(), "mllm"]
    reachable = {server for server in servers if server != process and networks[server] & networks[process]}
    leads_out = any(not (model["networks"][network] or {}).get("internal") for network in networks[process])
    return reachable | ({"outside"} if leads_out else set())


@pytest.mark.parametrize("process", PROCESSES)
def test_compose_connects_what_the_table_says(process):
    reaches, secrets = TABLE[process]
    assert list_reachable_in_compose(process) == reaches
    environment = compose()["services"][process]["environment"]
    assert environment.keys() & SECRETS == secrets


def list_policies(helm, case: dict) -> dict[str, dict]:
    things = rendered(helm, case)
    policies = [thing for thing in things if thing["kind"] == "NetworkPolicy"]
    return {policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]: policy["spec"]
            for policy in policies}  # fmt: skip


def list_reachable_in_chart(helm, process: str) -> set[str]:
    policies = list_policies(helm, WITH_EGRESS)
    values = yaml.safe_load((CHART / "values.yaml").read_text())["networkPolicy"]["egress"]
    rules = policies[process]["egress"]
    taken_by = {"mllm": policies["mllm"]["ingress"]}
    reachable = set()
    if {} in rules:  # to any address: to the servers too
        reachable |= {"outside", *SERVERS.values()}
        sources = [source["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
                   for rule in taken_by["mllm"] for source in rule["from"]]  # fmt: skip
        reachable |= {"mllm"} if process in sources else set()
    for server, name in SERVERS.items():
        if any([port["port"] for port in rule.get("ports", [])] == values[server]["ports"] for rule in rules):
            reachable.add(name)
    return reachable


@pytest.mark.parametrize("process", PROCESSES)
def test_the_chart_connects_what_the_table_says(helm, process):
    assert list_reachable_in_chart(helm, process) == TABLE[process][0]


@pytest.mark.parametrize("as_files", [False, True])
def test_the_chart_gives_each_process_the_secrets_of_the_table(helm, as_files):
    found = {}
    for thing in rendered(helm, {"secret": {"name": "ours", "asFiles": as_files}}):
        if thing["kind"] in ("Deployment", "Job", "CronJob"):
            pod = thing["spec"].get("jobTemplate", thing)["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            names = {entry["name"] for entry in container["env"]}
            found[container["name"]] = {name.removesuffix("_FILE") for name in names} & SECRETS
            assert any(name.endswith("_FILE") for name in names) == as_files
            assert not (as_files and names & SECRETS)
            mounted = [volume["secret"]["items"] for volume in pod["volumes"] if "secret" in volume]
            assert [len(items) for items in mounted] == ([len(found[container["name"]])] if as_files else [])
    assert found == {process: secrets for process, (_, secrets) in TABLE.items()}


def test_nothing_but_the_api_and_the_language_model_takes_connections(helm):
    policies = list_policies(helm, {})
    assert set(policies) == set(PROCESSES)
    assert {name for name, policy in policies.items() if policy["ingress"]} == {"api", "mllm"}
    assert all(policy["policyTypes"] == ["Ingress"] for policy in policies.values())  # egress is asked for
    assert list_policies(helm, {"networkPolicy": {"enabled": False}}) == {}


def test_settings_in_compose_and_in_the_chart_reach_the_same_processes(helm):
    """Each setting that a value is given for, except what the two give a fixed value."""
    names = yaml.safe_load((CHART / "values.yaml").read_text())["settings"]
    addresses = ("OMNIVIDEO_S3", "OMNIVIDEO_S3_PUBLIC", "OMNIVIDEO_MLLM", "OMNIVIDEO_PUBLIC_URL")
    given = dict.fromkeys(names, "9") | dict.fromkeys(addresses, "http://x")
    given |= {"OMNIVIDEO_HOME": "/x", "OMNIVIDEO_TRACES": "otlp", "OMNIVIDEO_LOG_FORMAT": "json"}
    given |= {"OMNIVIDEO_LOG_LEVEL": "info", "OMNIVIDEO_PRECISION": "preset"}
    for thing in rendered(helm, {"settings": given}):
        if thing["kind"] in ("Deployment", "Job", "CronJob"):
            pod = thing["spec"].get("jobTemplate", thing)["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            in_chart = {entry["name"] for entry in container["env"]} & names.keys()
            in_compose = compose()["services"][container["name"]]["environment"].keys() & names.keys()
            assert in_chart == in_compose, container["name"]


def test_secrets_come_from_files_where_compose_is_told_to():
    """compose.secrets.yaml replaces each secret of each process, and mounts the file that it names instead."""
    overlay, plain = compose("compose.secrets.yaml"), compose()
    for process in PROCESSES:
        service = overlay["services"][process]
        secrets = plain["services"][process]["environment"].keys() & SECRETS
        files = {name: f"/run/secrets/{name.removeprefix('OMNIVIDEO_').lower()}" for name in secrets}
        assert service["environment"] == {name: "" for name in secrets} | {
            f"{name}_FILE": path for name, path in files.items()
        }
        assert {f"/run/secrets/{secret}" for secret in service["secrets"]} == set(files.values())
        assert set(service["secrets"]) <= overlay["secrets"].keys()


def test_the_workers_health_check_reads_the_broker_from_its_file(tmp_path):
    """With `secret.asFiles` no variable has the broker; the chart's probes would otherwise kill every worker."""
    pytest.importorskip("celery", reason="celery is not installed; the workers' health check was not tested")
    pytest.importorskip("redis", reason="redis is not installed; the workers' health check was not tested")
    (tmp_path / "broker").write_text("redis://127.0.0.1:9/0\n")
    environment = {"PATH": os.environ["PATH"], "OMNIVIDEO_BROKER_FILE": str(tmp_path / "broker")}
    ask = [sys.executable, DEPLOY / "alive.py", "worker"]
    done = subprocess.run(ask, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "the broker is unavailable: OperationalError\n"), done.stderr


def test_servers_outside_can_be_reached_with_the_file_for_it():
    overlay, plain = compose("compose.external.yaml"), compose()
    for process, service in overlay["services"].items():
        assert set(service["networks"]) == {"outside"} and not set(service["networks"]) & set(
            plain["services"][process]["networks"]
        )
    assert set(overlay["services"]) == {"worker", "migrate", "sweep"}
