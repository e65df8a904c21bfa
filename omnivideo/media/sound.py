"""Keep the sound of what a clip is made of by copying packets. Nothing is decoded: hostile sound reaches no decoder."""

import io
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
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
from omnivideo.media.silence import encode_silence

SOUND_CODECS = ("aac", "mp3", "opus", "flac")  # what browsers play in an mp4
KEPT = "kept"
PREROLL_SECONDS = 0.1  # s before the beginning; decoders of sound need some to start with
MAX_GAP_SECONDS = 0.015  # s by which a sound is moved at most where silence could be inserted
NO_DECODERS = MediaLimits(codecs=("none",))


@dataclass(frozen=True)
class SoundSource:
    """A clip that is edited or that is part of another, and how long it is shown, in s.

    An edit has the length of its source, or its sound is left out. What `is_beginning` of a longer clip has its sound
    there, and the rest is silent.
    """

    file: MediaFile
    seconds: float
    is_beginning: bool = False


def keep_sound(clip: bytes, source: SoundSource, seconds: float, fps: float) -> tuple[bytes, str | None]:
    """Return the mp4 with its source's sound, and "kept", or why the sound was left out; None without any sound.

    `seconds` and `fps` are the clip's. Its length counts as the source's if they differ by one frame at most.
    """
    if not source.is_beginning and abs(source.seconds - seconds) > 1 / fps + 1e-6:
        note = f"left out: the source lasts {source.seconds:.2f} s and the clip {seconds:.2f} s"
        return clip, note if has_sound(source.file) else None
    return join_sounds(clip, [source if source.is_beginning else replace(source, seconds=seconds)])


def join_sounds(clip: bytes, sources: Sequence[SoundSource]) -> tuple[bytes, str | None]:
    """Return what `keep_sound` does, for an mp4 that shows sources one after the other; those without sound are silent.

    Sounds that are not coded alike are left out, since they would have to be decoded.
    """
    try:
        with ExitStack() as opened:
            track: SoundTrack | None = None
            start = 0.0
            for source in sources:
                demuxer = sniff_demuxer(source.file)
                if demuxer in CLIP_DEMUXERS:
                    container = opened.enter_context(open_container(source.file, demuxer, NO_DECODERS))
                    if container.streams.audio:
                        track = track or SoundTrack(container.streams.audio[0])
                        if problem := track.find_problem(container.streams.audio[0]):
                            return clip, f"left out: {problem}"
                        track.append_packets(container, start, source.seconds)
                start += source.seconds
            return (clip, None) if track is None else (mux_sound(clip, track), KEPT)
    except (av.FFmpegError, OSError, ValueError, ArithmeticError):  # also of times that are out of range
        return clip, "left out: it cannot be copied into an mp4"


def has_sound(file: MediaFile) -> bool:
    """Return whether a file has a sound, or may have one, since it cannot be read."""
    try:
        demuxer = sniff_demuxer(file)
        if demuxer not in CLIP_DEMUXERS:
            return False
        with open_container(file, demuxer, NO_DECODERS) as container:
            return bool(container.streams.audio)
    except (av.FFmpegError, OSError, ValueError, ArithmeticError):  # also of times that are out of range
        return True


def sniff_demuxer(file: MediaFile) -> str | None:
    """Return FFmpeg's name of the file's format, or Pillow's."""
    if isinstance(file, bytes):
        return sniff_format(file[:16])
    with file.open("rb") as opened:
        return sniff_format(opened.read(16))


