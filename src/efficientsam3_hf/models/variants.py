"""One row for each variant of the family: its name on the Hub, and the configuration it stands for.

A name reads trunk family, size, text tower, neck, context length:
`efficientsam3-{repvit,tinyvit,efficientvit}-{s,m,l}[-TOWER][-lateral][-ctxN]`,
`sam3-litetext-{s0,s1,l}[-ctxN]`, or `sam3`. Without TOWER it is MobileCLIP-S0, without a context
length the one in `TEXT_TOWERS`.
"""

import copy
import difflib
import re
from collections.abc import Mapping
from typing import Any

from .configuration_efficientsam3 import EfficientSam3Config

TRUNKS = {
    "repvit-s": "repvit_m0_9",
    "repvit-m": "repvit_m1_1",
    "repvit-l": "repvit_m2_3",
    "tinyvit-s": "tiny_vit_5m_224",
    "tinyvit-m": "tiny_vit_11m_224",
    "tinyvit-l": "tiny_vit_21m_224",
    "efficientvit-s": "efficientvit_b0",
    "efficientvit-m": "efficientvit_b1",
    "efficientvit-l": "efficientvit_b2",
}

_S1 = {"num_hidden_layers": 12, "use_repmixer_blocks": False}
_MOBILECLIP2_L = {
    "hidden_size": 768,
    "projection_dim": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "use_repmixer_blocks": False,
}
_SAM3_TEXT = {
    "model_type": "clip_text_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 512,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}

# Suffix of a name -> configuration of the tower, and its usual context length.
TEXT_TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    "mobileclip-s0": ({}, 16),
    "mobileclip-s1": (_S1, 16),
    "mobileclip2-l": (_MOBILECLIP2_L, 16),
    "sam3text": (_SAM3_TEXT, 32),
}
DEFAULT_TOWER = "mobileclip-s0"
CONTEXT_LENGTHS = (16, 32, 77)

# SAM 3's ViT with a small text tower.
LITE_TEXT = {
    "sam3-litetext-s0": "mobileclip-s0",
    "sam3-litetext-s1": "mobileclip-s1",
    "sam3-litetext-l": "mobileclip2-l",
}

_NAME = re.compile(
    r"efficientsam3-(?P<trunk>{trunks})(?:-(?P<tower>{towers}))?(?P<lateral>-lateral)?".format(
        trunks="|".join(TRUNKS), towers="|".join(TEXT_TOWERS)
    )
)


def names() -> list[str]:
    """Names of the zoo: nine trunks with four text towers each, SAM3-LiteText, and SAM 3."""
    suffixes = ["" if tower == DEFAULT_TOWER else f"-{tower}" for tower in TEXT_TOWERS]
    students = [f"efficientsam3-{trunk}{suffix}" for trunk in TRUNKS for suffix in suffixes]
    return [*students, *LITE_TEXT, "sam3"]


def config(name: str, **overrides: Any) -> EfficientSam3Config:
    """Configuration of a variant, with a tracker beside the concept model.

    Args:
        name: One of `names()`, optionally with `-lateral` and `-ctx16`, `-ctx32` or `-ctx77`.
        overrides: Fields of `EfficientSam3Config` to set, e.g. `image_size=504`. A dictionary, as
            in `text_config={"attend_to_padding": False}`, changes only the fields it names;
            `vision_config` is that of the tracker, too. `context_length` sets the text tower's.

    >>> config("efficientsam3-tinyvit-s").vision_config.backbone_config.trunk
    'tiny_vit_5m_224'
    >>> config("efficientsam3-tinyvit-s-mobileclip-s1-ctx32").context_length
    32
    """
    base_name, context_length = split_context(name)
    context_length = overrides.pop("context_length", context_length)
    if base_name == "sam3":
        vision, tower = {"model_type": "sam3_vision_model"}, "sam3text"
    elif base_name in LITE_TEXT:
        vision, tower = {"model_type": "sam3_vision_model"}, LITE_TEXT[base_name]
    elif match := _NAME.fullmatch(base_name):
        vision = {
            "neck": "lateral" if match["lateral"] else "sam3",
            "backbone_config": {"trunk": TRUNKS[match["trunk"]]},
        }
        tower = match["tower"] or DEFAULT_TOWER
    else:
        raise unknown_name(name)

    text, usual_length = TEXT_TOWERS[tower]
    text = {**text, "max_position_embeddings": context_length or usual_length}
    image_size = overrides.pop("image_size", None)
    unknown = [field for field in overrides if not hasattr(EfficientSam3Config, field)]
    if unknown:
        raise TypeError(f"EfficientSam3Config has no field {unknown[0]!r}.")
    if "vision_config" in overrides:
        vision = changed(vision, overrides.pop("vision_config"))
    defaults = {
        "vision_config": vision,
        "text_config": text,
        "tracker_config": {"vision_config": vision},
    }
    fields = {field: changed(defaults.get(field), value) for field, value in overrides.items()}
    result = EfficientSam3Config(**copy.deepcopy({**defaults, **fields}))
    if image_size is not None:
        result.image_size = image_size
    return result


def changed(default: Any, change: Any) -> Any:
    """A value with a change applied: dictionaries are merged, anything else is replaced.

    So is a dictionary by one that names its own `model_type`.

    >>> changed({"neck": "sam3", "backbone_config": {"a": 1}}, {"backbone_config": {"b": 2}})
    {'neck': 'sam3', 'backbone_config': {'a': 1, 'b': 2}}
    """
    both = isinstance(default, Mapping) and isinstance(change, Mapping)
    if not both or change.get("model_type", default.get("model_type")) != default.get("model_type"):
        return change
    return {
        **default,
        **{name: changed(default.get(name), value) for name, value in change.items()},
    }


def split_context(name: str) -> tuple[str, int | None]:
    """A name without its `-ctxN`, and N.

    >>> split_context("sam3-litetext-s0-ctx32")
    ('sam3-litetext-s0', 32)
    """
    match = re.fullmatch(r"(.+)-ctx(\d+)", name)
    if match is None:
        return name, None
    length = int(match[2])
    if length not in CONTEXT_LENGTHS:
        raise ValueError(f"Context length {length} is none of {CONTEXT_LENGTHS}.")
    return match[1], length


def unknown_name(name: str) -> ValueError:
    """An error that suggests the names most like the one given."""
    nearest = difflib.get_close_matches(name, names(), n=3, cutoff=0.3)
    question = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    return ValueError(
        f"There is no variant {name!r}.{question} efficientsam3_hf.zoo.names() lists them all."
    )
