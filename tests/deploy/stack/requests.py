"""What the tests ask of a running stack."""

import time

import httpx

from tests.deploy.stack.compose import Stack

LONG_CLIP = {"prompt": "a small red circle moving right", "num_inference_steps": 200}
QUERY = "SELECT state, attempt, worker_losses FROM jobs WHERE id = '{}'"


def wait_for_video(http: httpx.Client, video_id: str, states: tuple[str, ...] = ("completed", "failed")) -> dict:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        try:
            video = http.get(f"/v1/videos/{video_id}").json()
        except (httpx.HTTPError, ValueError):  # the API or the database restarts
            video = {}
        if video.get("status") in states:
            return video
        time.sleep(0.2)
    raise AssertionError(f"{video_id} is {video.get('status')}, not one of {states}")


def run_sql(stack: Stack, statement: str) -> str:
    """Run a statement in the stack's database, and return what psql prints: rows, their columns separated by `|`."""
    command = ["psql", "--username", "omnivideo", "--no-align", "--tuples-only", "--command", statement, "omnivideo"]
    return stack.engine.execute(stack.name("postgres"), *command).strip()


def read_job(stack: Stack, job_id: str) -> tuple[str, int, int]:
    """Return the state, the attempt and the lost workers of a job, from the database."""
    state, attempt, losses = run_sql(stack, QUERY.format(job_id)).split("|")
    return state, int(attempt), int(losses)


def begin_clip(http: httpx.Client, **fields: object) -> str:
    """Submit a clip of many steps, and return its id once a worker renders it."""
    response = http.post("/v1/videos", json=LONG_CLIP | fields)
    assert response.status_code == 200, response.text
    video_id = str(response.json()["id"])
    wait_for_video(http, video_id, ("in_progress",))
    return video_id


def make_everything_old(stack: Stack, video_ids: list[str]) -> None:
    """Make the clips and all objects two hours older, so that the sweep may remove what is deleted."""
    names = ", ".join(f"'{video_id}'" for video_id in video_ids)
    run_sql(stack, f"UPDATE jobs SET ended_at = ended_at - 7200 WHERE id IN ({names})")
    run_sql(stack, "UPDATE stored_objects SET written_at = written_at - 7200")
    touch = "find /var/lib/garage/data -type f -exec touch --date '2 hours ago' {} +"
    stack.engine.execute(stack.name("s3"), "sh", "-c", touch)
