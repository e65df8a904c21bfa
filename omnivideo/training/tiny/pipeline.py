"""Train the tiny preset from scratch: every recipe in order, each resumable, in one folder of runs."""

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
from transformers import Qwen3VLForConditionalGeneration, SiglipVisionModel, UMT5Config, UMT5EncoderModel

from omnivideo.contracts import TASKS, get_task_medium, is_editing_task
from omnivideo.errors import InvalidInput
from omnivideo.models.omni import Bridge, OmniVideoModel, build_decoder
from omnivideo.models.positions import add_absolute_positions
from omnivideo.models.weights.checkpoint import load_bridge, load_strict, save, save_library_model
from omnivideo.models.weights.shipped import SHIPPED_WEIGHTS_FOLDER
from omnivideo.presets import TINY, Task
from omnivideo.synthetic.requests import CONTINUATION_TASKS, sample_requests
from omnivideo.synthetic.scenes import CLIP_FRAMES, LONG_CLIP_FRAMES, stream_scenes
from omnivideo.training.config import SHARD_RECIPES
from omnivideo.training.data.batch import CachedTask
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.engine.run import RunContext
from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.recipes import parts
from omnivideo.training.recipes.flow import FLOW_BATCH_SIZES
from omnivideo.training.tiny import alignment_stages, flow_stages, mllm, text_encoder
from omnivideo.training.tiny.decoder import (
    BATCH_SIZES,
    SCENE_COUNTS,
    CaptionedLatents,
    DecoderFoundation,
    build_decoder_recipe,
)
from omnivideo.training.tiny.feature_cache import CHUNK_SIZE, PreparationConfig, load_cached_task
from omnivideo.training.tiny.flow_stages import LONG
from omnivideo.training.tiny.latents import encode_scenes, hash_weights, set_latent_statistics, take_scenes
from omnivideo.training.tiny.model_card import build_model_card
from omnivideo.training.tiny.vae import CONTINUED_PHASES, build_vae_decoder_recipe, build_vae_recipe
from omnivideo.training.tiny.visual_encoder import build_visual_encoder_recipe

REQUESTS_PER_TASK, LONG_REQUESTS = 12_000, 6_000  # in stages 2b and 3; of clips with 17 frames
# Each further seed adds as many edits to stage 3, which would otherwise memorise them.
REQUEST_SEEDS = (1, 3, 4)


