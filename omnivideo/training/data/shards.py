"""WebDataset shards: tar files in which the members of one sample stand together, under one key.

    00000.tar          KEY.json, KEY.source.png, KEY.target.mp4 ...   (docs/data.md has the fields)
    00000.index.json   for each sample its key, task, shape, and where in the tar its members are

Read from the start to the end as a stream, or, by the index, one sample at a time from anywhere: what mixed batches
need.  The index is made again where it is missing or the tar has another size.  Tars are read by the standard library:
the `webdataset` package goes forward only, and takes a tar that is cut between two members, or has a damaged header,
for whole.  What is written here, it reads (tests/unit/test_data.py).
"""

import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from omnivideo.errors import InvalidInput, NotStored
from omnivideo.training.data.batches import Task
from omnivideo.training.data.sample import Problems, Sample, Shape, check, kind_of, shape_of
from omnivideo.training.data.shelves import Shelf

SHARD_SAMPLES, SHARD_BYTES = 1000, 512 << 20
BLOCK = 512
FIELDS = ("task", "text", "turns", "caption", "origin")
Span = tuple[int, int]  # offset in the tar, and length


@dataclass(frozen=True)
class Entry:
    """A sample by its place: `members` maps "json", "source.png" ... to their spans in the shard."""

    shard: str
    key: str
    task: Task
    shape: Shape
    members: dict[str, Span]


# ---------------------------------------------------------------- one sample as members of a tar, and back


def to_members(sample: Sample) -> dict[str, bytes]:
    record = {name: value for name in FIELDS if (value := getattr(sample, name))}
    members = {"json": json.dumps(record, ensure_ascii=False).encode()}
    for name in ("source", "target"):
        if data := getattr(sample, name):
            members[f"{name}.{kind_of(data)}"] = data
    return members


def from_members(key: str, members: dict[str, bytes]) -> Sample:
    """Raises InvalidInput for a record that is not of the format."""
    if "json" not in members:
        raise InvalidInput("file", f"{key}.json is missing")
    record = parsed(members["json"])
    media: dict[str, Any] = {suffix.split(".")[0]: data for suffix, data in members.items() if suffix != "json"}
    if unknown := set(media) - {"source", "target"}:
        raise InvalidInput("file", f"{key}.{min(unknown)} is not source or target")
    sample = Sample(key=key, **record, **media)
    check(sample)
    return sample


