"""Tensors in an object store, as safetensors: never in JSON, a database or a broker."""

from safetensors.torch import load, save
from torch import Tensor

from omnivideo.errors import StoreError
from omnivideo.ports import ObjectStore


def put_tensors(store: ObjectStore, tensors: dict[str, Tensor]) -> str:
    """The key of the tensors, moved to the CPU."""
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return store.put(save(cpu_tensors), "safetensors")


def get_tensors(store: ObjectStore, key: str) -> dict[str, Tensor]:
    """Raises StoreError where the key holds no tensors."""
    if not key.endswith(".safetensors"):
        raise StoreError(f"store: {key} holds no tensors")
    # Copied to memory of torch's own alignment: out of a buffer that starts anywhere, the same matrix product comes
    # out differently in the last bits from one run to the next.
    return {name: tensor.clone() for name, tensor in load(store.get(key)).items()}