class TinyPipeline:
    """The recipes over one folder of runs; each loads what it needs from the runs of earlier recipes.

    The shipped weights replace the run of a foundation that is missing. Weights that the configuration names replace
    every missing run: the foundations and stage 1 continue from them, and a stage without a run leaves its parts as the
    stage before it. Stages 2b and 3 sample their requests with the first configured seed; stage 3 samples further edits
    with the other seeds.
    """

    def __init__(self, run: RunContext, shipped_weights: Path = SHIPPED_WEIGHTS_FOLDER / "tiny"):
        self.run, config = run, run.config
        self.runs_folder = config.runs
        self.weights_folder = config.weights or shipped_weights
        self.continues_from_weights = config.weights is not None
        self.device = run.device
        self.workers = workers = config.workers
        self.batch_scale = batch_scale = config.batch_scale
        self.request_seeds = request_seeds = config.seeds or REQUEST_SEEDS
        self.preparation = PreparationConfig(
            chunk_size=CHUNK_SIZE if self.device.type == "cpu" else 512, workers=workers
        )
        self.recipe_factories: dict[str, Callable[[], Recipe]] = {
            "vae": self.build_vae_recipe,
            "vae_decoder": lambda: build_vae_decoder_recipe(self.load_jointly_trained_vae()),
            "text": self.build_text_recipe,
            "decoder": self.build_decoder_recipe,
            "visual_encoder": build_visual_encoder_recipe,
            "mllm": self.build_mllm_recipe,
            "stage1": lambda: alignment_stages.build_stage1_recipe(
                self.load_omni("mllm"),
                self.load_visual_encoder(),
                batch_size=alignment_stages.STAGE1_BATCH_SIZE * batch_scale,
                workers=workers,
            ),
            "stage1_text": lambda: alignment_stages.build_stage1_text_recipe(
                self.load_omni("stage1"), batch_size=alignment_stages.TEXT_BATCH_SIZE * batch_scale, workers=workers
            ),
            "stage2a": lambda: alignment_stages.build_stage2a_recipe(self.load_omni("stage1")),
            "stage2b_generation": lambda: self.build_flow_recipe(
                flow_stages.build_stage2b_generation_recipe, "stage2a"
            ),
            "stage2b": lambda: self.build_flow_recipe(flow_stages.build_stage2b_recipe, "stage2b_generation"),
            "stage3": lambda: self.build_flow_recipe(flow_stages.build_stage3_recipe, "stage2b", request_seeds[1:]),
        }

    def load_trained(self, recipe: Recipe) -> Any:
        """Return a recipe's model with the averaged weights of its latest checkpoint."""
        return (
            Trainer(recipe, self.run.get_state_file(recipe.name).parent)
            .apply_ema_weights()
            .eval()
            .requires_grad_(False)
        )

    def load_vae(self) -> AutoencoderKLWan:
        """Return the trained VAE, with the decoder of `vae_decoder` if it has run."""
        if not self.run.has_run("vae_decoder"):
            return self.load_jointly_trained_vae()
        return self.load_trained(self.recipe_factories["vae_decoder"]()).to(self.device)

    def build_vae_recipe(self) -> Recipe:
        """Build the recipe of the VAE; it continues from the configured weights without the first phases."""
        if not self.continues_from_weights:
            return build_vae_recipe()
        recipe = build_vae_recipe(CONTINUED_PHASES)
        recipe.model.load_state_dict(self.load_shipped_part(AutoencoderKLWan, "vae").state_dict())
        return recipe

    def load_jointly_trained_vae(self) -> AutoencoderKLWan:
        """Return the VAE of the recipe `vae`, with latent statistics that are measured once on stills and clips."""
        if not self.run.has_run("vae"):
            return self.load_shipped_part(AutoencoderKLWan, "vae")
        vae = self.load_trained(self.build_vae_recipe()).to(self.device)
        path = self.runs_folder / "vae" / f"statistics-{hash_weights(vae)}.pt"
        if not path.exists():
            samples = [
                encode_scenes(vae, take_scenes(stream_scenes(2, frame_count > 1, frame_counts=[frame_count]), count))
                for frame_count, count in ((1, 512), (CLIP_FRAMES, 384), (LONG_CLIP_FRAMES, 128))
            ]
            set_latent_statistics(vae, samples)
            torch.save({"mean": vae.config.latents_mean, "std": vae.config.latents_std}, path)
        saved = torch.load(path, weights_only=True)
        vae.register_to_config(latents_mean=saved["mean"], latents_std=saved["std"])
        return vae

    def starts_from_nothing(self, recipe: str) -> bool:
        """Return whether a recipe has neither a run nor weights to continue from; it then builds its own tokenizer."""
        return not self.continues_from_weights and not self.run.has_run(recipe)

    def build_text_recipe(self) -> Recipe:
        folder = self.runs_folder / "text" / "tokenizer"
        from_nothing = self.starts_from_nothing("text")
        tokenizer = text_encoder.load_or_build_tokenizer(folder) if from_nothing else self.load_tokenizer()
        known_encoder = self.load_known_part(UMT5EncoderModel, "text_encoder")
        return text_encoder.build_text_recipe(tokenizer, known_encoder=known_encoder)

    def load_tokenizer(self) -> Any:
        return text_encoder.load_or_build_tokenizer(
            resolve_tokenizer_folder("tokenizer", self.runs_folder / "text" / "tokenizer", self.weights_folder)
        )

    def load_mllm_tokenizer(self) -> Any:
        return mllm.load_or_build_tokenizer(
            resolve_tokenizer_folder("mllm", self.runs_folder / "mllm" / "tokenizer", self.weights_folder)
        )

    def load_text_encoder(self) -> UMT5EncoderModel:
        if not self.run.has_run("text"):
            return self.load_shipped_part(UMT5EncoderModel, "text_encoder")
        return self.load_trained(self.recipe_factories["text"]()).encoder.to(self.device)

    def load_shipped_part(self, model_class: Any, name: str) -> Any:
        """Return a part of the weights that replace missing runs."""
        return (
            load_strict(model_class, self.weights_folder, name, torch.float32)
            .eval()
            .requires_grad_(False)
            .to(self.device)
        )

    def load_known_part(self, model_class: Any, name: str) -> Any:
        """Return the part with which its recipe goes on; None if it starts from nothing."""
        return self.load_shipped_part(model_class, name) if self.continues_from_weights else None

    def build_mllm_recipe(self) -> Recipe:
        folder = self.runs_folder / "mllm" / "tokenizer"
        tokenizer = (
            mllm.load_or_build_tokenizer(folder) if self.starts_from_nothing("mllm") else self.load_mllm_tokenizer()
        )
        recipe = mllm.build_mllm_recipe(tokenizer, batch_size=mllm.BATCH_SIZE * self.batch_scale, workers=self.workers)
        if self.continues_from_weights:
            recipe.model.load_state_dict(self.load_shipped_part(Qwen3VLForConditionalGeneration, "mllm").state_dict())
        return recipe

    def load_mllm(self) -> Qwen3VLForConditionalGeneration:
        if self.continues_from_weights and not self.run.has_run("mllm"):
            return self.load_shipped_part(Qwen3VLForConditionalGeneration, "mllm")
        return self.load_trained(self.build_mllm_recipe()).to(self.device)

    def build_decoder_recipe(self) -> Recipe:
        vae = self.load_vae()
        sources = []
        for frame_count, count in SCENE_COUNTS.items():
            with self.run.show_preparation(f"latents of {frame_count} frames") as on_progress:
                sources.append(CaptionedLatents(self.runs_folder / "cache", vae, frame_count, count, on_progress))
        known_decoder = self.load_known_part(WanTransformer3DModel, "transformer")
        batch_sizes = {frames: size * self.batch_scale for frames, size in BATCH_SIZES.items()}
        tokenizer, encoder = self.load_tokenizer(), self.load_text_encoder()
        return build_decoder_recipe(sources, tokenizer, encoder, batch_sizes=batch_sizes, known_decoder=known_decoder)

    def load_foundation(self) -> DecoderFoundation:
        """Return the decoder with the text encoder of its training, or the parts that replace its missing run."""
        if self.run.has_run("decoder"):
            model = DecoderFoundation(build_decoder(TINY), UMT5EncoderModel(UMT5Config(**text_encoder.CONFIG)))
            state = torch.load(self.runs_folder / "decoder" / "state.pt", weights_only=True)
            model.load_state_dict(state["model"] | state["average"])
        else:
            decoder = self.load_shipped_part(WanTransformer3DModel, "transformer")
            model = DecoderFoundation(add_absolute_positions(decoder), self.load_text_encoder())
        return model.eval().requires_grad_(False)

    def load_visual_encoder(self) -> SiglipVisionModel:
        if not self.run.has_run("visual_encoder"):
            return self.load_shipped_part(SiglipVisionModel, "visual_encoder")
        return self.load_trained(build_visual_encoder_recipe()).encoder.to(self.device)

    def load_omni(self, after_recipe: str) -> OmniVideoModel:
        """Return the model after a recipe: "mllm" (the foundations), or one of the stages."""
        foundation = self.load_foundation()
        omni = OmniVideoModel(
            preset=TINY,
            mllm=self.load_mllm(),
            mllm_tokenizer=self.load_mllm_tokenizer(),
            bridge=build_seeded_bridge(),
            decoder=foundation.decoder,
            text_encoder=foundation.text_encoder,
            tokenizer=self.load_tokenizer(),
            vae=self.load_vae(),
        )
        last_recipe = self.find_last_run(after_recipe)
        if last_recipe != "mllm":
            state = torch.load(self.run.get_state_file(last_recipe), weights_only=True)
            parts.TrainableParts(omni).load_state_dict(state["model"] | state["average"])
        elif self.continues_from_weights:
            omni.bridge = load_bridge(TINY, self.weights_folder, lambda part: torch.float32)
        if after_recipe not in ("mllm", "stage1") and self.run.has_run("stage1_text"):
            text_head = torch.load(self.run.get_state_file("stage1_text"), weights_only=True)["average"]
            parts.TrainableParts(omni).load_state_dict(text_head, strict=False)
        return omni.to(self.device).eval()

    def find_last_run(self, after_recipe: str) -> str:
        """Return the stage whose run has the weights after a recipe; "mllm" if they are the foundations.

        Without weights to continue from, every stage must have run.
        """
        if not self.continues_from_weights:
            return after_recipe
        stages = SHARD_RECIPES[: SHARD_RECIPES.index(after_recipe) + 1] if after_recipe in SHARD_RECIPES else ()
        return next((stage for stage in reversed(stages) if self.run.has_run(stage)), "mllm")

    def build_flow_recipe(
        self, recipe_factory: Callable[..., Recipe], after_recipe: str, extra_edit_seeds: Sequence[int] = ()
    ) -> Recipe:
        """Build a recipe over cached features of the four tasks, with more edits for each of `extra_edit_seeds`."""
        omni, encoder = self.load_omni(after_recipe), self.load_visual_encoder()

        def load_task(seed: int, task: Task, is_long: bool = False) -> CachedTask:
            count, frame_count = (LONG_REQUESTS, LONG_CLIP_FRAMES) if is_long else (REQUESTS_PER_TASK, None)
            requests = sample_requests(seed, task, count, frame_count)
            with self.run.show_preparation(f"features of {task}, {count:,} requests") as on_progress:
                preparation = replace(self.preparation, on_progress=on_progress)
                return load_cached_task(self.runs_folder / "cache", omni, encoder, requests, preparation)

        first_seed = self.request_seeds[0]
        data = {str(task): load_task(first_seed, task) for task in (*TASKS, *CONTINUATION_TASKS)}
        for task in TASKS:
            if get_task_medium(task) == "video":
                data[f"{LONG}{task}"] = load_task(first_seed, task, is_long=True)
        for seed, task in product(extra_edit_seeds, filter(is_editing_task, TASKS)):
            data[task] += load_task(seed, task)
        stills, clips = FLOW_BATCH_SIZES
        return recipe_factory(
            omni, data, batch_sizes=(stills * self.batch_scale, clips * self.batch_scale), workers=self.workers
        )

    def train(self) -> None:
        """Train the configured recipe, or all of them in order and export the preset for "tiny"; "export" only exports.

        Raises InvalidInput for an unknown recipe.
        """
        name = self.run.config.recipe
        recipes = {"tiny": list(self.recipe_factories), "export": list[str]()}.get(name, [name])
        if name not in ("tiny", "export", *self.recipe_factories):
            raise InvalidInput("recipe", f"{name!r} is not one of tiny, export, {', '.join(self.recipe_factories)}")
        if name in self.recipe_factories:
            parts.check_sampling(self.run.config)
        for recipe_name in recipes:
            self.run.build_and_train(self.recipe_factories[recipe_name])
        if name not in self.recipe_factories and self.run.processes.is_main_process:
            self.export_preset(self.runs_folder / "tiny")

    def export_preset(self, folder: Path) -> None:
        """Write the preset in the shipped layout, with its model card.

        The card contains scores if `runs/scores.json` exists, which
        `omnivideo evaluate tiny --weights runs/tiny --report runs/scores.json` writes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        save_library_model(self.load_visual_encoder(), folder / "visual_encoder", torch.float16)
        save(self.load_omni("stage3"), folder)  # last, because its index covers all files of the folder
        report = self.runs_folder / "scores.json"
        scores = json.loads(report.read_text()) if report.exists() else {}
        earlier_card = self.weights_folder / "README.md"
        markdown = build_model_card(
            self.runs_folder,
            self.recipe_factories,
            read_git_commit(),
            f"{platform.machine()}, {os.cpu_count()} cores",
            scores,
            earlier_card.read_text() if earlier_card.exists() else "",
        )
        (folder / "README.md").write_text(markdown)

    def export_foundations(self, folder: Path) -> None:
        """Write the trained foundations in the shipped layout, so that another machine can continue from them."""
        foundation = self.load_foundation()
        parts = {"vae": self.load_vae(), "transformer": foundation.decoder, "text_encoder": foundation.text_encoder}
        if self.run.has_run("visual_encoder"):
            parts["visual_encoder"] = self.load_visual_encoder()
        folder.mkdir(parents=True, exist_ok=True)
        for name, model in parts.items():
            save_library_model(model, folder / name, torch.float16)
        self.load_tokenizer().save_pretrained(folder / "tokenizer")


def read_git_commit() -> str:
    """Return the commit of the checkout, or "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def resolve_tokenizer_folder(name: str, run_folder: Path, shipped_folder: Path) -> Path:
    """Return a tokenizer's folder: that of its run, or the shipped one if there is no run."""
    use_shipped = (shipped_folder / name / "tokenizer.json").exists() and not (run_folder / "tokenizer.json").exists()
    return shipped_folder / name if use_shipped else run_folder


def build_seeded_bridge() -> Bridge:
    """Return the bridge with random weights from a fixed seed, with which stage 1 starts."""
    torch.manual_seed(10)
    return Bridge(TINY)
