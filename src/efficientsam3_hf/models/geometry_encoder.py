"""Exemplar boxes and points to prompt tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.sam3.modeling_sam3 import Sam3GeometryEncoder, box_cxcywh_to_xyxy

from .prompts import PADDING_LABEL


class EfficientSam3GeometryEncoder(Sam3GeometryEncoder):
    """SAM 3's geometry encoder with its point branch, which transformers leaves out.

    Its output for one prompt is a token for each point and box, and a CLS token, each having looked
    at the image.

    Args:
        config: transformers' `Sam3GeometryEncoderConfig`.
        has_point_branch: False where its weights are missing; points are then an error.
    """

    def __init__(self, config, has_point_branch: bool = True):
        super().__init__(config)
        width = config.hidden_size
        self.has_point_branch = has_point_branch
        if has_point_branch:
            self.points_direct_project = nn.Linear(2, width)
            self.points_pool_project = nn.Linear(width, width)
            self.points_pos_enc_project = nn.Linear(width, width)

    def forward(
        self,
        image_features: Tensor,
        image_positions: Tensor,
        boxes: Tensor | None = None,
        boxes_labels: Tensor | None = None,
        points: Tensor | None = None,
        points_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode the exemplars of each prompt.

        Args:
            image_features: Coarsest level (batch, channels, height, width) of the pyramid.
            image_positions: Its position encoding, of the same shape.
            boxes: (batch, boxes, 4) as (cx, cy, w, h) in [0, 1].
            boxes_labels: (batch, boxes): 1 positive, 0 negative, -10 padding.
            points: (batch, points, 2) as (x, y) in [0, 1].
            points_labels: (batch, points), as for boxes.

        Returns:
            Tokens (batch, points + boxes + 1, channels), and which of them are valid.
        """
        batch_size = image_features.shape[0]
        normalised = self.vision_layer_norm(image_features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        tokens, valid = [], []
        if points is not None:
            if not self.has_point_branch:
                raise ValueError(
                    "This model takes no exemplar points: its checkpoint has no weights for them "
                    "(config.has_point_branch is False). Prompt with a phrase or boxes, or convert "
                    "it again with Meta's sam3.pt as the donor."
                )
            valid.append(points_labels != PADDING_LABEL)
            tokens.append(self.encode_points(points, points_labels, normalised))
        if boxes is not None:
            valid.append(boxes_labels != PADDING_LABEL)
            tokens.append(self.encode_boxes(boxes, boxes_labels, normalised))
        tokens.append(self.cls_embed.weight.expand(batch_size, 1, -1))
        valid.append(torch.ones(batch_size, 1, dtype=torch.bool, device=image_features.device))
        tokens, valid = torch.cat(tokens, dim=1), torch.cat(valid, dim=1)

        tokens = self.prompt_layer_norm(self.final_proj(tokens))
        mask = None  # a lone CLS token has nothing to mask, and asking would wait for the GPU
        if tokens.shape[1] > 1:
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=tokens, attention_mask=valid
            )
        vision_tokens = image_features.flatten(2).transpose(1, 2)
        vision_positions = image_positions.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, vision_tokens, vision_positions, mask)
        return self.output_layer_norm(tokens), valid

    def encode_points(self, points: Tensor, labels: Tensor, image_features: Tensor) -> Tensor:
        """Where a point lies, what the image shows there, and whether it is positive."""
        dtype = image_features.dtype
        grid = (2 * points - 1).unsqueeze(2)  # (batch, points, 1, 2) in [-1, 1]
        sampled = F.grid_sample(image_features.float(), grid.float(), align_corners=False)
        sampled = sampled.squeeze(-1).transpose(1, 2).to(dtype)  # (batch, points, channels)
        return (
            self.label_embed((labels == 1).long())
            + self.points_direct_project(points.to(dtype))
            + self.points_pool_project(sampled)
            + self.points_pos_enc_project(torch.cat(self.sine_positions(points), dim=-1).to(dtype))
        )

    def encode_boxes(self, boxes: Tensor, labels: Tensor, image_features: Tensor) -> Tensor:
        """Where a box lies, what the image shows inside, and whether it is positive."""
        dtype = image_features.dtype
        height, width = image_features.shape[-2:]
        corners = box_cxcywh_to_xyxy(boxes.float()) * boxes.new_tensor([width, height] * 2).float()
        # In float32: half precision has too few digits for coordinates, and no kernel on CPUs.
        pooled = roi_align(image_features.float(), list(corners), self.roi_size).to(dtype)
        position_x, position_y = self.sine_positions(boxes[..., :2])
        sizes_hw = boxes[..., [3, 2]].float()
        position = torch.cat([position_y, position_x, sizes_hw], dim=-1).to(dtype)
        return (
            self.label_embed((labels == 1).long())
            + self.boxes_direct_project(boxes.to(dtype))
            + self.boxes_pool_project(pooled).view(*boxes.shape[:2], -1)
            + self.boxes_pos_enc_project(position)
        )

    def sine_positions(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Encodings (batch, points, channels / 2) of the x and of the y of points, in float32."""
        x, y = points.float().flatten(0, 1).unbind(-1)
        position_x, position_y = self.position_encoding.encode_1d_positions(x, y)
        return position_x.view(*points.shape[:2], -1), position_y.view(*points.shape[:2], -1)
