"""Placements carried out on the CPU: every one gives the results of the whole model in memory."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from omnivideo.backends.decoder.pipeline import GeneratedClip, generate_clip
from omnivideo.contracts import resolve_sampling_params
from omnivideo.errors import PartOutOfMemory
from omnivideo.models import offload, vae
from omnivideo.models.device import list_fast_dtypes
from omnivideo.models.mllm import MLLMMedia, MLLMMessage
from omnivideo.models.offload import BlockPass, PartTurns, compute_in_blocks, iterate_blocks
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.placement import GIB, Machine, plan_placement
from omnivideo.models.vae import decode_latents, encode_pixels
from omnivideo.models.weights.checkpoint import list_part_names, load
from omnivideo.models.weights.mapped_pages import MappedPages
from omnivideo.models.weights.part_sizes import measure_parts
from omnivideo.presets import PRESETS, TINY
from tests.support import vila_weights
from tests.support.tiny_decoder import build_tiny_decoder, make_inputs, predict_velocity

MODES = {"parts in turn on the GPU", "decoder in blocks on the GPU", "CPU"}


def render(omni: OmniVideoModel) -> GeneratedClip:
    """Edit a clip in two steps, which uses every part."""
    params = resolve_sampling_params(TINY, "video-editing", seed=1, steps=2)
    source = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
    *_, clip = generate_clip(omni, "make it blue", params, source)
    return clip


@pytest.fixture(scope="module")
def expected(weights) -> GeneratedClip:
    omni = load(weights)
    assert omni.placement.mode == "CPU" and not omni.placement.reads_from_disk
    return render(omni)


@pytest.fixture
def without_reserve(monkeypatch):
    """Plan for a GPU of a few megabytes, as the tiny preset needs it."""
    monkeypatch.setattr("omnivideo.models.placement.RESERVED_BYTES", 0)
    for name in ("MLLM_WORKING_BYTES", "SMALL_WORKING_BYTES"):
        monkeypatch.setattr(f"omnivideo.models.weights.part_sizes.{name}", 0)
    monkeypatch.setattr("omnivideo.models.weights.part_sizes.estimate_working_bytes", lambda preset, name: 0)


def find_machine(weights, mode: str) -> Machine:
    """Return the smallest GPU, in steps of 5 %, on which the tiny preset has this placement."""
    sizes = measure_parts(weights, TINY, list_part_names(TINY))
    total = sum(part.weights_bytes for part in sizes)
    machines = (Machine(GIB, int(total * percent / 100)) for percent in range(1, 200, 2))
    return next(machine for machine in machines if plan_placement(sizes, machine).mode == mode)


@pytest.mark.parametrize("mode", sorted(MODES - {"CPU"}))
def test_every_placement_gives_the_same_bytes(weights, expected, without_reserve, mode, monkeypatch):
    brought: list[str] = []
    bring = PartTurns.bring

    def bring_and_record(turns, module):
        if turns.present is not module:
            brought.append(type(module).__name__)
        bring(turns, module)
        held = {id(tensor) for tensor, _ in turns.originals}
        assert held == {id(tensor) for tensor in (*module.parameters(), *module.buffers())}

    monkeypatch.setattr(PartTurns, "bring", bring_and_record)
    omni = load(weights, machine=find_machine(weights, mode))
    assert omni.placement.mode == mode
    clip = render(omni)
    assert torch.equal(clip.latents, expected.latents) and np.array_equal(clip.frames, expected.frames)
    in_turn = [part for part in omni.placement.parts if part.location == "gpu-in-turn"]
    assert len(set(brought)) == len(in_turn) and len(brought) >= len(in_turn)
    if mode == "decoder in blocks on the GPU":
        assert hasattr(omni.decoder.blocks[0], "_diffusers_hook")


def test_a_part_that_stays_can_send_others_away():
    turns, visitor, resident = PartTurns(torch.device("cpu")), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    turns.add_part(visitor)
    turns.add_part(resident, visits=False)
    visitor(torch.ones(1, 4))
    assert turns.present is visitor and len(turns.originals) == 2
    resident(torch.ones(1, 4))
    assert turns.present is None and turns.originals == []


def test_two_threads_share_parts_that_take_turns(weights, without_reserve):
    """A service writes an answer in one thread and renders in another."""
    omni = load(weights, machine=find_machine(weights, "parts in turn on the GPU"))
    assert omni.placement.find_part("mllm").location == "gpu-in-turn"
    whole = load(weights)
    texts, message = [], MLLMMessage("how many balls are there?")

    def write() -> None:
        texts.append("".join(omni.bound_mllm.stream_text(message, temperature=0.0, max_tokens=12)))

    thread = threading.Thread(target=write)
    thread.start()
    clip = render(omni)
    thread.join()
    assert torch.equal(clip.latents, render(whole).latents)
    assert texts == ["".join(whole.bound_mllm.stream_text(message, temperature=0.0, max_tokens=12))]


# ---------------------------------------------------------------- blocks on a CPU


def build_half_decoder() -> WanTransformer3DModel:
    decoder = build_tiny_decoder(trained=False).eval()
    for block in decoder.blocks:
        block.to(torch.bfloat16)
    return decoder


def test_a_block_of_bf16_weights_computes_as_if_they_were_float32():
    decoder, wide = build_half_decoder(), build_half_decoder().float()
    block, calls = decoder.blocks[0], []
    wide.blocks[0].register_forward_hook(lambda module, args, output: calls.append((args, output)))
    predict_velocity(wide, make_inputs())
    addresses, seen = [weight.data_ptr() for weight in block.parameters()], []
    compute_in_blocks(decoder, to_float32=True)
    block.ffn.net[0].proj.register_forward_pre_hook(lambda module, args: seen.append(module.weight.dtype))
    (args, output), *_ = calls
    assert torch.equal(block(*args), output) and seen == [torch.float32]
    # Nothing was copied back.
    assert addresses == [weight.data_ptr() for weight in block.parameters()]
    assert {weight.dtype for weight in block.parameters()} == {torch.bfloat16}


def test_a_failing_block_restores_its_weights():
    decoder, inputs = build_half_decoder(), make_inputs()
    compute_in_blocks(decoder, to_float32=True)
    handle = decoder.blocks[3].register_forward_hook(lambda *call: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        predict_velocity(decoder, inputs)
    handle.remove()
    assert {weight.dtype for weight in decoder.blocks.parameters()} == {torch.bfloat16}
    predict_velocity(decoder, inputs)  # no lock is held


def test_blocks_cover_every_weight_once_and_no_table(omni):
    for module in omni.parts.values():
        covered = [id(weight) for _, weights in iterate_blocks(module) for weight in weights]
        tables = {id(entry.weight) for entry in module.modules() if isinstance(entry, torch.nn.Embedding)}
        assert len(covered) == len(set(covered))
        assert {id(weight) for weight in module.parameters()} - set(covered) <= tables


def test_a_model_in_half_precision_computes_everywhere_on_a_slow_cpu(weights, expected, monkeypatch):
    """Every part has the type of its file; a CPU without fast bf16 casts one block at a time."""
    halves = dict.fromkeys(("mllm", "decoder", "vision_head", "adapter", "text_encoder", "visual_context"), "float16")
    monkeypatch.setitem(PRESETS, "tiny", TINY.model_copy(update={"dtypes": halves}))
    omni = load(weights, machine=Machine(GIB))
    assert omni.decoder.dtype == omni.mllm.dtype == torch.float16
    clip = render(omni)
    assert (clip.latents - expected.latents).norm() / expected.latents.norm() < 2e-2
    assert omni.decoder.dtype == omni.mllm.dtype == torch.float16


def test_the_instructions_of_the_cpu_decide_whether_autocast_is_used(weights):
    omni = load(weights)
    omni.preset = omni.preset.model_copy(update={"autocast": "bfloat16"})
    omni.placement = replace(omni.placement, machine=Machine(GIB, None, ("float32",)))
    assert omni.autocast is None
    omni.placement = replace(omni.placement, machine=Machine(GIB, None, ("float32", "bfloat16")))
    assert omni.autocast == torch.bfloat16
    assert isinstance(list_fast_dtypes(), tuple)


# ---------------------------------------------------------------- a server of the language model


@pytest.fixture
def vila_folder(monkeypatch, tmp_path):
    """VILA in float16 with its vision head in bf16, as version 1 states them, and no other part."""
    monkeypatch.setitem(PRESETS, vila_weights.NAME, vila_weights.build_preset())
    return vila_weights.write_weights(tmp_path / "vila")


def compute_features(omni: OmniVideoModel) -> torch.Tensor:
    frame = np.random.default_rng(2).integers(0, 255, (1, 48, 64, 3), dtype=np.uint8)
    message = MLLMMessage("make it blue", (MLLMMedia(frame, 8.0, False),))
    with torch.no_grad():
        return omni.compute_mllm_features(message, "image").values.float()


def test_a_server_of_the_mllm_loads_nothing_else(vila_folder):
    omni = load(vila_folder, contents="mllm")
    assert omni.parts.keys() == {"mllm", "vision_head"}
    assert omni.decoder is omni.vae is omni.text_encoder is omni.tokenizer is None
    assert [part.size.name for part in omni.placement.parts] == ["mllm", "vision_head"]
    assert torch.isfinite(compute_features(omni)).all()


def test_a_worker_beside_that_server_loads_no_mllm(weights):
    omni = load(weights, contents="without-mllm")
    assert omni.mllm is None and "mllm" not in omni.parts and "vision_head" in omni.parts


def test_vila_in_half_precision_computes_in_float32_blocks(vila_folder):
    half, wide = load(vila_folder, contents="mllm", machine=Machine(GIB)), load(vila_folder, "cpu", "float32", "mllm")
    assert half.mllm.dtype == torch.float16 and wide.mllm.dtype == torch.float32
    features, expected = compute_features(half), compute_features(wide)
    assert (features - expected).norm() / expected.norm() < 1e-2
    message = MLLMMessage("what is red?")
    texts = ["".join(omni.bound_mllm.stream_text(message, temperature=0.0, max_tokens=6)) for omni in (half, wide)]
    assert texts[0] == texts[1]


def test_vila_takes_turns_with_its_vision_head(vila_folder, without_reserve):
    whole = load(vila_folder, "cpu", "float32", "mllm")
    largest = max(part.size.weights_bytes for part in whole.placement.parts)
    omni = load(vila_folder, "cpu", "float32", "mllm", Machine(GIB, int(1.06 * largest)))
    assert [part.location for part in omni.placement.parts] == ["gpu-in-turn"] * 2
    assert torch.equal(compute_features(omni), compute_features(whole))


# ---------------------------------------------------------------- mapped files


def read_resident_file_bytes() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


def test_pages_of_mapped_weights_are_given_back_and_read_again(weights, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY.model_copy(update={"dtypes": {"mllm": "float16"}}))
    omni = load(weights)
    pages, mapped = MappedPages(), list(omni.mllm.parameters())
    assert all(pages.holds(weight) for weight in mapped)
    sums = [weight.float().sum() for weight in mapped]
    resident = read_resident_file_bytes()
    pages.release(mapped)
    assert resident - read_resident_file_bytes() > 0.5 * sum(weight.nbytes for weight in mapped)
    assert all(torch.equal(total, weight.float().sum()) for total, weight in zip(sums, mapped, strict=True))


def test_ordinary_memory_is_left_alone():
    kept = torch.ones(1 << 20)
    MappedPages().release([kept])
    assert kept.min() == 1


def test_large_parts_give_their_pages_back_when_the_machine_is_too_small(weights, expected, monkeypatch):
    monkeypatch.setattr(offload, "MIN_RELEASED_BYTES", 0)
    released: list[int] = []
    release = MappedPages.release
    monkeypatch.setattr(MappedPages, "release", lambda pages, tensors: released.append(1) or release(pages, tensors))
    clip = render(load(weights, machine=Machine(1)))
    # Not the same bytes: torch joins the operations of the adapter's layers only where they have no hooks.
    assert len(released) > 100 and (clip.latents - expected.latents).abs().max() < 1e-3


# ---------------------------------------------------------------- out of memory


@pytest.mark.parametrize(
    ("name", "part", "advice"),
    [("mllm", "MLLM", "omnivideo mllm serve"), ("text_encoder", "text encoder", "free memory"),
     ("decoder", "decoder", "smaller size or fewer frames"), ("vae", "VAE", "smaller size or fewer frames")],
)  # fmt: skip
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_a_lack_of_memory_names_the_part_and_what_helps(omni, name, part, advice, error):
    module = {"mllm": omni.mllm.model, "vae": omni.vae.encoder}.get(name) or getattr(omni, name)
    handle = module.register_forward_pre_hook(lambda *call: (_ for _ in ()).throw(error))
    try:
        with pytest.raises(PartOutOfMemory, match=f"the {part} ran out of memory.*{advice}") as failure:
            render(omni)
    finally:
        handle.remove()
    assert failure.value.part == part and "\n" not in str(failure.value)


# ---------------------------------------------------------------- tiles


def test_only_frames_above_the_limit_are_encoded_and_decoded_in_tiles(omni, monkeypatch):
    assert vae.MAX_UNTILED_PIXELS == 1280 * 720  # no preset's default size changes
    for name, value in (("MAX_UNTILED_PIXELS", 96 * 96), ("TILE_SIZE", 64), ("TILE_STRIDE", 48)):
        monkeypatch.setattr(vae, name, value)
    small, large = torch.rand(1, 3, 5, 96, 96) * 2 - 1, torch.rand(1, 3, 5, 112, 128) * 2 - 1
    with torch.no_grad():
        expected, whole = (omni.vae.encode(pixels).latent_dist.mode() for pixels in (small, large))
        latents = encode_pixels(omni.vae, large)
        pixels = decode_latents(omni.vae, latents)
        assert omni.vae.use_tiling and latents.shape == whole.shape and pixels.shape == large.shape
        assert not torch.equal(latents, whole)
        assert torch.equal(encode_pixels(omni.vae, small), expected) and not omni.vae.use_tiling


def test_a_block_pass_needs_no_cast_to_give_pages_back():
    linear, released = torch.nn.Linear(4, 4), []
    block = BlockPass(list(linear.parameters()), to_float32=False, release_pages=released.extend)
    linear.register_forward_pre_hook(block.enter, with_kwargs=True)
    linear.register_forward_hook(block.leave, always_call=True)
    linear(torch.ones(1, 4))
    assert len(released) == 2
