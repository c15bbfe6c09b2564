"""SAM 3's DETR decoder, to which training may add a second group of queries."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam3.modeling_sam3 import (
    Sam3Attention,
    Sam3DetrDecoder,
    Sam3DetrDecoderLayer,
    Sam3DETRDecoderOutput,
)


class FirstGroupAttention(Sam3Attention):
    """Self-attention of presence token and queries; a second group of queries passes it by."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        first = 1 + self.config.num_queries  # the presence token leads
        if query.shape[1] == first:
            return super().forward(query, key, value, attention_mask, **kwargs)
        output, weights = super().forward(
            query[:, :first], key[:, :first], value[:, :first], attention_mask, **kwargs
        )
        return F.pad(output, (0, 0, 0, query.shape[1] - first)), weights


class EfficientSam3DetrDecoderLayer(Sam3DetrDecoderLayer):
    """SAM 3's layer, in which a second group of queries skips self-attention, not its norm."""

    def __init__(self, config):
        super().__init__(config)
        self.self_attn = FirstGroupAttention(config)


class EfficientSam3DetrDecoder(Sam3DetrDecoder):
    """SAM 3's decoder, which also decodes its queries a second time without self-attention.

    Queries that do not see one another do not share out instances between them. So each of them may
    learn from what lies below it, and an instance may teach many (DAC-DETR).
    """

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(
            EfficientSam3DetrDecoderLayer(config) for _ in range(config.num_layers)
        )
        self.post_init()

    def decode_twice(self, **inputs) -> Sam3DETRDecoderOutput:
        """As `forward`, with the second group's queries after the first's.

        The outputs of the first group and of presence are those of `forward`.
        """
        names = ("query_embed.weight", "reference_points.weight")
        doubled = {name: self.get_parameter(name).repeat(2, 1) for name in names}
        return torch.func.functional_call(self, doubled, kwargs=inputs)

    @torch.no_grad()
    def init_local_box_bias(self) -> None:
        """Make queries look at the inside of their reference boxes from the start.

        The bias that tells attention where the box lies is random otherwise, and a decoder that
        learns from scratch finds no use for it: all queries give the same mask. Here the bias falls
        with the distance from the box, on half of the heads steeply.
        """
        heads = self.config.num_attention_heads
        for embed in (self.box_rpb_embed_x, self.box_rpb_embed_y):
            # Of the distances from the box's two edges: how far before the one, and past the other.
            embed.layer1.weight[:2] = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
            embed.layer1.bias.zero_()
            embed.layer2.weight[:, :2] = -6.0
            embed.layer2.weight[: heads // 2, :2] = -12.0
