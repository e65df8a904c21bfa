"""Visual tokens and latents on their way from the MLLM to the renderer."""

import io
import json
import logging
import shutil

import av
import pytest
import torch

from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.server import LRUObjectStore
from omnivideo.contracts import Artifact, Job, MLLMRequest, resolve_sampling_params
from omnivideo.errors import ArtifactNotFound, CheckpointError, InvalidInput
from omnivideo.manifests import Manifest
from omnivideo.media.ingest import ingest_media
from omnivideo.models.weights.checkpoint import load
from omnivideo.presets import TINY
from omnivideo.sdk.studio import Studio
from omnivideo.settings import load_settings
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.objects.memory import MemoryObjectStore
from omnivideo.storage.objects.tensors import put_tensors
from omnivideo.wiring import ServiceWiring
from tests.support.api_server import run_mllm_server
from tests.support.servers import free_port
from tests.support.sound import encode_with_sound


class RecordingStore(MemoryObjectStore):
    """Records the keys of tensors that are written and read."""

    def __init__(self) -> None:
        super().__init__()
        self.written_tensors: list[str] = []
        self.read_tensors: list[str] = []

    def put(self, data: bytes, suffix: str) -> str:
        key = super().put(data, suffix)
        self.written_tensors += [key] if suffix == "safetensors" else []
        return key

    def get(self, key: str) -> bytes:
        self.read_tensors += [key] if key.endswith(".safetensors") else []
        return super().get(key)


def render(renderer: Renderer, job: Job) -> Artifact:
    prepared, params = renderer.prepare_job(job)
    *_, clip = renderer.render_job(prepared, params)
    return renderer.store_result(prepared, params, clip)


def build_job(visual_tokens: str | None = None) -> Job:
    return Job(
        id="clip", prompt="a red ball", visual_tokens=visual_tokens, source=None,
        params=resolve_sampling_params(TINY, "text-to-video", seed=3, steps=2),
    )  # fmt: skip


def test_generate_passes_no_tensor_through_the_store(weights, tmp_path, monkeypatch):
    studio = Studio(weights=weights, home=tmp_path, device="cpu")
    accessed: list[str] = []
    put, get = LocalObjectStore.put, LocalObjectStore.get

    def record_put(store: LocalObjectStore, data: bytes, suffix: str) -> str:
        accessed.append(key := put(store, data, suffix))
        return key

    def record_get(store: LocalObjectStore, key: str) -> bytes:
        accessed.append(key)
        return get(store, key)

    monkeypatch.setattr(LocalObjectStore, "put", record_put)
    monkeypatch.setattr(LocalObjectStore, "get", record_get)
    studio.generate("a red ball", image=False, steps=2)
    assert accessed == []
    renderer = studio.conversations.queue_for("local").renderer
    reference = studio.conversations.mllm.predict_visual_tokens(MLLMRequest(text="a red ball"), "video")
    *_, artifact = studio.conversations.queue_for("local").run(build_job(reference))
    # The finished clip's latents are kept for later edits; the visual tokens appear nowhere.
    assert [key for key in accessed if key.endswith(".safetensors")] == [artifact.latents]
    assert renderer.mllm.has_visual_tokens(reference) and not renderer.store.has(reference)


@pytest.mark.parametrize("persist_tokens", [True, False])
def test_a_renderer_of_the_same_process_takes_tokens_from_memory(omni, persist_tokens):
    store = RecordingStore()
    renderer = Renderer(omni, store, "random", persist_tokens)
    reference = renderer.mllm.predict_visual_tokens(MLLMRequest(text="a red ball"), "video")
    artifact = render(renderer, build_job(reference))
    assert store.written_tensors == ([reference] if persist_tokens else []) + [artifact.latents]
    assert store.read_tensors == []


def test_tokens_from_memory_and_from_the_store_give_the_same_bytes(omni):
    store = RecordingStore()
    first = Renderer(omni, store, "random")
    reference = first.mllm.predict_visual_tokens(MLLMRequest(text="a red ball"), "video")
    from_memory, from_store = (render(one, build_job(reference)) for one in (first, Renderer(omni, store, "random")))
    assert store.read_tensors == [reference]
    assert (from_memory.key, from_memory.latents) == (from_store.key, from_store.latents)
    computed_here = render(Renderer(omni, MemoryObjectStore(), "random", persist_tokens=False), build_job())
    assert (computed_here.key, computed_here.latents) == (from_store.key, from_store.latents)


def test_tokens_that_are_nowhere_are_an_error(omni):
    reference = Renderer(omni, MemoryObjectStore(), "random").mllm.predict_visual_tokens(
        MLLMRequest(text="a red ball"), "video"
    )
    with pytest.raises(ArtifactNotFound):
        render(Renderer(omni, MemoryObjectStore(), "random"), build_job(reference))


