"""The authors' generations through the service: a request over HTTP, a worker of the service, and the stored latents.

Their noise and their MLLM's hidden states enter as a resume point before the first step, which the worker continues.
"""

import time

import httpx
import pytest
import torch

from omnivideo.backends.decoder.resume import pack_resume_point
from omnivideo.contracts import Artifact, Claim, Job, resolve_sampling_params
from omnivideo.media.artifacts import encode_clip
from omnivideo.models.features import MLLMFeatures, encode_features
from omnivideo.models.sampling import DenoisingState
from omnivideo.models.vae import decode_latents, pixels_to_bytes
from omnivideo.presets import PRESETS, Preset, TrainedShapes
from omnivideo.settings import load_settings
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.objects.tensors import get_tensors, put_tensors
from omnivideo.wiring import ServiceWiring
from tests.support.api_server import run_api_server
from tests.support.golden import load_golden
from tests.support.golden_models import build_golden_preset, import_golden_weights, measure_error
from tests.support.openai_service import pause_worker

pytestmark = pytest.mark.golden
LATENTS_ERROR, PIXELS_ERROR = 2e-5, 5e-5
CASES = [("v1", "t2v"), ("v1", "v2v"), *[(kind, f"{kind}_{task}") for kind in ("single", "experts")
                                         for task in ("t2v", "v2v")]]  # fmt: skip


@pytest.fixture(scope="module")
def service(request, tmp_path_factory):
    """A service of a golden model and its address; its parts are in float32."""
    home, preset = tmp_path_factory.mktemp(request.param), with_golden_shapes(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, preset.name, preset)
        weights = import_golden_weights(request.param, home)
        settings = load_settings(home=home, preset=preset.name, weights=str(weights), precision="float32")
        wiring = ServiceWiring(settings, "cpu")
        with run_api_server(wiring) as address:
            yield wiring, address


def with_golden_shapes(kind: str) -> Preset:
    """Return the preset of a kind as trained on the sizes and lengths of its cases."""
    preset = build_golden_preset(kind)
    cases = [read_case(name)[1] for case_kind, name in CASES if case_kind == kind]
    sizes, frames = ({(case["width"], case["height"]) for case in cases}, {case["frames"] for case in cases})
    shapes = TrainedShapes(sizes=tuple(sizes), frames=tuple(frames))
    return preset.model_copy(update={"trained": dict.fromkeys(preset.sampling, shapes)})


def read_case(name: str) -> tuple[dict, dict, torch.Tensor | None, MLLMFeatures]:
    """Return a case's tensors, what is known about it, its source's latents, and the MLLM's features."""
    version = "v1" if "_" not in name else "v2"
    tensors, about = load_golden(f"{version}_sampling")
    parts, _ = load_golden(f"{version}_parts")
    (case,) = [case for case in about["cases"] if case["name"] == name]
    source = parts[case["source"]] if case.get("source") else None
    if version == "v2" and case["task"] == "v2v":
        source = parts["in.latents"][0]
    features = MLLMFeatures(parts["in.hidden_states"], "hidden-states", about.get("caption", ""))
    theirs = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    return theirs, about | case, source, features


def add_source(wiring: ServiceWiring, source_zThw: torch.Tensor, case: dict) -> str:
    """Store a finished job whose clip has these latents, and return its id."""
    omni, preset = wiring.renderer.omni, wiring.renderer.omni.preset
    with torch.no_grad():
        frames = pixels_to_bytes(decode_latents(omni.vae, source_zThw[None]), preset.byte_rounding)[0]
    data, suffix = encode_clip(frames, 8.0)
    job_id = f"video_{case['name']}"
    params = resolve_sampling_params(preset, "text-to-video", seed=0, steps=1)
    meta = {"size": f"{case['width']}x{case['height']}", "seconds": "1"}
    job = Job(id=job_id, prompt="x", visual_tokens=None, source=None, params=params, preset=preset.name)
    artifact = Artifact(
        key=wiring.store.put(data, suffix), medium="video", width=case["width"], height=case["height"],
        frames=case["frames"], fps=8.0, caption="", latents=put_tensors(wiring.store, {"latents": source_zThw}),
        created_by=job_id,
    )  # fmt: skip
    wiring.jobs.submit(job, "local", kind="video", meta=meta)
    wiring.jobs.mark_done(claim_paused_job(wiring), artifact)
    return job_id


def claim_paused_job(wiring: ServiceWiring) -> Claim:
    """Claim the only queued job, although the service's worker is paused."""
    claim = JobRepository(wiring.engine).claim_next_job("test", wiring.renderer.model)
    assert claim is not None
    return claim


def build_request(case: dict, offset: float) -> dict:
    scale = case.get("guide_scale_as_in_their_script", case.get("guide_scale"))
    request = {
        "prompt": case.get("prompt", case.get("instruction")), "size": f"{case['width']}x{case['height']}",
        "num_inference_steps": case["steps"], "guidance_scale": scale + offset, "flow_shift": case["shift"],
    }  # fmt: skip
    if "negative_prompt" in case:
        request["negative_prompt"] = case["negative_prompt"]
    return request


@pytest.mark.parametrize(("service", "name"), CASES, indirect=["service"])
def test_a_request_over_http_gives_the_authors_latents(service, name):
    wiring, address = service
    theirs, case, source, features = read_case(name)
    body = build_request(case, wiring.renderer.omni.preset.guidance_offset)
    body |= {"num_frames": case["frames"], "fps": 8}
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as http:
        with pause_worker(wiring):
            path = "/v1/videos"
            if source is not None:
                path, body = "/v1/videos/edits", body | {"video": {"id": add_source(wiring, source, case)}}
            video = http.post(path, json=body)
            assert video.status_code == 200, video.text
            begin_with(wiring, theirs["noise"], features)
        status = follow(http, video.json()["id"])
    assert status["status"] == "completed", status
    result = wiring.jobs.get_status(status["id"]).result
    latents = get_tensors(wiring.store, result.latents)["latents"]
    assert measure_error(latents, theirs["latents"][-1]) < LATENTS_ERROR
    if "pixels" in theirs:
        with torch.no_grad():
            pixels = decode_latents(wiring.renderer.omni.vae, latents[None])[0]
        assert measure_error(pixels, theirs["pixels"]) < PIXELS_ERROR


def begin_with(wiring: ServiceWiring, noise_zThw: torch.Tensor, features: MLLMFeatures) -> None:
    """Begin the queued job as a worker that is stopped before the first step."""
    claim = claim_paused_job(wiring)
    reference = wiring.store.put(encode_features(features), "safetensors")
    job = claim.job.model_copy(update={"visual_tokens": reference})
    state = DenoisingState(0, noise_zThw[None], noise_zThw[None].clone(), ())
    point = wiring.store.put(pack_resume_point(state, wiring.renderer.model, [job]), "safetensors")
    wiring.jobs.heartbeat(claim, resume_key=point)
    wiring.jobs.requeue(claim)


def follow(http: httpx.Client, video_id: str) -> dict:
    deadline = time.monotonic() + 60
    while (status := http.get(f"/v1/videos/{video_id}").json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return status
