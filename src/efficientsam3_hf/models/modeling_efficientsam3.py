"""The concept model: phrases, exemplar boxes and points to every instance in an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.models.auto import AutoModel
from transformers.models.sam3.modeling_sam3 import (
    Sam3DetrEncoder,
    Sam3DotProductScoring,
    Sam3ImageSegmentationOutput,
    Sam3MaskDecoder,
    Sam3SinePositionEmbedding,
    Sam3VisionEncoderOutput,
    box_cxcywh_to_xyxy,
    inverse_sigmoid,
)
from transformers.utils import can_return_tuple

from .checkpoint_layout import StrictLoadingMixin
from .concept_inputs import (
    check_exemplars,
    check_levels,
    check_options,
    check_pixels,
    check_precision,
    check_vit_image_size,
    repeat_prompt,
    select_images,
)
from .concept_objective import ConceptPredictions, concept_losses, weighted_sum
from .concept_targets import ConceptTargets, Label, pack_labels
from .configuration_efficientsam3 import EfficientSam3Config
from .detr_decoder import EfficientSam3DetrDecoder
from .from_teacher import FromTeacherMixin
from .geometry_encoder import EfficientSam3GeometryEncoder
from .modeling_efficientsam3_text import EfficientSam3TextModel
from .modeling_efficientsam3_vision import (
    EfficientSam3VisionModel,
    EfficientSam3VisionOutput,
    fuse_vision_encoder,
)
from .objective_config import ObjectiveConfig

TextFeatures = Tensor | Mapping[str, Tensor]
VisionFeatures = Mapping[str, Sequence[Tensor]] | Sequence[Tensor]


@dataclass
class EfficientSam3TextOutput(BaseModelOutputWithPooling):
    """Features of phrases, to be kept and used with any number of images.

    Args:
        pooler_output: Token features (prompts, length, channels) in the width of the detector.
        attention_mask: (prompts, length), 0 where a token is padding; None where nothing is.
    """

    attention_mask: Tensor | None = None


@dataclass
class ConceptLossOutput(ModelOutput):
    """What a model says of its labels; there only where it was given some.

    Args:
        loss: The sum of the terms, weighted as `config.objective` says.
        loss_dict: The terms by name, not weighted.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None


@dataclass
class EfficientSam3ImageSegmentationOutput(Sam3ImageSegmentationOutput, ConceptLossOutput):
    """SAM 3's output, before which stands the loss, as a `Trainer` expects it of a tuple."""


class EfficientSam3MaskDecoder(Sam3MaskDecoder):
    """SAM 3's mask decoder without its copies of the pyramid."""

    def _embed_pixels(
        self, backbone_features: list[Tensor], encoder_hidden_states: Tensor
    ) -> Tensor:
        *finer_levels, coarsest = backbone_features
        height, width = coarsest.shape[-2:]
        encoded = encoder_hidden_states[:, : height * width].transpose(1, 2)
        return self.pixel_decoder([*finer_levels, encoded.unflatten(2, (height, width))])