def test_features_of_another_presets_language_model_are_refused(omni):
    """Its server may serve other weights than the worker's."""
    renderer = Renderer(omni, MemoryObjectStore(), "random")
    for tensors in ({"hidden_states": torch.zeros(1, 3, 7)}, {"visual_tokens": torch.zeros(1, 4, 7)}):
        reference = put_tensors(renderer.store, tensors)
        with pytest.raises(CheckpointError, match="the language model's server has weights that do not fit tiny"):
            render(renderer, build_job(reference))


def test_weights_of_another_preset_than_the_services_are_refused(weights, tmp_path):
    settings = load_settings(home=tmp_path, preset="omnivideo-1.3b", weights=str(weights))
    wiring = ServiceWiring(settings, "cpu")
    text = r"omnivideo-1\.3b is not the preset of the weights in .*, which is tiny"
    for part in ("renderer", "text_limits"):
        with pytest.raises(InvalidInput, match=f"OMNIVIDEO_PRESET: {text}"):
            getattr(wiring, part)
    with pytest.raises(InvalidInput, match=f"preset: {text}"):
        Studio("omnivideo-1.3b", weights, "cpu", tmp_path)


def test_the_service_writes_tokens_for_jobs_that_survive_it(omni, tmp_path):
    wiring = ServiceWiring(load_settings(home=tmp_path), "cpu")
    wiring.renderer = Renderer(omni, wiring.store, "random")  # type: ignore[misc]
    reference = wiring.mllm.predict_visual_tokens(MLLMRequest(text="a red ball"), "video")
    assert wiring.store.has(reference) and wiring.renderer.mllm.has_visual_tokens(reference)


def test_a_worker_and_the_server_of_its_mllm_share_no_part(weights, tmp_path, caplog):
    """Each has a folder without what the other one loads, and together they render what one process renders."""
    for name, others in (("worker", ["mllm"]), ("server", ["transformer", "vae", "text_encoder", "adapter"])):
        shutil.copytree(weights, tmp_path / name, ignore=shutil.ignore_patterns(*others))
    expected = render(Renderer(load(weights), MemoryObjectStore(), "random"), build_job())
    port, server = free_port(), load(tmp_path / "server", contents="mllm")
    settings = load_settings(home=tmp_path / "home", weights=str(tmp_path / "worker"), mllm=f"http://127.0.0.1:{port}")
    with run_mllm_server(LocalMLLM(server, LRUObjectStore()), port), caplog.at_level(logging.INFO):
        wiring = ServiceWiring(settings, "cpu")
        artifact = render(wiring.renderer, build_job())
        wiring.close()
    assert (artifact.key, artifact.latents) == (expected.key, expected.latents)
    (line,) = (record.message for record in caplog.records if record.name == "omnivideo.wiring")
    assert line.startswith("placement of tiny: CPU (") and "decoder CPU (" in line and "mllm" not in line


def test_a_manifest_is_replayed_without_its_tokens(omni):
    store = MemoryObjectStore()
    generated = render(Renderer(omni, store, "random", persist_tokens=False), build_job())
    edit = build_job().model_copy(update={"id": "edit", "task": "video-editing", "source": generated})
    edited = render(Renderer(omni, store, "random", persist_tokens=False), edit)
    for artifact in (generated, edited):
        manifest = Manifest(**json.loads(store.get(artifact.manifest)))
        assert manifest.visual_tokens and not store.has(manifest.visual_tokens)
        assert Renderer(omni, store, "random").replay_manifest(manifest) == artifact.key


def test_an_edit_keeps_the_sound_of_its_source_and_its_replay_does_too(omni):
    params = resolve_sampling_params(TINY, "video-editing", seed=3, steps=1)
    seconds = params.frames / params.fps
    for source_seconds, is_kept in ((seconds, True), (seconds + 2, False)):
        store = MemoryObjectStore()
        data = encode_with_sound("mp4", "libx264", "aac", source_seconds)
        source = ingest_media(store, data, "user")
        job = build_job().model_copy(update={"id": "edit", "source": source, "params": params})
        artifact = render(Renderer(omni, store, "random"), job)
        manifest = Manifest(**json.loads(store.get(artifact.manifest)))
        assert manifest.sound is not None and manifest.sound.startswith("kept" if is_kept else "left out: the source")
        with av.open(io.BytesIO(store.get(artifact.key))) as container:
            assert len(container.streams.audio) == is_kept
        assert Renderer(omni, store, "random").replay_manifest(manifest) == artifact.key


def test_a_manifest_without_sound_has_the_fields_of_before(omni):
    store = MemoryObjectStore()
    artifact = render(Renderer(omni, store, "random"), build_job())
    assert "sound" not in json.loads(store.get(artifact.manifest))
