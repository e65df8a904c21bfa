"""Read media with FFmpeg's own filters, as the `ffmpeg` command shows them: an independent reference for `read_media`.

No code of omnivideo is used. Frames go through a filter graph that turns and mirrors them by their display matrix, as
ffmpeg's -autorotate does, and composites alpha on white.
"""

from pathlib import Path

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type

LEFT_SITED = ("h264", "hevc")  # their standards' default
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def read_reference(path: Path) -> np.ndarray:
    """Return every frame of a clip, uint8 [F, H, W, 3]."""
    shown = []
    with av.open(str(path)) as container:
        stream = max(container.streams.video, key=lambda candidate: candidate.frames)  # an avif holds a still as well
        decoder = stream.codec_context
        if stream.metadata.get("alpha_mode") == "1":
            decoder = av.CodecContext.create(ALPHA_DECODERS[decoder.name], "r")
        for packet in container.demux(stream):
            shown += [show_frame(frame, stream.codec_context.name in LEFT_SITED) for frame in decoder.decode(packet)]
    return np.stack(shown)


def show_frame(frame: av.VideoFrame, left_sited: bool = False) -> np.ndarray:
    """Return one frame as FFmpeg's filters show it, rounded and not cut off, on white.

    `left_sited` says where the samples of 4:2:0 chroma lie; PyAV does not pass on what the decoder says.
    """
    graph = Graph()
    last = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    location = ":in_chroma_loc=left" if left_sited and "420" in frame.format.name else ""
    scale = ("scale", "flags=bicubic+accurate_rnd+full_chroma_int" + location)
    has_alpha = any(component.is_alpha for component in frame.format.components)
    for name, arguments in [scale, ("format", "rgba" if has_alpha else "rgb24"), *list_turns(frame)]:
        link = graph.add(name, arguments or None)
        last.link_to(link)
        last = link
    last.link_to(graph.add("buffersink"))
    graph.configure()
    graph.push(frame)
    pixels = graph.pull().to_ndarray()
    if not has_alpha:
        return pixels
    alpha = pixels[..., 3:] / 255
    return np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def list_turns(frame: av.VideoFrame) -> list[tuple[str, str]]:
    """Return the filters of ffmpeg's autorotate (ffmpeg_filter.c): the angle of the matrix decides, then its signs."""
    try:
        side_data = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # the EXIF of a still, which PyAV does not know
        return []
    if side_data is None:
        return []
    matrix = np.frombuffer(bytes(side_data), np.int32)
    theta = round(-frame.rotation % 360)
    if theta == 90:
        return [("transpose", "cclock_flip" if matrix[3] > 0 else "clock")]
    if theta == 180:
        return [("hflip", "")] * bool(matrix[0] < 0) + [("vflip", "")] * bool(matrix[4] < 0)
    if theta == 270:
        return [("transpose", "clock_flip" if matrix[3] < 0 else "cclock")]
    return [("vflip", "")] if matrix[4] < 0 else []
