"""The joining parts of the paper: vision head, adapter and visual context adapter (sections 3.2 and 3.3).

Sizes and parameter names follow the released weights, so that those load strictly.
Shapes: B batch, N hidden states of the MLLM, L tokens, Q learned queries, M width of the MLLM, E width of the visual
encoder, D text width of the decoder.
"""

from typing import Any

import torch
from torch import Tensor, nn

from omnivideo.models.positions import build_grid_positions


def build_transformer(width: int, layers: int, heads: int) -> nn.Transformer:
    """Pre-norm encoder-decoder with ReLU and a four times wider feed-forward."""
    shape: dict[str, Any] = {"dim_feedforward": 4 * width, "dropout": 0.0, "batch_first": True, "norm_first": True}
    layer = nn.TransformerEncoderLayer(width, heads, **shape)
    # Given by hand only because nn.Transformer's own warns that nested tensors need post-norm.
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
    return nn.Transformer(width, heads, layers, layers, custom_encoder=encoder, **shape)


class QueryTransformer(nn.Module):
    """A two-layer projection, then an encoder over the input and a decoder whose learned queries read it.

    [B, L, in] -> [B, Q, width].  Parameters: `fc`, `adapter` and `decoder_query` of the released adapter.
    """

    def __init__(self, dim_in: int, width: int, num_queries: int, layers: int, heads: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(dim_in, width), nn.GELU(), nn.Linear(width, width))
        self.adapter = build_transformer(width, layers, heads)
        self.decoder_query = nn.Parameter(torch.randn(1, num_queries, width) * 0.02)

    @property
    def num_queries(self) -> int:
        return self.decoder_query.shape[1]

    def forward(self, x_BLI: Tensor, padding_BL: Tensor | None = None) -> Tensor:
        """`padding_BL` is True where a token is padding."""
        return self.adapter(
            self.fc(x_BLI),
            self.decoder_query.expand(len(x_BLI), -1, -1),
            src_key_padding_mask=padding_BL,
            memory_key_padding_mask=padding_BL,
        )


class VisionHead(QueryTransformer):
    """Continuous visual tokens V_o (Eq. 1) from the last hidden states of the whole sequence.

    [B, N, M] -> [B, Q, E].  Q is 4: one token per quarter of a clip; an image uses the first alone.
    """


class Adapter(QueryTransformer):
    """Q = Adapter(V_o) (Eq. 3): visual tokens into the decoder's text space.

    Every visual token goes through alone: [B, L, E] -> [B, L * Q, D].
    """

    def forward(self, x_BLE: Tensor, padding_BL: Tensor | None = None) -> Tensor:
        batch, length, width = x_BLE.shape
        out = super().forward(x_BLE.reshape(batch * length, 1, width))
        return out.reshape(batch, -1, out.shape[-1])


class VisualContextAdapter(nn.Module):
    """The source's latents as condition tokens, for editing: [B, z, T, h, w] -> [B, T * h/k * w/k, D].

    `absolute_positions` adds fixed positions of the token grid, which the released model does without.
    """

    def __init__(self, channels: int, hidden: int, dim: int, kernel: int, absolute_positions: bool):
        super().__init__()
        self.patch_embedding = nn.Conv3d(channels, hidden, (1, kernel, kernel), (1, kernel, kernel))
        self.projection = nn.Linear(hidden, dim)
        self.absolute_positions = absolute_positions

    def forward(self, latents_BzThw: Tensor) -> Tensor:
        patches = self.patch_embedding(latents_BzThw)
        tokens = nn.functional.layer_norm(patches.flatten(2).mT, (patches.shape[1],))
        out = nn.functional.layer_norm(self.projection(tokens), (self.projection.out_features,))
        if self.absolute_positions:
            out = out + build_grid_positions(out.shape[-1], *patches.shape[2:]).flatten(1).mT.to(out)
        return out


class HiddenProjection(nn.Module):
    """Version 2 in place of vision head and adapter: the MLLM's hidden states, normalised and projected.

    [B, N, M] -> [B, N, D].
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, dim)

    def forward(self, x_BNM: Tensor) -> Tensor:
        return self.proj(self.norm(x_BNM))
