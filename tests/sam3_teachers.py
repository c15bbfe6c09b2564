"""Tiny teachers of transformers, and folders of pictures to cache."""

from pathlib import Path
from typing import Any

import torch
from tiny import TINY_CLIP, TINY_VIT, stir, tiny_config
from transformers import (
    Sam3Config,
    Sam3Model,
    Sam3TrackerVideoConfig,
    Sam3VideoConfig,
    Sam3VideoModel,
)

from efficientsam3_hf import zoo
from efficientsam3_hf.data.files import write_image
from efficientsam3_hf.data.loading import Samples, load
from efficientsam3_hf.data.own_folder import OwnImages
from efficientsam3_hf.data.synthetic import Scenes
from efficientsam3_hf.distillation.teacher import Teacher, load_teacher


def tiny_sam3(seed: int = 0) -> Sam3Model:
    """transformers' SAM 3 for images."""
    config = tiny_config(TINY_VIT, TINY_CLIP).to_dict()
    torch.manual_seed(seed)
    model = stir(
        Sam3Model(Sam3Config(**{name: config[name] for name in Sam3Config.sub_configs_defaults}))
    )
    if seed:
        with torch.no_grad():
            model.vision_encoder.backbone.embeddings.position_embeddings.add_(0.1)
    return model


def tiny_sam3_video() -> Sam3VideoModel:
    """transformers' SAM 3 for video: detector, tracker and both necks."""
    config = tiny_config(TINY_VIT, TINY_CLIP).to_dict()
    detector = {name: config[name] for name in Sam3Config.sub_configs_defaults}
    names = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    tracker = {name: config["tracker_config"][name] for name in names}
    # Its memories have 64 channels whatever the configuration says, so all else is as wide.
    for part in (*detector.values(), *tracker.values()):
        field = "fpn_hidden_size" if "fpn_hidden_size" in part else "hidden_size"
        part[field] = 64 if part["model_type"] != "clip_text_model" else part[field]
    sizes = dict.fromkeys(
        (
            "memory_attention_hidden_size",
            "memory_encoder_hidden_size",
            "mask_downsampler_embed_dim",
            "memory_fuser_embed_dim",
            "memory_attention_feed_forward_hidden_size",
            "memory_fuser_intermediate_dim",
            "memory_encoder_output_channels",
        ),
        64,
    )
    tracker_config = Sam3TrackerVideoConfig(
        **tracker,
        **sizes,
        image_size=112,
        memory_attention_num_layers=1,
        memory_attention_rope_feat_sizes=[8, 8],
    )
    torch.manual_seed(0)
    video_config = Sam3VideoConfig(
        detector_config=detector, tracker_config=tracker_config.to_dict(), low_res_mask_size=32
    )
    return stir(Sam3VideoModel(video_config))


def tiny_teacher(seed: int = 0) -> Teacher:
    """A frozen concept model, in float32."""
    return load_teacher(tiny_sam3(seed), "float32")


def write_pictures(folder: Path, count: int = 10, seed: int = 0) -> None:
    """Pictures of one size, without loss."""
    scenes = Scenes(count, side=112, seed=seed)
    for number in range(count):
        image = scenes[number].image
        assert image is not None
        write_image(folder / f"{number}.png", image)


def pictures(folder: Path, **options: Any) -> Samples:
    """The samples of a folder."""
    return load(OwnImages(str(folder)), **options)


def processor() -> Any:
    """SAM 3's transform at the teacher's size."""
    return zoo.processor(tiny_config(TINY_VIT, TINY_CLIP)).image_processor
