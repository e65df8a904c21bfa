"""Keep the sound of an edit's source by copying its packets. Nothing is decoded: hostile sound reaches no decoder."""

import io
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from omnivideo.media.containers import sniff_format
from omnivideo.media.decode import CLIP_DEMUXERS, MediaFile, open_container
from omnivideo.media.limits import MediaLimits

SOUND_CODECS = ("aac", "mp3", "opus", "flac")  # what browsers play in an mp4
KEPT = "kept"
PREROLL_SECONDS = 0.1  # s before the beginning; decoders of sound need some to start with
NO_DECODERS = MediaLimits(codecs=("none",))


@dataclass(frozen=True)
class SoundSource:
    """The source of an edit, and how long it is shown, in s."""

    file: MediaFile
    seconds: float


def keep_sound(clip: bytes, source: SoundSource, seconds: float, fps: float) -> tuple[bytes, str | None]:
    """Return the edited mp4 with its source's sound, and "kept", or why the sound was left out; None without any sound.

    `seconds` and `fps` are the clip's. Its length counts as the source's if they differ by one frame at most.
    """
    try:
        demuxer = sniff_demuxer(source.file)
        if demuxer not in CLIP_DEMUXERS:
            return clip, None
        with open_container(source.file, demuxer, NO_DECODERS) as container:
            return copy_sound(clip, container, source.seconds, seconds, fps)
    except (av.FFmpegError, OSError, ValueError):
        return clip, "left out: it cannot be copied into an mp4"


def sniff_demuxer(file: MediaFile) -> str | None:
    """Return FFmpeg's name of the file's format, or Pillow's."""
    if isinstance(file, bytes):
        return sniff_format(file[:16])
    with file.open("rb") as opened:
        return sniff_format(opened.read(16))


def copy_sound(
    clip: bytes, source: InputContainer, source_seconds: float, seconds: float, fps: float
) -> tuple[bytes, str | None]:
    """Return what `keep_sound` does, for an open source. Raises av.FFmpegError."""
    if not source.streams.audio:
        return clip, None
    stream = source.streams.audio[0]
    codec = stream.codec_context.codec.canonical_name if stream.codec_context else "an unknown format"
    if abs(source_seconds - seconds) > 1 / fps + 1e-6:
        return clip, f"left out: the source lasts {source_seconds:.2f} s and the clip {seconds:.2f} s"
    if codec not in SOUND_CODECS:
        return clip, f"left out: it is coded as {codec}; an mp4 takes {', '.join(SOUND_CODECS)}"
    return mux_sound(clip, source, stream, seconds), KEPT


def mux_sound(clip: bytes, source: InputContainer, sound: AudioStream, seconds: float) -> bytes:
    """Return the clip with the sound's packets from 0 to `seconds` of the source's video."""
    with tempfile.TemporaryDirectory() as folder:  # FFmpeg reads a file again to move its index to the front
        path = Path(folder) / "clip.mp4"
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with (
            av.open(io.BytesIO(clip), "r") as edited,
            av.open(f"file:{path}", "w", format="mp4", options=options) as target,
        ):
            video, audio = (target.add_stream_from_template(stream) for stream in (edited.streams.video[0], sound))
            packets = [*list_packets(edited, edited.streams.video[0], 0.0, math.inf)]
            for packet in packets:
                packet.stream = video
            video_start = min(map(read_start, source.streams.video), default=0.0)
            for packet in list_packets(source, sound, video_start, seconds):
                packet.stream = audio
                packets.append(packet)
            target.mux(sorted(packets, key=read_packet_time))
        return path.read_bytes()


def read_packet_time(packet: "Packet[Any]") -> float:
    """Return the time at which a packet is decoded, in s."""
    return float((packet.dts or 0) * (packet.time_base or 0))


def read_start(stream: VideoStream) -> float:
    """Return the time of a stream's first frame, in s."""
    return float((stream.start_time or 0) * (stream.time_base or 0))


def list_packets(
    container: InputContainer, stream: VideoStream | AudioStream, origin: float, seconds: float
) -> "Iterator[Packet[Any]]":
    """Yield the packets from `origin` to `seconds` later, and those just before them, with times since `origin`."""
    for packet in container.demux(stream):
        if packet.size == 0 or packet.pts is None or packet.dts is None or packet.time_base is None:
            continue
        shift = round(origin / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        start = float(packet.pts * packet.time_base)
        if -PREROLL_SECONDS <= start < seconds:
            yield packet
