"""Configurations of EfficientSAM3: trunk, vision encoder, text tower, and the two image models.

Only the parts that differ from SAM 3 have fields of their own; geometry encoder, detector and mask
decoders use transformers' SAM 3 configurations. Those are named by their `model_type` instead of
imported, so that this file can be loaded while transformers is still importing SAM 3.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from .auto_map import SelfContainedConfigMixin
from .composite_config import CompositeConfig, check_equal_widths
from .configuration_efficientsam3_video import (
    EfficientSam3TrackerVideoConfig,
    EfficientSam3VideoConfig,
)
from .objective_config import ObjectiveConfig


@strict
class EfficientSam3BackboneConfig(SelfContainedConfigMixin, PreTrainedConfig):
    """Sizes of the student that stands in for the ViT of SAM 3.

    Args:
        trunk: timm name of the convolutional trunk, one of `TRUNK_CHANNELS` in `trunks.py`.
        hidden_size: Width of the tokens handed to the neck; 1024 matches the teacher. None leaves
            out the projection head, and hands on the trunk's own four maps.
        image_size: Side of the square input, in pixels.
        patch_size: Pixels per token; the tokens form a grid of `image_size // patch_size`.
        drop_path_rate: Share of TinyViT's residual branches dropped in training.
        fused: Whether RepViT's parallel branches are folded into single convolutions.
    """

    model_type = "efficientsam3_backbone"
    base_config_key = "backbone_config"

    trunk: str = "repvit_m1_1"
    hidden_size: int | None = 1024
    image_size: int = 1008
    patch_size: int = 14
    hidden_act: str = "gelu"
    drop_path_rate: float | int = 0.0
    fused: bool = False
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def validate_architecture(self):
        """Refuse sizes that no image has."""
        if self.patch_size < 1 or self.image_size < self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} and patch_size={self.patch_size} make no token: "
                "both must be positive, and an image at least as large as a patch."
            )


# What the lateral neck needs of a backbone, where the caller does not say otherwise.
_LATERAL_BACKBONE = {"hidden_size": None, "patch_size": 16, "image_size": 1024}


@strict
class EfficientSam3VisionConfig(CompositeConfig, SelfContainedConfigMixin, PreTrainedConfig):
    """A student trunk and the neck that turns its maps into the pyramid of the SAM 3 heads.

    Args:
        backbone_config: Trunk and projection head.
        neck: `"sam3"` projects the last map to the teacher's 72 x 72 x 1024 and runs SAM 3's neck
            on it, as the released weights need it. `"lateral"` joins the trunk's own maps of
            stride 4, 8, 16 and 32 through 1 x 1 convolutions, at a small part of the cost.
        fpn_hidden_size: Channels of every map of the pyramid.
        scale_factors: Levels of the `sam3` neck. Level 0.5 is in released files, but nothing reads
            it: its weights are kept, and it is not computed.
    """

    model_type = "efficientsam3_vision"
    base_config_key = "vision_config"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig, model_type="efficientsam3_backbone"
        )
    }

    backbone_config: dict | PreTrainedConfig | None = None
    neck: Literal["sam3", "lateral"] = "sam3"
    fpn_hidden_size: int = 256
    scale_factors: list[float] | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if not isinstance(self.backbone_config, PreTrainedConfig):
            defaults = _LATERAL_BACKBONE if self.neck == "lateral" else {}
            given = {**defaults, **(self.backbone_config or {})}
            model_type = given.pop("model_type", EfficientSam3BackboneConfig.model_type)
            if model_type != EfficientSam3BackboneConfig.model_type:
                raise ValueError(
                    f"A backbone_config of type {model_type!r} does not go into an "
                    "EfficientSam3VisionConfig. Give its own vision configuration in place of this "
                    'one, e.g. vision_config={"model_type": "sam3_vision_model"} for SAM 3\'s ViT.'
                )
            self.backbone_config = EfficientSam3BackboneConfig(**given)
        if self.scale_factors is None:
            self.scale_factors = [4.0, 2.0, 1.0, 0.5]
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse combinations of neck and backbone that cannot be built."""
        backbone = self.backbone_config
        if self.neck == "lateral" and (
            backbone.hidden_size is not None or backbone.patch_size != 16
        ):
            raise ValueError(
                "The lateral neck reads the trunk's own maps: it needs a backbone_config with "
                f"hidden_size=None and patch_size=16, not hidden_size={backbone.hidden_size} and "
                f"patch_size={backbone.patch_size}."
            )
        if self.neck == "sam3" and backbone.hidden_size is None:
            raise ValueError("The sam3 neck needs a backbone_config with a hidden_size, e.g. 1024.")
        self.check_image_size((self.image_size, self.image_size))

    def check_image_size(self, image_size: tuple[int, int]) -> None:
        """Raise if the neck cannot serve an image of this (height, width)."""
        if self.neck == "lateral":
            allowed = "multiples of 16 from 32 on"
            fits = all(side >= 32 and side % 16 == 0 for side in image_size)
        else:
            allowed = "28 pixels and more"
            fits = all(side >= 28 for side in image_size)
        if not fits:
            raise ValueError(
                f"The {self.neck} neck takes sides of {allowed}, not an image of "
                f"{image_size[0]} x {image_size[1]}."
            )

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.backbone_config.image_size

    @image_size.setter
    def image_size(self, value: int) -> None:
        self.check_image_size((value, value))
        self.backbone_config.image_size = value

    @property
    def backbone_feature_sizes(self) -> list[list[int]]:
        """(height, width) of the three maps that the heads read, finest first."""
        grid = self.image_size // self.backbone_config.patch_size
        return [[4 * grid, 4 * grid], [2 * grid, 2 * grid], [grid, grid]]


