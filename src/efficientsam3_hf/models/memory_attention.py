"""Attention of a frame to what a tracker remembers, for dense memories and those of a Perceiver.

The weights are those of transformers' `Sam3TrackerVideoMemoryAttention`, so SAM 3's fit; with
fewer layers, its first ones do. Ours are the rotary positions of latents, and a mask, by which
objects that remember different numbers of frames go through in one pass.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import attend
from .configuration_efficientsam3_video import EfficientSam3TrackerVideoConfig
from .perceiver_memory import window_bounds


class EfficientSam3MemoryAttention(nn.Module):
    """Layers in which the pixels of a frame look at one another, and then at the memory."""

    def __init__(self, config: EfficientSam3TrackerVideoConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            EfficientSam3MemoryAttentionLayer(config)
            for _ in range(config.memory_attention_num_layers)
        )
        self.layer_norm = nn.LayerNorm(config.memory_attention_hidden_size)

    def forward(
        self,
        features: Tensor,
        positions: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
        num_object_pointer_tokens: int = 0,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Condition the features of a frame on the memory of each object.

        Args:
            features: Coarsest map (batch, height * width, channels) of the frame.
            positions: Its position encoding, of the same shape or with a batch of 1.
            memory: (batch, tokens, memory channels): the memories of several frames one after
                another, `config.tokens_per_memory` each, then the tokens of object pointers.
            memory_positions: Of the same shape.
            num_object_pointer_tokens: How many tokens at the end come from pointers.
            valid: (batch, tokens), true for tokens that are not padding. None for no padding.

        Returns:
            Features of the same shape.
        """
        spatial_tokens = memory.shape[1] - num_object_pointer_tokens
        num_frames, remainder = divmod(spatial_tokens, self.config.tokens_per_memory)
        if remainder:
            raise ValueError(
                f"{spatial_tokens} tokens are no multiple of the {self.config.tokens_per_memory} "
                "by which one frame is remembered."
            )
        rotation = Rotation.of_grid(self.config, features.device)
        key_rotation = Rotation.of_memory(self.config, features.device).repeat(num_frames)
        # Left for the attention to broadcast: spread out, it would be as large as all scores.
        mask = None if valid is None else valid[:, None, None]

        hidden_states = features + 0.1 * positions
        keys = memory + memory_positions
        for layer in self.layers:
            hidden_states = layer(hidden_states, keys, memory, rotation, key_rotation, mask)
        return self.layer_norm(hidden_states)


class EfficientSam3MemoryAttentionLayer(GradientCheckpointingLayer):
    """Self-attention, attention to the memory, feed-forward; each with its norm before it."""

    def __init__(self, config: EfficientSam3TrackerVideoConfig):
        super().__init__()
        width = config.memory_attention_hidden_size
        self.self_attn = EfficientSam3RotaryAttention(config, width)
        self.cross_attn_image = EfficientSam3RotaryAttention(
            config, config.memory_encoder_output_channels
        )
        self.linear1 = nn.Linear(width, config.memory_attention_feed_forward_hidden_size)
        self.linear2 = nn.Linear(config.memory_attention_feed_forward_hidden_size, width)
        self.layer_norm1 = nn.LayerNorm(width)
        self.layer_norm2 = nn.LayerNorm(width)
        self.layer_norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.memory_attention_dropout)
        self.activation = ACT2FN[config.memory_attention_feed_forward_hidden_act]

    def forward(
        self,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        rotation: "Rotation",
        key_rotation: "Rotation",
        mask: Tensor | None,
    ) -> Tensor:
        query = self.layer_norm1(hidden_states)
        query = self.self_attn(query, query, query, rotation, rotation)
        hidden_states = hidden_states + self.dropout(query)

        query = self.layer_norm2(hidden_states)
        query = self.cross_attn_image(query, keys, values, rotation, key_rotation, mask)
        hidden_states = hidden_states + self.dropout(query)

        query = self.layer_norm3(hidden_states)
        query = self.linear2(self.dropout(self.activation(self.linear1(query))))
        return hidden_states + self.dropout(query)


