"""WebDataset shards: tar files in which the members of one sample stand together, under one key.

    00000.tar          KEY.json, KEY.source.png, KEY.target.mp4 ...   (docs/data.md has the fields)
    00000.index.json   for each sample its key, task, shape, and where in the tar its members are

Read from the start to the end as a stream, or, by the index, one sample at a time from anywhere: what mixed batches
need.  The index is made again where it is missing or the tar has another size.  Tars are read by the standard library:
the `webdataset` package goes forward only, and takes a tar that is cut between two members, or has a damaged header,
for whole.  What is written here, it reads (tests/training/data/test_webdataset.py).
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
    """A sample by its place: `members` maps "json", "source.png" ... to their spans in the shard."""

    shard: str
    key: str
    task: TrainingTask
    shape: MediaShape
    members: dict[str, ByteSpan]


# ---------------------------------------------------------------- one sample as members of a tar, and back


def to_members(sample: TrainingSample) -> dict[str, bytes]:
    record = {name: value for name in RECORD_FIELDS if (value := getattr(sample, name))}
    members = {"json": json.dumps(record, ensure_ascii=False).encode()}
    for name in ("source", "target"):
        if data := getattr(sample, name):
            members[f"{name}.{detect_member_suffix(data)}"] = data
    return members


def sample_from_members(key: str, members: dict[str, bytes]) -> TrainingSample:
    """Raises InvalidInput for a record that is not of the format."""
    if "json" not in members:
        raise InvalidInput("file", f"{key}.json is missing")
    record = parse_record(members["json"])
    media: dict[str, Any] = {suffix.split(".")[0]: data for suffix, data in members.items() if suffix != "json"}
    if unknown := set(media) - {"source", "target"}:
        raise InvalidInput("file", f"{key}.{min(unknown)} is not source or target")
    sample = TrainingSample(key=key, **record, **media)
    check_sample(sample)
    return sample


def parse_record(data: bytes) -> dict[str, Any]:
    """The fields of a sample's JSON."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidInput("json", "it is not JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("task"), str):
        raise InvalidInput("task", "missing from the record")
    fields = {name: record[name] for name in RECORD_FIELDS if name in record}
    turns = fields.pop("turns", [])
    if any(not isinstance(value, str) for value in fields.values()):
        raise InvalidInput("json", f"{', '.join(fields)} are to be text")
    if not isinstance(turns, list):
        raise InvalidInput("turns", "a list of questions and answers is wanted")
    return fields | {"turns": tuple(parse_turn(turn) for turn in turns)}


def parse_turn(turn: object) -> tuple[str, str]:
    if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(side, str) for side in turn)):
        raise InvalidInput("turns", "a turn is to be a question and an answer")
    return turn[0], turn[1]


# ---------------------------------------------------------------- writing


class ShardWriter:
    """One tar being written; members have no owner and no time, so the same samples give the same bytes."""

    def __init__(self, path: Path):
        self.path, self.entries = path, list[SampleRef]()
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add_sample(self, sample: TrainingSample, shape: MediaShape) -> None:
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
        return len(self.entries) >= MAX_SHARD_SAMPLES or self.tar.offset >= MAX_SHARD_BYTES

    def close(self, file_store: FileStore) -> None:
        """Puts tar and index on the shelf; the index last, so that what has one is whole."""
        self.tar.close()
        index = self.path.with_suffix(".index.json")
        index.write_text(format_index(self.path.stat().st_size, self.entries))
        file_store.put_file(self.path)
        file_store.put_file(index)


def format_index(tar_bytes: int, entries: list[SampleRef]) -> str:
    rows = [{name: value for name, value in asdict(entry).items() if name != "shard"} for entry in entries]
    return json.dumps({"format": 1, "bytes": tar_bytes, "samples": rows})


def write_shards(samples: Iterable[TrainingSample], file_store: FileStore, skip_report: SkipReport) -> int:
    """Writes all samples that can be used, in their order, keyed by their number; returns how many."""
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
    """A stream that remembers the last bytes that were read from it."""

    def __init__(self, file: IO[bytes]):
        self.file, self.recent_bytes, self.total_bytes = file, b"", 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.recent_bytes = (self.recent_bytes + data)[-4 * tarfile.RECORDSIZE :]
        self.total_bytes += len(data)
        return data

    def get_block(self, offset: int) -> bytes:
        """The block at an offset of the stream."""
        start = offset - self.total_bytes + len(self.recent_bytes)
        return self.recent_bytes[max(0, start) : start + TAR_BLOCK_BYTES]


