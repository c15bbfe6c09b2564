"""Student vision encoder: a timm trunk, and a neck that gives the SAM 3 heads their pyramid."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import AutoModel
from transformers.models.sam3.modeling_sam3 import (
    Sam3FPNLayer,
    Sam3SinePositionEmbedding,
    Sam3VisionEncoderOutput,
)
from transformers.utils import can_return_tuple

from .checkpoint_layout import PartLoadingMixin
from .configuration_efficientsam3 import EfficientSam3BackboneConfig, EfficientSam3VisionConfig
from .trunks import (
    TRUNK_CHANNELS,
    build_trunk,
    fuse_trunk,
    init_trunk_module,
    trunk_features,
    use_fused_attention,
)


@dataclass
class EfficientSam3BackboneOutput(BaseModelOutput):
    """What a backbone hands to a neck.

    Args:
        last_hidden_state: Tokens (batch, tokens, channels) of the last map, row by row.
        feature_maps: One projected map, or the trunk's own maps of stride 4, 8, 16 and 32.
    """

    feature_maps: tuple[Tensor, ...] | None = None


@dataclass
class EfficientSam3VisionOutput(Sam3VisionEncoderOutput):
    """What a vision encoder hands to the heads.

    Args:
        feature_maps: What its backbone made, for a neck of another task.
    """

    feature_maps: tuple[Tensor, ...] | None = None


class EfficientSam3Backbone(PartLoadingMixin, PreTrainedModel):
    """A trunk, and the head that projects its last map to the shape of the teacher's."""

    config: EfficientSam3BackboneConfig
    config_class = EfficientSam3BackboneConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: EfficientSam3BackboneConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.trunk = build_trunk(config.trunk, drop_path_rate=config.drop_path_rate)
        self.head = None
        if config.hidden_size is not None:
            self.head = nn.Sequential(
                nn.Conv2d(TRUNK_CHANNELS[config.trunk][-1], config.hidden_size, 1, bias=False),
                nn.BatchNorm2d(config.hidden_size),
                nn.GELU(),
                nn.Conv2d(config.hidden_size, config.hidden_size, 3, padding=1),
            )
        if config.fused:
            fuse_trunk(self.trunk)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_trunk_module(module)

    def get_input_embeddings(self) -> None:
        """None, for pixels are not looked up in a table."""

    def load_pretrained_trunk(self) -> None:
        """Fetch timm's ImageNet weights for the trunk."""
        pretrained = build_trunk(self.config.trunk, pretrained=True)
        if self.config.fused:
            fuse_trunk(pretrained)
        self.trunk.load_state_dict(pretrained.state_dict())

    def fuse(self) -> "EfficientSam3Backbone":
        """Fold RepViT's parallel branches and batch norms, for inference and export."""
        fuse_trunk(self.trunk)
        self.config.fused = True
        return self

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> EfficientSam3BackboneOutput | tuple:
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        self.trunk.set_grad_checkpointing(self.gradient_checkpointing and self.training)
        use_fused_attention(self.trunk, self.config._attn_implementation != "eager")

        pixel_values = pixel_values.to(self.dtype)
        all_stages = self.head is None or output_hidden_states
        stages = range(4) if all_stages else [3]
        trunk_maps = trunk_features(self.trunk, pixel_values, stages)

        if self.head is None:
            feature_maps = tuple(trunk_maps)
        else:
            feature_maps = (self.project(trunk_maps[-1], pixel_values.shape[-2:]),)
        return EfficientSam3BackboneOutput(
            last_hidden_state=feature_maps[-1].flatten(2).transpose(1, 2),
            feature_maps=feature_maps,
            hidden_states=tuple(trunk_maps) if output_hidden_states else None,
        )

    def project(self, trunk_map: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Widen the trunk's last map and stretch it to one token per patch."""
        feature_map = self.head(trunk_map)  # (batch, hidden_size, height / 32, width / 32)
        grid = (image_size[0] // self.config.patch_size, image_size[1] // self.config.patch_size)
        if feature_map.shape[-2:] == grid:
            return feature_map
        return F.interpolate(feature_map, grid, mode="bilinear", align_corners=False)


class EfficientSam3Neck(nn.Module):
    """SAM 3's neck, less the level that nothing reads."""

    def __init__(self, config: EfficientSam3VisionConfig):
        super().__init__()
        self.fpn_layers = nn.ModuleList(
            Sam3FPNLayer(config.backbone_config.hidden_size, config.fpn_hidden_size, scale)
            for scale in config.scale_factors
        )
        for layer in self.fpn_layers:
            if layer.scale_factor < 1:
                layer.requires_grad_(False)  # kept for the round trip of released files only

    def forward(self, feature_maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (feature_map,) = feature_maps
        # The convolutions are a third faster so on CPUs; a ViT's tokens come in this order anyway.
        feature_map = feature_map.contiguous(memory_format=torch.channels_last)
        levels = [layer(feature_map) for layer in self.fpn_layers if layer.scale_factor >= 1]
        # All consumers drop the last of four levels unread: a view that costs nothing.
        return (*levels, levels[-1][..., ::2, ::2])


class EfficientSam3LateralNeck(nn.Module):
    """The trunk's own maps, brought to one width and enriched from coarse to fine."""

    def __init__(self, config: EfficientSam3VisionConfig):
        super().__init__()
        width = config.fpn_hidden_size
        self.laterals = nn.ModuleList(
            nn.Conv2d(channels, width, 1)
            for channels in TRUNK_CHANNELS[config.backbone_config.trunk]
        )
        self.smoothings = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(3)
        )

    def forward(self, feature_maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        levels = []
        for feature_map, lateral in zip(
            reversed(feature_maps), reversed(self.laterals), strict=False
        ):
            level = lateral(feature_map)
            if levels:
                level = level + F.interpolate(levels[-1], level.shape[-2:], mode="nearest")
            levels.append(level)
        *read, unread = reversed(levels)  # finest first; the last has done its part
        smooth = [
            level + smoothing(level)
            for level, smoothing in zip(read, self.smoothings, strict=False)
        ]
        return (*smooth, unread)


def build_neck(config: EfficientSam3VisionConfig) -> EfficientSam3Neck | EfficientSam3LateralNeck:
    """The neck of a configuration."""
    neck_class = EfficientSam3LateralNeck if config.neck == "lateral" else EfficientSam3Neck
    return neck_class(config)


class EfficientSam3VisionModel(PartLoadingMixin, PreTrainedModel):
    """Backbone and neck: an image to four maps of one width, fine to coarse.

    It keeps the contract of transformers' `Sam3VisionModel`, so that every SAM 3 head takes it.
    """

    config: EfficientSam3VisionConfig
    config_class = EfficientSam3VisionConfig
    base_model_prefix = "vision_encoder"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: EfficientSam3VisionConfig):
        super().__init__(config)
        self.backbone = EfficientSam3Backbone(config.backbone_config)
        self.neck = build_neck(config)
        self.position_encoding = Sam3SinePositionEmbedding(
            num_position_features=config.fpn_hidden_size // 2, normalize=True
        )
        self.post_init()

    def get_input_embeddings(self) -> None:
        """None, for pixels are not looked up in a table."""

    def fuse(self) -> "EfficientSam3VisionModel":
        """Fold RepViT's parallel branches and batch norms, for inference and export."""
        self.backbone.fuse()
        return self

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, **kwargs
    ) -> EfficientSam3VisionOutput | tuple:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        self.config.check_image_size(pixel_values.shape[-2:])
        backbone_output = self.backbone(pixel_values, return_dict=True, **kwargs)
        levels = self.neck(backbone_output.feature_maps)
        return EfficientSam3VisionOutput(
            last_hidden_state=self.token_map(backbone_output, levels).flatten(2).transpose(1, 2),
            fpn_hidden_states=levels,
            fpn_position_encoding=tuple(self.encode_positions(level) for level in levels),
            hidden_states=backbone_output.hidden_states,
            feature_maps=backbone_output.feature_maps,
        )

    def token_map(
        self, backbone_output: EfficientSam3BackboneOutput, levels: tuple[Tensor, ...]
    ) -> Tensor:
        """The map of one token per patch: the backbone's, or the neck's where that makes it."""
        return levels[2] if self.config.neck == "lateral" else backbone_output.feature_maps[-1]

    def encode_positions(self, level: Tensor) -> Tensor:
        """Sine positions of one level, computed once per size and shared by the batch."""
        # In float32, since bfloat16 cannot count to the 288 rows of the finest level.
        encoding = self.position_encoding((1, *level.shape[1:]), level.device, torch.float32)
        return encoding.to(level.dtype).expand(level.shape[0], -1, -1, -1)


def fuse_vision_encoder(encoder: PreTrainedModel) -> None:
    """Fold the trunk of a model of the family, or say why it cannot be."""
    if not isinstance(encoder, EfficientSam3VisionModel):
        raise ValueError(f"Only RepViT trunks can be fused; this is a {type(encoder).__name__}.")
    encoder.fuse()


# Stock heads build their vision encoder through AutoModel, also where this file is remote code.
AutoModel.register(EfficientSam3BackboneConfig, EfficientSam3Backbone, exist_ok=True)
AutoModel.register(EfficientSam3VisionConfig, EfficientSam3VisionModel, exist_ok=True)
