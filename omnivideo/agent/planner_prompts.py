"""The prompts of the planner's calls to the MLLM, from the folder of prompts/ that the preset names."""

from dataclasses import dataclass
from importlib.resources import files

from omnivideo.presets import Preset


@dataclass(frozen=True)
class Prompts:
    """The prompts of the MLLM's modes. The optional ones are None for an MLLM that is too small for them.

    `background` is around what a request's background says.
    """

    think: str
    check: str
    describe: str
    plan: str | None
    ask: str | None
    decline: str | None
    background: str | None

    def add_background(self, system: str | None, background: str) -> str | None:
        """Return a mode's system prompt with a turn's background, for an MLLM that can read it."""
        if not background or self.background is None:
            return system
        told = self.background.replace("{background}", background)
        return f"{system}\n\n{told}" if system else told


def load_prompts(preset: Preset) -> Prompts:
    """Read the preset's prompts."""
    folder = files("omnivideo.agent") / "prompts" / preset.prompts

    def read_prompt(name: str) -> str | None:
        file = folder / f"{name}.md"
        return file.read_text().strip() if file.is_file() else None

    think, check, describe = read_prompt("think"), read_prompt("check"), read_prompt("describe")
    assert think and check and describe, "every folder of prompts has these three"
    plan = read_prompt("plan") if preset.mllm.can_plan else None
    ask, decline, background = (read_prompt(name) for name in ("ask", "decline", "background"))
    return Prompts(think, check, describe, plan, ask, decline, background)
