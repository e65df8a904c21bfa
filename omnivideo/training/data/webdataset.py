"""WebDataset shards: tar files in which the members of a sample are adjacent and share a key.

    00000.tar          KEY.json, KEY.source.png, KEY.target.mp4 ...   (docs/data.md has the fields)
    00000.index.json   each sample's key, task, shape and the byte spans of its members

Shards are read as a stream, or one sample at a time through the index, as mixed batches need. The index is rebuilt if
it is missing or does not match the size of the tar. Tars are read with the standard library, because the `webdataset`
package cannot seek, and accepts a tar that is truncated between two members or has a damaged header. That package can
read the shards written here (tests/training/data/test_webdataset.py).
"""

import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from omnivideo.contracts import TrainingTask
from omnivideo.errors import ArtifactNotFound, InvalidInput
from omnivideo.training.data.file_store import FileStore
from omnivideo.training.data.sample import (
    MediaShape,
    SkipReport,
    TrainingSample,
    check_sample,
    detect_member_suffix,
    measure_sample,
)

MAX_SHARD_SAMPLES, MAX_SHARD_BYTES = 1000, 512 << 20
TAR_BLOCK_BYTES = 512
RECORD_FIELDS = ("task", "text", "turns", "caption", "origin")
ByteSpan = tuple[int, int]  # offset in the tar, and length


@dataclass(frozen=True)
class SampleRef:
    """A sample's location and shape; `members` maps "json", "source.png" ... to their spans in the shard."""

    shard: str
    key: str
    task: TrainingTask
    shape: MediaShape
    members: dict[str, ByteSpan]


# ---------------------------------------------------------------- one sample as members of a tar, and back


def to_members(sample: TrainingSample) -> dict[str, bytes]:
    """Return the files of a sample by their suffixes."""
    record = {name: value for name in RECORD_FIELDS if (value := getattr(sample, name))}
    members = {"json": json.dumps(record, ensure_ascii=False).encode()}
    for name in ("source", "target"):
        if data := getattr(sample, name):
            members[f"{name}.{detect_member_suffix(data)}"] = data
    return members


def sample_from_members(key: str, members: dict[str, bytes]) -> TrainingSample:
    """Return the sample in these files; raise InvalidInput if they do not have the format."""
    if "json" not in members:
        raise InvalidInput("file", f"{key}.json is missing")
    record = parse_record(members["json"])
    media: dict[str, Any] = {suffix.split(".")[0]: data for suffix, data in members.items() if suffix != "json"}
    if unknown := set(media) - {"source", "target"}:
        raise InvalidInput("file", f"{key}.{min(unknown)} is unknown; allowed: source and target")
    sample = TrainingSample(key=key, **record, **media)
    check_sample(sample)
    return sample


