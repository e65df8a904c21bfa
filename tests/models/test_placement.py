"""The plan of where parts compute, over a table of machines and models."""

import pytest
import torch

from omnivideo.models.device import list_fast_dtypes, measure_free_memory, measure_machine, read_cgroups_free
from omnivideo.models.placement import GIB, Machine, PartSize, plan_placement

# The parts of the published presets in GiB: weights, largest block, working memory.
MLLM_V1, MLLM_V2 = ("mllm", "float16", 16, 0.41, 2), ("mllm", "bfloat16", 58, 1.2, 2)
SHARED = (("text_encoder", "bfloat16", 10.6, 0.36, 0.5), ("vae", "float32", 0.5, 0.02, 4))
VERSION_1 = (MLLM_V1, ("decoder", "float32", 5.3, 0.17, 4.5), ("adapter", "bfloat16", 3.6, 0.5, 0.5), *SHARED)
EXPERTS = (("decoder", "bfloat16", 26.6, 0.66, 11), ("decoder_2", "bfloat16", 26.6, 0.66, 11), *SHARED)
TABLE = [
    # parts, GPU, memory -> mode, locations, read from disk
    (VERSION_1, 80, 64, "all on the GPU", {"mllm": "gpu", "decoder": "gpu", "vae": "gpu"}, False),
    # Parts take turns where they do not fit together; the small ones stay.
    (VERSION_1, 24, 64, "parts in turn on the GPU", {"mllm": "gpu-in-turn", "vae": "gpu"}, False),
    (VERSION_1, 24, 20, "parts in turn on the GPU", {"mllm": "gpu-in-turn", "decoder": "gpu-in-turn"}, True),
    # A language model that does not fit alone computes on the CPU: each of its tokens would copy all of it.
    (VERSION_1, 16, 64, "parts in turn on the GPU", {"mllm": "cpu", "decoder": "gpu-in-turn", "vae": "gpu"}, False),
    (VERSION_1, 8, 64, "decoder in blocks on the GPU", {"decoder": "gpu-in-blocks", "text_encoder": "cpu"}, False),
    (VERSION_1, 4, 64, "CPU", {"decoder": "cpu", "vae": "cpu"}, False),
    (VERSION_1, None, 64, "CPU", {"decoder": "cpu", "mllm": "cpu"}, False),
    (VERSION_1, None, 20, "CPU", {"decoder": "cpu", "mllm": "cpu"}, True),
    (EXPERTS, 80, 128, "all on the GPU", {"decoder": "gpu", "decoder_2": "gpu"}, False),
    (EXPERTS, 48, 128, "parts in turn on the GPU", {"decoder": "gpu-in-turn", "decoder_2": "gpu-in-turn"}, False),
    (EXPERTS, 24, 128, "decoder in blocks on the GPU", {"decoder": "gpu-in-blocks", "vae": "gpu"}, False),
    (EXPERTS, 10, 128, "CPU", {"decoder": "cpu", "text_encoder": "cpu"}, False),
    ((MLLM_V2,), 80, 128, "all on the GPU", {"mllm": "gpu"}, False),
    ((MLLM_V2,), 24, 128, "CPU", {"mllm": "cpu"}, False),
]  # fmt: skip


def build_parts(rows) -> list[PartSize]:
    return [PartSize(name, dtype, *(int(GIB * size) for size in sizes)) for name, dtype, *sizes in rows]


@pytest.mark.parametrize(("rows", "gpu", "memory", "mode", "locations", "reads_from_disk"), TABLE)
def test_placement_follows_from_sizes_and_free_memory(rows, gpu, memory, mode, locations, reads_from_disk):
    placement = plan_placement(build_parts(rows), Machine(memory * GIB, gpu and gpu * GIB))
    assert placement.mode == mode
    assert {name: placement.find_part(name).location for name in locations} == locations
    assert placement.reads_from_disk == reads_from_disk
    assert all(f"{row[0]} " in placement.describe() for row in rows) and placement.describe().startswith(mode)


