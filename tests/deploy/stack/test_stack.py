"""The three images and the whole stack, as compose.yaml describes them: work, faults, stops and limits.

The tests share one stack and run in this order. `make test-deploy` runs them; the figures go to
.cache/deploy/results.json.
"""

import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.deploy.stack.compose import Stack, parse_seconds
from tests.deploy.stack.documented import read_commands
from tests.deploy.stack.requests import begin_clip, read_job, run_sql, wait_for_video
from tests.deploy.test_access import PROCESSES, SECRETS, TABLE

UPLOAD_BYTES = 190 * 2**20
STOPPED = (0, 143)  # exit codes of a process that has ended by itself, or by SIGTERM
# What a process of the network reads from an address: a status, or why there is none.
ASK = """
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(urllib.request.Request(sys.argv[1]), timeout=3).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError as error:
    print("unreachable")
"""


def ask(stack: Stack, container: str, address: str) -> str:
    return stack.engine.execute(stack.name(container), "python3", "-c", ASK, address).strip()


# ---------------------------------------------------------------- what stands


def test_the_language_model_answers_where_nothing_can_be_compiled(stack, http):
    """The image has no compiler: what vLLM compiles at its first request must not be needed."""
    with pytest.raises(AssertionError):
        stack.engine.execute(stack.name("mllm"), "sh", "-c", "command -v c++ || command -v g++ || command -v cc")
    routed = http.post("/v1/route", json={"prompt": "a red circle moves right"})
    assert routed.status_code == 200, (routed.text, stack.log(stack.name("mllm")))
    assert stack.engine.inspect(stack.name("mllm"))["RestartCount"] == 0


def test_containers_have_what_compose_says_and_no_more(stack):
    for process in PROCESSES:
        details = stack.engine.inspect(stack.name(process))
        host, configuration = details["HostConfig"], details["Config"]
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and configuration["User"] == "10001:10001"
        assert host["Memory"] and host["NanoCpus"] <= os.cpu_count() * 1e9 and host["PidsLimit"]
        names = {entry.partition("=")[0] for entry in configuration["Env"]}
        assert names & SECRETS == TABLE[process][1], process
    ports = {service: stack.engine.inspect(stack.name(service))["NetworkSettings"]["Ports"] for service in TABLE}
    assert {service for service, bindings in ports.items() if any(bindings.values())} == {"api"}
    assert all(port == "8000/tcp" for port, binding in ports["api"].items() if binding)


def test_processes_reach_what_the_table_says(stack):
    servers = {"postgres": "http://postgres:5432", "redis": "http://redis:6379", "s3": "http://s3:3900",
               "mllm": "http://mllm:8001/health"}  # fmt: skip
    for process in ("api", "worker", "mllm"):
        for server, address in servers.items():
            is_reached = can_connect(stack, process, address)
            assert is_reached == (server in TABLE[process][0] or server == process), (process, server)
    assert ask(stack, "api", "http://mllm:8001/metrics") == "401"  # without the key


def can_connect(stack: Stack, process: str, address: str) -> bool:
    """Return whether a process finds a server's name and can open a connection to it."""
    host, port = address.partition("//")[2].partition("/")[0].split(":")
    program = "import socket, sys\ntry: socket.create_connection((sys.argv[1], sys.argv[2]), 3); print('yes')\n"
    program += "except OSError: print('no')"
    return stack.engine.execute(stack.name(process), "python3", "-c", program, host, port).strip() == "yes"


def test_metrics_and_documentation_need_a_key_on_the_published_port(stack, http, key):
    address = stack.address("api", 8000)
    for path in ("/metrics", "/docs", "/openapi.json"):
        assert httpx.get(f"{address}{path}", trust_env=False).status_code == 401
        assert httpx.get(f"{address}{path}", auth=("anyone", key), trust_env=False).status_code == 200
    assert httpx.get(f"{address}/ready", trust_env=False).status_code == 200
    assert ask(stack, "api", "http://127.0.0.1:9100/metrics") == "200"


# ---------------------------------------------------------------- work


def test_the_documented_commands_make_the_first_clip(stack):
    """`exec -T` because a test has no terminal."""
    add_key = read_commands("Start")[-1].replace("exec api", "exec -T api")
    key = stack.run(add_key).split()[-1]
    submit, poll, download = [command.replace("Bearer KEY", f"Bearer {key}") for command in read_commands("Start", 1)]
    video_id, deadline = json.loads(stack.run(submit))["id"], time.monotonic() + 180
    while json.loads(stack.run(poll.replace("videos/ID", f"videos/{video_id}")))["status"] != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    stack.run(download.replace("videos/ID", f"videos/{video_id}"))
    assert (stack.checkout / "clip.mp4").read_bytes()[4:8] == b"ftyp"


