"""A Perceiver that sums up the memory of a frame in a few latents.

Names and arithmetic are those of transformers' `EdgeTamVideoPerceiverResampler` where that is
right; that one fails for more than one head, for more than one object, and for maps that the
latents do not divide.
"""

import math

import torch
from torch import Tensor, nn
from transformers.models.sam3.modeling_sam3 import Sam3SinePositionEmbedding

from .attention import attend
from .configuration_efficientsam3_video import EfficientSam3TrackerVideoConfig


class EfficientSam3PerceiverMemory(nn.Module):
    """Latents that have looked at a map: some at the whole, the others at one window each.

    Windows are as even as the map allows: a map of 72 x 72 and 16 x 16 latents make windows of 4
    or 5 pixels a side. Every pixel is in one window and no window is empty, which padding the map
    to whole windows would not grant (80 / 16 = 5 leaves the last two of 16 rows with nothing but
    2 and 0 pixels), nor does the map have to be resampled.
    """

    def __init__(self, config: EfficientSam3TrackerVideoConfig):
        super().__init__()
        width = config.perceiver_resampler_hidden_size
        self.side = math.isqrt(config.perceiver_resampler_num_latents_2d)
        self.latents_1d = self.latents_2d = None
        if config.perceiver_resampler_num_latents:
            self.latents_1d = nn.Parameter(
                torch.randn(config.perceiver_resampler_num_latents, width)
            )
        if self.side:
            self.latents_2d = nn.Parameter(torch.randn(self.side**2, width))
        self.layers = nn.ModuleList(
            EfficientSam3PerceiverLayer(config)
            for _ in range(config.perceiver_resampler_num_layers)
        )
        self.layer_norm = nn.LayerNorm(width)
        self.position_encoding = Sam3SinePositionEmbedding(width // 2, normalize=True)

    def forward(self, memory_map: Tensor, position_map: Tensor) -> Tensor:
        """Latents (batch, latents, channels) of a memory map (batch, channels, height, width).

        Args:
            memory_map: What the memory encoder made of a frame and its masks.
            position_map: Its position encoding, of the same shape or with a batch of 1.
        """
        batch_size = memory_map.shape[0]
        latents = []
        if self.latents_1d is not None:
            tokens = memory_map.flatten(2).transpose(1, 2)
            positions = position_map.flatten(2).transpose(1, 2)
            latents.append(self.run(self.latents_1d.expand(batch_size, -1, -1), tokens, positions))
        if self.latents_2d is not None:
            windows, inside = split_windows(memory_map, self.side)
            own = self.latents_2d.repeat(batch_size, 1)[:, None]  # (batch * windows, 1, channels)
            if inside is not None:
                inside = inside.repeat(batch_size, 1)[:, None, None]
            latents.append(self.run(own, windows, valid=inside).view(batch_size, -1, own.shape[-1]))
        return torch.cat(latents, dim=1)

    def run(
        self,
        latents: Tensor,
        tokens: Tensor,
        positions: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        for layer in self.layers:
            latents = layer(latents, tokens, positions, valid)
        return self.layer_norm(latents)

    def positions(self) -> Tensor:
        """Position encoding (latents, channels): sine of the windows' grid, zero for the others."""
        parameter = self.layer_norm.weight
        encodings = []
        if self.latents_1d is not None:
            encodings.append(torch.zeros_like(self.latents_1d, requires_grad=False))
        if self.latents_2d is not None:
            shape = (1, parameter.shape[0], self.side, self.side)
            encoding = self.position_encoding(shape, parameter.device, torch.float32)
            encodings.append(encoding[0].flatten(1).T.to(parameter.dtype))
        return torch.cat(encodings)


class EfficientSam3PerceiverLayer(nn.Module):
    """Latents look at their tokens, then at one another."""

    def __init__(self, config: EfficientSam3TrackerVideoConfig):
        super().__init__()
        width = config.perceiver_resampler_hidden_size
        self.cross_attention = EfficientSam3PerceiverAttention(config)
        self.mlp = EfficientSam3PerceiverMLP(config)
        self.self_attention = EfficientSam3PerceiverAttention(config)
        self.self_mlp = EfficientSam3PerceiverMLP(config)
        self.layer_norm_input = nn.LayerNorm(width)
        self.layer_norm_latents = nn.LayerNorm(width)
        self.layer_norm_self = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.perceiver_resampler_hidden_dropout)

    def forward(
        self, latents: Tensor, tokens: Tensor, positions: Tensor | None, valid: Tensor | None
    ) -> Tensor:
        seen = self.cross_attention(
            self.layer_norm_latents(latents), self.layer_norm_input(tokens), positions, valid
        )
        latents = latents + self.dropout(seen)
        latents = latents + self.mlp(latents)
        normed = self.layer_norm_self(latents)
        latents = latents + self.self_attention(normed, normed)
        return latents + self.self_mlp(latents)


class EfficientSam3PerceiverAttention(nn.Module):
    """Multi-head attention whose keys and values both carry the position of their token."""

    def __init__(self, config: EfficientSam3TrackerVideoConfig):
        super().__init__()
        self.config = config
        width = config.perceiver_resampler_hidden_size
        self.num_heads = config.perceiver_resampler_num_attention_heads
        self.scaling = (width // self.num_heads) ** -0.5
        self.is_causal = False
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        latents: Tensor,
        tokens: Tensor,
        positions: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        keys, values = self.k_proj(tokens), self.v_proj(tokens)
        if positions is not None:
            keys, values = keys + positions, values + positions
        query, keys, values = (
            each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for each in (self.q_proj(latents), keys, values)
        )  # (batch, heads, tokens, channels)
        dropout = self.config.perceiver_resampler_attention_dropout if self.training else 0.0
        output = attend(self, query, keys, values, valid, self.scaling, dropout)
        return self.o_proj(output.flatten(-2))


class EfficientSam3PerceiverMLP(nn.Module):
    """Norm and feed-forward, without biases."""

    def __init__(self, config: EfficientSam3TrackerVideoConfig):
        super().__init__()
        width = config.perceiver_resampler_hidden_size
        inner = config.perceiver_resampler_mlp_intermediate_size
        self.layer_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation = nn.GELU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(self.layer_norm(hidden_states))))


