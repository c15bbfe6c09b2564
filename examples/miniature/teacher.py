"""A SAM 3 of a million and a half parameters, and weights that it learns from scratch with."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Sam3Config,
    Sam3Model,
    Sam3TrackerVideoConfig,
    Sam3VideoConfig,
    Sam3VideoModel,
)

from efficientsam3_hf import (
    EfficientSam3Config,
    EfficientSam3Model,
    EfficientSam3TrackerVideoConfig,
    EfficientSam3TrackerVideoModel,
)
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.models.checkpoint_layout import join_weights
from efficientsam3_hf.tokenizer import FIRST_TOKENS, LAST_TOKENS

from .world import SIDE, WORDS, scenes

PATCH = 12
GRID = SIDE // PATCH
# transformers' tracker has memories of 64 channels whatever its configuration says.
WIDTH = 64
VIT_WIDTH, VIT_LAYERS = 128, 4
ANCHORS = 5  # in a row of queries
FAST_PAIRS = 4  # of channels that are turned far from one place to the next
HEADS = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
    "dropout": 0.0,
}


def vision_config() -> dict:
    """SAM 3's vision encoder. All layers see the whole image, which is no larger than a window."""
    return {
        "model_type": "sam3_vision_model",
        "fpn_hidden_size": WIDTH,
        "backbone_feature_sizes": [[scale * GRID, scale * GRID] for scale in (4, 2, 1)],
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": VIT_WIDTH,
            "intermediate_size": 2 * VIT_WIDTH,
            "num_hidden_layers": VIT_LAYERS,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "pretrain_image_size": SIDE,
            "patch_size": PATCH,
            "global_attn_indexes": list(range(VIT_LAYERS)),
        },
    }


def text_config() -> dict:
    """SAM 3's text tower for the words of the world."""
    vocab_size = len(FIRST_TOKENS) + len(WORDS) + len(LAST_TOKENS)
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 8,
        "hidden_act": "gelu",
        "pad_token_id": 0,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
    }


def teacher_config() -> EfficientSam3Config:
    """Everything that the concept model has."""
    return EfficientSam3Config(
        vision_config=vision_config(),
        text_config=text_config(),
        geometry_encoder_config={**HEADS, "num_layers": 1},
        detr_encoder_config={**HEADS, "num_layers": 2},
        detr_decoder_config={**HEADS, "num_layers": 3, "num_queries": ANCHORS**2},
        mask_decoder_config={
            "hidden_size": WIDTH,
            "num_attention_heads": 4,
            "num_upsampling_stages": 2,
        },
        # As in transformers, whose classes load the same weights and give the same outputs.
        always_encode_geometry=False,
        has_point_branch=False,
        init_local_box_bias=True,
        words=WORDS,
        objective={"class_target": "one", "class_queries": ANCHORS**2, "mask_points": None},
    )


def tracker_config() -> EfficientSam3TrackerVideoConfig:
    """The tracker, with SAM 3's own memory."""
    return EfficientSam3TrackerVideoConfig(
        vision_config=vision_config(),
        prompt_encoder_config={"hidden_size": WIDTH},
        mask_decoder_config={
            "hidden_size": WIDTH,
            "mlp_dim": 2 * WIDTH,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": WIDTH,
        },
        memory="dense",
        memory_attention_hidden_size=WIDTH,
        memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=2 * WIDTH,
        memory_attention_dropout=0.0,
        memory_attention_rope_dropout=0.0,
        memory_encoder_hidden_size=WIDTH,
        memory_encoder_output_channels=WIDTH,
        mask_downsampler_embed_dim=WIDTH,
        memory_fuser_embed_dim=WIDTH,
        memory_fuser_intermediate_dim=2 * WIDTH,
        memory_fuser_layer_scale_init_value=0.1,
    )


def new_teacher(seed: int = 0) -> EfficientSam3Model:
    """A teacher that has learned nothing yet."""
    torch.manual_seed(seed)
    model = EfficientSam3Model(teacher_config())
    scale_to_fan_in(model)
    lay_out_queries(model)
    lay_out_positions(model)
    whiten_patches(model)
    model.detr_decoder.init_local_box_bias()
    return model


def with_tracker(model: EfficientSam3Model, seed: int = 0) -> Family:
    """A teacher and beside it a tracker that has learned nothing yet."""
    torch.manual_seed(seed)
    tracker = EfficientSam3TrackerVideoModel(tracker_config())
    scale_to_fan_in(tracker)
    lay_out_memory(tracker)
    neck = model.vision_encoder.neck.state_dict()  # a good place to begin
    tracker.vision_encoder.neck.load_state_dict(neck)
    return Family(model, tracker)


def as_transformers(model: EfficientSam3Model) -> Sam3Model:
    """The same teacher as a class of transformers."""
    config = model.config.to_dict()
    stock = Sam3Model(
        Sam3Config(**{name: config[name] for name in Sam3Config.sub_configs_defaults})
    )
    stock.load_state_dict(model.state_dict())
    return stock.eval()


