"""Convert the artifacts of a store to pixels and back, and make artifacts of others."""

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from omnivideo.contracts import Artifact, FramePosition, Medium
from omnivideo.errors import InvalidInput
from omnivideo.manifests import FrameManifest, JoinManifest, encode_manifest
from omnivideo.media.read import measure_media, read_chosen_frames, read_media
from omnivideo.media.resample import center_crop_resize, select_nearest_frames
from omnivideo.media.sound import SoundSource, join_sounds
from omnivideo.media.thumbnails import encode_animation
from omnivideo.media.write import write_media
from omnivideo.ports import ObjectStore
from omnivideo.presets.shapes import MAX_CLIP_PIXELS, Delivery

SUFFIX_BY_MEDIUM: dict[Medium, str] = {"image": "png", "video": "mp4"}


def load_frames(store: ObjectStore, artifact: Artifact) -> np.ndarray:
    """Return all frames of an artifact, uint8 [F, H, W, 3]; for clips generated here, which are small."""
    return read_media(store.get(artifact.key)).frames


def encode_clip(frames: np.ndarray, fps: float) -> tuple[bytes, str]:
    """Return the bytes and the suffix of a file: an mp4 for a clip, or a png for a single frame."""
    suffix = SUFFIX_BY_MEDIUM["video" if len(frames) > 1 else "image"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{suffix}"
        write_media(path, frames, fps)
        return path.read_bytes(), suffix


def convert_artifact(store: ObjectStore, artifact: Artifact, suffix: str) -> Artifact:
    """Return the artifact as a stored file of another format: mp4, gif or png; for clips generated here."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{suffix}"
        write_media(path, load_frames(store, artifact), artifact.fps)
        return artifact.model_copy(update={"key": store.put(path.read_bytes(), suffix), "latents": None})


def to_png_bytes(frame: np.ndarray) -> bytes:
    """Return a frame [H, W, 3] as a png file."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def extract_frame(store: ObjectStore, clip: Artifact, position: FramePosition, created_by: str) -> Artifact:
    """Store a frame of a clip as an image and return it."""

    def choose(count: int, fps: float | None) -> list[int]:
        return [{"first": 0, "middle": count // 2, "last": count - 1}[position]]

    (frame,), _ = read_chosen_frames(store.get(clip.key), choose, lambda frame: frame)
    height, width, _ = frame.shape
    caption, shape = f"the {position} frame of {clip.caption}", Delivery(width=width, height=height, frames=1)
    manifest = FrameManifest(prompt=caption, parts=(clip,), position=position, delivered=shape)
    return Artifact(
        key=store.put(to_png_bytes(frame), SUFFIX_BY_MEDIUM["image"]), medium="image", width=width, height=height,
        frames=1, fps=1.0, caption=caption, manifest=store.put(encode_manifest(manifest), "json"), source=clip.key,
        created_by=created_by,
    )  # fmt: skip


def ignore_progress(number: int) -> None:
    """Do nothing; the default for `on_clip`."""


def join_clips(
    store: ObjectStore, clips: Sequence[Artifact], created_by: str, on_clip: Callable[[int], None] = ignore_progress
) -> Artifact:
    """Store a clip that shows several one after the other, and return it.

    It has the size and the rate of the first; frames of another size are scaled to cover it and cropped centrally. The
    sounds of the clips are kept where they can be copied. `on_clip` receives the number of clips that have been read;
    if it raises, nothing is stored.
    """
    first = clips[0]
    size, fps = (first.width - first.width % 2, first.height - first.height % 2), first.fps
    counts = [max(1, round(clip.frames * fps / clip.fps)) for clip in clips]
    if size[0] * size[1] * sum(counts) > MAX_CLIP_PIXELS:
        raise InvalidInput("clips", f"together they would have {sum(counts)} frames, which is too long")
    frames, sounds = list[np.ndarray](), list[SoundSource]()
    for number, (clip, count) in enumerate(zip(clips, counts, strict=True), 1):
        data = store.get(clip.key)

        def choose(total: int, own_fps: float | None, count: int = count, clip_fps: float = clip.fps) -> Sequence[int]:
            return [int(index) for index in select_nearest_frames(total, own_fps and clip_fps, count, fps)]

        frames += read_chosen_frames(data, choose, lambda frame: center_crop_resize(frame, *size))[0]
        sounds.append(SoundSource(data, count / fps))
        on_clip(number)
    joined, caption = np.stack(frames), " ; ".join(clip.caption for clip in clips)
    silent, suffix = encode_clip(joined, fps)
    file, sound = join_sounds(silent, sounds)
    shape = Delivery(width=size[0], height=size[1], frames=len(joined))
    manifest = JoinManifest(prompt=caption, parts=tuple(clips), fps=fps, delivered=shape, sound=sound)
    return Artifact(
        key=store.put(file, suffix), medium="video", width=size[0], height=size[1], frames=len(joined), fps=fps,
        caption=caption, manifest=store.put(encode_manifest(manifest), "json"), source=first.key, created_by=created_by,
        preview=store.put(encode_animation(joined, fps), "webp"),
    )  # fmt: skip


class StoreMediaTools:
    """The tools of `ports.MediaTools` over an object store."""

    def __init__(self, store: ObjectStore):
        self.store = store

    def extract_frame(self, clip: Artifact, position: FramePosition, created_by: str) -> Artifact:
        return extract_frame(self.store, clip, position, created_by)

    def join_clips(
        self, clips: Sequence[Artifact], created_by: str, on_clip: Callable[[int], None] = ignore_progress
    ) -> Artifact:
        return join_clips(self.store, clips, created_by, on_clip)

    def convert_artifact(self, artifact: Artifact, suffix: str) -> Artifact:
        return convert_artifact(self.store, artifact, suffix)


def convert_picture(data: bytes, picture_format: str, quality: int) -> bytes:
    """Return a png as a jpeg or a webp of a quality from 0 to 100; a webp of 100 has the same pixels."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        picture.convert("RGB").save(buffer, picture_format.upper(), quality=quality, lossless=quality == 100)
    return buffer.getvalue()


def store_user_file(store: ObjectStore, path: str | Path, made_by: str) -> Artifact:
    """Store a user's file unchanged as an artifact; raise UnreadableMedia if it is not an image or video."""
    info = measure_media(path)
    suffix = Path(path).suffix.lower().lstrip(".")
    key = store.put(Path(path).read_bytes(), suffix if suffix.isalnum() and len(suffix) <= 16 else "bin")
    return Artifact(
        key=key, medium=info.kind, width=info.width, height=info.height, frames=info.frames, fps=info.fps or 1.0,
        caption=Path(path).stem.replace("_", " ").replace("-", " "), created_by=made_by,
    )  # fmt: skip
