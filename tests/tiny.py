"""Tiny random models of every kind: all parts there, in milliseconds."""

import copy
from typing import Any

import torch

from efficientsam3_hf import EfficientSam3Config, EfficientSam3Model, EfficientSam3TrackerModel

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
                gain = 0.3 if parameter.ndim == 4 else 1.0  # deep random trunks amplify roundings
                parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()
