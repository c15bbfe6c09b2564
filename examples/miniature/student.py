"""The student: EfficientViT-B0, a small MobileCLIP tower, and a Perceiver for its memory."""

import os
from pathlib import Path

from efficientsam3_hf import EfficientSam3Config

from .teacher import HEADS, VIT_WIDTH, WIDTH, teacher_config, tracker_config

SIDE = 128  # of its images; a multiple of EfficientViT's stride of 32
TEXT_WIDTH = 32
LATENTS, LATENTS_2D = 8, 16  # of a frame, where dense memory has 64 tokens


def vision_config(neck: str) -> dict:
    """EfficientViT-B0 with one of the two necks."""
    return {
        "model_type": "efficientsam3_vision",
        "neck": neck,
        "fpn_hidden_size": WIDTH,
        "backbone_config": {
            "model_type": "efficientsam3_backbone",
            "trunk": "efficientvit_b0",
            "image_size": SIDE,
            "patch_size": 16,
            "hidden_size": None if neck == "lateral" else VIT_WIDTH,
        },
    }


def text_config() -> dict:
    """A MobileCLIP tower of one layer."""
    teachers = teacher_config().text_config.to_dict()
    return {
        "model_type": "efficientsam3_text",
        "vocab_size": teachers["vocab_size"],
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "projection_dim": TEXT_WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": teachers["max_position_embeddings"],
        "attend_to_padding": False,
        "use_repmixer_blocks": False,
    }


def student_config(neck: str = "lateral", memory: str = "perceiver") -> EfficientSam3Config:
    """Everything that a student has; its heads are the teacher's.

    Args:
        neck: `"lateral"` or `"sam3"`.
        memory: `"perceiver"` or `"dense"`.
    """
    teacher, tracker = teacher_config().to_dict(), tracker_config().to_dict()
    vision = vision_config(neck)
    tracker |= {
        "vision_config": vision,
        "memory": memory,
        "perceiver_resampler_num_latents": LATENTS,
        "perceiver_resampler_num_latents_2d": LATENTS_2D,
        "perceiver_resampler_hidden_size": WIDTH,
        "perceiver_resampler_mlp_intermediate_size": HEADS["intermediate_size"],
    }
    del tracker["prompt_encoder_config"]["image_size"]
    return EfficientSam3Config(
        **{name: teacher[name] for name in teacher if name.endswith("_config")}
        | {
            "vision_config": vision,
            "text_config": text_config(),
            "tracker_video_config": tracker,
            "always_encode_geometry": teacher["always_encode_geometry"],
            "has_point_branch": teacher["has_point_branch"],
            "words": teacher["words"],
            "objective": teacher["objective"],
        }
    )


def write_student(folder: str | os.PathLike, neck: str) -> Path:
    """A folder with a configuration and no weights, of which `train_distill.py` makes a student."""
    student_config(neck).save_pretrained(folder)
    return Path(folder)