class EfficientSam3Model(StrictLoadingMixin, FromTeacherMixin, PreTrainedModel):
    """Concept segmentation in images; takes and returns what `Sam3Model` does, and more.

    One call may hold several prompts for one image. `image_indices` says which image each prompt is
    about; the vision encoder runs once for each image.
    """

    config: EfficientSam3Config
    config_class = EfficientSam3Config
    base_model_prefix = "detector_model"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    # `Trainer` counts items by labels that are one tensor. So it averages over micro-batches, whose
    # loss is a mean already; `loss_counts` is for trainers that count by themselves.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"^tracker_model\.", r"^tracker_neck\."]

    def __init__(self, config: EfficientSam3Config):
        super().__init__(config)
        ObjectiveConfig.from_dict(config.objective)  # raises for what from_pretrained put into it
        self.image_size = config.image_size  # that the positions of a ViT are laid out for
        self.vision_encoder = build_vision_encoder(config.vision_config)
        self.text_encoder = build_text_encoder(config.text_config)
        detector_width = config.detr_encoder_config.hidden_size
        self.text_projection = nn.Linear(config.text_config.hidden_size, detector_width)
        # Not a PreTrainedModel, so that nothing else tells it which attention to use.
        config.geometry_encoder_config._attn_implementation = config._attn_implementation
        self.geometry_encoder = EfficientSam3GeometryEncoder(
            config.geometry_encoder_config, has_point_branch=config.has_point_branch
        )
        self.detr_encoder = Sam3DetrEncoder(config.detr_encoder_config)
        self.detr_decoder = EfficientSam3DetrDecoder(config.detr_decoder_config)
        self.mask_decoder = EfficientSam3MaskDecoder(config.mask_decoder_config)
        self.dot_product_scoring = Sam3DotProductScoring(config)
        self.position_encoding = Sam3SinePositionEmbedding(
            num_position_features=detector_width // 2, normalize=True
        )
        self.post_init()
        if config.init_local_box_bias:
            self.detr_decoder.init_local_box_bias()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_encoder.set_input_embeddings(value)

    def fuse(self) -> "EfficientSam3Model":
        """Fold RepViT's parallel branches and batch norms, for inference and export."""
        fuse_vision_encoder(self.vision_encoder)
        if self.config.tracker_config is not None:  # it shares the trunk
            self.config.tracker_config.vision_config.backbone_config.fused = True
        return self

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> EfficientSam3TextOutput:
        """Features of phrases, one row a phrase; pass the result as `text_embeds`.

        Args:
            input_ids: (prompts, length) token ids.
            attention_mask: (prompts, length), 0 where a token is padding.
        """
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} does not fit input_ids "
                f"{tuple(input_ids.shape)}."
            )
        # SAM 3's tower is causal: padding comes last, and no valid token ever sees it.
        causal = self.config.text_config.model_type == "clip_text_model"
        outputs = self.text_encoder(
            input_ids,
            attention_mask=None if causal else attention_mask,
            return_dict=True,
            **kwargs,
        )
        return EfficientSam3TextOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.text_projection(outputs.last_hidden_state),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attention_mask=attention_mask,
        )

    def get_vision_features(self, pixel_values: Tensor, **kwargs) -> Sam3VisionEncoderOutput:
        """Pyramid of each image; pass the result as `vision_embeds`.

        Args:
            pixel_values: (images, 3, height, width) as the image processor makes them.
        """
        check_pixels(pixel_values)
        if self.config.vision_config.model_type == "sam3_vision_model":
            check_vit_image_size(pixel_values, self.image_size)
        return self.vision_encoder(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        vision_embeds: VisionFeatures | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_embeds: TextFeatures | None = None,
        input_boxes: Tensor | None = None,
        input_boxes_labels: Tensor | None = None,
        input_points: Tensor | None = None,
        input_points_labels: Tensor | None = None,
        image_indices: Tensor | None = None,
        original_sizes: Tensor | None = None,
        labels: Sequence[Label] | None = None,
        loss_counts: Mapping[str, Tensor | float] | None = None,
        **kwargs,
    ) -> EfficientSam3ImageSegmentationOutput | tuple:
        """Find every instance of each prompt, and compare them with labels if there are any.

        Args:
            pixel_values: (images, 3, height, width) as the image processor makes them.
            vision_embeds: Instead of pixels: what `get_vision_features` returned, its items as a
                dictionary, or its three maps, finest first.
            input_ids: (prompts, length) token ids of one phrase a prompt.
            attention_mask: (prompts, length), 0 where a token is padding.
            text_embeds: Instead of ids: what `get_text_features` returned, its items as a
                dictionary, or its `pooler_output` alone, whose padding `attention_mask` tells.
            input_boxes: (prompts, boxes, 4) exemplars as (cx, cy, w, h) in [0, 1].
            input_boxes_labels: (prompts, boxes): 1 positive, 0 negative, -10 padding. None: all 1.
            input_points: (prompts, points, 2) exemplars as (x, y) in [0, 1].
            input_points_labels: (prompts, points), as for boxes.
            image_indices: (prompts,) the image each prompt is about. None: one prompt an image in
                order, or all prompts for a single image, or a single prompt for all images.
            original_sizes: Not used; taken so that `model(**processor(...))` works.
            labels: What should be found, one dictionary for each prompt, as `ImageCollator` makes
                them; the output then has `loss` and `loss_dict`. Its keys: `boxes` (instances, 4)
                as (cx, cy, w, h) in [0, 1]; `masks` (instances, height, width); `is_crowd`
                (instances,); `is_exhaustive`, false if there may be more instances. All but
                `boxes` may be left out.
            loss_counts: What the loss is a mean over, `boxes` and `prompts` of a whole step, as
                `count_labels` gives them. None: those of this batch, or where processes train
                together, their mean over processes.
        """
        kwargs = check_options(type(self).__name__, kwargs)
        if (pixel_values is None) == (vision_embeds is None):
            raise ValueError("You must specify exactly one of pixel_values or vision_embeds")
        if (input_ids is None) == (text_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or text_embeds")

        if vision_embeds is None:
            vision_embeds = self.get_vision_features(pixel_values, return_dict=True, **kwargs)
        if text_embeds is None:
            text_embeds = self.get_text_features(
                input_ids, attention_mask, return_dict=True, **kwargs
            )
        levels, positions, vision_outputs = self.unpack_vision(vision_embeds)
        prompt, prompt_mask = self.unpack_text(text_embeds, attention_mask)
        if pixel_values is None:
            check_precision("vision_embeds", levels[-1], self.dtype)
        if input_ids is None:
            check_precision("text_embeds", prompt, self.dtype)
        boxes, boxes_labels = check_exemplars("box", input_boxes, input_boxes_labels, 4)
        points, points_labels = check_exemplars("point", input_points, input_points_labels, 2)

        num_prompts = max(len(prompt), *(len(x) for x in (boxes, points) if x is not None), 1)
        levels, position = select_images(levels, positions, image_indices, num_prompts)
        num_prompts = len(position)
        prompt, prompt_mask = repeat_prompt("phrase", num_prompts, prompt, prompt_mask)
        if boxes is not None:
            boxes, boxes_labels = repeat_prompt("box list", num_prompts, boxes, boxes_labels)
        if points is not None:
            points, points_labels = repeat_prompt("point list", num_prompts, points, points_labels)

        if self.config.always_encode_geometry or boxes is not None or points is not None:
            geometry, geometry_mask = self.geometry_encoder(
                levels[-1], position, boxes, boxes_labels, points, points_labels
            )
            if not self.config.always_encode_geometry:  # nor for a phrase beside others' exemplars
                has_exemplar = geometry_mask[:, :-1].any(dim=1, keepdim=True)
                geometry_mask = geometry_mask & has_exemplar
            prompt = torch.cat([prompt, geometry], dim=1)
            prompt_mask = torch.cat([prompt_mask, geometry_mask], dim=1)

        targets = None if labels is None else pack_labels(labels, num_prompts, position.device)
        output = self.detect(levels, position, prompt, prompt_mask, targets, loss_counts, **kwargs)
        output.vision_hidden_states = vision_outputs.hidden_states
        output.vision_attentions = vision_outputs.attentions
        return output

    def detect(
        self,
        levels: Sequence[Tensor],
        position: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor,
        targets: ConceptTargets | None = None,
        loss_counts: Mapping[str, Tensor | float] | None = None,
        **kwargs,
    ) -> EfficientSam3ImageSegmentationOutput:
        """From features of image and prompt to instances.

        Args:
            levels: Three maps (prompts, channels, height, width), finest first.
            position: Position encoding of the last of them.
            prompt: Tokens (prompts, length, channels) of phrase and exemplars.
            prompt_mask: (prompts, length), true where a token is valid.
            targets: What should be found, where that is to be compared.
            loss_counts: As `forward` takes them.
        """
        encoded = self.detr_encoder(
            vision_features=[levels[-1]],
            text_features=prompt,
            vision_pos_embeds=[position],
            text_mask=prompt_mask,
            **kwargs,
        )
        decode = self.detr_decoder
        if targets is not None:
            objective = ObjectiveConfig.from_dict(self.config.objective)
            if self.training and objective.one_to_many_weight > 0:
                decode = self.detr_decoder.decode_twice
        decoded = decode(
            vision_features=encoded.last_hidden_state,
            text_features=encoded.text_features,
            vision_pos_encoding=encoded.pos_embeds_flattened,
            text_mask=prompt_mask,
            spatial_shapes=encoded.spatial_shapes,
            **kwargs,
        )
        # (layers, prompts, queries, channels); only a loss asks for those before the last.
        num_queries = self.config.detr_decoder_config.num_queries
        layers = slice(-1, None) if targets is None else slice(None)
        states = decoded.intermediate_hidden_states[layers]
        offsets = self.detr_decoder.box_head(states)
        # In float32: a share of the image in bfloat16 is 16 pixels wide.
        anchors = inverse_sigmoid(decoded.reference_boxes[layers].float())
        boxes_cxcywh = (anchors + offsets.float()).sigmoid()
        logits = self.dot_product_scoring(states, encoded.text_features, prompt_mask)[..., 0]
        masks = self.mask_decoder(
            decoder_queries=states[-1, :, :num_queries],
            backbone_features=list(levels),
            encoder_hidden_states=encoded.last_hidden_state,
            prompt_features=prompt,
            prompt_mask=prompt_mask,
            **kwargs,
        )
        losses = {}
        if targets is not None:
            predictions = ConceptPredictions(
                logits=torch.stack(logits.split(num_queries, dim=2)),
                boxes=torch.stack(boxes_cxcywh.split(num_queries, dim=2)),
                presence=decoded.presence_logits[..., 0],
                masks=masks.pred_masks,
                semantic=masks.semantic_seg,
            )
            losses["loss_dict"] = concept_losses(predictions, targets, objective, loss_counts)
            losses["loss"] = weighted_sum(losses["loss_dict"], objective.weights())
        return EfficientSam3ImageSegmentationOutput(
            **losses,
            pred_masks=masks.pred_masks,
            pred_boxes=box_cxcywh_to_xyxy(boxes_cxcywh[-1, :, :num_queries]),
            pred_logits=logits[-1, :, :num_queries],
            presence_logits=decoded.presence_logits[-1],
            semantic_seg=masks.semantic_seg,
            decoder_hidden_states=decoded.hidden_states,
            decoder_reference_boxes=decoded.reference_boxes[:, :, :num_queries],
            encoder_hidden_states=encoded.hidden_states,
            detr_encoder_attentions=encoded.attentions,
            detr_decoder_attentions=decoded.attentions,
            mask_decoder_attentions=masks.attentions,
        )

    def unpack_vision(
        self, vision_embeds: VisionFeatures
    ) -> tuple[list[Tensor], Tensor, Sam3VisionEncoderOutput]:
        """Three maps, finest first, the position encoding of the last, and the output itself."""
        if isinstance(vision_embeds, Tensor):
            raise TypeError(
                "vision_embeds must be the output of get_vision_features or its maps (finest "
                "first), not a single tensor."
            )
        if not isinstance(vision_embeds, Mapping):
            vision_embeds = {"fpn_hidden_states": tuple(vision_embeds)}
        if vision_embeds.get("fpn_hidden_states") is None:
            raise ValueError(
                f"vision_embeds holds {sorted(vision_embeds)}, but no fpn_hidden_states, which "
                "are what the heads read of get_vision_features."
            )
        vision_embeds = EfficientSam3VisionOutput(**vision_embeds)
        levels = list(vision_embeds.fpn_hidden_states[:3])
        check_levels(levels)
        if vision_embeds.fpn_position_encoding is not None:
            return levels, vision_embeds.fpn_position_encoding[2], vision_embeds
        coarsest = levels[-1]
        position = self.position_encoding(coarsest.shape, coarsest.device, torch.float32)
        return levels, position.to(coarsest.dtype), vision_embeds

    def unpack_text(
        self, text_embeds: TextFeatures, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Token features, and which of them are valid."""
        if isinstance(text_embeds, Mapping):
            if attention_mask is None:
                attention_mask = text_embeds.get("attention_mask")
            if "pooler_output" not in text_embeds:
                raise ValueError(
                    f"text_embeds holds {sorted(text_embeds)}, but no pooler_output, which is what "
                    "the detector reads of get_text_features."
                )
            text_embeds = text_embeds["pooler_output"]
        width = self.text_projection.out_features
        if text_embeds.ndim != 3 or text_embeds.shape[-1] != width:
            raise ValueError(
                f"text_embeds must be (prompts, length, {width}), as pooler_output of "
                f"get_text_features is, not {tuple(text_embeds.shape)}."
            )
        if attention_mask is None:
            attention_mask = torch.ones(text_embeds.shape[:2], device=text_embeds.device)
        if attention_mask.shape != text_embeds.shape[:2]:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} does not fit text features of "
                f"{tuple(text_embeds.shape[:2])} tokens."
            )
        return text_embeds, attention_mask.bool()


def build_vision_encoder(config) -> PreTrainedModel:
    """The student's vision encoder, or any that transformers knows, such as SAM 3's."""
    if config.model_type == "efficientsam3_vision":
        return EfficientSam3VisionModel(config)
    return AutoModel.from_config(config)


def build_text_encoder(config) -> PreTrainedModel:
    """A MobileCLIP tower, or SAM 3's own."""
    if config.model_type == "efficientsam3_text":
        return EfficientSam3TextModel(config)
    if config.model_type == "clip_text_model":
        return CLIPTextModelWithProjection(config)
    raise ValueError(
        f"There is no text tower of type {config.model_type!r}: text_config must be of "
        "'efficientsam3_text' (MobileCLIP) or 'clip_text_model' (SAM 3's own)."
    )


AutoModel.register(EfficientSam3Config, EfficientSam3Model, exist_ok=True)
