"""Write files of the true shapes of omnivideo-1.3b as published, and measure what runs on them.

    python -m benchmarks.full_size_weights FOLDER                 write, measure, and remove everything
    python -m benchmarks.full_size_weights FOLDER --keep          leave FOLDER/published and FOLDER/ours
    python -m benchmarks.full_size_weights FOLDER --only-write    write FOLDER/published

Two of the decoder's blocks have random values. All other tensors are zeros in sparse files, which take no disk; only
the sizes are real. The tokenizers are those of the golden data. Measured are `weights import`, `weights check`, the
loading of all parts, and a clip of 256 x 256 x 5 up to its first denoising step (language model, text encoder, adapter
and both passes of the decoder), each in a process of its own. Peak memory is resident memory, mapped pages included.
The two blocks are also compared with the same weights computed in float32.
"""

import argparse
import json
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel, UMT5Config

from omnivideo.models.sampling import autocast_to
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.folder import split_shards
from omnivideo.models.weights.published import list_required_markers, locate_tensors
from omnivideo.models.weights.strict import load_strict
from omnivideo.models.weights.tensor_files import encode_header
from omnivideo.models.weights.wan_layouts import locate_text_encoder_tensors, locate_vae_tensors
from omnivideo.presets import OMNIVIDEO_1_3B

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
RANDOM_BLOCKS = (0, 29)
NULL_STATES, NULL_TOKENS = 164, 126  # rows of the null condition; the first is the published number
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3_8B |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
SIGLIP_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIGLIP_SO400M |= {"image_size": 384, "patch_size": 14}


# ---------------------------------------------------------------- writing


def write_published(folder: Path) -> None:
    """Write the whole published folder; only the two random blocks take disk."""
    shapes = {key: location.shape for key, location in locate_tensors(OMNIVIDEO_1_3B).items()}
    full_precision = ("wan_model.", "visual_context_adapter.")
    state = {key: torch.empty(shape, dtype=torch.float32 if key.startswith(full_precision) else torch.bfloat16)
             for key, shape in shapes.items()}  # fmt: skip
    save_sparse(folder / "transformer" / "model.pt", state)
    fill_blocks(folder / "transformer" / "model.pt", state)
    width = OMNIVIDEO_1_3B.text_width
    markers = {f"<{name}>": torch.randn(6, width) * 0.02 for name in list_required_markers(OMNIVIDEO_1_3B)}
    write_pickle(folder / "special_tokens" / "tokens.pkl", markers)
    context: dict[str, Any] = {
        "text_emb": [torch.randn(NULL_TOKENS, width) * 0.1],
        "text_emb_siglip2": [torch.zeros(1152)],
    }
    context["vlm_last_hidden_states"] = torch.randn(1, NULL_STATES, OMNIVIDEO_1_3B.mllm_width)
    write_pickle(folder / "unconditioned_context" / "context.pkl", context)
    wan = folder / "wan" / "wanxiang1_3b"
    vae = {key: torch.empty(shape) for key, (_, shape) in locate_vae_tensors(OMNIVIDEO_1_3B.vae).items()}
    save_sparse(wan / "Wan2.1_VAE.pth", vae)
    encoder = locate_text_encoder_tensors(UMT5Config(**UMT5_XXL, feed_forward_proj="gated-gelu"))
    text = {key: torch.empty(shape, dtype=torch.bfloat16) for key, (_, shape) in encoder.items()}
    save_sparse(wan / "models_t5_umt5-xxl-enc-bf16.pth", text)
    shutil.copytree(GOLDEN / "t5_tokenizer", wan / "google" / "umt5-xxl")
    write_vila(folder / "ar_model" / "checkpoint")


def save_sparse(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a file of torch.save with holes in place of the tensors' bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.serialization.skip_data():
        torch.save(dict(state), path)


def fill_blocks(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write random values into the decoder's two blocks."""
    generator = torch.Generator().manual_seed(0)
    reader: Any = torch._C.PyTorchFileReader(str(path))
    with path.open("r+b") as file:
        for number, (key, value) in enumerate(state.items()):
            if not any(key.startswith(f"wan_model.blocks.{block}.") for block in RANDOM_BLOCKS):
                continue
            noise = torch.randn(value.shape, generator=generator)
            file.seek(reader.get_record_offset(f"data/{number}"))
            norm = "norm" in key and key.endswith("weight")
            file.write((1 + 0.1 * noise if norm else 0.02 * noise).numpy().tobytes())


def write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(dict(content)))


def write_vila(folder: Path) -> None:
    """Write VILA's three folders in fp16: configurations, tokenizer, and sparse files of the true shapes."""
    shutil.copytree(GOLDEN / "vila_ar_model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    update_json(folder / "llm" / "config.json", LLAMA_3_8B | {"head_dim": 128, "torch_dtype": "float16"})
    update_json(folder / "vision_tower" / "config.json", SIGLIP_SO400M | {"torch_dtype": "float16"})
    update_json(folder / "config.json", {"hidden_size": 4096, "mm_hidden_size": 1152})
    size = {"height": 384, "width": 384}
    update_json(folder / "vision_tower" / "preprocessor_config.json", {"size": size})
    with torch.device("meta"):
        llm = LlamaForCausalLM(LlamaConfig(**LLAMA_3_8B, head_dim=128)).state_dict()
        tower = SiglipVisionModel(SiglipVisionConfig(**SIGLIP_SO400M)).state_dict()
    write_sparse_shards(folder / "llm", llm)
    write_sparse_shards(folder / "vision_tower", {f"vision_model.{key}": value for key, value in tower.items()})
    joined, width = 4 * 1152, 4096
    projector = {"layers.1": (joined, joined), "layers.2": (width, joined), "layers.4": (width, width)}
    weights = {f"{key}.weight": torch.empty(shape if key != "layers.1" else shape[:1], device="meta")
               for key, shape in projector.items()}  # fmt: skip
    biases = {f"{key}.bias": torch.empty(shape[0], device="meta") for key, shape in projector.items()}
    write_sparse_shards(folder / "mm_projector", weights | biases)


def update_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(values), indent=2))


