"""The tiny preset from nothing: every recipe in its order, each resumable, in one folder of runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import nn
from transformers import UMT5EncoderModel

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.training.latents import CHUNK, digest, encode_scenes, first_scenes, set_statistics
from omnivideo.training.plots import plot_losses
from omnivideo.training.recipes import mllm, text
from omnivideo.training.recipes.decoder import CLIPS, STILLS, Captioned, decoder_recipe
from omnivideo.training.recipes.text import TextFoundation, text_recipe
from omnivideo.training.recipes.vae import vae_recipe
from omnivideo.training.recipes.visual_encoder import visual_encoder_recipe
from omnivideo.training.trainer import Progress, Recipe, Trainer
from omnivideo.training.world import scenes

Tell = Callable[[int, int], None]


def quiet(done: int, count: int) -> None:
    """Tells nobody."""


class Tiny:
    """The recipes over one folder (`runs/` by default): each knows how to load what came before it."""

    def __init__(self, runs: Path, compiled: bool = False, tell: Tell = quiet):
        self.runs = runs
        self.compiled = compiled
        self.tell = tell

    def finished(self, recipe: Recipe) -> nn.Module:
        """The trained (averaged) model of a recipe's checkpoint, as it stands."""
        folder = self.runs / recipe.name
        if not (folder / "state.pt").exists():
            raise CheckpointError(f"recipe {recipe.name} has not been trained yet: omnivideo train {recipe.name}")
        return Trainer(recipe, folder).averaged().eval().requires_grad_(False)

    def vae(self) -> AutoencoderKLWan:
        """The trained VAE, with its latent statistics measured on 2,000 clips and stills once."""
        vae = self.finished(vae_recipe())
        assert isinstance(vae, AutoencoderKLWan)
        path = self.runs / "vae" / f"statistics-{digest(vae)}.pt"
        if not path.exists():
            samples = [encode_scenes(vae, first_scenes(scenes(2, video), 8 * CHUNK)) for video in (False, True)]
            set_statistics(vae, samples)
            torch.save({"mean": vae.config.latents_mean, "std": vae.config.latents_std}, path)
        saved = torch.load(path, weights_only=True)
        vae.register_to_config(latents_mean=saved["mean"], latents_std=saved["std"])
        return vae

    def tokenizer(self) -> Any:
        return text.load_or_build_tokenizer(self.runs / "text" / "tokenizer")

    def text_recipe(self) -> Recipe:
        return text_recipe(self.tokenizer())

    def text_encoder(self) -> UMT5EncoderModel:
        model = self.finished(self.text_recipe())
        assert isinstance(model, TextFoundation)
        return model.encoder

    def decoder_recipe(self) -> Recipe:
        vae = self.vae()
        stills, clips = (
            Captioned(self.runs / "cache", vae, video, count, self.tell)
            for video, count in ((False, STILLS), (True, CLIPS))
        )
        return decoder_recipe(stills, clips, self.tokenizer(), self.text_encoder(), compiled=self.compiled)

    def mllm_recipe(self) -> Recipe:
        return mllm.mllm_recipe(mllm.load_or_build_tokenizer(self.runs / "mllm" / "tokenizer"))

    def train(self, name: str, out: Console) -> None:
        """One recipe, or all of them in order for "tiny"; raises InvalidInput for a name that is none."""
        makers: dict[str, Callable[[], Recipe]] = {
            "vae": vae_recipe,
            "text": self.text_recipe,
            "decoder": self.decoder_recipe,
            "visual_encoder": visual_encoder_recipe,
            "mllm": self.mllm_recipe,
        }
        if name != "tiny" and name not in makers:
            raise InvalidInput("recipe", f"{name!r} is not one of tiny, {', '.join(makers)}")
        for chosen in makers if name == "tiny" else [name]:
            train_one(makers[chosen](), self.runs / chosen, out)


def train_one(recipe: Recipe, folder: Path, out: Console) -> None:
    """Trains to the end with a progress bar, prints what is trainable, and draws the losses."""
    trainer = Trainer(recipe, folder)
    weights = sum(parameter.numel() for _, parameter in trainer.named)
    tops = sorted({".".join(key.split(".")[:2]) for key, _ in trainer.named})
    out.print(f"[bold]{recipe.name}[/bold]: {weights:,} trainable weights in {', '.join(tops)}")
    columns = (TextColumn(recipe.name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.description}"), console=out) as bar:
        row = bar.add_task("", total=recipe.steps, completed=trainer.step)

        def tell(progress: Progress) -> None:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in progress.losses.items())
            bar.update(row, completed=progress.step, description=shown)

        trainer.run(tell=tell)
    plot_losses(folder / "log.jsonl", folder / "loss.png", recipe.name)
