"""The modules between the MLLM and the decoder: vision head, adapter and visual context adapter (sections 3.2, 3.3).

Their sizes and parameter names match the released weights, so that these load strictly.
Shapes: B batch, N hidden states of the MLLM, L tokens, I input width, Q learned queries, M width of the MLLM,
E width of the visual encoder, D text width of the decoder, K condition tokens of the source, z T h w its latents.
"""

from typing import Any

import torch
from torch import Tensor, nn

from omnivideo.models.positions import build_grid_positions


def sample_parameter(*shape: int) -> nn.Parameter:
    """Return a parameter with values of standard deviation 0.02; on the meta device, which has none, without values.

    There, torch would import its symbolic shapes and sympy to sample nothing, which takes a quarter of a second.
    """
    values = torch.empty(shape)
    return nn.Parameter(values if values.is_meta else torch.randn(shape) * 0.02)


def build_transformer(width: int, layers: int, heads: int) -> nn.Transformer:
    """Return a pre-norm encoder-decoder with ReLU and a feed-forward layer of four times its width."""
    shape: dict[str, Any] = {"dim_feedforward": 4 * width, "dropout": 0.0, "batch_first": True, "norm_first": True}
    layer = nn.TransformerEncoderLayer(width, heads, **shape)
    # nn.Transformer's default encoder warns that nested tensors need post-norm layers, so we pass our own.
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
    return nn.Transformer(width, heads, layers, layers, custom_encoder=encoder, **shape)


class QueryTransformer(nn.Module):
    """A two-layer projection and an encoder over the input, and a decoder whose learned queries attend to the result.

    [B, L, I] -> [B, Q, width]. The parameters are `fc`, `adapter` and `decoder_query`, as in the released adapter.
    """

    def __init__(self, dim_in: int, width: int, num_queries: int, layers: int, heads: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(dim_in, width), nn.GELU(), nn.Linear(width, width))
        self.adapter = build_transformer(width, layers, heads)
        self.decoder_query = sample_parameter(1, num_queries, width)

    @property
    def num_queries(self) -> int:
        return self.decoder_query.shape[1]

    def forward(self, x_BLI: Tensor, padding_BL: Tensor | None = None) -> Tensor:
        """Return [B, Q, width]; `padding_BL` is True for tokens that are padding."""
        out: Tensor = self.adapter(
            self.fc(x_BLI),
            self.decoder_query.expand(len(x_BLI), -1, -1),
            src_key_padding_mask=padding_BL,
            memory_key_padding_mask=padding_BL,
        )
        return out


class VisionHead(QueryTransformer):
    """Predicts the continuous visual tokens V_o (Eq. 1) from the last hidden states of the sequence.

    [B, N, M] -> [B, Q, E]. Q is 4, one token for each quarter of a clip; an image uses only the first.
    """


class Adapter(QueryTransformer):
    """Maps visual tokens into the decoder's text space: Q = Adapter(V_o) (Eq. 3).

    [B, L, E] -> [B, L * Q, D]. Each visual token is mapped independently of the others.
    """

    def forward(self, x_BLE: Tensor, padding_BL: Tensor | None = None) -> Tensor:
        batch, length, width = x_BLE.shape
        out = super().forward(x_BLE.reshape(batch * length, 1, width))
        return out.reshape(batch, -1, out.shape[-1])


class VisualContextAdapter(nn.Module):
    """Turns the latents of an edit's source into condition tokens.

    [B, z, T, h, w] -> [B, K, D] with K = T * h/kernel * w/kernel. `eps` is that of its two layer norms.
    `absolute_positions` adds fixed positions on the token grid, which the released model does not have.
    """

    def __init__(self, channels: int, hidden: int, dim: int, kernel: int, absolute_positions: bool, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.patch_embedding = nn.Conv3d(channels, hidden, (1, kernel, kernel), (1, kernel, kernel))
        self.projection = nn.Linear(hidden, dim)
        self.absolute_positions = absolute_positions

    def forward(self, latents_BzThw: Tensor) -> Tensor:
        patches_BCThw = self.patch_embedding(latents_BzThw)
        tokens_BKC = nn.functional.layer_norm(patches_BCThw.flatten(2).mT, (patches_BCThw.shape[1],), eps=self.eps)
        out_BKD = self.projection(tokens_BKC)
        out_BKD = nn.functional.layer_norm(out_BKD, (out_BKD.shape[-1],), eps=self.eps)
        if self.absolute_positions:
            positions_DThw = build_grid_positions(out_BKD.shape[-1], *patches_BCThw.shape[2:])
            out_BKD = out_BKD + positions_DThw.flatten(1).mT.to(out_BKD)
        return out_BKD


class HiddenProjection(nn.Module):
    """Normalises and projects the MLLM's hidden states; in version 2 this replaces the vision head and the adapter.

    [B, N, M] -> [B, N, D].
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, dim)

    def forward(self, x_BNM: Tensor) -> Tensor:
        out_BND: Tensor = self.proj(self.norm(x_BNM))
        return out_BND


class NullContext(nn.Module):
    """What the null branch of version 1 has in place of a request, from the published `context.pkl`.

    `hidden_states` [1, N, M] go through the vision head and the adapter, `text` [L, D] is a text embedding. Neither is
    trained.
    """

    hidden_states: Tensor
    text: Tensor

    def __init__(self, mllm_width: int, text_width: int, num_states: int = 1, num_text_tokens: int = 1):
        super().__init__()
        self.register_buffer("hidden_states", torch.zeros(1, num_states, mllm_width))
        self.register_buffer("text", torch.zeros(num_text_tokens, text_width))
