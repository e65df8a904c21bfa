"""Encode silence, to fill the gaps of a track of sound: many players ignore gaps and play what follows too early."""

from fractions import Fraction
from itertools import accumulate
from typing import Any

import av
from av.audio.codeccontext import AudioCodecContext
from av.packet import Packet

ENCODERS = {"aac": ("aac", "fltp"), "mp3": ("libmp3lame", "fltp"), "opus": ("libopus", "flt"), "flac": ("flac", "s16")}
LAYOUTS = {1: "mono", 2: "stereo"}
AAC_LC = 2  # the type of AAC objects in which silence can be encoded here
MAX_SECONDS = 600  # a file with a very low rate may ask for hours


def encode_silence(context: AudioCodecContext, seconds: float) -> "list[Packet[Any]]":
    """Return packets of silence for a stream, with times from 0, of about `seconds`: to half a packet.

    Raises ValueError for streams among whose packets those of the encoders here cannot be.
    """
    codec, extradata = context.codec.canonical_name, context.extradata or b"\0"
    is_known = codec != "aac" or extradata[0] >> 3 == AAC_LC
    if not is_known or context.channels not in LAYOUTS or context.sample_rate < 1 or seconds > MAX_SECONDS:
        raise ValueError(f"silence cannot be encoded for this stream of {codec}")
    encoder = av.CodecContext.create(ENCODERS[codec][0], "w")
    assert isinstance(encoder, AudioCodecContext)
    encoder.sample_rate, encoder.layout = context.sample_rate, LAYOUTS[context.channels]
    encoder.format, encoder.time_base = ENCODERS[codec][1], Fraction(1, context.sample_rate)
    encoder.open()
    size, wanted = encoder.frame_size, round(seconds * context.sample_rate)
    if codec == "flac":  # its last packet can be shorter
        sizes = [size] * (wanted // size) + ([wanted % size] if wanted % size else [])
        encoded = encode_zeros(encoder, sizes)
    else:  # the first packets of a stream differ, those after them are all the same
        sizes = [size] * round(wanted / size)
        encoded = encode_zeros(encoder, [size] * 4)[2:3] * len(sizes)
    packets: list[Packet[Any]] = []
    for data, duration, position in zip(encoded, sizes, accumulate(sizes, initial=0), strict=False):
        packet = Packet(data)
        packet.pts = packet.dts = position
        packet.duration, packet.time_base, packet.is_keyframe = duration, encoder.time_base, True
        packets.append(packet)
    return packets


def encode_zeros(encoder: AudioCodecContext, sizes: list[int]) -> list[bytes]:
    """Return the packets of frames of these numbers of samples."""
    encoded = list[bytes]()
    for size, position in zip(sizes, accumulate(sizes, initial=0), strict=False):
        frame = av.AudioFrame(format=encoder.format.name, layout=encoder.layout.name, samples=size)
        frame.sample_rate, frame.pts = encoder.sample_rate, position
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        encoded += [bytes(packet) for packet in encoder.encode(frame)]
    encoded += [bytes(packet) for packet in encoder.encode(None)]
    return [data for data in encoded if data]
