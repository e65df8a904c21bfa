"""A clip or an image that was generated in this process, with its manifest."""

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omnivideo.contracts import Manifest
from omnivideo.errors import InvalidInput
from omnivideo.media.artifacts import encode_clip
from omnivideo.media.sound import SoundSource
from omnivideo.media.write import check_output, write_media


@dataclass(frozen=True)
class Result:
    """A clip, or an image (F = 1), as uint8 frames [F, H, W, 3], with the manifest that reproduces it.

    `sound` is the source of an edited clip, whose sound `save` keeps where the length is unchanged.
    """

    frames: np.ndarray
    manifest: Manifest
    sound: SoundSource | None = None

    def _repr_html_(self) -> str:
        """Return the clip or the image for display in a notebook."""
        data, suffix = encode_clip(self.frames, self.manifest.settings.fps)
        source = f"data:{'video/mp4' if suffix == 'mp4' else 'image/png'};base64,{base64.b64encode(data).decode()}"
        if suffix == "png":
            return f'<img src="{source}" width="256">'
        return f'<video src="{source}" width="256" controls loop autoplay muted></video>'

    def save(self, path: str | Path) -> Path:
        """Write the media in the format of the file's suffix, and the manifest beside it as JSON; both or neither.

        The manifest says what became of the source's sound. Raises InvalidInput if the format does not fit or the file
        cannot be written.
        """
        path = Path(path)
        check_output(path, len(self.frames))
        note = write_media(path, self.frames, self.manifest.settings.fps, self.sound)
        manifest = self.manifest.model_copy(update={"sound": note})
        manifest_path = path.with_name(path.name + ".json")
        partial = manifest_path.with_name(f".{manifest_path.name}.partial")
        try:
            partial.write_text(json.dumps(manifest.model_dump(), indent=2) + "\n")
            os.replace(partial, manifest_path)
        except OSError as error:
            path.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
            raise InvalidInput("output", f"{manifest_path.name} cannot be written: {error.strerror}") from error
        return path
