"""Configuration of the tracker in video: the image tracker and its memory."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from .auto_map import SelfContainedConfigMixin
from .composite_config import CompositeConfig, check_equal_widths

# Depth of the memory attention where the caller does not say otherwise.
DEPTHS = {"dense": 4, "perceiver": 2}


@strict
class EfficientSam3TrackerVideoConfig(CompositeConfig, SelfContainedConfigMixin, PreTrainedConfig):
    """The tracker in video: points, boxes and masks on any frame to masks on all frames.

    Fields that are not explained mean what they mean in transformers' `Sam3TrackerVideoConfig`.

    Args:
        vision_config: Vision encoder; a dictionary without `model_type` is an EfficientSAM3 one.
        prompt_encoder_config: Its image and patch size follow those of the vision encoder.
        mask_decoder_config: SAM 3's mask decoder.
        memory: `"dense"` remembers a frame by one token for each pixel of its coarsest map, as
            SAM 3 does; `"perceiver"` by the latents of a Perceiver.
        num_maskmem: Frames that the memory attention sees beside those of the prompts, plus one.
        max_object_pointers_in_encoder: Frames whose object pointers it sees, plus one.
        max_cond_frame_num: Frames with prompts that it sees at most, nearest first; -1 for all.
        memory_attention_num_layers: None for 4 layers on dense memory and 2 on a Perceiver's.
        rope_parameters: `rope_theta` of the memory attention, 10000 unless said otherwise.
        memory_encoder_output_channels: Width of a memory token.
        perceiver_resampler_num_latents: Latents that look at the whole map.
        perceiver_resampler_num_latents_2d: Latents that look at one window each; a square number.
        perceiver_resampler_hidden_size: Width of a latent, `memory_encoder_output_channels`.
        perceiver_resampler_attention_head_dim: None for `hidden_size / num_attention_heads`, the
            only value that lets a position be added to keys and values.
    """

    model_type = "efficientsam3_tracker_video"
    default_rope_type = "axial"
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

    memory: Literal["dense", "perceiver"] = "dense"
    num_maskmem: int = 7
    max_object_pointers_in_encoder: int = 16
    max_cond_frame_num: int = 4
    sigmoid_scale_for_mem_enc: float = 20.0
    sigmoid_bias_for_mem_enc: float = -10.0
    enable_occlusion_spatial_embedding: bool = True
    enable_temporal_pos_encoding_for_object_pointers: bool = True
    multimask_output_in_sam: bool = True
    multimask_min_pt_num: int = 0
    multimask_max_pt_num: int = 1
    multimask_output_for_tracking: bool = True

    memory_attention_hidden_size: int = 256
    memory_attention_num_layers: int | None = None
    memory_attention_num_attention_heads: int = 1
    memory_attention_downsample_rate: int = 1
    memory_attention_feed_forward_hidden_size: int = 2048
    memory_attention_feed_forward_hidden_act: str = "relu"
    memory_attention_dropout: float | int = 0.1
    memory_attention_rope_dropout: float | int = 0.1
    rope_parameters: dict | None = None

    perceiver_resampler_num_latents: int = 256
    perceiver_resampler_num_latents_2d: int = 144
    perceiver_resampler_hidden_size: int = 64
    perceiver_resampler_mlp_intermediate_size: int = 256
    perceiver_resampler_num_attention_heads: int = 1
    perceiver_resampler_attention_head_dim: int | None = None
    perceiver_resampler_num_layers: int = 2
    perceiver_resampler_hidden_dropout: float | int = 0.0
    perceiver_resampler_attention_dropout: float | int = 0.0

    memory_encoder_hidden_size: int = 256
    memory_encoder_output_channels: int = 64
    mask_downsampler_embed_dim: int = 256
    mask_downsampler_kernel_size: int = 3
    mask_downsampler_stride: int = 2
    mask_downsampler_padding: int = 1
    mask_downsampler_total_stride: int = 16
    mask_downsampler_hidden_act: str = "gelu"
    memory_fuser_num_layers: int = 2
    memory_fuser_embed_dim: int = 256
    memory_fuser_intermediate_dim: int = 1024
    memory_fuser_kernel_size: int = 7
    memory_fuser_padding: int = 3
    memory_fuser_layer_scale_init_value: float = 1e-6
    memory_fuser_hidden_act: str = "gelu"

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; of a checkpoint for all tasks, the part of its tracker."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == "efficientsam3":
            config_dict = tracker_part(config_dict)
        return config_dict, kwargs

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.memory_attention_num_layers is None:
            self.memory_attention_num_layers = DEPTHS[self.memory]
        if self.perceiver_resampler_attention_head_dim is None:
            self.perceiver_resampler_attention_head_dim = (
                self.perceiver_resampler_hidden_size // self.perceiver_resampler_num_attention_heads
            )
        self.prompt_encoder_config.patch_size = self.vision_config.backbone_config.patch_size
        self.image_size = self.vision_config.image_size

    def validate_architecture(self):
        """Refuse sizes that do not fit together."""
        if self.num_maskmem < 1:
            raise ValueError(f"num_maskmem={self.num_maskmem}: a tracker needs at least 1 memory.")
        check_equal_widths(
            {
                "vision_config.fpn_hidden_size": self.vision_config.fpn_hidden_size,
                "prompt_encoder_config.hidden_size": self.prompt_encoder_config.hidden_size,
                "mask_decoder_config.hidden_size": self.mask_decoder_config.hidden_size,
                "memory_attention_hidden_size": self.memory_attention_hidden_size,
                "memory_encoder_hidden_size": self.memory_encoder_hidden_size,
                "mask_downsampler_embed_dim": self.mask_downsampler_embed_dim,
                "memory_fuser_embed_dim": self.memory_fuser_embed_dim,
            }
        )
        width, channels = self.vision_config.fpn_hidden_size, self.memory_encoder_output_channels
        if width % channels:
            raise ValueError(
                f"vision_config.fpn_hidden_size={width} must be a multiple of "
                f"memory_encoder_output_channels={channels}: object pointers are cut into tokens."
            )
        if self.memory == "perceiver":
            self.check_perceiver()

    def check_perceiver(self):
        """Refuse a Perceiver that does not fit the memory it stands in for."""
        width = self.perceiver_resampler_hidden_size
        heads = self.perceiver_resampler_num_attention_heads
        head_dim = self.perceiver_resampler_attention_head_dim
        latents_2d = self.perceiver_resampler_num_latents_2d
        side = math.isqrt(latents_2d)
        if width != self.memory_encoder_output_channels:
            raise ValueError(
                f"perceiver_resampler_hidden_size={width} must equal "
                f"memory_encoder_output_channels={self.memory_encoder_output_channels}."
            )
        if heads * (head_dim or width // heads) != width:
            raise ValueError(
                f"{heads} heads of {head_dim} do not make up perceiver_resampler_hidden_size="
                f"{width}: choose a number of heads that divides it."
            )
        if side**2 != latents_2d or side > self.grid_size:
            raise ValueError(
                f"perceiver_resampler_num_latents_2d={latents_2d} must be a square number of at "
                f"most {self.grid_size} x {self.grid_size}, the size of the coarsest map."
            )
        if latents_2d + self.perceiver_resampler_num_latents == 0:
            raise ValueError("A Perceiver without latents remembers nothing.")

    @property
    def grid_size(self) -> int:
        """Side of the coarsest map, in tokens."""
        return self.image_size // self.vision_config.backbone_config.patch_size

    @property
    def memory_attention_rope_feat_sizes(self) -> list[int]:
        """What transformers calls the size of the coarsest map."""
        return [self.grid_size, self.grid_size]

    @property
    def tokens_per_memory(self) -> int:
        """Tokens by which one frame is remembered."""
        if self.memory == "dense":
            return self.grid_size**2
        return self.perceiver_resampler_num_latents + self.perceiver_resampler_num_latents_2d

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.vision_config.image_size

    @image_size.setter
    def image_size(self, value: int) -> None:
        self.vision_config.image_size = value
        self.prompt_encoder_config.image_size = value
        if self.vision_config.model_type == "sam3_vision_model":  # the others compute theirs
            grid = value // self.vision_config.backbone_config.patch_size
            sizes = [[scale * grid, scale * grid] for scale in (4, 2, 1)]
            self.vision_config.backbone_feature_sizes = sizes


def tracker_part(config_dict: dict[str, Any]) -> dict[str, Any]:
    """The tracker's part of the configuration of a checkpoint for all tasks.

    One that says nothing of video has SAM 3's own memory.
    """
    for field in ("tracker_video_config", "tracker_config"):
        part = config_dict.get(field)
        if part is not None:
            return {key: value for key, value in part.items() if key != "model_type"}
    raise ValueError(
        "This configuration has no tracker_config: the checkpoint serves the concept model only."
    )


@strict
class EfficientSam3VideoConfig(CompositeConfig, SelfContainedConfigMixin, PreTrainedConfig):
    """Concepts through video: a detector of concepts in frames, and a tracker between them.

    Fields that are not explained mean what they mean in transformers' `Sam3VideoConfig`.

    Args:
        detector_config: The concept model.
        tracker_config: The tracker in video, which shares the detector's trunk.
        detect_every_nth_frame: 1 looks for objects in every frame; n tracks only, in between. All
            thresholds below count frames all the same: a look speaks for those since the last one.
        lost_after: Frames without a detection that confirms it after which an object is forgotten;
            None remembers all, as transformers does, and grows with every object that a video ever
            shows.
        hotstart_delay: Frames within which a new masklet has to prove itself, and by which results
            come late.
        hotstart_unmatch_thresh: Of these, frames without a detection at which it turns out to be
            none.
        hotstart_dup_thresh: Of these, frames with the detection of an older masklet at which it
            turns out to be none.
        fill_hole_area: Largest hole or island, in pixels of the predicted masks, that is removed.
        max_num_objects: Objects followed at a time, of all prompts; as many as SAM 3's detector can
            find of one prompt in one frame.
        recondition_every_nth_frame: How often a detection may confirm a mask so surely that the
            frame counts as one with a prompt; counted from where tracking began.
    """

    model_type = "efficientsam3_video"
    sub_configs_defaults = {
        "detector_config": SubConfigSpec(config_class=AutoConfig, model_type="efficientsam3"),
        "tracker_config": SubConfigSpec(
            config_class=AutoConfig, model_type="efficientsam3_tracker_video"
        ),
    }

    detector_config: dict | PreTrainedConfig | None = None
    tracker_config: dict | PreTrainedConfig | None = None
    initializer_range: float = 0.02

    detect_every_nth_frame: int = 1
    lost_after: int | None = 300
    score_threshold_detection: float = 0.5
    det_nms_thresh: float = 0.1
    assoc_iou_thresh: float = 0.1
    trk_assoc_iou_thresh: float = 0.5
    new_det_thresh: float = 0.7
    recondition_on_trk_masks: bool = True
    hotstart_delay: int = 15
    hotstart_unmatch_thresh: int = 8
    hotstart_dup_thresh: int = 8
    suppress_unmatched_only_within_hotstart: bool = True
    init_trk_keep_alive: int = 30
    max_trk_keep_alive: int = 30
    min_trk_keep_alive: int = -1
    suppress_overlapping_based_on_recent_occlusion_threshold: float = 0.7
    decrease_trk_keep_alive_for_empty_masklets: bool = False
    fill_hole_area: int = 16
    max_num_objects: int = 200
    recondition_every_nth_frame: int = 16
    high_conf_thresh: float = 0.8
    high_iou_thresh: float = 0.8

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; out of a checkpoint for all tasks, its detector and its tracker."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == "efficientsam3":
            trackers = ("tracker_config", "tracker_video_config")
            detector = {name: value for name, value in config_dict.items() if name not in trackers}
            config_dict = {
                "detector_config": detector,
                "tracker_config": tracker_part(config_dict),
                "dtype": config_dict.get("dtype"),
            }
        return config_dict, kwargs

    def validate_architecture(self):
        """Refuse settings that contradict one another."""
        every, delay = self.detect_every_nth_frame, self.hotstart_delay
        if every < 1:
            raise ValueError("detect_every_nth_frame is 1 or more.")
        judged = every * ((delay - 1) // every)  # frames that looks speak for while one is young
        for name in ("hotstart_unmatch_thresh", "hotstart_dup_thresh"):
            if delay > 0 and judged < getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} can never be reached within hotstart_delay="
                    f"{delay}: with detect_every_nth_frame={every}, detections speak for {judged} "
                    "frames by then."
                )

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.detector_config.image_size

    @image_size.setter
    def image_size(self, value: int) -> None:
        self.detector_config.image_size = value
        self.tracker_config.image_size = value