class EfficientSam3RotaryAttention(nn.Module):
    """Multi-head attention whose queries and keys are turned by their positions."""

    def __init__(self, config: EfficientSam3TrackerVideoConfig, memory_width: int):
        super().__init__()
        self.config = config
        width = config.memory_attention_hidden_size
        inner = width // config.memory_attention_downsample_rate
        self.num_heads = config.memory_attention_num_attention_heads
        self.scaling = (inner // self.num_heads) ** -0.5
        self.is_causal = False
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(memory_width, inner)
        self.v_proj = nn.Linear(memory_width, inner)
        self.o_proj = nn.Linear(inner, width)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: "Rotation",
        key_rotation: "Rotation",
        mask: Tensor | None = None,
    ) -> Tensor:
        query, key, value = (
            projection(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, tokens in (
                (self.q_proj, query),
                (self.k_proj, key),
                (self.v_proj, value),
            )
        )  # (batch, heads, tokens, channels)
        dropout = self.config.memory_attention_rope_dropout if self.training else 0.0
        output = attend(
            self, rotation.turn(query), key_rotation.turn(key), value, mask, self.scaling, dropout
        )
        return self.o_proj(output.flatten(-2))


class Rotation:
    """The angles by which the channels of tokens are turned, pair by pair.

    They are computed in every forward: a table kept as a buffer would be in no checkpoint, and
    hold garbage after a model has been built without memory.

    Args:
        angles: (tokens, channels / 2), in float32. Tokens beyond them are not turned.
    """

    def __init__(self, angles: Tensor):
        self.cosine = angles.cos().repeat_interleave(2, dim=-1)
        self.sine = angles.sin().repeat_interleave(2, dim=-1)

    @classmethod
    def of_grid(cls, config: EfficientSam3TrackerVideoConfig, device: torch.device) -> "Rotation":
        """One token for each pixel of the coarsest map."""
        sides = torch.arange(config.grid_size, dtype=torch.float32, device=device)
        return cls(grid_angles(config, sides))

    @classmethod
    def of_memory(cls, config: EfficientSam3TrackerVideoConfig, device: torch.device) -> "Rotation":
        """The tokens by which one frame is remembered.

        Latents that look at the whole map are nowhere, and not turned. Those of windows sit at
        the middle of their windows, in pixels of the map, as the queries do: then a latent and the
        pixels it has seen are turned alike, whatever the number of windows.
        """
        if config.memory == "dense":
            return cls.of_grid(config, device)
        side = round(config.perceiver_resampler_num_latents_2d**0.5)
        bounds = window_bounds(config.grid_size, side)
        middles = torch.tensor(
            [(start + end - 1) / 2 for start, end in bounds], dtype=torch.float32, device=device
        )
        angles = grid_angles(config, middles)
        nowhere = angles.new_zeros(config.perceiver_resampler_num_latents, angles.shape[-1])
        return cls(torch.cat([nowhere, angles]))

    def repeat(self, count: int) -> "Rotation":
        """The same for several memories one after another."""
        repeated = object.__new__(Rotation)
        repeated.cosine, repeated.sine = self.cosine.repeat(count, 1), self.sine.repeat(count, 1)
        return repeated

    def turn(self, tokens: Tensor) -> Tensor:
        """Turn tokens (batch, heads, tokens, channels); in float32, as transformers does."""
        count = len(self.cosine)
        turned = tokens[..., :count, :].float()
        pairs = turned.unflatten(-1, (-1, 2))
        quarter_turn = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        turned = (turned * self.cosine + quarter_turn * self.sine).to(tokens.dtype)
        return (
            turned if count == tokens.shape[-2] else torch.cat([turned, tokens[..., count:, :]], -2)
        )


def grid_angles(config: EfficientSam3TrackerVideoConfig, sides: Tensor) -> Tensor:
    """Angles (tokens, channels / 2) of a square grid whose rows and columns lie at `sides`."""
    inner = config.memory_attention_hidden_size // config.memory_attention_downsample_rate
    half = inner // config.memory_attention_num_attention_heads // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=sides.device) / half
    frequencies = 1.0 / config.rope_parameters["rope_theta"] ** exponents
    rows, columns = torch.meshgrid(sides, sides, indexing="ij")
    return torch.cat([axis.reshape(-1, 1) * frequencies for axis in (columns, rows)], dim=-1)