@pytest.mark.parametrize("rows", [VERSION_1, EXPERTS, (MLLM_V2,)])
def test_more_memory_never_makes_a_placement_worse_and_none_exceeds_the_gpu(rows):
    modes = ["CPU", "decoder in blocks on the GPU", "parts in turn on the GPU", "all on the GPU"]
    ranks = []
    for gpu in range(2, 140):
        placement = plan_placement(build_parts(rows), Machine(512 * GIB, gpu * GIB))
        ranks.append(modes.index(placement.mode))
        staying = sum(part.size.weights_bytes for part in placement.parts if part.location == "gpu")
        turns = [part.size.weights_bytes + part.size.working_bytes for part in placement.parts
                 if part.location == "gpu-in-turn"]  # fmt: skip
        assert staying + max(turns, default=0) < gpu * GIB
    assert ranks == sorted(ranks) and ranks[-1] == 3


def test_parts_with_large_computations_are_alone_on_the_gpu():
    """What stays there after its turn leaves no room for the activations of the decoder."""
    in_turn = plan_placement(build_parts(VERSION_1), Machine(64 * GIB, 12 * GIB))
    assert in_turn.find_part("adapter").location == "gpu-in-turn"
    assert in_turn.list_parts_that_need_room() == {"decoder", "vae"}
    whole = plan_placement(build_parts(VERSION_1), Machine(64 * GIB, 80 * GIB))
    assert whole.list_parts_that_need_room() == set()


def test_parts_are_cast_only_on_a_cpu_that_is_slow_in_their_type():
    parts = build_parts(VERSION_1)
    slow = plan_placement(parts, Machine(64 * GIB))
    fast = plan_placement(parts, Machine(64 * GIB, None, ("float32", "bfloat16")))
    gpu = plan_placement(parts, Machine(64 * GIB, 80 * GIB))
    dtypes = {
        name: [plan.find_part(name).compute_dtype for plan in (slow, fast, gpu)]
        for name in ("mllm", "text_encoder", "decoder")
    }
    assert dtypes == {
        "mllm": ["float32", "float32", "float16"],
        "text_encoder": ["float32", "bfloat16", "bfloat16"],
        "decoder": ["float32"] * 3,
    }
    assert "float16, each block cast to float32" in slow.describe()


def test_the_machine_is_measured():
    machine = measure_machine(torch.device("cpu"))
    assert machine.gpu_bytes is None and "float32" in list_fast_dtypes() and "float16" not in list_fast_dtypes()
    with open("/proc/meminfo") as lines:
        total = int(next(lines).split()[1]) * 1024
    assert 0 < measure_free_memory() <= total


@pytest.mark.parametrize(
    ("membership", "files", "free"),
    [
        ("0::/\n", {"memory.max": "1000\n", "memory.current": "900\n"}, [100]),
        (
            "0::/\n",
            {"memory.max": "1000\n", "memory.current": "990\n",
             "memory.stat": "anon 90\nfile 900\ninactive_file 600\nactive_file 300\n"},
            [910],
        ),
        ("0::/job/step\n", {"job/memory.max": "1000\n", "job/memory.current": "400\n", "memory.max": "max\n"}, [600]),
        ("0::/path/of/the/host\n", {"memory.max": "max\n", "memory.current": "5\n"}, []),
        (
            "4:memory:/job\n1:cpu:/\n",
            {"memory/job/memory.limit_in_bytes": "1000\n", "memory/job/memory.usage_in_bytes": "900\n",
             "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 200\ntotal_active_file 300\n"},
            [600],
        ),
    ],
    ids=["v2", "v2, weights in the page cache", "v2 of a job", "v2 no limit", "v1 of a job, page cache"],
)  # fmt: skip
def test_the_free_memory_of_cgroups_counts_what_the_system_takes_back(tmp_path, membership, files, free):
    for name, content in (files | {"membership": membership}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert list(read_cgroups_free(tmp_path, tmp_path / "membership")) == free
