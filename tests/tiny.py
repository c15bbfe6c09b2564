"""Tiny random models of every kind: all parts there, in milliseconds."""

import copy
from typing import Any

import torch

from efficientsam3_hf import (
    EfficientSam3Backbone,
    EfficientSam3Config,
    EfficientSam3Model,
    EfficientSam3TrackerModel,
    EfficientSam3TrackerVideoConfig,
    EfficientSam3TrackerVideoModel,
    EfficientSam3VideoConfig,
    EfficientSam3VideoModel,
)

WIDTH = 32
HEADS = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 64}
TINY_TEXT = {
    "hidden_size": WIDTH,
    "projection_dim": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
TINY_CLIP = {
    **TINY_TEXT,
    "model_type": "clip_text_model",
    "num_hidden_layers": 1,
    "vocab_size": 49408,
}
TINY_VIT = {
    "model_type": "sam3_vision_model",
    "fpn_hidden_size": WIDTH,
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    "backbone_config": {
        "model_type": "sam3_vit_model",
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 112,
        "pretrain_image_size": 56,
        "window_size": 4,
        "global_attn_indexes": [1],
    },
}
# With which random weights find something, doubt it, and lose it again.
LOW_THRESHOLDS = {
    "score_threshold_detection": 0.1,
    "new_det_thresh": 0.2,
    "high_conf_thresh": 0.2,
    "high_iou_thresh": 0.5,
    "det_nms_thresh": 0.5,
    "hotstart_delay": 4,
    "hotstart_unmatch_thresh": 3,
    "hotstart_dup_thresh": 3,
    "recondition_every_nth_frame": 4,
    "fill_hole_area": 4,
}
TRUNKS = ("efficientvit_b0", "repvit_m0_9", "tiny_vit_5m_224")


def tiny_vision(neck: str = "sam3", trunk: str = "efficientvit_b0") -> dict[str, Any]:
    """Vision configuration of 112 (`sam3`) or 128 (`lateral`) pixels, grid 8."""
    backbone: dict[str, Any] = {"trunk": trunk}
    backbone |= {"image_size": 128} if neck == "lateral" else {"image_size": 112}
    if neck == "sam3":
        backbone["hidden_size"] = WIDTH
    return {"neck": neck, "fpn_hidden_size": WIDTH, "backbone_config": backbone}


def tiny_config(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **fields: Any
) -> EfficientSam3Config:
    """A whole family, concept model and tracker, that runs in milliseconds."""
    vision = tiny_vision() if vision is None else vision
    return EfficientSam3Config(
        vision_config=copy.deepcopy(vision),
        text_config=copy.deepcopy(TINY_TEXT if text is None else text),
        geometry_encoder_config={**HEADS, "num_layers": 1},
        detr_encoder_config={**HEADS, "num_layers": 1},
        detr_decoder_config={**HEADS, "num_layers": 2, "num_queries": 5},
        mask_decoder_config={"hidden_size": WIDTH, "num_attention_heads": 4},
        tracker_config={
            "vision_config": copy.deepcopy(vision),
            "prompt_encoder_config": {"hidden_size": WIDTH, "mask_input_channels": 4},
            "mask_decoder_config": {
                "hidden_size": WIDTH,
                "mlp_dim": 64,
                "num_attention_heads": 4,
                "iou_head_hidden_dim": WIDTH,
            },
        },
        **fields,
    )


def tiny_model(*args: Any, **fields: Any) -> EfficientSam3Model:
    """A concept model with weights large enough that outputs depend on inputs."""
    torch.manual_seed(0)
    return stir(EfficientSam3Model(tiny_config(*args, **fields)))


def tiny_tracker(*args: Any, **fields: Any) -> EfficientSam3TrackerModel:
    """A tracker with weights large enough that outputs depend on inputs."""
    torch.manual_seed(0)
    return stir(EfficientSam3TrackerModel(tiny_config(*args, **fields).tracker_config))


def stir(model: torch.nn.Module) -> Any:
    """Replace small initial weights, and trivial norms, by ones that matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    backbones = [m for m in model.modules() if isinstance(m, EfficientSam3Backbone)]
    is_trunk = type(model).__module__.startswith("timm.")
    for trunk in [model] if is_trunk else backbones:
        calibrate(trunk, generator)
    return model.eval()


@torch.no_grad()
def calibrate(trunk: torch.nn.Module, generator: torch.Generator) -> None:
    """Set the statistics of batch norms to those of noise, so that signals keep their size.

    With others, what an image shows fades away in a deep random trunk, and no test would see it.
    """
    norms = [module for module in trunk.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    trunk.train()(torch.randn(4, 3, 128, 128, generator=generator))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


MEMORY_WIDTH = 16


def tiny_video_config(
    memory: str = "dense", vision: dict[str, Any] | None = None, **fields: Any
) -> EfficientSam3TrackerVideoConfig:
    """A tracker in video that runs in milliseconds: grid 8, memories of 64 or 4 + 9 tokens."""
    parts = tiny_config(vision).tracker_config.to_dict()
    sizes = {
        "memory_attention_hidden_size": WIDTH,
        "memory_attention_num_layers": 2,
        "memory_attention_feed_forward_hidden_size": 64,
        "memory_encoder_hidden_size": WIDTH,
        "memory_encoder_output_channels": MEMORY_WIDTH,
        "mask_downsampler_embed_dim": WIDTH,
        "memory_fuser_embed_dim": WIDTH,
        "memory_fuser_intermediate_dim": 64,
        "perceiver_resampler_num_latents": 4,
        "perceiver_resampler_num_latents_2d": 9,
        "perceiver_resampler_hidden_size": MEMORY_WIDTH,
        "perceiver_resampler_mlp_intermediate_size": 32,
    }
    names = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    return EfficientSam3TrackerVideoConfig(
        **{name: parts[name] for name in names}, **{**sizes, "memory": memory, **fields}
    )


def tiny_tracker_video(*args: Any, **fields: Any) -> EfficientSam3TrackerVideoModel:
    """A tracker in video with weights large enough that masks depend on memories.

    It sees its objects, for the masks of absent ones say nothing.
    """
    torch.manual_seed(0)
    return see_objects(stir(EfficientSam3TrackerVideoModel(tiny_video_config(*args, **fields))))


def tiny_video(
    memory: str = "dense", vision: dict[str, Any] | None = None, **fields: Any
) -> EfficientSam3VideoModel:
    """A model for concepts in video, which finds something in every frame."""
    torch.manual_seed(0)
    config = EfficientSam3VideoConfig(
        detector_config=tiny_config(vision).to_dict(),
        tracker_config=tiny_video_config(memory, vision).to_dict(),
        **{**LOW_THRESHOLDS, **fields},
    )
    model = stir(EfficientSam3VideoModel(config))
    see_objects(model.tracker_model)
    return model


def see_objects(tracker: Any, shift: float = 3.0) -> Any:
    """Shift the score of whether an object is there to where random weights say yes."""
    with torch.no_grad():
        tracker.mask_decoder.pred_obj_score_head.proj_out.bias.add_(shift)
    return tracker


def moving_squares(num_frames: int, num_objects: int = 2, size: int = 112) -> tuple[Any, Any]:
    """A clip (frames, 3, size, size) of bright squares that drift, and their masks.

    The masks are (frames, objects, size, size). Frames are noisy, each in its own way.
    """
    generator = torch.Generator().manual_seed(7)
    clip = 0.3 * torch.randn(num_frames, 3, size, size, generator=generator)
    masks = torch.zeros(num_frames, num_objects, size, size, dtype=torch.bool)
    side = size // 5
    for time in range(num_frames):
        for index in range(num_objects):
            across = index % 2 == 1
            along = (size // 8 + 2 * time) % (size - side)
            beside = size // 8 + index * size // (num_objects + 1)
            top, left = (beside, along) if across else (along, beside)
            masks[time, index, top : top + side, left : left + side] = True
            clip[time, index % 3][masks[time, index]] += 1.5
    return clip, masks
