"""A clip or an image with its manifest, from this process or from a service."""

import base64
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from omnivideo.contracts import Manifest
from omnivideo.errors import InvalidInput
from omnivideo.media.artifacts import SUFFIX_BY_MEDIUM, encode_clip
from omnivideo.media.read import read_media
from omnivideo.media.sound import KEPT, SoundSource
from omnivideo.media.write import check_output, write_media

MAX_SHOWN_CHARS = 60
ARRAY_FPS = 8.0  # of a clip that is given as an array


class Result:
    """A clip, or an image (one frame), with the manifest that reproduces it.

    It has the frames that were generated in this process, or the file that a service has sent; the other is derived
    when it is first used. `sound` is the source of an edited clip, whose sound is kept where the length is unchanged.
    """

    def __init__(
        self,
        manifest: Manifest | None,
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
    def manifest(self) -> Manifest:
        """Everything that the file was generated from. Raises InvalidInput for a file that a user has attached."""
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
        return encode_clip(self.frames, self.fps)[0]

    @property
    def fps(self) -> float:
        known_fps = self.known_fps or ARRAY_FPS
        return known_fps if self.known_manifest is None else self.known_manifest.settings.fps

    @property
    def seed(self) -> int:
        return self.manifest.settings.seed

    @property
    def prompt(self) -> str:
        return self.manifest.prompt

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        medium = "image" if count == 1 else "clip"
        length = "" if count == 1 else f", {count} frames at {self.fps:g} fps"
        if self.known_manifest is None:
            return f"<Result: an attached {medium}, {width}x{height}{length}>"
        prompt = self.prompt if len(self.prompt) <= MAX_SHOWN_CHARS else f"{self.prompt[: MAX_SHOWN_CHARS - 3]}..."
        article = "an image" if count == 1 else "a clip"
        return f"<Result: {article}, {width}x{height}{length}, seed {self.seed}, {prompt!r}>"

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
        if self.known_manifest is not None:
            manifest = self.known_manifest.model_copy(update={"sound": note})
            self.write_manifest(path, manifest.model_dump())
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
        return None if self.known_manifest is None else self.known_manifest.sound

    def describe_lost_sound(self, path: Path) -> str | None:
        """Return what becomes of the sound of a service's file in another format, which is written without it."""
        note = None if self.known_manifest is None else self.known_manifest.sound
        return f"left out: a {path.suffix.lower()[1:]} holds no sound" if note == KEPT else note

    def write_manifest(self, path: Path, manifest: dict[str, Any]) -> None:
        """Write the manifest beside the media; remove the media if that fails."""
        manifest_path = path.with_name(path.name + ".json")
        partial = manifest_path.with_name(f".{manifest_path.name}.partial")
        try:
            partial.write_text(json.dumps(manifest, indent=2) + "\n")
            os.replace(partial, manifest_path)
        except OSError as error:
            path.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
            raise InvalidInput("output", f"{manifest_path.name} cannot be written: {error.strerror}") from error
