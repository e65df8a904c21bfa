"""The manifests of results: what a file was made of, which is enough to make the same bytes again."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from omnivideo.contracts import Artifact, FramePosition, FrozenModel, SamplingParams, build_omitted_field
from omnivideo.presets import Task
from omnivideo.presets.shapes import Delivery

TENSOR_FIELDS = ("visual_tokens", "source_latents", "last_frame_latents")  # of a manifest: object keys of tensors


class Manifest(FrozenModel):
    """Everything that a file was generated from.

    `weights` is the digest of the weights and `precision` the types that they were computed in. `source` is the file
    name of an edit's source, or its object key if it was in the store; `mask` is that of its mask. `visual_tokens` and
    `source_latents` are object keys of tensors, or None if they are not stored. `settings` has the size and length that
    were generated, `delivered` those of the file. `sound` says what became of the source's sound: "kept", or why it was
    left out. `last_frame` and `last_frame_latents` are those of the picture that a clip ends with. A manifest does not
    have the fields of what its clip does not have, and one of version 0.2 has no precision.
    """

    prompt: str
    task: Task
    settings: SamplingParams
    source: str | None
    source_latents: str | None = None
    visual_tokens: str | None = None
    preset: str
    weights: str
    precision: str | None = build_omitted_field()
    versions: dict[str, str]
    seconds: dict[str, float]
    delivered: Delivery | None = build_omitted_field()
    mask: str | None = build_omitted_field()
    sound: str | None = build_omitted_field()
    last_frame: str | None = build_omitted_field()
    last_frame_latents: str | None = build_omitted_field()


class JoinManifest(FrozenModel):
    """The clips that a clip shows one after the other, in order, at this rate. `sound` is as in a `Manifest`."""

    task: Literal["join-clips"] = "join-clips"
    prompt: str
    parts: tuple[Artifact, ...]
    fps: float
    delivered: Delivery
    sound: str | None = build_omitted_field()


class FrameManifest(FrozenModel):
    """The clip that a picture is a frame of, and which one."""

    task: Literal["extract-frame"] = "extract-frame"
    prompt: str
    parts: tuple[Artifact]
    position: FramePosition
    delivered: Delivery


DerivedManifest = JoinManifest | FrameManifest  # of what is made of other results, without a model
AnyManifest = Manifest | DerivedManifest
MANIFEST_ADAPTER: TypeAdapter[AnyManifest] = TypeAdapter(Annotated[AnyManifest, Field(discriminator="task")])


def parse_manifest(document: bytes | str) -> AnyManifest:
    """Return a stored manifest; fields that a later version has added are left out."""
    return MANIFEST_ADAPTER.validate_json(document, extra="ignore")


def encode_manifest(manifest: AnyManifest) -> bytes:
    """Return a manifest as it is stored."""
    return json.dumps(manifest.model_dump(), indent=2).encode()


def list_needed_keys(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the object keys that a manifest needs to be made again: of tensors, or of its parts and their manifests.

    The manifest is given as JSON, as another version may have stored it. The source of an edit is not among them, since
    its job refers to it.
    """
    yield from (key for name in TENSOR_FIELDS if (key := document.get(name)))
    for part in document.get("parts", ()):
        yield from (key for name in ("key", "manifest") if (key := part.get(name)))