def write_sparse_shards(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write safetensors files in fp16, with an index if there are several, and holes in place of the bytes."""
    half = {key: value.to("meta", torch.float16) for key, value in state.items()}
    shards = split_shards(half)
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        header = encode_header(shard, list(shard))
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(value.nbytes for value in shard.values()))
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---------------------------------------------------------------- measuring


def run_command(*arguments: str) -> dict[str, Any]:
    """Run a command of omnivideo; return its time and its peak resident memory."""
    return measure_process(f"omnivideo {' '.join(arguments[:2])}", MEASURE, *arguments)


def measure_process(name: str, program: str, *arguments: str) -> dict[str, Any]:
    """Run a program that prints its peak memory last; return its time and its peak."""
    command = [sys.executable, "-c", program, *arguments]
    started = time.perf_counter()
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if completed.returncode:
        raise SystemExit(completed.stdout + completed.stderr)
    print(completed.stdout)
    peak = int(completed.stderr.strip().splitlines()[-1])
    return {"command": name, "seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 2)}


MEASURE = """
import resource, sys
from omnivideo.cli.main import main
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
"""
LOAD = """
import resource, sys
from pathlib import Path
from omnivideo.models.weights import checkpoint
print(checkpoint.load(Path(sys.argv[1])).placement.describe())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
"""
STEP = """
import resource, sys, time
from omnivideo import Studio
from omnivideo.backends.decoder.pipeline import generate_clip
from omnivideo.contracts import resolve_sampling_params

studio = Studio("omnivideo-1.3b", sys.argv[1], "cpu")
shape = {"width": 256, "height": 256, "frames": 5, "delivery": None}  # below the trained sizes that requests get
params = resolve_sampling_params(studio.omni.preset, "text-to-video", steps=1).model_copy(update=shape)
loaded_at = time.perf_counter()
progress = next(generate_clip(studio.omni, "a red ball", params))
assert progress.state.latents.isfinite().all()
print(f"the step's latents {list(progress.state.latents.shape)} after {time.perf_counter() - loaded_at:.0f} s")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
"""


def measure_block_errors(folder: Path) -> dict[int, float]:
    """Return how far each random block, as it computes here, is from the same block in float32 (relative L2).

    The inputs are those of a clip of 256 x 256 x 5 in shape, and random: behind weights of zero they would be zero.
    """
    omni = checkpoint.load(folder, contents="without-mllm")
    in_float32 = load_strict(WanTransformer3DModel, folder, "transformer", torch.float32)
    decoder, width = omni.decoder, omni.decoder.config.num_attention_heads * omni.decoder.config.attention_head_dim
    torch.manual_seed(0)
    rotary = decoder.rope(torch.zeros(1, 16, 2, 32, 32))
    inputs = torch.randn(1, 2 * 16 * 16, width), torch.randn(1, 2560, width), torch.randn(1, 6, width), rotary
    errors = {}
    with torch.no_grad():
        for index in RANDOM_BLOCKS:
            with autocast_to(omni.autocast, omni.device):
                served = decoder.blocks[index](*inputs).float()
            expected = in_float32.blocks[index](*inputs)
            errors[index] = float((served - expected).norm() / expected.norm())
    return errors


def list_sizes(folder: Path) -> Iterator[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    yield f"{sum(path.stat().st_size for path in files) / 1e9:.2f} GB in {len(files)} files"
    yield f"{sum(path.stat().st_blocks * 512 for path in files) / 1e9:.2f} GB on disk"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--only-write", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    published, ours = options.folder / "published", options.folder / "ours"
    started = time.perf_counter()
    write_published(published)
    print(f"written in {time.perf_counter() - started:.1f} s:", ", ".join(list_sizes(published)))
    if options.only_write:
        return
    results = [
        run_command("weights", "import", str(published), "-o", str(ours)),
        run_command("weights", "check", str(ours)),
        measure_process("load all parts", LOAD, str(ours)),
        measure_process("one denoising step", STEP, str(ours)),
    ]
    print("ours:", ", ".join(list_sizes(ours)))
    for result in results:
        print(json.dumps(result))
    for index, error in measure_block_errors(ours).items():
        print(json.dumps({"block": index, "relative_error": error}))
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
