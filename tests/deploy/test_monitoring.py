"""The alert rules and the dashboard in deploy/monitoring: each is complete, and names only metrics that exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from omnivideo.api.app import create_app
from omnivideo.api.routes.operations import MLLMCollector
from tests.support.api_server import build_scripted_wiring

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
ALERTS = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
TARGETS = [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = {rule["alert"]: rule["expr"] for rule in RULES}
EXPRESSIONS |= {f"{title} {target['refId']}": target["expr"] for title, target in TARGETS}
WORDS = {"by", "without", "and", "or", "unless", "on", "ignoring", "sum", "max", "min", "rate", "increase", "absent",
         "histogram_quantile"}  # fmt: skip
LABELS = {"le", "lane", "state", "route", "method", "status", "kind", "cache", "result", "preset", "weights",
          "precision", "placement", "part", "location"}  # fmt: skip
ADDED_BY_PROMETHEUS = {"instance", "pod"}
DURATION = r"\[(?:\d+[smhd]|\$__rate_interval)\]"
TOKEN = re.compile(r'\s+|"[^"]*"|[A-Za-z_:][A-Za-z0-9_:]*|\d+(?:\.\d+)?|[=!<>]=|=~|[-+*/<>=(){},]')
CLOSING = {"(": ")", "{": "}"}


def parse_expression(expression: str) -> tuple[set[str], set[str]]:
    """Return the names of metrics and of labels in a PromQL expression; raise ValueError for what is none."""
    text, position, open_brackets = re.sub(DURATION, "", expression), 0, []
    tokens = []
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"unexpected {text[position : position + 10]!r}")
        token, position = match[0], match.end()
        if token in CLOSING:
            open_brackets.append(token)
        elif token in CLOSING.values() and (not open_brackets or CLOSING[open_brackets.pop()] != token):
            raise ValueError(f"unexpected {token}")
        if token.strip():
            tokens.append((token, open_brackets[-1:] == ["{"]))
    if open_brackets:
        raise ValueError("a bracket is not closed")
    metrics, labels, in_grouping = set(), set(), False
    for index, (token, in_braces) in enumerate(tokens):
        if token in ("by", "without"):
            in_grouping = True
        elif token == ")":
            in_grouping = False
        elif not re.fullmatch(r"[A-Za-z_:][A-Za-z0-9_:]*", token):
            continue
        elif in_braces or in_grouping:
            labels.add(token)
        elif token not in WORDS:
            if tokens[index + 1 : index + 2] and tokens[index + 1][0] == "(":
                raise ValueError(f"unknown function {token}")
            metrics.add(token)
    return metrics, labels


@pytest.fixture(scope="module")
def exported(omni, tmp_path_factory):
    """Return the names of all samples of a service, and of vLLM's metrics that it passes on."""
    wiring = build_scripted_wiring(tmp_path_factory.mktemp("service"), omni)
    app = create_app(wiring.build_service_context())
    registry = app.state.request_metrics.registry
    app.state.request_metrics.latency_seconds.labels("GET", "/health", "200").observe(0.1)
    app.state.request_metrics.error_count.labels("/health").inc()
    names = set()
    for family in registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        names |= {f"{family.name}{suffix}" for suffix in suffixes}
    counters = {"num_preemptions", "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"}
    vllm_names = [name for name in MLLMCollector.exported_metrics if not name.startswith("omnivideo_")]
    names |= {f"vllm:{name}" + "_total" * (name in counters) for name in vllm_names}
    # Of an MLLM with a server of its own.
    yield names | {"omnivideo_language_model_up", "omnivideo_mllm_part_bytes"}
    wiring.close()


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_name_metrics_that_exist(name, exported):
    metrics, labels = parse_expression(EXPRESSIONS[name])
    assert metrics and metrics <= exported, metrics - exported
    assert labels <= LABELS | ADDED_BY_PROMETHEUS


@pytest.mark.parametrize("wrong", ["sum(rate(omnivideo_jobs[5m])", "summ(omnivideo_jobs)", "max(a) ? 1", 'a{b="c")'])
def test_wrong_expressions_are_noticed(wrong):
    with pytest.raises(ValueError):
        parse_expression(wrong)


def test_every_metric_of_ours_is_shown(exported):
    shown = set().union(*(parse_expression(expression)[0] for expression in EXPRESSIONS.values()))
    unshown = {name for name in exported - shown if not name.endswith(("_sum", "_bucket", "_count"))}
    assert all(name.startswith("vllm:") for name in unshown), unshown


def test_every_alert_says_what_to_do():
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert re.fullmatch(r"\d+m", rule["for"]) and rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "action"}


def test_every_panel_has_its_place():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({str(panel["gridPos"]) for panel in panels}) == len(panels)
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in panels)


def test_names_follow_the_conventions_of_prometheus(exported):
    ours = {name for name in exported if name.startswith("omnivideo_")}
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in ours)
    assert not [name for name in ours if re.search(r"_(ms|minutes|kb|mb)(_|$)", name)]


def test_metrics_have_the_text_format(omni):
    from omnivideo.backends.mllm.local import describe_counts

    families = list(text_string_to_metric_families(describe_counts({"prompt_tokens": 3}, 1, 2)))
    assert [family.name for family in families] == [
        "omnivideo_language_model_tokens", "omnivideo_language_model_cache_requests",
    ]  # fmt: skip


def test_promtool_accepts_the_rules():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: the rules were only parsed here")
    subprocess.run([promtool, "check", "rules", FOLDER / "alerts.yaml"], check=True, capture_output=True)
