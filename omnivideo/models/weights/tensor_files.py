"""Weights that are larger than memory: read where they lie, written a piece at a time, and all of them or none.

Tensors come as maps of their files (nothing is read before it is needed), from pickles that may hold tensors and
plain containers only.
"""

import hashlib
import json
import mmap
import os
import pickle
import shutil
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from omnivideo.errors import CheckpointError, InvalidInput

StateDict = dict[str, Tensor]
WriteProgress = Callable[[str, int], None]  # the file and how many bytes more of it are written

CHUNK_BYTES = 1 << 20
DTYPE_BY_NAME = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAME_BY_DTYPE = {dtype: name for name, dtype in DTYPE_BY_NAME.items()}


# ---------------------------------------------------------------- pickles


def read_pickle(path: Path) -> dict[str, Any]:
    """What torch.save wrote, its tensors as maps of the file.

    Raises CheckpointError where the pickle names anything but tensors and plain containers, so that none of it runs.
    """
    check_plain_zip(path)
    try:
        # Fake tensors know where in the file their bytes lie.  torch's own mmap=True asks the system to be ready to
        # copy every page, which it refuses for a file larger than memory.
        with FakeTensorMode(), warnings.catch_warnings(action="ignore"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{path.name} holds {type(loaded).__name__}, not a dictionary of tensors")
        return map_fake_tensors(loaded, map_bytes(path))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, AssertionError):
        raise CheckpointError(explain_refusal(path)) from None


def check_plain_zip(path: Path) -> None:
    """Raises CheckpointError unless the file can be read and is a zip whose entries lie there as they are."""
    try:
        if not is_zip(path):
            raise zipfile.BadZipFile
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type for entry in archive.infolist())
    except OSError as error:
        raise CheckpointError(f"{path.parent.name}/{path.name} cannot be read: {error.strerror}") from None
    except zipfile.BadZipFile:
        raise CheckpointError(f"{path.name} is cut, or is not in the zip format of torch.save") from None
    if compressed:
        raise CheckpointError(f"{path.name} is compressed, which torch.save never does")


def is_zip(path: Path) -> bool:
    """By its first bytes, as torch tells; a zip may also hide further back in another file."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def explain_refusal(path: Path) -> str:
    """Why torch will not read a file; its pickle is only looked through here, never run."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, pickle.UnpicklingError):
        return f"{path.name} is damaged: its pickle cannot be read"
    return unsafe_name_message(path.name, names[0]) if names else f"{path.name} is damaged, or not of torch.save"


def map_fake_tensors(value: Any, data: mmap.mmap) -> Any:
    """The same dictionaries with every fake tensor over its bytes in the file."""
    if isinstance(value, Mapping):
        return {key: map_fake_tensors(entry, data) for key, entry in value.items()}
    if not isinstance(value, FakeTensor) or value.layout != torch.strided:
        return value
    storage = value.untyped_storage()
    offset = storage._checkpoint_offset
    assert offset is not None, "a fake tensor of torch.load"
    flat = tensor_over_buffer(data, value.dtype, storage.nbytes() // value.element_size(), offset)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


def map_bytes(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def tensor_over_buffer(data: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    """A flat tensor over bytes that must not be written to, which torch warns of each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=dtype, count=count, offset=offset)


def unsafe_name_message(file: str, name: str) -> str:
    return f"{file} asks for {name}, which is neither a tensor nor a plain container: it could run code, and is refused"


def check_dense_tensors(file: str, loaded: Mapping[Any, Any]) -> StateDict:
    """The dictionary, of which every entry is a dense tensor of floating point numbers."""
    for key, value in loaded.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in NAME_BY_DTYPE
        if not (isinstance(key, str) and dense):
            raise CheckpointError(f"{file}: {key!r} is not a dense tensor of floating point numbers")
    return {key: value.detach() for key, value in loaded.items()}


def load_storage(data: bytes) -> Any:
    """A tensor's bytes inside a plain pickle, which are a file of torch.save again."""
    with warnings.catch_warnings(action="ignore"):
        return torch.load(BytesIO(data), weights_only=True)


class RestrictedUnpickler(pickle.Unpickler):
    """For plain pickles of tensors, as `pickle.dump` writes them: what they may call is listed here."""

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
            ("torch.storage", "_load_from_bytes"): load_storage,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a persistent id")


def read_small_pickle(path: Path) -> StateDict:
    """A few tensors, in memory, from a plain pickle or from torch.save's zip."""
    if is_zip(path):
        return check_dense_tensors(path.name, read_pickle(path))
    try:
        with path.open("rb") as file:
            loaded = RestrictedUnpickler(file).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(unsafe_name_message(path.name, str(error).split()[-1])) from None
    except (EOFError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, TypeError):
        raise CheckpointError(f"{path.name} is damaged: its pickle cannot be read") from None
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path.name} holds {type(loaded).__name__}, not a dictionary of tensors")
    return check_dense_tensors(path.name, loaded)


# ---------------------------------------------------------------- safetensors


def map_safetensors_folder(folder: Path) -> StateDict:
    """All tensors of a folder's safetensors files, each as a map of its own piece of the file."""
    state: StateDict = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= map_safetensors_file(path)
    return state


def map_safetensors_file(path: Path) -> StateDict:
    data = map_bytes(path)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    state = {}
    for key, entry in header.items():
        if key != "__metadata__":
            first, last = entry["data_offsets"]
            dtype = DTYPE_BY_NAME[entry["dtype"]]
            state[key] = tensor_over_buffer(data, dtype, (last - first) // dtype.itemsize, start + first).view(
                entry["shape"]
            )
    return state


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], on_progress: WriteProgress) -> str:
    """A safetensors file, a piece at a time; returns its sha256.  A piece of zeros is left as a hole in the file."""
    keys = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # keeps every tensor aligned
    header, digest = encode_header(tensors, keys), hashlib.sha256()
    with path.open("wb") as file:
        file.write(header)
        digest.update(header)
        for piece in (piece for key in keys for piece in iterate_chunks(tensors[key])):
            digest.update(piece)
            if piece[:4096].any() or piece.any():
                file.write(piece)
            else:
                file.seek(len(piece), os.SEEK_CUR)
            on_progress(path.name, len(piece))
        file.truncate(file.tell())
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def encode_header(tensors: Mapping[str, Tensor], keys: list[str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in keys:
        value = tensors[key]
        entries[key] = {
            "dtype": NAME_BY_DTYPE[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def iterate_chunks(tensor: Tensor) -> Iterator[Any]:
    """The tensor's bytes in order, as arrays of at most PIECE."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), CHUNK_BYTES):
        yield flat[start : start + CHUNK_BYTES]


# ---------------------------------------------------------------- all or nothing


@contextmanager
def stage_folder(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write `needed_bytes` into, which takes its name when all is there; after a failure nothing is left.

    Raises InvalidInput where the name is taken, CheckpointError where the disk is too small.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InvalidInput("output", f"{folder.name!r} is there already; name a folder that is not, or an empty one")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an import that was killed
    try:
        partial.mkdir(parents=True)
        free_bytes = shutil.disk_usage(partial).free
        if free_bytes < needed_bytes:
            raise CheckpointError(
                f"the weights take {needed_bytes / 1e9:.1f} GB; the disk has {free_bytes / 1e9:.1f} GB free"
            )
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"the weights could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
