"""Tensors in an object store, as safetensors: never in JSON, a database or a broker."""

from safetensors.torch import load, save
from torch import Tensor

from omnivideo.errors import StoreError
from omnivideo.ports import ObjectStore


def put_tensors(store: ObjectStore, tensors: dict[str, Tensor]) -> str:
    """The key of the tensors, moved to the CPU."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return store.put(save(held), "safetensors")


def get_tensors(store: ObjectStore, key: str) -> dict[str, Tensor]:
    """Raises StoreError where the key holds no tensors."""
    if not key.endswith(".safetensors"):
        raise StoreError(f"store: {key} holds no tensors")
    return load(store.get(key))