@strict
class EfficientSam3TextConfig(SelfContainedConfigMixin, PreTrainedConfig):
    """Sizes of a MobileCLIP text tower.

    Args:
        projection_dim: Width of the pooled embedding, which the detector does not use.
        max_position_embeddings: Rows of the position table.
        context_length: Tokens of a padded phrase; None for one per row of the position table. If
            it is smaller, the table is interpolated to it, as the first released text weights ask.
        attend_to_padding: Whether padding takes part in attention and convolution. The released
            weights were trained so; False makes features independent of the padded length.
        pad_token_id: Token that pads a phrase.
        use_repmixer_blocks: Convolutional first and last layer (MobileCLIP-S0).
    """

    model_type = "efficientsam3_text"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    max_position_embeddings: int = 16
    context_length: int | None = None
    attend_to_padding: bool = True
    pad_token_id: int = 0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    use_repmixer_blocks: bool = True
    layer_scale_init_value: float = 1e-5
    repmixer_kernel_size: int = 11
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.context_length is None:
            self.context_length = self.max_position_embeddings
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse a context that the position table cannot serve."""
        check_context_length(self.context_length)
        if self.context_length > self.max_position_embeddings:
            raise ValueError(
                f"context_length={self.context_length} needs a position table of at least as many "
                f"rows, not max_position_embeddings={self.max_position_embeddings}."
            )


@strict
class EfficientSam3TrackerConfig(CompositeConfig, SelfContainedConfigMixin, PreTrainedConfig):
    """The tracker on images: points, boxes and masks to masks.

    Args:
        vision_config: Vision encoder; a dictionary without `model_type` is an EfficientSAM3 one.
        prompt_encoder_config: Its image and patch size follow those of the vision encoder.
        mask_decoder_config: SAM 3's mask decoder.
    """

    model_type = "efficientsam3_tracker"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="efficientsam3_vision"),
        "prompt_encoder_config": SubConfigSpec(
            config_class=AutoConfig, model_type="sam3_tracker_prompt_encoder"
        ),
        "mask_decoder_config": SubConfigSpec(
            config_class=AutoConfig, model_type="sam3_tracker_mask_decoder"
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    prompt_encoder_config: dict | PreTrainedConfig | None = None
    mask_decoder_config: dict | PreTrainedConfig | None = None
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers, which finds the tracker's part of a checkpoint for all tasks."""
        if config_dict.get("model_type") == "efficientsam3":
            raise ValueError(
                "This configuration has no tracker_config: the checkpoint serves the concept model "
                "only."
            )
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.prompt_encoder_config.patch_size = self.vision_config.backbone_config.patch_size
        self.prompt_encoder_config.image_size = self.vision_config.image_size

    def validate_architecture(self):
        """Refuse widths that do not fit together."""
        check_equal_widths(
            {
                "vision_config.fpn_hidden_size": self.vision_config.fpn_hidden_size,
                "prompt_encoder_config.hidden_size": self.prompt_encoder_config.hidden_size,
                "mask_decoder_config.hidden_size": self.mask_decoder_config.hidden_size,
            }
        )

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.vision_config.image_size

    @image_size.setter
    def image_size(self, value: int) -> None:
        self.vision_config.image_size = value
        self.prompt_encoder_config.image_size = value