def window_bounds(length: int, count: int) -> list[tuple[int, int]]:
    """First pixel of each of `count` windows along a side, and the first one after it.

    >>> window_bounds(7, 3)
    [(0, 2), (2, 4), (4, 7)]
    """
    if count > length:
        raise ValueError(f"A side of {length} pixels cannot be cut into {count} windows.")
    return [(index * length // count, (index + 1) * length // count) for index in range(count)]


def split_windows(feature_map: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
    """Cut a map (batch, channels, height, width) into side x side windows.

    Returns:
        Tokens (batch * windows, pixels, channels), row by row, and which of the pixels of the
        windows (windows, pixels) are there. None where all windows have the same size.
    """
    batch_size, channels, height, width = feature_map.shape
    (rows, row_there), (columns, column_there) = (
        window_pixels(length, side, feature_map.device) for length in (height, width)
    )
    windows = feature_map[:, :, rows[:, None, :, None], columns[None, :, None, :]]
    tokens = windows.flatten(4).flatten(2, 3).permute(0, 2, 3, 1)  # (batch, windows, pixels, ...)
    tokens = tokens.reshape(batch_size * side**2, -1, channels)
    there = row_there[:, None, :, None] & column_there[None, :, None, :]
    if height % side == 0 and width % side == 0:
        return tokens, None
    return tokens, there.flatten(2).flatten(0, 1)


def window_pixels(length: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels (windows, pixels) of each window along a side, and which of them are there.

    The smaller windows are filled up with a pixel of theirs.
    """
    bounds = window_bounds(length, count)
    longest = max(end - start for start, end in bounds)
    pixels = [[min(start + step, end - 1) for step in range(longest)] for start, end in bounds]
    there = [[start + step < end for step in range(longest)] for start, end in bounds]
    return torch.tensor(pixels, device=device), torch.tensor(there, device=device)
