"""The changes that the clauses of a request amount to, in the MLLM's words."""

from dataclasses import dataclass, field, replace

from omnivideo.agent.small_world.scenes import REGION_PHRASES, ObjectRequest

IMPERATIVE_MOTIONS = {
    "still": "stay still", "left": "move left", "right": "move right", "up": "move up", "down": "move down",
    "growing": "grow", "shrinking": "shrink",
}  # fmt: skip
# Where a new object stands that is placed by the one that is there.
REGIONS_BY_RELATION = {"above": "top", "below": "bottom", "left of": "left", "right of": "right"}


@dataclass(frozen=True)
class WordedChange:
    """One change: its kind, and the request for it in the MLLM's words."""

    kind: str
    text: str
    target: str = ""

    @property
    def value(self) -> str:
        return self.text.rpartition(" ")[2]


@dataclass
class Clause:
    verb: str = ""
    target: str = ""
    values: dict[str, str] = field(default_factory=dict)
    new_objects: list[ObjectRequest] = field(default_factory=list)
    other_targets: list[str] = field(default_factory=list)  # with the same changes

    def add_target(self, target: str) -> None:
        self.other_targets.append(self.target)
        self.target = target

    def split_targets(self) -> list["Clause"]:
        """Return a clause for each target: "the circle and the star green" has two."""
        if self.verb == "swap":
            return [replace(self, target=" and ".join((*self.other_targets, self.target)))]
        return [replace(self, target=target, other_targets=[]) for target in (*self.other_targets, self.target)]

    def place_by(self, relation: str) -> None:
        """Place the last new object by what is there: one object is in the middle."""
        region, self.verb = REGIONS_BY_RELATION.get(relation), self.verb or "add"
        self.new_objects[-1] = replace(self.new_objects[-1], region=region or self.new_objects[-1].region)

    def is_empty(self) -> bool:
        return not (self.target or self.values or self.new_objects or self.verb in ("remove", "swap"))


def build_changes(clause: Clause, attribute: str) -> list[WordedChange]:
    """Return the changes of one clause, in the MLLM's words."""
    target = clause.target or "it"
    if clause.verb == "swap" and clause.new_objects:
        clause.verb = "replace"
    if clause.verb == "swap":
        noun = {"colour": "colours", "shape": "shapes"}.get(attribute, "places")
        pair = f" of {clause.target}" if " and " in clause.target else ""
        return [WordedChange("swap", f"swap the {noun}{pair}" if pair else f"swap their {noun}", target)]
    if clause.verb == "remove":
        return [WordedChange("remove", f"remove {target}", target)] if clause.target else []
    if clause.new_objects:
        return build_object_changes(clause, target)
    return build_value_changes(clause.values, target)


def build_object_changes(clause: Clause, target: str) -> list[WordedChange]:
    """Return the changes that bring new objects: additions, replacements or another shape."""
    obj = clause.new_objects[0]
    ground = {name: value for name, value in clause.values.items() if name == "background"}
    if clause.verb in ("add", "put") and clause.target in ("", "it"):
        return [WordedChange("add", f"add {new.to_text()}") for new in clause.new_objects] + build_value_changes(
            ground, "it"
        )
    if clause.verb == "replace" or (obj.shape and (obj.colour or obj.size)):
        return [
            WordedChange("replace", f"replace {target} with {obj.to_text()}", target),
            *build_value_changes(ground, "it"),
        ]
    if (obj.count or 1) > 1 and clause.verb != "replace":
        return [WordedChange("count", f"count {obj.count}", target)]
    if obj.shape is None:
        values = {name: value for name in ("colour", "size", "motion") if (value := getattr(obj, name))}
        return build_value_changes(values | clause.values, target)
    reshape = WordedChange("reshape", f"turn {target} into {obj.to_text()}", target)
    return [reshape, *build_value_changes(clause.values, target)]


def build_value_changes(values: dict[str, str], target: str) -> list[WordedChange]:
    """Return a change for each new value."""
    changes = []
    for name, value in values.items():
        if name == "colour":
            changes.append(WordedChange("recolour", f"make {target} {value}", target))
        elif name == "background":
            changes.append(WordedChange("background", f"change the background to {value}"))
        elif name == "size":
            changes.append(
                WordedChange("resize", f"make {target} {'bigger' if value == 'large' else 'smaller'}", target)
            )
        elif name == "motion":
            changes.append(build_motion_change(values, target))
        elif name == "speed" and "motion" not in values:
            changes.append(WordedChange("speed", f"make {target} {'slower' if value == 'slow' else 'faster'}", target))
        elif name == "region":
            place = REGION_PHRASES.get(value, f"in the {value}")
            changes.append(WordedChange("place", f"put {target} {place}", target))
        elif name in ("length", "count", "medium"):
            changes.append(WordedChange(name, f"{name} {value}", target))
    return changes


def build_motion_change(values: dict[str, str], target: str) -> WordedChange:
    motion = values["motion"]
    if second := values.get("second_motion"):
        return WordedChange(
            "path", f"make {target} {IMPERATIVE_MOTIONS[motion]} then {IMPERATIVE_MOTIONS[second]}", target
        )
    return WordedChange("motion", f"make {target} {IMPERATIVE_MOTIONS[motion]}", target)