class SoundTrack:
    """The packets of one or several streams of sound, one after the other. The streams must stay open."""

    def __init__(self, template: AudioStream):
        self.template = template
        self.packets: list[Packet[Any]] = []

    def find_problem(self, stream: AudioStream) -> str:
        """Return why a stream cannot be copied into this track; "" if it can."""
        codec, first_codec = describe_codec(stream), describe_codec(self.template)
        if codec[0] not in SOUND_CODECS:
            return f"it is coded as {codec[0]}; an mp4 takes {', '.join(SOUND_CODECS)}"
        return "" if codec == first_codec else "the sounds of the clips are not coded alike"

    def append_packets(self, container: InputContainer, start: float, seconds: float) -> None:
        """Append the packets of a container's sound from 0 to `seconds` of its video, for `start` s of the clip.

        The track has no gaps and no overlaps, so players that count samples and those that read times agree. What
        follows other packets is therefore up to half a packet early or late.
        """
        video_start = min(map(read_start, container.streams.video), default=0.0)
        packets = [*list_packets(container, container.streams.audio[0], video_start, seconds)]
        set_missing_durations(packets)
        move_packets(packets, start)
        if self.packets:
            packets = [packet for packet in packets if read_packet_middle(packet) > start]
        if not packets:
            return
        first = read_packet_time(packets[0])
        if len(self.packets) > 1 and self.template.codec_context.codec.canonical_name != "flac":
            # The last packet of a file may be shown in part, but decoders return all of it.
            self.packets[-1].duration = max(self.packets[-1].duration or 0, self.packets[-2].duration or 0)
        while self.packets and read_packet_middle(self.packets[-1]) > first:
            self.packets.pop()
        if self.packets:
            self.fill_gap(first)
            move_packets(packets, read_packet_end(self.packets[-1]) - first)
        self.packets += packets

    def fill_gap(self, time: float) -> None:
        """Append silence up to a time, as exactly as its packets allow."""
        last = self.packets[-1]
        end = read_packet_end(last)
        if time - end > min(end - read_packet_middle(last), MAX_GAP_SECONDS):
            silence = encode_silence(self.template.codec_context, time - end)
            move_packets(silence, end)
            self.packets += silence


def describe_codec(stream: AudioStream) -> tuple[object, ...]:
    """Return what two streams of sound must share to be parts of one: the codec, the rate, the channels."""
    context = stream.codec_context
    if context is None:
        return ("an unknown format",)
    codec = context.codec.canonical_name
    # The headers of other codecs differ in what a decoder of the packets need not know, such as a digest of the file.
    return codec, context.sample_rate, context.channels, context.extradata if codec == "aac" else None


def mux_sound(clip: bytes, track: SoundTrack) -> bytes:
    """Return the clip with the track's packets."""
    with tempfile.TemporaryDirectory() as folder:  # FFmpeg reads a file again to move its index to the front
        path = Path(folder) / "clip.mp4"
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with (
            av.open(io.BytesIO(clip), "r") as silent,
            av.open(f"file:{path}", "w", format="mp4", options=options) as target,
        ):
            shown = silent.streams.video[0]
            video, audio = (target.add_stream_from_template(stream) for stream in (shown, track.template))
            packets = [*list_packets(silent, shown, 0.0, math.inf)]
            for packet in packets:
                packet.stream = video
            for packet in track.packets:
                packet.stream = audio
            target.mux(sorted([*packets, *track.packets], key=read_packet_time))
        return path.read_bytes()


def read_packet_time(packet: "Packet[Any]") -> float:
    """Return the time at which a packet is decoded, in s."""
    return float((packet.dts or 0) * (packet.time_base or 0))


def read_packet_middle(packet: "Packet[Any]") -> float:
    """Return the time of a packet's middle, in s."""
    return float(((packet.pts or 0) + (packet.duration or 0) / 2) * (packet.time_base or 0))


def read_packet_end(packet: "Packet[Any]") -> float:
    """Return the time at which the packet after this one begins, in s."""
    return float(((packet.pts or 0) + (packet.duration or 0)) * (packet.time_base or 0))


def set_missing_durations(packets: "Sequence[Packet[Any]]") -> None:
    """Set the durations that a container does not state, such as Matroska for AAC, from the times of the packets."""
    for packet, following in pairwise(packets):
        packet.duration = packet.duration or max(0, (following.pts or 0) - (packet.pts or 0))
    if len(packets) > 1:
        packets[-1].duration = packets[-1].duration or packets[-2].duration


def move_packets(packets: "Sequence[Packet[Any]]", seconds: float) -> None:
    """Add a time to those of the packets."""
    for packet in packets:
        assert packet.pts is not None and packet.dts is not None and packet.time_base is not None
        shift = round(seconds / packet.time_base)
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift


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
        move_packets([packet], -origin)
        start = float(packet.pts * packet.time_base)
        if -PREROLL_SECONDS <= start < seconds:
            yield packet
