"""Store tensors as safetensors files; they never travel in JSON, the database or the broker."""

from safetensors.torch import load, save
from torch import Tensor

from omnivideo.errors import StoreError
from omnivideo.ports import ObjectStore


def put_tensors(store: ObjectStore, tensors: dict[str, Tensor]) -> str:
    """Store the tensors, moved to the CPU, and return their key."""
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return store.put(save(cpu_tensors), "safetensors")


def get_tensors(store: ObjectStore, key: str) -> dict[str, Tensor]:
    """Return the tensors of a key, on the CPU. Raises StoreError if the file contains no tensors."""
    if not key.endswith(".safetensors"):
        raise StoreError(f"store: {key} contains no tensors")
    # The copies have torch's own alignment. With the alignment of the file's buffer, which differs between runs, the
    # last bits of a matrix product would differ as well.
    return {name: tensor.clone() for name, tensor in load(store.get(key)).items()}
