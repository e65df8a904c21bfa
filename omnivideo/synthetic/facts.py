"""What a clip shows (`SceneDetection`) and what a prompt requests (`SceneSpec`); a verdict compares the two."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from omnivideo.synthetic.scenes import FRAME_SIZE


@dataclass(frozen=True)
class ObjectDetection:
    """One object of a clip: position and size at frame 0, and its motions; None if unclear.

    `speed` is None for an object that moves in no direction, `second_motion` if the first motion continues.
    """

    shape: str | None
    colour: str | None
    size: str
    motion: str | None
    x: float
    y: float
    speed: str | None = None
    second_motion: str | None = None


@dataclass(frozen=True)
class SceneDetection:
    """The content of a clip; `steadiness` is the share of frames with every object in its usual shape."""

    background: str | None
    objects: tuple[ObjectDetection, ...]
    steadiness: float


@dataclass(frozen=True)
class ObjectSpec:
    """The attributes that a prompt requests for one object; None allows any value.

    A requested motion without a second one is the only motion. `region` names the sides of the frame on which the
    object's centre lies at frame 0; () is the middle.
    """

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    motion: str | None = None
    speed: str | None = None
    second_motion: str | None = None
    region: tuple[str, ...] | None = None

    def is_met_by(self, detection: ObjectDetection) -> bool:
        attributes = ("shape", "colour", "size", "motion", "speed")
        if any(getattr(self, name) not in (None, getattr(detection, name)) for name in attributes):
            return False
        if self.motion is not None and self.second_motion != detection.second_motion:
            return False
        return self.region is None or is_in_region(detection, self.region)


@dataclass(frozen=True)
class SceneSpec:
    """The content that a prompt requests: exactly these objects; `relation` is that of the first to the second."""

    objects: tuple[ObjectSpec, ...]
    background: str | None = None
    relation: str | None = None

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
        return self.relation is None or relation_holds(self.relation, detections[0], detections[1])


REGION_MARGIN = 4  # px from the middle line up to which a centre is in the middle
REGION_TOLERANCE = 2  # px by which a generated object may be off


def is_in_region(detection: ObjectDetection, region: tuple[str, ...], frame_size: int = FRAME_SIZE) -> bool:
    """Return whether an object's centre lies in a ninth of the frame that the region's sides name."""
    margin, middle = REGION_MARGIN - REGION_TOLERANCE, frame_size / 2
    for position, sides in ((detection.x, ("left", "right")), (detection.y, ("top", "bottom"))):
        if sides[0] in region:
            if position > middle - margin:
                return False
        elif sides[1] in region:
            if position < middle + margin:
                return False
        elif abs(position - middle) > REGION_MARGIN + REGION_TOLERANCE:
            return False
    return True


def relation_holds(relation: str, first: ObjectDetection, second: ObjectDetection) -> bool:
    """Return whether the offset from the second to the first object points mainly in the direction of the relation."""
    dx, dy = first.x - second.x, first.y - second.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    return along >= 8 and along >= across - 3