def test_clips_edits_chats_batches_and_links(stack, http, environment, report):
    began_at = time.monotonic()
    video = wait_for_video(http, http.post("/v1/videos", json={"prompt": "a red circle moving right"}).json()["id"])
    assert video["status"] == "completed", video
    report["a clip"] = f"{time.monotonic() - began_at:.1f} s"
    assert http.get(f"/v1/videos/{video['id']}/content").content[4:8] == b"ftyp"

    began_at = time.monotonic()
    edit = http.post("/v1/videos/edits", json={"prompt": "make the circle blue", "video": {"id": video["id"]}})
    assert edit.status_code == 200, edit.text
    assert wait_for_video(http, edit.json()["id"])["status"] == "completed"
    report["an edit of it"] = f"{time.monotonic() - began_at:.1f} s"

    chat = http.post("/v1/chat/completions", json={
        "model": "tiny", "messages": [{"role": "user", "content": "a picture of a green square"}],
    })  # fmt: skip
    assert chat.status_code == 200, chat.text
    (link,) = re.findall(r"\((http://[^)\s]+)\)", chat.json()["choices"][0]["message"]["content"])[:1]
    assert httpx.get(link, follow_redirects=True, trust_env=False).status_code == 200  # signed: no key is sent

    image = http.post("/v1/images/generations", json={"prompt": "a blue square", "response_format": "url"}).json()
    address = image["data"][0]["url"]
    assert address.startswith(environment["OMNIVIDEO_S3_PUBLIC"])
    assert httpx.get(address, trust_env=False).content[:4] == b"\x89PNG"

    began_at = time.monotonic()
    body = {"prompt": "a red ball", "seconds": "1"}
    lines = [{"custom_id": str(n), "method": "POST", "url": "/v1/videos", "body": body | {"seed": n}} for n in range(6)]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = http.post("/v1/files", files={"file": ("six.jsonl", content)}, data={"purpose": "batch"}).json()
    batch = http.post("/v1/batches", json={
        "input_file_id": file["id"], "endpoint": "/v1/videos", "completion_window": "24h",
    }).json()  # fmt: skip
    while (batch := http.get(f"/v1/batches/{batch['id']}").json())["status"] not in ("completed", "failed"):
        assert time.monotonic() - began_at < 180
        time.sleep(0.3)
    assert batch["request_counts"] == {"total": 6, "completed": 6, "failed": 0}
    report["a batch of six clips"] = f"{time.monotonic() - began_at:.1f} s"


def test_the_logs_have_our_lines(stack):
    """Celery sets up logging of its own first; the lines of our processes are JSON all the same."""
    expected = {"worker": "attempt 1 begins", "api": "POST /v1/videos 200", "mllm": "/v1/route"}
    for process, text in expected.items():
        lines = stack.engine.read_log(stack.name(process)).splitlines()
        records = [json.loads(line) for line in lines if line.startswith("{")]
        assert any(text in record["message"] for record in records), (process, lines[-20:])


# ---------------------------------------------------------------- faults


def test_a_killed_worker_loses_no_clip(stack, http, report):
    stack.scale(worker=2)
    video_id = begin_clip(http)
    hosts = {stack.engine.inspect(stack.name("worker", number))["Config"]["Hostname"]: number for number in (1, 2)}
    name = run_sql(stack, f"SELECT worker_name FROM jobs WHERE id = '{video_id}'")
    (number,) = [number for host, number in hosts.items() if host in name]
    killed_at = time.monotonic()
    stack.kill("worker", number)
    assert wait_for_video(http, video_id)["status"] == "completed"
    report["SIGKILL of a worker in a clip"] = f"done by another {time.monotonic() - killed_at:.1f} s later"
    assert read_job(stack, video_id) == ("done", 2, 1)
    stack.start("worker", number)
    stack.scale(worker=1)


@pytest.mark.parametrize("server", ["redis", "postgres", "s3"])
def test_a_server_restarts_during_a_clip(stack, http, report, server):
    video_id = begin_clip(http)
    seconds, code = stack.stop(server)
    stack.start(server)
    report[f"stop of {server} in a clip"] = f"{seconds:.1f} s, exit code {code}"
    assert seconds < parse_seconds(stack.services[server]["stop_grace_period"])
    assert wait_for_video(http, video_id)["status"] == "completed"
    assert read_job(stack, video_id) == ("done", 1, 0)
    stack.wait(stack.name(server), "service_healthy")


