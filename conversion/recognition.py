"""Tells from weights alone which variant of the zoo they are.

Everything but one number can be seen: trunk, size, text tower, tracker. A position table of 77 rows
does not say how many of a phrase's tokens the tower was trained to read. The released files with
such a table are those of December 2025, whose table was interpolated to 32 at run time; 77 rows are
therefore read as that, unless the caller says otherwise.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from efficientsam3_hf.models.configuration_efficientsam3 import (
    EfficientSam3Config,
    EfficientSam3TextConfig,
)
from efficientsam3_hf.models.trunks import TRUNK_CHANNELS
from efficientsam3_hf.models.variants import (
    DEFAULT_TOWER,
    LITE_TEXT,
    TEXT_TOWERS,
    TRUNKS,
    config,
    split_context,
)

from .parts import DETECTOR, POINT_BRANCH, split_parts

BACKBONE = f"{DETECTOR}vision_encoder.backbone."
TEXT = f"{DETECTOR}text_encoder."
STUDENT_HEAD = f"{BACKBONE}head.0.weight"
CLIP_POSITIONS = f"{TEXT}text_model.embeddings.position_embedding.weight"
MOBILECLIP_POSITIONS = f"{TEXT}embeddings.position_embedding.position_embedding"
TOKENS = f"{TEXT}embeddings.token_embedding.weight"

# A weight that only trunks of one family have.
FAMILIES = {
    "repvit": f"{BACKBONE}trunk.stem.conv1.c.weight",
    "tinyvit": f"{BACKBONE}trunk.patch_embed.conv1.conv.weight",
    "efficientvit": f"{BACKBONE}trunk.stem.in_conv.conv.weight",
}
VIT = "sam3's ViT"

INTERPOLATED_ROWS = 77
INTERPOLATED_LENGTH = 32
LEAST_LENGTH = 3

# Meta builds its ViT with torch's default, transformers with 1e-6.
VIT_LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Variant:
    """What some weights are.

    Args:
        name: In the zoo.
        config: The zoo's configuration, fitted to what these weights hold.
        notes: What was decided where the weights leave it open.
    """

    name: str
    config: EfficientSam3Config
    notes: tuple[str, ...]


def recognise(
    weights: Mapping[str, Tensor], name: str | None = None, context_length: int | None = None
) -> Variant:
    """The variant that complete weights under our names belong to.

    Args:
        weights: All that a folder is to hold.
        name: What the user takes them for; another variant is an error.
        context_length: Tokens of a phrase, where the position table has 77 rows.
    """
    trunk, tower, rows = find_trunk(weights), find_tower(weights), count_positions(weights)
    wished = context_length
    if wished is None and name is not None:
        wished = split_context(name)[1]
    length = choose_context(rows, wished)
    found = compose_name(trunk, tower, length)
    if name is not None:
        refuse_conflict(name, found, f"{trunk} trunk, {tower} with {rows} positions")

    configuration = config(found)
    notes = fit_text(configuration, rows, length) + fit_vision(configuration, weights, trunk)
    notes += fit_parts(configuration, weights)
    return Variant(found, configuration, tuple(notes))


def find_trunk(weights: Mapping[str, Tensor]) -> str:
    """`"repvit-m"` and the like, or `VIT`."""
    if f"{BACKBONE}embeddings.patch_embeddings.projection.weight" in weights:
        return VIT
    families = [family for family, key in FAMILIES.items() if key in weights]
    if len(families) != 1 or STUDENT_HEAD not in weights:
        raise ValueError(
            f"The image trunk is of no known family: {families or 'none'} of {list(FAMILIES)} "
            f"fits, and its head {'is' if STUDENT_HEAD in weights else 'is not'} there."
        )
    channels = size_of(weights, STUDENT_HEAD, 1, of=4)
    for trunk, timm_name in TRUNKS.items():
        if trunk.startswith(families[0]) and TRUNK_CHANNELS[timm_name][-1] == channels:
            return trunk
    raise ValueError(f"No {families[0]} of the zoo ends in {channels} channels.")


def find_tower(weights: Mapping[str, Tensor]) -> str:
    """A key of the zoo's text towers."""
    if CLIP_POSITIONS in weights:
        return "sam3text"
    layers = {m[1] for key in weights if (m := re.match(rf"{re.escape(TEXT)}layers\.(\d+)\.", key))}
    has_repmixer = any(key.startswith(TEXT) and ".token_mixer." in key for key in weights)
    width = size_of(weights, TOKENS, 1, of=2) if TOKENS in weights else 0
    for tower, (fields, _) in TEXT_TOWERS.items():
        if fields.get("model_type", "efficientsam3_text") != "efficientsam3_text":
            continue
        sizes = EfficientSam3TextConfig(**fields)
        expected = (sizes.hidden_size, sizes.num_hidden_layers, sizes.use_repmixer_blocks)
        if expected == (width, len(layers), has_repmixer):
            return tower
    raise ValueError(
        f"No text tower of the zoo has width {width}, {len(layers)} layers and "
        f"{'' if has_repmixer else 'no '}RepMixer blocks. It knows {', '.join(TEXT_TOWERS)}."
    )