def parsed(data: bytes) -> dict[str, Any]:
    """The fields of a sample's JSON."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidInput("json", "it is not JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("task"), str):
        raise InvalidInput("task", "missing from the record")
    kept = {name: record[name] for name in FIELDS if name in record}
    turns = kept.pop("turns", [])
    if any(not isinstance(value, str) for value in kept.values()):
        raise InvalidInput("json", f"{', '.join(kept)} are to be text")
    if not isinstance(turns, list):
        raise InvalidInput("turns", "a list of questions and answers is wanted")
    return kept | {"turns": tuple(pair_of(turn) for turn in turns)}


def pair_of(turn: object) -> tuple[str, str]:
    if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(side, str) for side in turn)):
        raise InvalidInput("turns", "a turn is to be a question and an answer")
    return turn[0], turn[1]


# ---------------------------------------------------------------- writing


class Shard:
    """One tar being written; members have no owner and no time, so the same samples give the same bytes."""

    def __init__(self, path: Path):
        self.path, self.entries = path, list[Entry]()
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed by `close`

    def add(self, sample: Sample, shape: Shape) -> None:
        spans = {}
        for suffix, data in to_members(sample).items():
            info = tarfile.TarInfo(f"{sample.key}.{suffix}")
            info.size = len(data)
            self.tar.addfile(info, io.BytesIO(data))
            end = -(-len(data) // BLOCK) * BLOCK
            spans[suffix] = (self.tar.offset - end, len(data))
        self.entries.append(Entry(self.path.name, sample.key, sample.task, shape, spans))

    @property
    def full(self) -> bool:
        return len(self.entries) >= SHARD_SAMPLES or self.tar.offset >= SHARD_BYTES

    def close(self, to: Shelf) -> None:
        """Puts tar and index on the shelf; the index last, so that what has one is whole."""
        self.tar.close()
        index = self.path.with_suffix(".index.json")
        index.write_text(index_text(self.path.stat().st_size, self.entries))
        to.put(self.path)
        to.put(index)


def index_text(size: int, entries: list[Entry]) -> str:
    rows = [{name: value for name, value in asdict(entry).items() if name != "shard"} for entry in entries]
    return json.dumps({"format": 1, "bytes": size, "samples": rows})


def write(samples: Iterable[Sample], to: Shelf, problems: Problems) -> int:
    """Writes all samples that can be used, in their order, keyed by their number; returns how many."""
    done, shard, number = 0, None, 0
    with tempfile.TemporaryDirectory() as folder:
        for sample in samples:
            with problems.skipping(f"{sample.origin} {sample.key}".strip()):
                check(sample)
                shape = shape_of(sample)
                shard = shard or Shard(Path(folder) / f"{number:05}.tar")
                shard.add(replace(sample, key=f"{done:09}"), shape)
                done += 1
            if shard and shard.full:
                shard.close(to)
                shard, number = None, number + 1
        if shard:
            shard.close(to)
    return done


# ---------------------------------------------------------------- reading


class Tee:
    """A stream that remembers the last bytes that were read from it."""

    def __init__(self, file: IO[bytes]):
        self.file, self.recent, self.total = file, b"", 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.recent = (self.recent + data)[-4 * tarfile.RECORDSIZE :]
        self.total += len(data)
        return data

    def block(self, offset: int) -> bytes:
        """The block at an offset of the stream."""
        start = offset - self.total + len(self.recent)
        return self.recent[max(0, start) : start + BLOCK]


def members(file: IO[bytes], shard: str, problems: Problems) -> Iterator[tuple[str, Span, bytes]]:
    """Name, span and bytes of every file of a tar; where it is broken, what comes before the break."""
    tee = Tee(file)
    try:
        with tarfile.open(fileobj=tee, mode="r|") as tar:  # type: ignore[call-overload]
            for info in tar:
                if info.isfile():
                    yield info.name, (info.offset_data, info.size), tar.extractfile(info).read()
            # tarfile takes any header that it cannot read for the end; the end is a block of zeros.
            if tee.block(tar.offset) != bytes(BLOCK):
                raise tarfile.ReadError("it ends without its end mark")
    except tarfile.TarError as error:
        problems.add("broken shard", shard, f"{error}; what comes after byte {tee.total} is lost")


def groups(file: IO[bytes], shard: str, problems: Problems) -> Iterator[tuple[str, dict[str, Span], dict[str, bytes]]]:
    """Key, spans and bytes of the members of each sample: names up to the first dot of their last part."""
    key, spans, held = "", dict[str, Span](), dict[str, bytes]()
    for name, span, data in members(file, shard, problems):
        folder, slash, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if folder + slash + stem != key:
            if held:
                yield key, spans, held
            key, spans, held = folder + slash + stem, {}, {}
        spans[suffix], held[suffix] = span, data
    if held:
        yield key, spans, held


def stream(of: Shelf, problems: Problems, shards: Iterable[str] | None = None) -> Iterator[Sample]:
    """All samples of the shards, one after another, without an index and without going back."""
    for shard in of.names(".tar") if shards is None else shards:
        with of.open(shard) as file:
            for key, _, held in groups(file, shard, problems):
                with problems.skipping(f"{shard}/{key}"):
                    yield from_members(key, held)


class Library:
    """The samples of a shelf's shards, by number; only their indices are in memory."""

    def __init__(self, of: Shelf, problems: Problems):
        self.shelf, self.problems = of, problems
        self.entries = [entry for shard in of.names(".tar") for entry in entries_of(of, shard, problems)]
        if not self.entries:
            raise InvalidInput("shards", "there is no sample that can be used")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, at: int) -> Sample:
        """Raises InvalidInput, or UnreadableMedia, where the shard has changed under its index."""
        entry = self.entries[at]
        first = min(offset for offset, _ in entry.members.values())
        last = max(offset + length for offset, length in entry.members.values())
        data = self.shelf.read(entry.shard, first, last - first)  # they stand together: one request
        held = {name: data[offset - first :][:length] for name, (offset, length) in entry.members.items()}
        return from_members(entry.key, held)


def entries_of(of: Shelf, shard: str, problems: Problems) -> list[Entry]:
    """A shard's samples from its index, or from the shard where the index does not fit."""
    try:
        index = json.loads(of.read(shard.removesuffix(".tar") + ".index.json"))
        if index["format"] == 1 and index["bytes"] == of.size(shard):
            return [entry_of(shard, row) for row in index["samples"]]
    except (NotStored, ValueError, KeyError, TypeError):
        pass  # none, or none of ours
    return scan(of, shard, problems)


def entry_of(shard: str, row: dict[str, Any]) -> Entry:
    spans = {name: (offset, length) for name, (offset, length) in row["members"].items()}
    return Entry(shard, row["key"], row["task"], Shape(**row["shape"]), spans)


def scan(of: Shelf, shard: str, problems: Problems) -> list[Entry]:
    """Reads the whole shard and looks at every sample."""
    entries = []
    with of.open(shard) as file:
        for key, spans, held in groups(file, shard, problems):
            with problems.skipping(f"{shard}/{key}"):
                sample = from_members(key, held)
                entries.append(Entry(shard, key, sample.task, shape_of(sample), spans))
    return entries
