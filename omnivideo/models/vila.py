"""VILA, the MLLM of version 1: a SigLIP tower, a projector and a Llama, all stock except the projector.

The projector turns each 2 x 2 patches into one token of the Llama. `vila_requests` makes the inputs.
Shapes: F images, H W pixels, P patches, K tokens of an image, S width of the tower, N or T tokens, M of the Llama,
h of its attention heads that share a key, d width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from omnivideo.models.vila_requests import IMAGE_TOKEN_ID, VilaImageConfig

MERGE_SIZE = 2  # patches along each side of one token
REPELLED_SCORE = 1000.0  # exp(-1000) is 0 in every precision


def join_patches(features_FPS: Tensor) -> Tensor:
    """Return the 2 x 2 patches of a square grid side by side [F, K, 4 S]; an odd side gets a row and column of zeros.

    The tokens run column by column, as in VILA.
    """
    count, patches, width = features_FPS.shape
    side = round(patches**0.5)
    grid_FHWS = features_FPS.view(count, side, side, width)
    extra = -side % MERGE_SIZE
    grid_FHWS = nn.functional.pad(grid_FHWS, (0, 0, 0, extra, 0, extra))
    half = (side + extra) // MERGE_SIZE
    x = grid_FHWS.view(count, half, MERGE_SIZE, half, MERGE_SIZE, width)
    # To (token's column, token's row), then within a token (row, column).
    return x.permute(0, 3, 1, 2, 4, 5).reshape(count, half * half, MERGE_SIZE**2 * width)


class PatchJoin(nn.Module):
    """`join_patches` as a layer, so that the following layers have the numbers of the published keys."""

    def forward(self, features_FPS: Tensor) -> Tensor:
        return join_patches(features_FPS)


class VilaProjector(nn.Module):
    """Turns the tower's patches [F, P, S] into the Llama's tokens [F, K, M]."""

    def __init__(self, tower_width: int, llm_width: int):
        super().__init__()
        joined_width = MERGE_SIZE**2 * tower_width
        self.layers = nn.Sequential(
            PatchJoin(),
            nn.LayerNorm(joined_width),
            nn.Linear(joined_width, llm_width),
            nn.GELU(),
            nn.Linear(llm_width, llm_width),
        )

    def forward(self, features_FPS: Tensor) -> Tensor:
        tokens_FKM: Tensor = self.layers(features_FPS)
        return tokens_FKM


class Vila(nn.Module):
    """The three parts of VILA. `select_layer` is the index of the tower's hidden states that the projector gets."""

    def __init__(
        self,
        vision_tower: SiglipVisionModel,
        projector: VilaProjector,
        llm: LlamaForCausalLM,
        select_layer: int,
        image_config: VilaImageConfig,
    ):
        super().__init__()
        self.vision_tower, self.projector, self.llm = vision_tower, projector, llm
        self.select_layer, self.image_config = select_layer, image_config

    @classmethod
    def from_configs(
        cls, vision_config: SiglipVisionConfig, llm_config: LlamaConfig, select_layer: int, image: VilaImageConfig
    ) -> "Vila":
        """Return a VILA with random weights."""
        projector = VilaProjector(vision_config.hidden_size, llm_config.hidden_size)
        return cls(SiglipVisionModel(vision_config), projector, LlamaForCausalLM(llm_config), select_layer, image)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.llm.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.llm.dtype
        return dtype

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.llm.get_input_embeddings()
        return embeddings

    def encode_images(self, pixels_F3HW: Tensor) -> Tensor:
        """Return the tokens [F, K, M] of images with pixels in -1..1."""
        pixels_F3HW = pixels_F3HW.to(self.device, self.dtype)
        out = self.vision_tower(pixels_F3HW, output_hidden_states=True)
        tokens_FKM: Tensor = self.projector(out.hidden_states[self.select_layer])
        return tokens_FKM

    def embed_request(self, token_ids: Sequence[int], pixels_F3HW: Tensor | None) -> Tensor:
        """Return the Llama's input [1, N, M]: the embedding of each token id, and an image's K tokens at each -200.

        The first images are used if there are more images than places.
        """
        ids_N = torch.tensor(token_ids, device=self.device)
        is_image_N = ids_N == IMAGE_TOKEN_ID
        embeddings_NM: Tensor = self.get_input_embeddings()(ids_N.where(~is_image_N, 0))
        places = is_image_N.nonzero()[:, 0].tolist()
        if not places:
            return embeddings_NM[None]
        assert pixels_F3HW is not None and len(places) <= len(pixels_F3HW), "every place has an image"
        tokens_FKM = self.encode_images(pixels_F3HW[: len(places)])
        embeddings_NM = embeddings_NM.to(tokens_FKM.device)  # the table may stay on another device than the tower
        pieces, start = [], 0
        for place, tokens_KM in zip(places, tokens_FKM, strict=True):
            pieces += [embeddings_NM[start:place], tokens_KM]
            start = place + 1
        return torch.cat([*pieces, embeddings_NM[start:]])[None]


def compute_repelled_keys(queries_Thd: Tensor, scale: float) -> Tensor:
    """Return for each token a key [T, d] to which all of its h queries give the attention weight 0.

    It is the shortest vector whose product with each query is -1000 / scale, by Gram-Schmidt orthogonalisation.
    """
    queries_Thd = queries_Thd.float()
    basis: list[Tensor] = []
    direction_Td = torch.zeros_like(queries_Thd[:, 0])
    for query_Td in queries_Thd.unbind(1):
        rest_Td = query_Td
        for unit_Td in basis:
            rest_Td = rest_Td - (rest_Td * unit_Td).sum(-1, keepdim=True) * unit_Td
        length_T1 = rest_Td.norm(dim=-1, keepdim=True)
        unit_Td = rest_Td / length_T1
        missing_T1 = 1 - (query_Td * direction_Td).sum(-1, keepdim=True)
        direction_Td = direction_Td + missing_T1 / length_T1 * unit_Td
        basis.append(unit_Td)
    return direction_Td * (-REPELLED_SCORE / scale)