def count_positions(weights: Mapping[str, Tensor]) -> int:
    """Rows of the text tower's position table."""
    if CLIP_POSITIONS in weights:
        return size_of(weights, CLIP_POSITIONS, 0, of=2)
    if MOBILECLIP_POSITIONS not in weights:
        raise ValueError("The text tower has no position table: the file is incomplete.")
    return size_of(weights, MOBILECLIP_POSITIONS, 2, of=4)


def size_of(weights: Mapping[str, Tensor], name: str, dimension: int, of: int) -> int:
    """One dimension of a weight that must have so many."""
    shape = tuple(weights[name].shape)
    if len(shape) != of:
        raise ValueError(
            f"{name} has shape {shape}, but needs {of} dimensions: the file is damaged, or of "
            f"another family. Give the file as released."
        )
    return shape[dimension]


def choose_context(rows: int, wished: int | None) -> int:
    """Tokens of a phrase, for a position table of so many rows."""
    if wished is not None and not LEAST_LENGTH <= wished <= max(rows, INTERPOLATED_ROWS):
        raise ValueError(
            f"Phrases cannot have {wished} tokens: {LEAST_LENGTH} is the least, for start, end and "
            f"one between, and {INTERPOLATED_ROWS} the most. Choose another context length."
        )
    if rows == INTERPOLATED_ROWS:
        return INTERPOLATED_LENGTH if wished is None else wished
    if wished is not None and wished != rows:
        raise ValueError(
            f"The position table has {rows} rows, so phrases have {rows} tokens, not {wished}. "
            f"Only a table of {INTERPOLATED_ROWS} leaves a choice: it may be interpolated."
        )
    return rows


def compose_name(trunk: str, tower: str, context_length: int) -> str:
    """The name in the zoo.

    >>> compose_name("repvit-m", "mobileclip-s1", 32)
    'efficientsam3-repvit-m-mobileclip-s1-ctx32'
    """
    if trunk == VIT:
        lite = {tower: name for name, tower in LITE_TEXT.items()}
        name = lite.get(tower, "sam3")
    else:
        name = f"efficientsam3-{trunk}" + ("" if tower == DEFAULT_TOWER else f"-{tower}")
    return name if context_length == TEXT_TOWERS[tower][1] else f"{name}-ctx{context_length}"


def refuse_conflict(wished: str, found: str, seen: str) -> None:
    """Raise unless both names stand for one variant."""
    expected = config(wished)  # an error where the zoo has no such name
    same_base = split_context(wished)[0] == split_context(found)[0]
    if not same_base or expected.context_length != config(found).context_length:
        raise ValueError(
            f"These are the weights of {found!r} ({seen}), not of {wished!r}. Leave --name out, or "
            f"give the file that you mean."
        )


def fit_text(configuration: EfficientSam3Config, rows: int, length: int) -> list[str]:
    """Set the table's own length where it is read at another one."""
    if rows == length:
        return []
    configuration.text_config.max_position_embeddings = rows
    configuration.text_config.context_length = length
    return [
        f"The position table of {rows} rows is interpolated to {length} tokens when it is read. "
        f"--context-length chooses another length."
    ]


def fit_vision(
    configuration: EfficientSam3Config, weights: Mapping[str, Tensor], trunk: str
) -> list[str]:
    """Set what the zoo leaves to the weights: levels of the necks, precision of the ViT's norms."""
    necks = {f"{DETECTOR}vision_encoder.neck.": configuration.vision_config}
    necks["tracker_neck."] = configuration.tracker_config.vision_config
    notes = []
    for prefix, vision in necks.items():
        has_neck = any(name.startswith(prefix) for name in weights)
        if has_neck and not any(name.startswith(f"{prefix}fpn_layers.3.") for name in weights):
            vision.scale_factors = vision.scale_factors[:3]
            notes.append(f"{prefix}* has three levels, without the fourth, which nothing reads.")
        if trunk == VIT:
            vision.backbone_config.layer_norm_eps = VIT_LAYER_NORM_EPS
    if trunk == VIT:
        notes.append(
            f"Layer norms of the ViT use eps {VIT_LAYER_NORM_EPS}, as in Meta's code; the default "
            f"of transformers is 1e-6."
        )
    return notes


def fit_parts(configuration: EfficientSam3Config, weights: Mapping[str, Tensor]) -> list[str]:
    """Leave parts without weights out of a configuration, and load all in the widest precision."""
    parts = split_parts(weights)
    if "tracker" not in parts:
        configuration.tracker_config = None
    if POINT_BRANCH not in parts:
        configuration.has_point_branch = False
    stored: dict[torch.dtype, list[str]] = {}
    for part, tensors in parts.items():
        for dtype in {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}:
            stored.setdefault(dtype, []).append(part)
    # In which every number of the others can be written.
    widest = reduce(torch.promote_types, stored)
    configuration.dtype = widest
    if len(stored) == 1:
        return []
    listing = "; ".join(f"{_name(dtype)}: {', '.join(stored[dtype])}" for dtype in stored)
    return [
        f"The weights are stored in several precisions ({listing}) and load as {_name(widest)}, "
        f"which changes no number."
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
