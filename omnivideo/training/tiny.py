"""The tiny preset from nothing: every recipe in its order, each resumable, in one folder of runs."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import nn
from transformers import Qwen3VLForConditionalGeneration, SiglipVisionModel, UMT5Config, UMT5EncoderModel

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.checkpoint import SHIPPED, load_bridge, save, save_library_model, strictly
from omnivideo.models.mllm import Pixels
from omnivideo.models.omni import Bridge, Omni, build_decoder
from omnivideo.models.positions import with_absolute_positions
from omnivideo.presets import TINY
from omnivideo.training.card import card
from omnivideo.training.distributed import World
from omnivideo.training.drawn import CHUNK, Drawn, Way, drawn
from omnivideo.training.latents import digest, encode_scenes, first_scenes, set_statistics
from omnivideo.training.plots import plot_losses
from omnivideo.training.recipes import mllm, stages, text
from omnivideo.training.recipes.decoder import CLIPS, STILLS, Captioned, DecoderFoundation, decoder_recipe
from omnivideo.training.recipes.vae import vae_decoder_recipe, vae_recipe
from omnivideo.training.recipes.visual_encoder import visual_encoder_recipe
from omnivideo.training.samples import TASKS, Task, requests
from omnivideo.training.trainer import Progress, Recipe, Trainer
from omnivideo.training.watch import DRAWN, Look, Watch, blind, line, speed, watchers
from omnivideo.training.world import scenes

REQUESTS = 12_000  # of each task, in stages 2b and 3
# Of the requests.  Stage 3 has as many edits again for each further seed: it sees them often enough to know them.
SEEDS = (1, 3, 4)
Tell = Callable[[int, int], None]
ALONE = World()
UNWATCHED = watchers(())


def quiet(done: int, count: int) -> None:
    """Tells nobody."""


class Tiny:
    """The recipes over one folder (`runs/` by default): each knows how to load what came before it.

    Where an earlier foundation's run is not at hand, its part of the shipped weights stands in.  With `weights`, a
    folder of that layout, these stand in for every earlier recipe, and the MLLM goes on from them.  `workers` processes
    draw the batches, each `times` as large as the recipe says.  Stages 2b and 3 draw their requests of `seeds`: of the
    first for all tasks, in stage 3 of the others for edits.
    """

    def __init__(
        self,
        runs: Path,
        compiled: bool = False,
        tell: Tell = quiet,
        shipped: Path = SHIPPED / "tiny",
        watch: Watch = UNWATCHED,
        weights: Path | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
        times: int = 1,
        seeds: Sequence[int] = SEEDS,
    ):
        self.runs = runs
        self.compiled = compiled
        self.tell = tell
        self.shipped = weights or shipped
        self.goes_on = weights is not None
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32; bf16 would only add conversions at this size
        self.workers = workers
        self.times = times
        self.seeds = seeds
        self.way = Way(tell, CHUNK if self.device.type == "cpu" else 512, workers)
        self.watch = watch
        self.makers: dict[str, Callable[[], Recipe]] = {
            "vae": vae_recipe,
            "vae_decoder": lambda: vae_decoder_recipe(self.vae_at_first()),
            "text": lambda: text.text_recipe(self.tokenizer()),
            "decoder": self.decoder_recipe,
            "visual_encoder": visual_encoder_recipe,
            "mllm": self.mllm_recipe,
            "stage1": lambda: stages.stage1_recipe(
                self.omni("mllm"), self.visual_encoder(), batch=stages.BATCH * times, workers=workers
            ),
            "stage1_text": lambda: stages.stage1_text_recipe(
                self.omni("stage1"), batch=stages.TEXT_BATCH * times, workers=workers
            ),
            "stage2a": lambda: stages.stage2a_recipe(self.omni("stage1")),
            "stage2b_generation": lambda: self.flow(stages.stage2b_generation_recipe, "stage2a"),
            "stage2b": lambda: self.flow(stages.stage2b_recipe, "stage2b_generation"),
            "stage3": lambda: self.flow(stages.stage3_recipe, "stage2b", seeds[1:]),
        }

    def has_run(self, name: str) -> bool:
        return (self.runs / name / "state.pt").exists()

    def trained(self, recipe: Recipe) -> Any:
        """A recipe's model with the (averaged) weights of its checkpoint, as it stands."""
        if not self.has_run(recipe.name):
            raise CheckpointError(f"recipe {recipe.name} has not been trained yet: omnivideo train {recipe.name}")
        return Trainer(recipe, self.runs / recipe.name).averaged().eval().requires_grad_(False)

    def vae(self) -> AutoencoderKLWan:
        """The trained VAE, with the decoder that went on alone where there is such a run."""
        if not self.has_run("vae_decoder"):
            return self.vae_at_first()
        return self.trained(self.makers["vae_decoder"]()).to(self.device)

    def vae_at_first(self) -> AutoencoderKLWan:
        """The VAE that was trained as a whole, with its latent statistics measured on stills and clips once."""
        if not self.has_run("vae"):
            return self.part(AutoencoderKLWan, "vae")
        vae = self.trained(vae_recipe()).to(self.device)
        path = self.runs / "vae" / f"statistics-{digest(vae)}.pt"
        if not path.exists():
            samples = [encode_scenes(vae, first_scenes(scenes(2, video), 512)) for video in (False, True)]
            set_statistics(vae, samples)
            torch.save({"mean": vae.config.latents_mean, "std": vae.config.latents_std}, path)
        saved = torch.load(path, weights_only=True)
        vae.register_to_config(latents_mean=saved["mean"], latents_std=saved["std"])
        return vae

    def tokenizer(self) -> Any:
        return text.load_or_build_tokenizer(folder_of("tokenizer", self.runs / "text" / "tokenizer", self.shipped))

    def mllm_tokenizer(self) -> Any:
        return mllm.load_or_build_tokenizer(folder_of("mllm", self.runs / "mllm" / "tokenizer", self.shipped))

    def text_encoder(self) -> UMT5EncoderModel:
        if not self.has_run("text"):
            return self.part(UMT5EncoderModel, "text_encoder")
        return self.trained(self.makers["text"]()).encoder.to(self.device)

    def part(self, kind: Any, name: str) -> Any:
        """A part of the weights that stand in for the runs that are not at hand."""
        return strictly(kind, self.shipped, name, torch.float32).eval().requires_grad_(False).to(self.device)

    def mllm_recipe(self) -> Recipe:
        recipe = mllm.mllm_recipe(self.mllm_tokenizer(), batch=mllm.BATCH * self.times, workers=self.workers)
        if self.goes_on:
            recipe.model.load_state_dict(self.part(Qwen3VLForConditionalGeneration, "mllm").state_dict())
        return recipe

    def mllm(self) -> Qwen3VLForConditionalGeneration:
        if self.goes_on and not self.has_run("mllm"):
            return self.part(Qwen3VLForConditionalGeneration, "mllm")
        return self.trained(self.mllm_recipe()).to(self.device)

    def decoder_recipe(self) -> Recipe:
        vae = self.vae()
        stills, clips = (
            Captioned(self.runs / "cache", vae, video, count, self.tell)
            for video, count in ((False, STILLS), (True, CLIPS))
        )
        return decoder_recipe(stills, clips, self.tokenizer(), self.text_encoder())

    def foundation(self) -> DecoderFoundation:
        """The decoder with the text encoder that it was trained under."""
        if self.has_run("decoder"):
            model = DecoderFoundation(build_decoder(TINY), UMT5EncoderModel(UMT5Config(**text.CONFIG)))
            state = torch.load(self.runs / "decoder" / "state.pt", weights_only=True)
            model.load_state_dict(state["model"] | state["average"])
        else:
            decoder = self.part(WanTransformer3DModel, "transformer")
            encoder = self.part(UMT5EncoderModel, "text_encoder")
            model = DecoderFoundation(with_absolute_positions(decoder), encoder)
        return model.eval().requires_grad_(False)

    def visual_encoder(self) -> SiglipVisionModel:
        if not self.has_run("visual_encoder"):
            return self.part(SiglipVisionModel, "visual_encoder")
        return self.trained(visual_encoder_recipe()).encoder.to(self.device)

    def omni(self, after: str) -> Omni:
        """All parts as they stand after a recipe: "mllm" (the foundations), or one of the stages."""
        foundation = self.foundation()
        omni = Omni(
            preset=TINY,
            mllm=self.mllm(),
            mllm_tokenizer=self.mllm_tokenizer(),
            pixels=Pixels(),
            bridge=seeded_bridge(),
            decoder=foundation.decoder,
            text_encoder=foundation.text_encoder,
            tokenizer=self.tokenizer(),
            vae=self.vae(),
        )
        if after != "mllm" and self.goes_on and not self.has_run(after):
            omni.bridge = load_bridge(TINY, self.shipped, torch.float32)
        elif after != "mllm":
            state = torch.load(self.stage_file(after), weights_only=True)
            stages.Whole(omni).load_state_dict(state["model"] | state["average"])
        if after not in ("mllm", "stage1") and self.has_run("stage1_text"):
            text_head = torch.load(self.stage_file("stage1_text"), weights_only=True)["average"]
            stages.Whole(omni).load_state_dict(text_head, strict=False)
        return omni.to(self.device).eval()

    def stage_file(self, name: str) -> Path:
        if not self.has_run(name):
            raise CheckpointError(f"recipe {name} has not been trained yet: omnivideo train {name}")
        return self.runs / name / "state.pt"

    def flow(self, make: Callable[..., Recipe], after: str, more: Sequence[int] = ()) -> Recipe:
        """A recipe over the four tasks' cached data; what is frozen in stages 2b and 3 is frozen in the cache.

        Edits are drawn for the seeds in `more` as well.
        """
        omni, encoder = self.omni(after), self.visual_encoder()

        def made(seed: int, task: Task) -> Drawn:
            return drawn(self.runs / "cache", omni, encoder, requests(seed, task, REQUESTS), self.way)

        data = {task: made(self.seeds[0], task) for task in TASKS}
        for seed, task in product(more, TASKS[2:]):
            data[task] += made(seed, task)
        stills, clips = stages.SIZES
        return make(omni, data, sizes=(stills * self.times, clips * self.times), workers=self.workers)

    def train(
        self,
        name: str,
        out: Console,
        world: World = ALONE,
        until: int | None = None,
        rate: float = 1.0,
        save_every: float = 120.0,
        look: Look = blind,
        **changes: Any,
    ) -> None:
        """One recipe, or all of them in order for "tiny"; to step `until`, at `rate` times its learning rates, with
        other fields changed.

        Raises InvalidInput for a name that is none, and to look at a recipe that draws nothing.
        """
        if name != "tiny" and name not in self.makers:
            raise InvalidInput("recipe", f"{name!r} is not one of tiny, {', '.join(self.makers)}")
        if look is not blind and name not in ("tiny", *stages.DRAWING):
            raise InvalidInput("look-every", f"{name} draws nothing; for {', '.join(stages.DRAWING)}, and tiny: all")
        for chosen in self.makers if name == "tiny" else [name]:
            with world.first_alone():
                recipe = self.makers[chosen]()
                if self.compiled:
                    compile_decoder(recipe.model)
                changes |= {"device": self.device, "lr": recipe.lr * rate, "adam_lr": recipe.adam_lr * rate}
                recipe = replace(recipe, **changes)
            train_one(recipe, self.runs / chosen, out, world, self.watch, until, save_every, look)
        if name == "tiny" and world.first:
            self.ship(self.runs / "tiny")

    def ship(self, folder: Path) -> None:
        """The whole preset as it is shipped, with its card; scores are in it once `runs/scores.json` has them
        (`omnivideo evaluate tiny --weights runs/tiny --report runs/scores.json`)."""
        folder.mkdir(parents=True, exist_ok=True)
        save_library_model(self.visual_encoder(), folder / "visual_encoder", torch.float16)
        save(self.omni("stage3"), folder)  # last: its index is over all that lies there
        report = self.runs / "scores.json"
        scores = json.loads(report.read_text()) if report.exists() else {}
        earlier = self.shipped / "README.md"
        text = card(
            self.runs, self.makers, commit(), f"{platform.machine()}, {os.cpu_count()} cores", scores,
            earlier.read_text() if earlier.exists() else "",
        )  # fmt: skip
        (folder / "README.md").write_text(text)

    def export_foundations(self, folder: Path) -> None:
        """The foundations that are there, in the shipped layout, so that a later machine can go on from them."""
        foundation = self.foundation()
        parts = {"vae": self.vae(), "transformer": foundation.decoder, "text_encoder": foundation.text_encoder}
        if self.has_run("visual_encoder"):
            parts["visual_encoder"] = self.visual_encoder()
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            save_library_model(part, folder / name, torch.float16)
        self.tokenizer().save_pretrained(folder / "tokenizer")


