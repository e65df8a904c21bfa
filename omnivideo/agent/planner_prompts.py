"""The prompts of the planner's calls to the MLLM, from the folder of prompts/ that the preset names."""

from dataclasses import dataclass
from importlib.resources import files

from omnivideo.presets import Preset


@dataclass(frozen=True)
class Prompts:
    """The prompts of the MLLM's modes. `plan`, `ask` and `decline` are None for an MLLM that is too small for them."""

    think: str
    check: str
    describe: str
    plan: str | None
    ask: str | None
    decline: str | None


def load_prompts(preset: Preset) -> Prompts:
    """Read the preset's prompts."""
    folder = files("omnivideo.agent") / "prompts" / preset.prompts

    def read_prompt(name: str) -> str | None:
        file = folder / f"{name}.md"
        return file.read_text().strip() if file.is_file() else None

    think, check, describe = read_prompt("think"), read_prompt("check"), read_prompt("describe")
    assert think and check and describe, "every folder of prompts has these three"
    plan = read_prompt("plan") if preset.mllm.can_plan else None
    return Prompts(think, check, describe, plan, read_prompt("ask"), read_prompt("decline"))