def parse_record(data: bytes) -> dict[str, Any]:
    """Return the fields of a sample's JSON; raise InvalidInput if they do not have the format."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidInput("json", "it is not JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("task"), str):
        raise InvalidInput("task", "it is missing from the record")
    fields = {name: record[name] for name in RECORD_FIELDS if name in record}
    turns = fields.pop("turns", [])
    if any(not isinstance(value, str) for value in fields.values()):
        raise InvalidInput("json", f"{', '.join(fields)} must be strings")
    if not isinstance(turns, list):
        raise InvalidInput("turns", "it must be a list of questions and answers")
    return fields | {"turns": tuple(parse_turn(turn) for turn in turns)}


def parse_turn(turn: object) -> tuple[str, str]:
    """Return a question and its answer."""
    if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(side, str) for side in turn)):
        raise InvalidInput("turns", "each turn must be a question and an answer")
    return turn[0], turn[1]


# ---------------------------------------------------------------- writing


class ShardWriter:
    """Writes one tar; members have no owner and no time, so the same samples give the same bytes."""

    def __init__(self, path: Path):
        self.path, self.entries = path, list[SampleRef]()
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add_sample(self, sample: TrainingSample, shape: MediaShape) -> None:
        """Append a sample's members to the tar."""
        spans = {}
        for suffix, data in to_members(sample).items():
            info = tarfile.TarInfo(f"{sample.key}.{suffix}")
            info.size = len(data)
            self.tar.addfile(info, io.BytesIO(data))
            end = -(-len(data) // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
            spans[suffix] = (self.tar.offset - end, len(data))
        self.entries.append(SampleRef(self.path.name, sample.key, sample.task, shape, spans))

    @property
    def is_full(self) -> bool:
        """Return whether the next sample belongs in another shard."""
        return len(self.entries) >= MAX_SHARD_SAMPLES or self.tar.offset >= MAX_SHARD_BYTES

    def close(self, file_store: FileStore) -> None:
        """Store the tar and then the index, so that a tar with an index is complete."""
        self.tar.close()
        index = self.path.with_suffix(".index.json")
        index.write_text(format_index(self.path.stat().st_size, self.entries))
        file_store.put_file(self.path)
        file_store.put_file(index)


def format_index(tar_bytes: int, entries: list[SampleRef]) -> str:
    """Return the index file of a shard."""
    rows = [{name: value for name, value in asdict(entry).items() if name != "shard"} for entry in entries]
    return json.dumps({"format": 1, "bytes": tar_bytes, "samples": rows})


def write_shards(samples: Iterable[TrainingSample], file_store: FileStore, skip_report: SkipReport) -> int:
    """Write the usable samples in order, with their numbers as keys; return their number."""
    written_count, shard, shard_number = 0, None, 0
    with tempfile.TemporaryDirectory() as folder:
        for sample in samples:
            with skip_report.skip_on_error(f"{sample.origin} {sample.key}".strip()):
                check_sample(sample)
                shape = measure_sample(sample)
                shard = shard or ShardWriter(Path(folder) / f"{shard_number:05}.tar")
                shard.add_sample(replace(sample, key=f"{written_count:09}"), shape)
                written_count += 1
            if shard and shard.is_full:
                shard.close(file_store)
                shard, shard_number = None, shard_number + 1
        if shard:
            shard.close(file_store)
    return written_count


# ---------------------------------------------------------------- reading


class TailRecordingReader:
    """A stream that keeps the last bytes read from it."""

    def __init__(self, file: IO[bytes]):
        self.file, self.recent_bytes, self.total_bytes = file, b"", 0

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        data = self.file.read(size)
        self.recent_bytes = (self.recent_bytes + data)[-4 * tarfile.RECORDSIZE :]
        self.total_bytes += len(data)
        return data

    def get_block(self, offset: int) -> bytes:
        """Return the tar block at an offset among the last bytes."""
        start = offset - self.total_bytes + len(self.recent_bytes)
        return self.recent_bytes[max(0, start) : start + TAR_BLOCK_BYTES]


def read_members(file: IO[bytes], shard: str, skip_report: SkipReport) -> Iterator[tuple[str, ByteSpan, bytes]]:
    """Yield the name, span and bytes of every file of a tar, up to the point where it is damaged."""
    tee = TailRecordingReader(file)
    try:
        with tarfile.open(fileobj=tee, mode="r|") as tar:  # type: ignore[call-overload]
            for info in tar:
                if info.isfile():
                    yield info.name, (info.offset_data, info.size), tar.extractfile(info).read()
            # tarfile takes any unreadable header for the end of the tar, which is a block of zeros.
            if tee.get_block(tar.offset) != bytes(TAR_BLOCK_BYTES):
                raise tarfile.ReadError("it has no end mark")
    except tarfile.TarError as error:
        skip_report.add_skip("broken shard", shard, f"{error}; the data after byte {tee.total_bytes} is lost")


def read_sample_groups(
    file: IO[bytes], shard: str, skip_report: SkipReport
) -> Iterator[tuple[str, dict[str, ByteSpan], dict[str, bytes]]]:
    """Yield the key, spans and bytes of each sample; the key is a path up to the first dot of its last part."""
    key, spans, contents = "", dict[str, ByteSpan](), dict[str, bytes]()
    for name, span, data in read_members(file, shard, skip_report):
        folder, slash, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if folder + slash + stem != key:
            if contents:
                yield key, spans, contents
            key, spans, contents = folder + slash + stem, {}, {}
        spans[suffix], contents[suffix] = span, data
    if contents:
        yield key, spans, contents


def stream_samples(
    file_store: FileStore, skip_report: SkipReport, shards: Iterable[str] | None = None
) -> Iterator[TrainingSample]:
    """Yield all samples of the shards in order, without an index and without seeking."""
    for shard in file_store.list_names(".tar") if shards is None else shards:
        with file_store.open(shard) as file:
            for key, _, contents in read_sample_groups(file, shard, skip_report):
                with skip_report.skip_on_error(f"{shard}/{key}"):
                    yield sample_from_members(key, contents)


class ShardDataset:
    """The samples of all shards in a store, by index; only their SampleRefs are in memory."""

    def __init__(self, file_store: FileStore, skip_report: SkipReport):
        self.file_store, self.skip_report = file_store, skip_report
        self.entries = [
            entry for shard in file_store.list_names(".tar") for entry in load_entries(file_store, shard, skip_report)
        ]
        if not self.entries:
            raise InvalidInput("shards", "no sample in them can be used; allowed: shards with one or more")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> TrainingSample:
        """Read a sample; raise InvalidInput or UnreadableMedia if the shard has changed since it was indexed."""
        entry = self.entries[index]
        first = min(offset for offset, _ in entry.members.values())
        last = max(offset + length for offset, length in entry.members.values())
        data = self.file_store.read_range(entry.shard, first, last - first)  # adjacent members take one request
        contents = {name: data[offset - first :][:length] for name, (offset, length) in entry.members.items()}
        return sample_from_members(entry.key, contents)


def load_entries(file_store: FileStore, shard: str, skip_report: SkipReport) -> list[SampleRef]:
    """Return a shard's samples from its index, or from the shard itself if the index does not match."""
    try:
        index = json.loads(file_store.read_range(shard.removesuffix(".tar") + ".index.json"))
        if index["format"] == 1 and index["bytes"] == file_store.get_size(shard):
            return [parse_entry(shard, row) for row in index["samples"]]
    except (ArtifactNotFound, ValueError, KeyError, TypeError):
        pass  # there is no index, or one in another format
    return scan_shard(file_store, shard, skip_report)


def parse_entry(shard: str, row: dict[str, Any]) -> SampleRef:
    """Return the sample of a row of an index."""
    spans = {name: (offset, length) for name, (offset, length) in row["members"].items()}
    return SampleRef(shard, row["key"], row["task"], MediaShape(**row["shape"]), spans)


def scan_shard(file_store: FileStore, shard: str, skip_report: SkipReport) -> list[SampleRef]:
    """Read the whole shard and measure every sample."""
    entries = []
    with file_store.open(shard) as file:
        for key, spans, contents in read_sample_groups(file, shard, skip_report):
            with skip_report.skip_on_error(f"{shard}/{key}"):
                sample = sample_from_members(key, contents)
                entries.append(SampleRef(shard, key, sample.task, measure_sample(sample), spans))
    return entries