@strict
class EfficientSam3Config(CompositeConfig, SelfContainedConfigMixin, PreTrainedConfig):
    """Concepts in images: phrases, exemplar boxes and exemplar points to instances.

    Args:
        vision_config: Vision encoder; a dictionary without `model_type` is an EfficientSAM3 one,
            `{"model_type": "sam3_vision_model"}` is SAM 3's ViT.
        text_config: Text tower; `{"model_type": "clip_text_model", ...}` is SAM 3's own.
        tracker_config: The tracker that shares this checkpoint, where there is one.
        tracker_video_config: The tracker in video that shares this checkpoint; None for one like
            `tracker_config` with SAM 3's own memory.
        always_encode_geometry: Run the geometry encoder for every prompt, so that a phrase alone
            carries its CLS token, as in Meta's code and in all training. False reproduces
            transformers' `Sam3Model`, which runs it only where there are boxes; other than there,
            a phrase without boxes stays without the token beside prompts that have some.
        has_point_branch: Whether the geometry encoder takes exemplar points. transformers' SAM 3
            lacks the weights for them, and so does a checkpoint completed from it.
        score_temperature: By which the logits of scores are divided, and
        score_bias: what is added to them then, so that a score of one half separates right from
            wrong. Scores out of the processors are so; those in a model's outputs are not.
        objective: What training asks for where it is not SAM 3's: fields of `ObjectiveConfig`.
        init_local_box_bias: Whether fresh weights make queries look at the inside of their
            reference boxes, without which a decoder hardly learns from scratch. Weights that are
            loaded stay as they are.
        words: All that the tokenizer knows, in the order of their ids; None for CLIP's tokenizer.
    """

    model_type = "efficientsam3"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="efficientsam3_vision"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="efficientsam3_text"),
        "geometry_encoder_config": SubConfigSpec(
            config_class=AutoConfig, model_type="sam3_geometry_encoder"
        ),
        "detr_encoder_config": SubConfigSpec(
            config_class=AutoConfig, model_type="sam3_detr_encoder"
        ),
        "detr_decoder_config": SubConfigSpec(
            config_class=AutoConfig, model_type="sam3_detr_decoder"
        ),
        "mask_decoder_config": SubConfigSpec(
            config_class=AutoConfig, model_type="sam3_mask_decoder"
        ),
        "tracker_config": SubConfigSpec(
            config_class=AutoConfig, model_type="efficientsam3_tracker", optional=True
        ),
        "tracker_video_config": SubConfigSpec(
            config_class=AutoConfig, model_type="efficientsam3_tracker_video", optional=True
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    geometry_encoder_config: dict | PreTrainedConfig | None = None
    detr_encoder_config: dict | PreTrainedConfig | None = None
    detr_decoder_config: dict | PreTrainedConfig | None = None
    mask_decoder_config: dict | PreTrainedConfig | None = None
    tracker_config: dict | PreTrainedConfig | None = None
    tracker_video_config: dict | PreTrainedConfig | None = None
    always_encode_geometry: bool = True
    has_point_branch: bool = True
    score_temperature: float | int = 1.0
    score_bias: float | int = 0.0
    objective: dict[str, Any] | None = None
    init_local_box_bias: bool = False
    words: list[str] | None = None
    initializer_range: float = 0.02

    def validate_architecture(self):
        """Refuse widths that do not fit together, and sizes that cannot work."""
        check_context_length(self.context_length)
        check_side(self.image_size)
        ObjectiveConfig.from_dict(self.objective)
        if not self.score_temperature > 0:
            raise ValueError(f"score_temperature={self.score_temperature} must be more than 0.")
        check_equal_widths(
            {
                "vision_config.fpn_hidden_size": self.vision_config.fpn_hidden_size,
                "geometry_encoder_config.hidden_size": self.geometry_encoder_config.hidden_size,
                "detr_encoder_config.hidden_size": self.detr_encoder_config.hidden_size,
                "detr_decoder_config.hidden_size": self.detr_decoder_config.hidden_size,
                "mask_decoder_config.hidden_size": self.mask_decoder_config.hidden_size,
            }
        )

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.vision_config.image_size

    @image_size.setter
    def image_size(self, value: int) -> None:
        check_side(value)
        self.vision_config.image_size = value
        for tracker in (self.tracker_config, self.tracker_video_config):
            if tracker is not None:
                tracker.image_size = value

    @property
    def context_length(self) -> int:
        """Tokens of a padded phrase."""
        text: Any = self.text_config
        return getattr(text, "context_length", None) or text.max_position_embeddings


def check_context_length(length: int) -> None:
    """Raise for a context that holds no phrase."""
    if length < 3:
        raise ValueError(
            f"A context of {length} tokens holds no phrase: it takes 3 and more, the first and the "
            "last of which mark start and end."
        )


def check_side(image_size: int) -> None:
    """Raise for an image size that no vision encoder takes, be it of the family or not."""
    if image_size < 28:
        raise ValueError(
            f"image_size={image_size} is none: sides are of 28 pixels and more, e.g. 1008."
        )


CONFIGURATIONS = (
    EfficientSam3BackboneConfig,
    EfficientSam3VisionConfig,
    EfficientSam3TextConfig,
    EfficientSam3TrackerConfig,
    EfficientSam3TrackerVideoConfig,
    EfficientSam3VideoConfig,
    EfficientSam3Config,
)

# Here and not in auto.py, because nested configurations must resolve wherever this file is loaded,
# as remote code too.
for _configuration in CONFIGURATIONS:
    AutoConfig.register(_configuration.model_type, _configuration, exist_ok=True)