def read_members(file: IO[bytes], shard: str, skip_report: SkipReport) -> Iterator[tuple[str, ByteSpan, bytes]]:
    """Name, span and bytes of every file of a tar; where it is broken, what comes before the break."""
    tee = TailRecordingReader(file)
    try:
        with tarfile.open(fileobj=tee, mode="r|") as tar:  # type: ignore[call-overload]
            for info in tar:
                if info.isfile():
                    yield info.name, (info.offset_data, info.size), tar.extractfile(info).read()
            # tarfile takes any header that it cannot read for the end; the end is a block of zeros.
            if tee.get_block(tar.offset) != bytes(TAR_BLOCK_BYTES):
                raise tarfile.ReadError("it ends without its end mark")
    except tarfile.TarError as error:
        skip_report.add_skip("broken shard", shard, f"{error}; what comes after byte {tee.total_bytes} is lost")


def read_sample_groups(
    file: IO[bytes], shard: str, skip_report: SkipReport
) -> Iterator[tuple[str, dict[str, ByteSpan], dict[str, bytes]]]:
    """Key, spans and bytes of the members of each sample: names up to the first dot of their last part."""
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
    """All samples of the shards, one after another, without an index and without going back."""
    for shard in file_store.list_names(".tar") if shards is None else shards:
        with file_store.open(shard) as file:
            for key, _, contents in read_sample_groups(file, shard, skip_report):
                with skip_report.skip_on_error(f"{shard}/{key}"):
                    yield sample_from_members(key, contents)


class ShardDataset:
    """The samples of a shelf's shards, by number; only their indices are in memory."""

    def __init__(self, file_store: FileStore, skip_report: SkipReport):
        self.file_store, self.skip_report = file_store, skip_report
        self.entries = [
            entry for shard in file_store.list_names(".tar") for entry in load_entries(file_store, shard, skip_report)
        ]
        if not self.entries:
            raise InvalidInput("shards", "there is no sample that can be used")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> TrainingSample:
        """Raises InvalidInput, or UnreadableMedia, where the shard has changed under its index."""
        entry = self.entries[index]
        first = min(offset for offset, _ in entry.members.values())
        last = max(offset + length for offset, length in entry.members.values())
        data = self.file_store.read_range(entry.shard, first, last - first)  # they stand together: one request
        contents = {name: data[offset - first :][:length] for name, (offset, length) in entry.members.items()}
        return sample_from_members(entry.key, contents)


def load_entries(file_store: FileStore, shard: str, skip_report: SkipReport) -> list[SampleRef]:
    """A shard's samples from its index, or from the shard where the index does not fit."""
    try:
        index = json.loads(file_store.read_range(shard.removesuffix(".tar") + ".index.json"))
        if index["format"] == 1 and index["bytes"] == file_store.get_size(shard):
            return [parse_entry(shard, row) for row in index["samples"]]
    except (ArtifactNotFound, ValueError, KeyError, TypeError):
        pass  # none, or none of ours
    return scan_shard(file_store, shard, skip_report)


def parse_entry(shard: str, row: dict[str, Any]) -> SampleRef:
    spans = {name: (offset, length) for name, (offset, length) in row["members"].items()}
    return SampleRef(shard, row["key"], row["task"], MediaShape(**row["shape"]), spans)


def scan_shard(file_store: FileStore, shard: str, skip_report: SkipReport) -> list[SampleRef]:
    """Reads the whole shard and looks at every sample."""
    entries = []
    with file_store.open(shard) as file:
        for key, spans, contents in read_sample_groups(file, shard, skip_report):
            with skip_report.skip_on_error(f"{shard}/{key}"):
                sample = sample_from_members(key, contents)
                entries.append(SampleRef(shard, key, sample.task, measure_sample(sample), spans))
    return entries
