"""Further training of the VAE's decoder."""

import torch

from omnivideo.training.engine.trainer import Trainer
from tests.support.recipes import vae_decoder_recipe


def test_a_vae_whose_decoder_goes_on_encodes_as_before(request, tmp_path):
    recipe = vae_decoder_recipe(request)
    before = {key: value.clone() for key, value in recipe.model.state_dict().items()}
    Trainer(recipe, tmp_path).run(stop_at_step=2)
    moved = {
        key.split(".")[0] for key, value in recipe.model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {"decoder", "post_quant_conv"}