def video_as_transformers(family: Family) -> Sam3VideoModel:
    """Teacher and tracker as the class of transformers that has both."""
    detector: Any = as_transformers(family.detector).config
    tracker = family.tracker.config.to_dict()
    left_out = ("memory", "model_type", "auto_map")
    tracker = {
        name: value
        for name, value in tracker.items()
        if not name.startswith("perceiver") and name not in left_out
    }
    tracker |= {"image_size": SIDE, "memory_attention_rope_feat_sizes": [GRID, GRID]}
    stock = Sam3VideoModel(
        Sam3VideoConfig(
            detector_config=detector.to_dict(),
            tracker_config=Sam3TrackerVideoConfig(**tracker).to_dict(),
            low_res_mask_size=4 * GRID,
        )
    )
    weights = join_weights(family.detector.state_dict(), family.tracker.state_dict())
    stock.load_state_dict(weights)
    return stock.eval()


@torch.no_grad()
def scale_to_fan_in(model: nn.Module) -> None:
    """Let signals keep their size: the usual deviation of 0.02 is for layers ten times as wide."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.ConvTranspose2d):  # whose outputs each have one input pixel
            module.weight.normal_(std=len(module.weight) ** -0.5)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.5)


@torch.no_grad()
def lay_out_queries(model: EfficientSam3Model) -> None:
    """Spread queries over the image; they differ by nothing but their places."""
    decoder = model.detr_decoder
    middle = (torch.arange(ANCHORS) + 0.5) / ANCHORS
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    size = torch.full_like(x, 0.35)
    anchors = torch.stack([x, y, size, size], dim=-1).view(-1, 4)
    decoder.reference_points.weight.copy_(anchors.logit())
    decoder.query_embed.weight.copy_(waves(anchors[:, :2], WIDTH))
    # Boxes start out at their anchors.
    decoder.box_head.layer3.weight.mul_(0.01)


@torch.no_grad()
def lay_out_positions(model: EfficientSam3Model) -> None:
    """Tell the ViT where its patches are."""
    middle = (torch.arange(GRID) + 0.5) / GRID
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    places = torch.stack([x, y], dim=-1).view(-1, 2)
    backbone = model.vision_encoder.backbone
    backbone.embeddings.position_embeddings.copy_(waves(places, VIT_WIDTH)[None])


@torch.no_grad()
def whiten_patches(model: EfficientSam3Model, num_scenes: int = 100) -> None:
    """Begin with the principal components of patches, so that edges weigh as much as brightness.

    And let the layers of the ViT begin with small steps away from them.
    """
    backbone = model.vision_encoder.backbone
    patches = F.unfold(some_pixels(num_scenes), PATCH, stride=PATCH).movedim(1, -1).flatten(0, 1)
    variances, components = torch.linalg.eigh(patches.T.double().cov())
    variances, components = variances[-VIT_WIDTH:], components[:, -VIT_WIDTH:]
    filters = (components / (variances + 1e-3).sqrt()).T
    projection = backbone.embeddings.patch_embeddings.projection
    projection.weight.copy_(0.7 * filters.view_as(projection.weight))
    for layer in backbone.layers:
        layer.attention.o_proj.weight.mul_(0.3)
        layer.mlp.fc2.weight.mul_(0.3)


@torch.no_grad()
def lay_out_memory(tracker: EfficientSam3TrackerVideoModel, peak: float = 1.5) -> None:
    """Let each place look at what is remembered of the places around it.

    Queries and keys are turned by their positions, pair of channels by pair, each pair at a speed
    of its own. The same constant in both adds `peak` times the cosine of how far apart two places
    have been turned. Of the fastest pairs of either axis that falls off within two places.

    Args:
        tracker: With dense memory.
        peak: What each pair adds to the score of a query and a key in the same place.
    """
    for layer in tracker.memory_attention.layers:
        attention = layer.cross_attn_image
        constant = (peak / attention.scaling) ** 0.5
        for projection in (attention.q_proj, attention.k_proj):
            channels = projection.bias.view(attention.num_heads, 2, -1, 2)  # head, axis, pair
            channels[:, :, :FAST_PAIRS, 0] = constant


@torch.no_grad()
def fit_memory(family: Family, num_scenes: int = 100) -> None:
    """Let a new memory speak as loudly as what a trained neck says, which is left as it is.

    Args:
        family: Whose tracker answers boxes and clicks, and remembers nothing yet.
        num_scenes: To measure with.
    """
    pixels = some_pixels(num_scenes).to(family.detector.device)
    coarse = family.tracker_features(family.see(pixels)).coarse
    size = float(coarse.square().mean().sqrt())
    encoder, attention = family.tracker.memory_encoder, family.tracker.memory_attention
    encoder.feature_projection.weight.div_(size)
    for layer in attention.layers:
        for last in (layer.self_attn.o_proj, layer.cross_attn_image.o_proj, layer.linear2):
            last.weight.mul_(size)
    attention.layer_norm.weight.fill_(size)


def some_pixels(count: int) -> Tensor:
    """Scenes (count, 3, height, width) as the model takes them, in [-1, 1]."""
    drawn = scenes(count, "train")
    images = torch.stack([torch.from_numpy(drawn[number].image) for number in range(count)])
    return images.movedim(-1, 1) / 127.5 - 1


def waves(places: Tensor, width: int, most: float = 3.0) -> Tensor:
    """Sines and cosines (count, width) of (x, y) in [0, 1], from half a wave to `most` waves."""
    waves = torch.logspace(math.log10(0.5), math.log10(most), width // 4)
    phase = 2 * math.pi * places[..., None] * waves  # (count, 2, width / 4)
    return torch.cat([phase.sin(), phase.cos()], dim=-1).flatten(1)
