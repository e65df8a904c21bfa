"""The limits on clips and the stages that check them, in order. The unit of a limit is in its name or in a comment."""

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from omnivideo.contracts import FrozenModel


class CurationBounds(FrozenModel):
    """The allowed range of every stage's measurement; the unit "side" is the longer side of the frame."""

    min_short_side: int = Field(default=480, ge=16, le=8192)  # of the shorter side
    max_aspect: float = Field(default=2.4, ge=1, le=10)  # longer side / shorter side
    min_seconds: float = Field(default=1.0, ge=0.25, le=60)
    max_seconds: float = Field(default=20.0, ge=1, le=600)  # longer scenes are split into equal parts
    max_bars: float = Field(default=0.01, ge=0, le=1)  # share of the frame
    min_motion: float = Field(default=0.02, ge=0, le=10)  # sides per second
    max_shake: float = Field(default=0.015, ge=0, le=1)  # sides
    max_overlay: float = Field(default=0.002, ge=0, le=1)  # share of the frame
    max_text: float = Field(default=0.001, ge=0, le=1)  # share of the frame
    min_aesthetic: float = Field(default=4.5, ge=0, le=10)  # points of 10
    max_duplicate_distance: float = Field(default=8.0, ge=0, le=32)  # bits of 64; a clip this close is a duplicate


@dataclass(frozen=True)
class CurationStage:
    """A stage; `min_field` and `max_field` name the limits of its measurement in CurationBounds."""

    name: str
    description: str
    unit: str
    min_field: str | None = None
    max_field: str | None = None

    def find_rejection(self, bounds: CurationBounds, value: float) -> dict[str, Any] | None:
        """Return the stage, the value and the reason if the value is outside the limits, otherwise None."""
        low = getattr(bounds, self.min_field) if self.min_field else None
        high = getattr(bounds, self.max_field) if self.max_field else None
        if (low is None or value >= low) and (high is None or value <= high):
            return None
        allowed = f"{low:g} or more" if high is None else f"at most {high:g}"
        return {"stage": self.name, "value": value, "why": f"{value:.4g} {self.unit}; allowed: {allowed}"}


STAGES = {
    stage.name: stage
    for stage in (
        CurationStage("resolution", "the shorter side", "px", min_field="min_short_side"),
        CurationStage("aspect", "longer side over shorter side", "to 1", max_field="max_aspect"),
        CurationStage("length", "a scene between two cuts", "s", min_field="min_seconds"),
        CurationStage("bars", "black bars at the edges", "of the frame", max_field="max_bars"),
        CurationStage(
            "motion", "optical flow of the fastest 5 % of the pixels", "sides per second", min_field="min_motion"
        ),
        CurationStage(
            "shake", "change of the camera's motion from one 1/8 s to the next", "sides", max_field="max_shake"
        ),
        CurationStage(
            "overlay", "outlines that stay in place while the camera moves", "of the frame", max_field="max_overlay"
        ),
        CurationStage("text", "text found by OCR", "of the frame", max_field="max_text"),
        CurationStage("aesthetic", "the predictor's score", "points", min_field="min_aesthetic"),
        CurationStage("duplicates", "distance to a better clip that is kept", "bits of 64"),
    )
}
UNREADABLE = "unreadable"  # the stage of files and clips that could not be measured
