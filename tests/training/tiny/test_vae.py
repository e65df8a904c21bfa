"""Training the VAE's decoder alone."""

import torch

from omnivideo.training.engine.trainer import Trainer
from tests.support.recipes import make_vae_decoder_recipe


def test_training_the_decoder_leaves_the_encoder_unchanged(request, tmp_path):
    recipe = make_vae_decoder_recipe(request)
    before = {key: value.clone() for key, value in recipe.model.state_dict().items()}
    Trainer(recipe, tmp_path).run(stop_at_step=2)
    changed = {
        key.split(".")[0] for key, value in recipe.model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {"decoder", "post_quant_conv"}