def commit() -> str:
    """The checkout's commit, "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def folder_of(name: str, run: Path, shipped: Path) -> Path:
    """A tokenizer's folder: the run's, or the shipped one where there is no run."""
    there = (shipped / name / "tokenizer.json").exists() and not (run / "tokenizer.json").exists()
    return shipped / name if there else run


def compile_decoder(model: nn.Module) -> None:
    """Its blocks, where there is one: they are compiled once for all."""
    for part in model.modules():
        if isinstance(part, WanTransformer3DModel):
            part.compile_repeated_blocks()


def seeded_bridge() -> Bridge:
    """The joining parts at random, the same every time (stage 1 starts here)."""
    torch.manual_seed(10)
    return Bridge(TINY)


def train_one(
    recipe: Recipe,
    folder: Path,
    out: Console,
    world: World = ALONE,
    watch: Watch = UNWATCHED,
    until: int | None = None,
    save_every: float = 120.0,
    look: Look = blind,
) -> None:
    """Trains to the end with a progress bar, prints what is trainable, and draws the losses."""
    trainer = world.trainer(recipe, folder)
    if not world.first:
        trainer.run(until, save_every, look=look)
        return
    weights = sum(parameter.numel() for _, parameter in trainer.named)
    tops = sorted({".".join(key.split(".")[:2]) for key, _ in trainer.named})
    out.print(f"[bold]{recipe.name}[/bold]: {weights:,} trainable weights in {', '.join(tops)}")
    columns = (TextColumn(recipe.name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.description}"), console=out) as bar:
        row = bar.add_task("", total=recipe.steps, completed=trainer.step)
        writers = watch(folder, recipe, trainer.step)
        seen: dict[str, float] = {}

        def tell(progress: Progress) -> None:
            figures = speed(recipe, progress, world.size).figures()
            seen.update((name, value) for name, value in progress.scores.items() if name == DRAWN)
            bar.update(row, completed=progress.step, description=line(progress, seen | figures))
            for write in writers:
                write(progress.step, progress.losses | progress.scores | figures)

        trainer.run(until, save_every, tell, look)
    plot_losses(folder / "log.jsonl", folder / "loss.png", recipe.name)
