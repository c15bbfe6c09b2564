"""The tracker on images: points, boxes and masks to masks of single objects."""

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto import AutoModel
from transformers.models.sam3_tracker.modeling_sam3_tracker import Sam3TrackerModel
from transformers.utils import can_return_tuple

from .checkpoint_layout import TRACKER_RENAMES, StrictLoadingMixin, tracker_weights
from .concept_inputs import check_options, check_pixels
from .configuration_efficientsam3 import EfficientSam3Config, EfficientSam3TrackerConfig
from .from_teacher import FromTeacherMixin
from .modeling_efficientsam3_vision import fuse_vision_encoder


class EfficientSam3TrackerModel(StrictLoadingMixin, FromTeacherMixin, Sam3TrackerModel):
    """SAM 3's image tracker on any vision encoder of the family.

    It reads its part of a checkpoint that holds all tasks: the trunk, which it shares with the
    concept model, its own neck, and prompt encoder and mask decoder.
    """

    config: EfficientSam3TrackerConfig
    config_class = EfficientSam3TrackerConfig
    supports_gradient_checkpointing = True
    # What serves other tasks in a checkpoint that holds all of them.
    _keys_to_ignore_on_load_unexpected = [
        *(Sam3TrackerModel._keys_to_ignore_on_load_unexpected or []),
        r"^spatial_perceiver\.",
    ]

    def __init__(self, config: EfficientSam3TrackerConfig | EfficientSam3Config):
        super().__init__(tracker_config(config))
        self.image_size = self.config.image_size  # that its positions are laid out for
        grid = self.image_size // self.config.prompt_encoder_config.patch_size
        self.backbone_feature_sizes = [[scale * grid, scale * grid] for scale in (4, 2, 1)]

    def fuse(self) -> "EfficientSam3TrackerModel":
        """Fold RepViT's parallel branches and batch norms, for inference and export."""
        fuse_vision_encoder(self.vision_encoder)
        return self

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
        image_embeddings: list[Tensor] | None = None,
        multimask_output: bool = True,
        attention_similarity: Tensor | None = None,
        target_embedding: Tensor | None = None,
        original_sizes: Tensor | None = None,
        **kwargs,
    ):
        """As in transformers; arguments that nothing would read are errors.

        `original_sizes` is not used, and taken so that `model(**processor(...))` works.
        """
        return super().forward(
            pixel_values=pixel_values,
            input_points=input_points,
            input_labels=input_labels,
            input_boxes=input_boxes,
            input_masks=input_masks,
            image_embeddings=image_embeddings,
            multimask_output=multimask_output,
            attention_similarity=attention_similarity,
            target_embedding=target_embedding,
            **check_options(type(self).__name__, kwargs),
        )

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs):
        """The three maps that the mask decoder reads, flattened to (pixels, batch, channels)."""
        check_pixels(pixel_values)
        size = self.image_size
        if tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"This tracker takes {size} x {size}, not {pixel_values.shape[-2]} x "
                f"{pixel_values.shape[-1]}. Load it with image_size={pixel_values.shape[-1]}, or "
                "resize: its prompts are coordinates in the configured size."
            )
        outputs = super().get_image_features(pixel_values, return_dict=True, **kwargs)
        # transformers keeps the fourth level, and would add the no-memory embedding to that one.
        outputs.fpn_hidden_states = outputs.fpn_hidden_states[:3]
        outputs.fpn_position_encoding = outputs.fpn_position_encoding[:3]
        return outputs

    @classmethod
    def teacher_weights(cls, teacher: PreTrainedModel) -> dict[str, Tensor]:
        """Weights of the teacher's tracker under the names of this class."""
        return tracker_weights(teacher.state_dict())


def tracker_config(
    config: EfficientSam3TrackerConfig | EfficientSam3Config,
) -> EfficientSam3TrackerConfig:
    """The tracker's part of the configuration of a checkpoint that holds all tasks."""
    if not isinstance(config, EfficientSam3Config):
        return config
    if not isinstance(config.tracker_config, EfficientSam3TrackerConfig):
        raise ValueError(
            "This configuration has no tracker_config: the checkpoint serves concepts only."
        )
    config.tracker_config._attn_implementation = config._attn_implementation
    return config.tracker_config


# Names in a checkpoint that holds all tasks. Alone, a tracker is all under `tracker_model.`.
register_checkpoint_conversion_mapping(
    EfficientSam3TrackerConfig.model_type,
    [WeightRenaming(source, target) for source, target in TRACKER_RENAMES],
    overwrite=True,
)
AutoModel.register(EfficientSam3TrackerConfig, EfficientSam3TrackerModel, exist_ok=True)
