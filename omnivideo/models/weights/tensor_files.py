"""Read and write weights that are larger than memory.

Files are memory-mapped, so that tensors are read only when they are used, and written in pieces. Pickles may contain
only tensors and plain containers. An output folder appears only when it is complete.
"""

import fcntl
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
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.weights.shipped import INDEX_FILE
from omnivideo.models.weights.strict import explain_unreadable

StateDict = dict[str, Tensor]
WriteProgress = Callable[[str, int], None]  # the file, and the number of bytes just written

CHUNK_BYTES = 1 << 20
DTYPE_BY_NAME = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAME_BY_DTYPE = {dtype: name for name, dtype in DTYPE_BY_NAME.items()}
MAPPED_FILES: "WeakSet[mmap.mmap]" = WeakSet()  # read-only files, whose pages can be dropped at any time
DAMAGED_PICKLE = (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, AssertionError)
PARTIAL_NAME = ".partial"  # of what is written into a folder that exists
NAMES_IN_EMPTY_FOLDER = {PARTIAL_NAME, "lost+found"}  # the second belongs to a disk's file system
RELEASE_BYTES = 256 << 20  # of mapped pages that a copy may keep


# ---------------------------------------------------------------- pickles


def read_pickle(path: Path) -> dict[str, Any]:
    """Return what torch.save wrote, with memory-mapped tensors.

    Raises CheckpointError if the pickle names anything but tensors and plain containers, before any of it runs.
    """
    label = f"{path.parent.name}/{path.name}"
    check_plain_zip(path)
    try:
        # Fake tensors know their offset in the file. torch's own mmap=True reserves memory to copy every page, which
        # the system refuses for a file larger than memory.
        with FakeTensorMode(), warnings.catch_warnings(action="ignore"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{label} holds {type(loaded).__name__}, not a dictionary of tensors")
        mapped: dict[str, Any] = map_fake_tensors(loaded, map_bytes(path))
        return mapped
    except DAMAGED_PICKLE:
        raise CheckpointError(explain_refusal(path)) from None


def check_plain_zip(path: Path) -> None:
    """Raise CheckpointError unless the file can be read and is a zip archive of uncompressed entries."""
    label = f"{path.parent.name}/{path.name}"
    try:
        if not is_zip(path):
            raise zipfile.BadZipFile
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type for entry in archive.infolist())
    except OSError as error:
        raise CheckpointError(f"{label} cannot be read: {error.strerror}") from None
    except zipfile.BadZipFile:
        raise CheckpointError(explain_unreadable(path, "in the zip format of torch.save")) from None
    if compressed:
        raise CheckpointError(f"{label} is compressed, which torch.save never does")


def is_zip(path: Path) -> bool:
    """Return whether a file begins like a zip archive, which is how torch decides.

    zipfile.is_zipfile would also accept an archive at the end of another file.
    """
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def explain_refusal(path: Path) -> str:
    """Return why torch refuses a file. Its pickle is only scanned, never run."""
    label = f"{path.parent.name}/{path.name}"
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, pickle.UnpicklingError):
        return f"{label} is damaged: its pickle cannot be read"
    if not names:
        return f"{label} is damaged, or was not written by torch.save"
    return unsafe_name_message(label, names[0])


