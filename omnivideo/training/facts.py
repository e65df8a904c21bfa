"""What is on a clip (`Reading`) and what a prompt asks for (`Demand`): the two sides of every verdict."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from omnivideo.training.world import FRAME


@dataclass(frozen=True)
class Seen:
    """One object over a clip: place at frame 0, size at frame 0, motion over all frames (None where unclear)."""

    shape: str | None
    colour: str | None
    size: str
    motion: str | None
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """The facts of a clip; `steadiness` is the share of frames on which every object is there, named as ever."""

    background: str | None
    things: tuple[Seen, ...]
    steadiness: float


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks of one object; None leaves it open."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    motion: str | None = None

    def met_by(self, thing: Seen) -> bool:
        return all(want is None or want == getattr(thing, name) for name, want in vars(self).items())


@dataclass(frozen=True)
class Demand:
    """What a prompt asks for: exactly these objects, and a relation of the first to the second if named."""

    things: tuple[Wanted, ...]
    background: str | None = None
    relation: str | None = None
    region: tuple[str, ...] = ()

    def met_by(self, reading: Reading) -> bool:
        if self.background is not None and reading.background != self.background:
            return False
        if len(reading.things) != len(self.things):
            return False
        return any(self.fits(order) for order in itertools.permutations(reading.things))

    def fits(self, things: Sequence[Seen]) -> bool:
        if not all(want.met_by(thing) for want, thing in zip(self.things, things, strict=True)):
            return False
        if self.region and not set(self.region) <= set(sides(things[0])):
            return False
        return self.relation is None or relation_holds(self.relation, things[0], things[1])


def sides(thing: Seen, frame: int = FRAME) -> tuple[str, ...]:
    """The halves of the frame in which an object's centre lies."""
    across = "left" if thing.x < frame / 2 - 2 else "right" if thing.x > frame / 2 + 2 else ""
    along = "top" if thing.y < frame / 2 - 2 else "bottom" if thing.y > frame / 2 + 2 else ""
    return tuple(side for side in (along, across) if side)


def relation_holds(relation: str, one: Seen, two: Seen) -> bool:
    """Whether the offset points the named way, by more than it points any other."""
    dx, dy = one.x - two.x, one.y - two.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    return along >= 8 and along >= across - 3
