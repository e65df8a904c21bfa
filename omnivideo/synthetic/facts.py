"""What a clip shows (`SceneDetection`) and what a prompt requests (`SceneSpec`); a verdict compares the two."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from omnivideo.synthetic.scenes import FRAME_SIZE


@dataclass(frozen=True)
class ObjectDetection:
    """One object of a clip: position and size at frame 0, and motion over all frames; None if unclear."""

    shape: str | None
    colour: str | None
    size: str
    motion: str | None
    x: float
    y: float


@dataclass(frozen=True)
class SceneDetection:
    """The content of a clip; `steadiness` is the share of frames with every object in its usual shape."""

    background: str | None
    objects: tuple[ObjectDetection, ...]
    steadiness: float


@dataclass(frozen=True)
class ObjectSpec:
    """The attributes that a prompt requests for one object; None allows any value."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    motion: str | None = None

    def is_met_by(self, detection: ObjectDetection) -> bool:
        return all(expected is None or expected == getattr(detection, name) for name, expected in vars(self).items())


@dataclass(frozen=True)
class SceneSpec:
    """The content that a prompt requests: exactly these objects; `relation` is that of the first to the second."""

    objects: tuple[ObjectSpec, ...]
    background: str | None = None
    relation: str | None = None
    region: tuple[str, ...] = ()

    def is_met_by(self, detection: SceneDetection) -> bool:
        if self.background is not None and detection.background != self.background:
            return False
        if len(detection.objects) != len(self.objects):
            return False
        return any(self.is_met_in_order(order) for order in itertools.permutations(detection.objects))

    def is_met_in_order(self, detections: Sequence[ObjectDetection]) -> bool:
        if not all(
            object_spec.is_met_by(detection) for object_spec, detection in zip(self.objects, detections, strict=True)
        ):
            return False
        if self.region and not set(self.region) <= set(find_sides(detections[0])):
            return False
        return self.relation is None or relation_holds(self.relation, detections[0], detections[1])


def find_sides(detection: ObjectDetection, frame_size: int = FRAME_SIZE) -> tuple[str, ...]:
    """Return the halves of the frame that contain an object's centre."""
    horizontal = "left" if detection.x < frame_size / 2 - 2 else "right" if detection.x > frame_size / 2 + 2 else ""
    vertical = "top" if detection.y < frame_size / 2 - 2 else "bottom" if detection.y > frame_size / 2 + 2 else ""
    return tuple(side for side in (vertical, horizontal) if side)


def relation_holds(relation: str, first: ObjectDetection, second: ObjectDetection) -> bool:
    """Return whether the offset from the second to the first object points mainly in the direction of the relation."""
    dx, dy = first.x - second.x, first.y - second.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    return along >= 8 and along >= across - 3
