"""A clip or an image with its manifest, from this process or from a service."""

import base64
import os
from functools import cached_property
from pathlib import Path

import numpy as np

from omnivideo.errors import InvalidInput
from omnivideo.manifests import AnyManifest, FrameManifest, JoinManifest, Manifest, encode_manifest
from omnivideo.media.artifacts import SUFFIX_BY_MEDIUM, encode_clip
from omnivideo.media.read import read_media
from omnivideo.media.sound import KEPT, SoundSource, keep_sound
from omnivideo.media.write import check_output, write_media

MAX_SHOWN_CHARS = 60
DERIVATIONS = {JoinManifest: "joined", FrameManifest: "a frame"}  # of what is made without the model
ARRAY_FPS = 8.0  # of a clip that is given as an array


class Result:
    """A clip, or an image (one frame), with the manifest that reproduces it.

    It has the frames that were generated in this process, or the file that a service has sent; the other is derived
    when it is first used. `sound` is the source of an edited clip, whose sound is kept where the length is unchanged.
    """

    def __init__(
        self,
        manifest: AnyManifest | None,
        *,
        frames: np.ndarray | None = None,
        data: bytes | None = None,
        suffix: str | None = None,
        fps: float | None = None,
        sound: SoundSource | None = None,
    ):
        assert (frames is None) != (data is None), "a result has either frames or a file"
        self.known_manifest = manifest
        self.sound = sound
        self.known_fps = fps
        if frames is not None:
            self.__dict__["frames"] = frames
            self.suffix = SUFFIX_BY_MEDIUM["video" if len(frames) > 1 else "image"]
        if data is not None:
            assert suffix, "a file has a suffix"
            self.__dict__["data"], self.suffix = data, suffix

    @property
    def manifest(self) -> AnyManifest:
        """Everything that the file was made of. Raises InvalidInput for a file that a user has attached.

        It is a `Manifest`, or of what was made without the model a `JoinManifest` (several clips in one) or a
        `FrameManifest` (a frame of a clip).
        """
        if self.known_manifest is None:
            raise InvalidInput("manifest", "this file was attached, not generated, so it has none")
        return self.known_manifest

    @cached_property
    def frames(self) -> np.ndarray:
        """The frames, uint8 [F, H, W, 3]; of a service's result, those of its file."""
        return read_media(self.data).frames

    @cached_property
    def data(self) -> bytes:
        """The file: an mp4 for a clip, a png for an image."""
        data, suffix = encode_clip(self.frames, self.fps)
        if self.sound is None or suffix != SUFFIX_BY_MEDIUM["video"]:
            return data
        return keep_sound(data, self.sound, len(self.frames) / self.fps, self.fps)[0]

    @property
    def fps(self) -> float:
        manifest = self.known_manifest
        return manifest.settings.fps if isinstance(manifest, Manifest) else self.known_fps or ARRAY_FPS

    @property
    def seed(self) -> int:
        """The seed. Raises InvalidInput for a file that was attached, or made without the model."""
        if not isinstance(self.manifest, Manifest):
            raise InvalidInput("seed", "this was made of other results, which have their own seeds, in its manifest")
        return self.manifest.settings.seed

    @property
    def seconds_by_stage(self) -> dict[str, float]:
        """The seconds that each stage of the model took; {} for what was made without it."""
        return self.manifest.seconds if isinstance(self.manifest, Manifest) else {}

    @property
    def prompt(self) -> str:
        return self.manifest.prompt

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        medium = "image" if count == 1 else "clip"
        length = "" if count == 1 else f", {count} frames at {self.fps:g} fps"
        manifest = self.known_manifest
        if manifest is None:
            return f"<Result: an attached {medium}, {width}x{height}{length}>"
        prompt = self.prompt if len(self.prompt) <= MAX_SHOWN_CHARS else f"{self.prompt[: MAX_SHOWN_CHARS - 3]}..."
        article = "an image" if count == 1 else "a clip"
        origin = f"seed {self.seed}" if isinstance(manifest, Manifest) else DERIVATIONS[type(manifest)]
        return f"<Result: {article}, {width}x{height}{length}, {origin}, {prompt!r}>"

    def _repr_html_(self) -> str:
        """Return the clip or the image for display in a notebook."""
        data = base64.b64encode(self.data).decode()
        if self.suffix != "mp4":
            return f'<img src="data:image/{self.suffix};base64,{data}" width="256">'
        return f'<video src="data:video/mp4;base64,{data}" width="256" controls loop autoplay muted></video>'

    def save(self, path: str | Path) -> Path:
        """Write the media in the format of the file's suffix, and the manifest beside it as JSON; both or neither.

        The manifest says what became of the source's sound. Raises InvalidInput if the format does not fit or the file
        cannot be written.
        """
        path = Path(path)
        if "data" in self.__dict__ and path.suffix.lower() == f".{self.suffix}" and self.sound is None:
            note = self.write_data(path)
        else:
            check_output(path, len(self.frames))
            note = write_media(path, self.frames, self.fps, self.sound) or self.describe_lost_sound(path)
        manifest = self.known_manifest
        if manifest is not None:
            if not isinstance(manifest, FrameManifest):
                manifest = manifest.model_copy(update={"sound": note})
            self.write_manifest(path, manifest)
        return path

    def write_data(self, path: Path) -> str | None:
        """Write the file as it came from a service, and return its manifest's note about the sound."""
        if path.is_dir() or not path.parent.is_dir():
            check_output(path, len(self.frames))
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(self.data)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise InvalidInput("output", f"{path.name} cannot be written: {error.strerror}") from None
        return self.get_sound_note()

    def get_sound_note(self) -> str | None:
        """Return what the manifest says about the sound."""
        manifest = self.known_manifest
        return None if manifest is None or isinstance(manifest, FrameManifest) else manifest.sound

    def describe_lost_sound(self, path: Path) -> str | None:
        """Return what becomes of the sound of a service's file in another format, which is written without it."""
        note = self.get_sound_note()
        return f"left out: a {path.suffix.lower()[1:]} holds no sound" if note == KEPT else note

    def write_manifest(self, path: Path, manifest: AnyManifest) -> None:
        """Write the manifest beside the media; remove the media if that fails."""
        manifest_path = path.with_name(path.name + ".json")
        partial = manifest_path.with_name(f".{manifest_path.name}.partial")
        try:
            partial.write_bytes(encode_manifest(manifest) + b"\n")
            os.replace(partial, manifest_path)
        except OSError as error:
            path.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
            raise InvalidInput("output", f"{manifest_path.name} cannot be written: {error.strerror}") from error