def map_fake_tensors(value: Any, data: mmap.mmap) -> Any:
    """Return the same dictionaries and lists with each fake tensor replaced by a view of its bytes in the file."""
    if isinstance(value, Mapping):
        return {key: map_fake_tensors(entry, data) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [map_fake_tensors(entry, data) for entry in value]
    if not isinstance(value, FakeTensor) or value.layout != torch.strided:
        return value
    storage = value.untyped_storage()
    offset = storage._checkpoint_offset
    assert offset is not None, "torch.load sets the offset of every fake tensor"
    flat = tensor_over_buffer(data, value.dtype, storage.nbytes() // value.element_size(), offset)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


def map_bytes(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    MAPPED_FILES.add(mapped)
    return mapped


def release_mapped_pages() -> None:
    """Give the pages of all mapped files back to the system; they are read again if they are needed.

    Without this, a process that has read a file of 28 GB counts all of it as resident memory.
    """
    for mapped in list(MAPPED_FILES):
        if not mapped.closed:
            mapped.madvise(mmap.MADV_DONTNEED)


def tensor_over_buffer(data: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    """Return a flat tensor over read-only bytes, without torch's warning about them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=dtype, count=count, offset=offset)


def unsafe_name_message(file: str, name: str) -> str:
    return f"{file} is refused: it names {name}, which is neither a tensor nor a plain container and could run code"


def check_dense_tensors(file: str, loaded: Mapping[Any, Any]) -> StateDict:
    """Return the dictionary; raise CheckpointError unless every entry is a dense floating-point tensor."""
    for key, value in loaded.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in NAME_BY_DTYPE
        if not (isinstance(key, str) and dense):
            raise CheckpointError(f"{file}: {key!r} is not a dense tensor of floating-point numbers")
    return {key: value.detach() for key, value in loaded.items()}


def load_storage(data: bytes) -> Any:
    """Load the bytes of a storage inside a plain pickle, which torch.save wrote."""
    with warnings.catch_warnings(action="ignore"):
        return torch.load(BytesIO(data), map_location="cpu", weights_only=True)


class UnsafeName(pickle.UnpicklingError):
    """A pickle names something that could run code; the text is the name."""


class RestrictedUnpickler(pickle.Unpickler):
    """Reads plain pickles of tensors, as `pickle.dump` writes them, and allows only the calls that those need."""

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
            ("torch.storage", "_load_from_bytes"): load_storage,
        }
        if (module, name) not in allowed:
            raise UnsafeName(f"{module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafeName("a persistent id")


def read_small_pickle(path: Path) -> StateDict:
    """Read a few tensors into memory, from a plain pickle or from torch.save's zip format."""
    return check_dense_tensors(path.name, load_small_pickle(path))


def read_tensor_lists(path: Path) -> dict[str, list[Tensor]]:
    """Read a pickle of tensors and lists of tensors; return each entry as a list."""
    lists = {}
    for key, value in load_small_pickle(path).items():
        entries = list(value) if isinstance(value, list | tuple) else [value]
        numbered = check_dense_tensors(path.name, {f"{key}.{number}": entry for number, entry in enumerate(entries)})
        lists[str(key)] = list(numbered.values())
    return lists


def load_small_pickle(path: Path) -> Mapping[Any, Any]:
    """Return the dictionary in a small pickle; raise CheckpointError if it is damaged or names anything else."""
    if is_zip(path):
        return read_pickle(path)
    try:
        with path.open("rb") as file:
            loaded = RestrictedUnpickler(file).load()
    except UnsafeName as error:
        raise CheckpointError(unsafe_name_message(path.name, str(error))) from None
    except (*DAMAGED_PICKLE, AttributeError, TypeError, KeyError, IndexError, OverflowError, MemoryError):
        raise CheckpointError(explain_unreadable(path, "a pickle of tensors")) from None
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path.name} holds {type(loaded).__name__}, not a dictionary of tensors")
    return loaded


# ---------------------------------------------------------------- safetensors


def map_safetensors_folder(folder: Path) -> StateDict:
    """Return all tensors of a folder's safetensors files, memory-mapped."""
    state: StateDict = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= map_safetensors_file(path)
    return state


def map_safetensors_file(path: Path) -> StateDict:
    """Return all tensors of a safetensors file, memory-mapped."""
    data, start, entries = map_bytes(path), *read_safetensors_header(path)
    state = {}
    for key, entry in entries.items():
        if entry["dtype"] not in DTYPE_BY_NAME:
            raise CheckpointError(f"{path.name}: {key!r} is not a dense tensor of floating-point numbers")
        begin, end = entry["data_offsets"]
        dtype = DTYPE_BY_NAME[entry["dtype"]]
        flat = tensor_over_buffer(data, dtype, (end - begin) // dtype.itemsize, start + begin)
        state[key] = flat.view(entry["shape"])
    return state


def read_safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where a file's tensors start, and the type, shape and offsets of each.

    Raises CheckpointError if the file is missing, damaged or cut short.
    """
    label = f"{path.parent.name}/{path.name}"
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(header_bytes)) if 8 + header_bytes <= size_bytes else None
        if not isinstance(entries, dict):
            raise ValueError
        entries.pop("__metadata__", None)
        end = 8 + header_bytes + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise CheckpointError(f"{label} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise CheckpointError(explain_unreadable(path, "a safetensors file")) from None
    if size_bytes != end:
        raise CheckpointError(f"{label} is cut short or damaged: it has {size_bytes:,} bytes, its header says {end:,}")
    return 8 + header_bytes, entries


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], on_progress: WriteProgress) -> str:
    """Write a safetensors file in pieces and return its SHA-256. Pieces of zeros become holes in the file."""
    # Tensors with large elements come first, which keeps every tensor aligned.
    keys = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header, digest, unreleased_bytes = encode_header(tensors, keys), hashlib.sha256(), 0
    with path.open("wb") as file:
        file.write(header)
        digest.update(header)
        for piece in (piece for key in keys for piece in iterate_chunks(tensors[key])):
            digest.update(piece.data)
            if piece[:4096].any() or piece.any():
                file.write(piece.data)
            else:
                file.seek(len(piece), os.SEEK_CUR)
            on_progress(path.name, len(piece))
            unreleased_bytes += len(piece)
            if unreleased_bytes >= RELEASE_BYTES:
                release_mapped_pages()
                unreleased_bytes = 0
        file.truncate(file.tell())
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def encode_header(tensors: Mapping[str, Tensor], keys: list[str]) -> bytes:
    """Return the header of a safetensors file with the tensors in the order of `keys`."""
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


def iterate_chunks(tensor: Tensor) -> Iterator[np.ndarray]:
    """Yield the tensor's bytes in order, as uint8 arrays of at most CHUNK_BYTES."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), CHUNK_BYTES):
        yield flat[start : start + CHUNK_BYTES]


# ---------------------------------------------------------------- other files


def link_file(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link, or a symbolic link if they are on different disks."""
    source = source.resolve()  # the hub's cache consists of symbolic links
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source)


def digest_file(path: Path, on_progress: WriteProgress) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(16 * CHUNK_BYTES):
            digest.update(piece)
            on_progress(path.name, len(piece))
    return digest.hexdigest()


# ---------------------------------------------------------------- all or nothing


@contextmanager
def stage_folder(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """Provide a temporary folder that becomes `folder` at the end; a failure leaves nothing behind.

    An empty folder that exists stays the same folder, since it may be a disk of its own: what is written is moved into
    it. Raises InvalidInput if the folder exists and is not empty or if another process writes it, and CheckpointError
    if the disk has too little space.
    """
    folder = folder.resolve()
    exists = folder.exists()
    if exists and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= NAMES_IN_EMPTY_FOLDER):
        raise InvalidInput("output", f"{folder.name!r} already exists; choose a new or an empty folder")
    partial = folder / PARTIAL_NAME if exists else folder.with_name(f".{folder.name}.partial")
    lock = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(partial, folder.name)
        for path in partial.iterdir():  # left by an import that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        free_bytes = shutil.disk_usage(partial).free
        if free_bytes < needed_bytes:
            raise CheckpointError(
                f"the weights take {needed_bytes / 1e9:.1f} GB; the disk has {free_bytes / 1e9:.1f} GB free"
            )
        yield partial
        if exists:
            move_entries(partial, folder)
        else:
            partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"the weights could not be written: {error.strerror or error}") from error
    finally:
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def move_entries(source: Path, target: Path) -> None:
    """Move a folder's entries to another on the same disk, the index last, without which no command accepts it."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == INDEX_FILE):
        path.rename(target / path.name)


def lock_folder(folder: Path, output_name: str) -> int:
    """Return a descriptor that locks a folder until it is closed or the process ends.

    Raises InvalidInput if another process has locked it; `output_name` is what it writes.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InvalidInput("output", f"another process is writing {output_name!r}; choose another folder") from None
    return descriptor
