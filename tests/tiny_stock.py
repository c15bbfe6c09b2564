"""Folders of tiny random models: ours, and those of transformers that ours are measured beside."""

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny
import torch
from safetensors.torch import save_file
from tiny import (
    HEADS,
    LOW_THRESHOLDS,
    TINY_CLIP,
    TINY_TEXT,
    TINY_VIT,
    WIDTH,
    see_objects,
    stir,
    tiny_config,
    tiny_model,
    tiny_tracker_video,
    tiny_video_config,
)
from transformers import (
    EdgeTamVideoConfig,
    EdgeTamVideoModel,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
    Sam3Config,
    Sam3LiteTextConfig,
    Sam3LiteTextModel,
    Sam3Processor,
    Sam3VideoConfig,
    Sam3VideoModel,
    Sam3VideoProcessor,
)
from transformers.models.sam2.image_processing_sam2 import Sam2ImageProcessor
from transformers.models.sam3.image_processing_sam3 import Sam3ImageProcessor

from efficientsam3_hf import zoo
from efficientsam3_hf.tokenizer import build_tokenizer

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def write_ours(folder: Path) -> Path:
    """A folder with concept model and tracker, which finds something in every picture."""
    model, tracker = tiny_model(), tiny_tracker_video("perceiver")
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    see_concepts(model)
    return zoo.save(model.config, folder, model, tracker)


def see_concepts(model: Any, shift: float = 4.0) -> None:
    """Shift the presence of phrases to where random weights doubt, and say yes now and then."""
    with torch.no_grad():
        model.detr_decoder.presence_head.layer3.bias.add_(shift)


def write_sam3(folder: Path) -> Path:
    """A folder with the layout of facebook/sam3: concepts, objects, both in video."""
    with patch.object(tiny, "WIDTH", 128), patch.dict(tiny.HEADS, hidden_size=128):
        vision = {**copy.deepcopy(TINY_VIT), "fpn_hidden_size": 128}
        # The length to which transformers' processor pads.
        text = {**TINY_CLIP, "max_position_embeddings": 32}
        detector = tiny_config(vision, text).to_dict()
        tracker = tiny_video_config(vision=vision, memory_encoder_output_channels=64).to_dict()
    left_out = ("memory", "auto_map")
    tracker = {
        name: value
        for name, value in tracker.items()
        if not name.startswith("perceiver") and name not in left_out
    }
    tracker |= {"model_type": "sam3_tracker_video", "image_size": 112}
    tracker["memory_attention_rope_feat_sizes"] = [8, 8]
    config = Sam3VideoConfig(
        detector_config={name: detector[name] for name in Sam3Config.sub_configs_defaults},
        tracker_config=tracker,
        low_res_mask_size=32,
        **LOW_THRESHOLDS,
    )
    torch.manual_seed(0)
    model = stir(Sam3VideoModel(config))
    see_objects(model.tracker_model)
    see_concepts(model.detector_model)
    # `save_pretrained` of transformers 5.23 writes the prefix of the tracker twice.
    model.config.save_pretrained(folder)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    size = {"height": 112, "width": 112}
    Sam3VideoProcessor(
        Sam3ImageProcessor(size=size, mask_size={"height": 32, "width": 32}),
        Sam2VideoVideoProcessor(size=size, **HALF),
        build_tokenizer(32),
    ).save_pretrained(folder)
    return folder


def write_edgetam(folder: Path) -> Path:
    """A folder with the layout of EdgeTAM: objects, in images and in video."""
    width = 128
    config = EdgeTamVideoConfig(
        vision_config={
            "model_type": "edgetam_vision_model",
            "backbone_config": {
                "model_type": "timm_wrapper",
                "architecture": "repvit_m1",
                "num_classes": 0,
                "model_args": {
                    "in_chans": 3,
                    "features_only": True,
                    "out_indices": [0, 1, 2, 3],
                },
            },
            "backbone_channel_list": [384, 192, 96, 48],
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "fpn_hidden_size": width,
            "num_feature_levels": 3,
        },
        prompt_encoder_config={
            "hidden_size": width,
            "image_size": 128,
            "patch_size": 16,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": width,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": width,
        },
        image_size=128,
        memory_attention_hidden_size=width,
        memory_attention_num_layers=1,
        memory_attention_mlp_hidden_size=64,
        memory_attention_rope_feat_sizes=[8, 8],
        memory_attention_rope_k_sizes=[4, 4],
        memory_encoder_hidden_size=width,
        memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=width,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=64,
        perceiver_resampler_num_latents=16,
        perceiver_resampler_num_latents_2d=16,
        perceiver_resampler_hidden_size=64,
        perceiver_resampler_mlp_intermediate_size=32,
        perceiver_resampler_attention_head_dim=64,
    )
    torch.manual_seed(0)
    model = see_objects(stir(EdgeTamVideoModel(config)))
    model.save_pretrained(folder)
    size = {"height": 128, "width": 128}
    Sam2VideoProcessor(
        Sam2ImageProcessor(size=size, mask_size={"height": 32, "width": 32}),
        Sam2VideoVideoProcessor(size=size),
    ).save_pretrained(folder)
    return folder


def write_lite_text(folder: Path) -> Path:
    """A folder with the layout of SAM3-LiteText: SAM 3 on images, with MobileCLIP's text tower."""
    config = Sam3LiteTextConfig(
        vision_config=copy.deepcopy(TINY_VIT),
        # The length to which transformers' processor pads.
        text_config={**TINY_TEXT, "max_position_embeddings": 32},
        geometry_encoder_config={**HEADS, "num_layers": 1},
        detr_encoder_config={**HEADS, "num_layers": 1},
        detr_decoder_config={**HEADS, "num_layers": 2, "num_queries": 5},
        mask_decoder_config={"hidden_size": WIDTH, "num_attention_heads": 4},
    )
    torch.manual_seed(0)
    model = stir(Sam3LiteTextModel(config))
    see_concepts(model)
    model.save_pretrained(folder)
    size = {"height": 112, "width": 112}
    Sam3Processor(
        Sam3ImageProcessor(size=size, mask_size={"height": 32, "width": 32}), build_tokenizer(32)
    ).save_pretrained(folder)
    return folder


def write_sam2(folder: Path) -> Path:
    """A folder with the layout of SAM 2: objects, in images and in video."""
    width = 128
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 16,
                "image_size": [128, 128],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [16, 32, 64, 128],
                "num_attention_heads_per_stage": [1, 1, 2, 4],
                "window_size_per_stage": [8, 4, 4, 4],
                "window_positional_embedding_background_size": [4, 4],
                "global_attention_blocks": [3],
            },
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "fpn_hidden_size": width,
        },
        prompt_encoder_config={"hidden_size": width, "image_size": 128, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": width,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": width,
        },
        image_size=128,
        memory_attention_hidden_size=width,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=64,
        memory_attention_rope_feat_sizes=[8, 8],
        memory_encoder_hidden_size=width,
        mask_downsampler_embed_dim=width,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=64,
    )
    torch.manual_seed(0)
    model = see_objects(stir(Sam2VideoModel(config)))
    model.save_pretrained(folder)
    size = {"height": 128, "width": 128}
    Sam2VideoProcessor(
        Sam2ImageProcessor(size=size, mask_size={"height": 32, "width": 32}),
        Sam2VideoVideoProcessor(size=size),
    ).save_pretrained(folder)
    return folder
