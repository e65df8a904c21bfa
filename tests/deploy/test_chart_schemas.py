"""The chart, rendered for five kinds of installation, agrees with Kubernetes' own schemas."""

import pytest

from tests.deploy.test_deploy import CASES, PYPROJECT, rendered
from tests.deploy.test_deploy import helm as helm  # the fixture

OURS_ALONE = ("TriggerAuthentication", "ScaledObject", "ServiceMonitor")  # of KEDA and the Prometheus operator
TLS = {
    "OMNIVIDEO_S3": "https://s3.example.org", "OMNIVIDEO_S3_PUBLIC": "https://s3.example.org",
    "OMNIVIDEO_S3_REGION": "eu-central-1", "OMNIVIDEO_PUBLIC_URL": "https://video.example.org",
}  # fmt: skip
INSTALLATIONS = {
    "with its defaults": {},
    "with a language model on GPUs": CASES["gpu"],
    "with external servers over TLS": {
        "settings": TLS,
        "extraEnv": [{"name": "SSL_CERT_FILE", "value": "/etc/company/ca.crt"}],
        "secret": {"name": "ours", "asFiles": True},
        "registry": "registry.example.org/video",
    },
    "with three API replicas and KEDA": {
        "api": {"replicas": 3, "autoscaling": {"enabled": False}, "extraEnv": [{"name": "A", "value": "b"}]},
        "worker": {"keda": {"enabled": True, "min": 0}},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    },
    "with policies for what pods open": {
        "networkPolicy": {
            "apiFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}],
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "egress": {"enabled": True, "database": {"ports": [6432], "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}},
        },
    },
}


@pytest.fixture(scope="module")
def validate():
    module = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed; no schema of Kubernetes was asked"
    )
    return module.validate


@pytest.mark.parametrize("version", ["1.27", "1.33"])
@pytest.mark.parametrize("case", INSTALLATIONS.values(), ids=INSTALLATIONS)
def test_kubernetes_accepts_the_chart(helm, validate, case, version):
    things = rendered(helm, case)
    checked = [thing for thing in things if thing["kind"] not in OURS_ALONE]
    assert {"Deployment", "Service", "Job", "CronJob", "NetworkPolicy"} <= {thing["kind"] for thing in checked}
    for thing in checked:
        validate(thing, version, strict=True)


def test_a_wrong_field_is_refused(helm, validate):
    (deployment, *_) = [thing for thing in rendered(helm, {}) if thing["kind"] == "Deployment"]
    deployment["spec"]["replica"] = 3
    with pytest.raises(Exception, match="replica"):
        validate(deployment, "1.33", strict=True)


def test_pods_of_a_kind_are_spread_and_scraped(helm):
    things = rendered(helm, INSTALLATIONS["with three API replicas and KEDA"])
    for thing in things:
        if thing["kind"] == "Deployment":
            labels = thing["spec"]["selector"]["matchLabels"]
            constraints = thing["spec"]["template"]["spec"]["topologySpreadConstraints"]
            assert [constraint["topologyKey"] for constraint in constraints] == [
                "kubernetes.io/hostname", "topology.kubernetes.io/zone",
            ]  # fmt: skip
            assert all(constraint["labelSelector"]["matchLabels"] == labels for constraint in constraints)
    (monitor,) = [thing for thing in things if thing["kind"] == "ServiceMonitor"]
    services = [thing for thing in things if thing["kind"] == "Service"]
    selected = monitor["spec"]["selector"]["matchLabels"].items()
    (service,) = [service for service in services if selected <= service["metadata"]["labels"].items()]
    assert service["spec"]["ports"][0]["name"] == monitor["spec"]["endpoints"][0]["port"] == "metrics"
    (published,) = [service for service in services if service["metadata"]["name"].endswith("-api")]
    assert [port["name"] for port in published["spec"]["ports"]] == ["http"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_every_process_has_requests_extra_variables_and_the_registrys_images(helm):
    for thing in rendered(helm, INSTALLATIONS["with external servers over TLS"]):
        if thing["kind"] in ("Deployment", "Job", "CronJob"):
            pod = thing["spec"].get("jobTemplate", thing)["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            assert container["resources"]["requests"]["memory"]
            assert {"name": "SSL_CERT_FILE", "value": "/etc/company/ca.crt"} in container["env"]
            assert container["image"].startswith("registry.example.org/video/omnivideo-")
            assert f":{PYPROJECT['version']}" in container["image"]


def test_keda_reads_the_database_with_the_secret(helm):
    things = rendered(helm, INSTALLATIONS["with three API replicas and KEDA"])
    (scaled,) = [thing for thing in things if thing["kind"] == "ScaledObject"]
    (access,) = [thing for thing in things if thing["kind"] == "TriggerAuthentication"]
    assert scaled["spec"]["triggers"][0]["authenticationRef"]["name"] == access["metadata"]["name"]
    assert access["spec"]["secretTargetRef"] == [{"parameter": "connection", "name": "ours", "key": "database"}]