def test_a_worker_that_is_stopped_again_and_again_counts_no_loss(stack, http, report):
    """`docker stop -t 1` three times during one clip: it is not taken for one that kills its workers."""
    video_id = begin_clip(http)
    for _ in range(3):
        attempt = read_job(stack, video_id)[1]
        seconds, code = stack.stop("worker", seconds=1)
        stack.start("worker")
        report["docker stop -t 1 of a worker in a clip"] = f"{seconds:.1f} s, exit code {code}"
        deadline = time.monotonic() + 180
        while read_job(stack, video_id)[:2] == ("running", attempt) or read_job(stack, video_id)[0] == "queued":
            assert time.monotonic() < deadline, stack.log(stack.name("worker"))
            time.sleep(0.5)
    assert wait_for_video(http, video_id)["status"] == "completed", read_job(stack, video_id)
    assert read_job(stack, video_id)[2] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_stopping_api_answers_those_who_wait(stack, http, report, stream):
    """A chat that waits for its picture gets 503 and Retry-After, or the error in its stream; its turn goes on."""
    stack.stop("worker")  # so that it waits
    answers: list[tuple[int, str, str]] = []

    def chat() -> None:
        body = {"model": "tiny", "stream": stream, "messages": [{"role": "user", "content": "a picture of a red ball"}]}
        response = http.post("/v1/chat/completions", json=body)
        answers.append((response.status_code, response.headers.get("Retry-After", ""), response.text))

    waiting = threading.Thread(target=chat)
    waiting.start()
    time.sleep(4)
    seconds, code = stack.stop("api")
    waiting.join(30)
    report[f"stop of the API while a chat {'streams' if stream else 'waits'}"] = f"{seconds:.1f} s, exit code {code}"
    ((status, retry_after, text),) = answers
    if stream and status == 200:
        assert '"status": 503' in text and '"retry_after"' in text and text.rstrip().endswith("[DONE]")
    else:
        assert status == 503 and int(retry_after) > 0, text
    assert seconds < parse_seconds(stack.services["api"]["stop_grace_period"]) / 2 and code in STOPPED
    for service in ("api", "worker"):
        stack.start(service)
        stack.wait(stack.name(service), "service_healthy")


@pytest.mark.parametrize("service", ["api", "worker", "mllm", "sweep"])
def test_a_service_stops_in_its_grace_period(stack, http, report, service):
    video_id = begin_clip(http)
    seconds, code = stack.stop(service)
    stack.start(service)
    report[f"stop of {service} in a clip"] = f"{seconds:.1f} s, exit code {code}"
    assert code in STOPPED and seconds < parse_seconds(stack.services[service]["stop_grace_period"])
    stack.wait(stack.name(service), "service_healthy")
    assert wait_for_video(http, video_id)["status"] == "completed"
    assert read_job(stack, video_id)[2] == 0


# ---------------------------------------------------------------- limits


def test_six_large_uploads_at_once(stack, http, key, report):
    data = os.urandom(2**20) * 190
    headers = {"Authorization": f"Bearer {key}"}

    def upload(number: int) -> int:
        files, fields = {"file": (f"{number}.bin", data)}, {"purpose": "user_data"}
        address = f"{stack.address('api', 8000)}/v1/files"
        for _ in range(20):
            response = httpx.post(address, files=files, data=fields, headers=headers, timeout=300, trust_env=False)
            if response.status_code != 503:
                break
            time.sleep(int(response.headers["Retry-After"]))
        return response.status_code

    began_at = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        statuses = list(pool.map(upload, range(6)))
    report["six uploads of 190 MB at once"] = f"{time.monotonic() - began_at:.0f} s, statuses {sorted(set(statuses))}"
    details = stack.engine.inspect(stack.name("api"))
    assert statuses == [200] * 6
    assert not details["State"]["OOMKilled"] and details["RestartCount"] == 0
    assert http.get("/ready").status_code == 200


def test_the_api_and_the_workers_scale(stack, http, environment, report):
    address, _, port = environment["API_ADDRESS"].rpartition(":")
    stack.set_variables({"API_ADDRESS": f"{address}:{port}-{int(port) + 3}"})
    stack.scale(api=2, worker=2)
    first, second = stack.address("api", 8000), stack.address("api", 8000, 2)
    assert first != second
    headers = dict(http.headers)
    with httpx.Client(base_url=second, headers=headers, timeout=120, trust_env=False) as other:
        video_id = other.post("/v1/videos", json={"prompt": "a red circle moving right"}).json()["id"]
        assert wait_for_video(other, video_id)["status"] == "completed"
    for service in ("api", "worker", "mllm"):
        stats = stack.engine("GET", f"/containers/{stack.name(service)}/stats?stream=false&one-shot=true")
        memory = stats["memory_stats"]
        used = memory["usage"] - memory["stats"].get("total_inactive_file", 0)
        report[f"memory of {service}"] = f"{used / 1e6:.0f} MB of {memory['limit'] / 1e6:.0f}"
    stack.set_variables({"API_ADDRESS": environment["API_ADDRESS"]})
    stack.scale(api=1, worker=1)
