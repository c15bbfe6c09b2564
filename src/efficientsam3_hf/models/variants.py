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

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

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

_VIT = {"model_type": "sam3_vision_model", "backbone_config": {"model_type": "sam3_vit_model"}}

# What the dictionary of a configuration may hold beside its fields.
NO_FIELDS = {"model_type", "_name_or_path", "output_attentions", "auto_map"}

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
    if context_length is not None:
        check_one_length(context_length, overrides.get("text_config"))
    if base_name == "sam3":
        vision, tower = _VIT, "sam3text"
    elif base_name in LITE_TEXT:
        vision, tower = _VIT, LITE_TEXT[base_name]
    elif match := _NAME.fullmatch(base_name):
        vision = {
            "model_type": "efficientsam3_vision",
            "neck": "lateral" if match["lateral"] else "sam3",
            "backbone_config": {
                "model_type": "efficientsam3_backbone",
                "trunk": TRUNKS[match["trunk"]],
            },
        }
        tower = match["tower"] or DEFAULT_TOWER
    else:
        raise unknown_name(name)

    text, usual_length = TEXT_TOWERS[tower]
    text = {
        "model_type": "efficientsam3_text",
        **text,
        "max_position_embeddings": usual_length if context_length is None else context_length,
    }
    image_size = overrides.pop("image_size", None)
    if "vision_config" in overrides:
        vision = changed(vision, overrides.pop("vision_config"))
    defaults = {
        "vision_config": vision,
        "text_config": text,
        "tracker_config": {"model_type": "efficientsam3_tracker", "vision_config": vision},
    }
    fields = changed(defaults, overrides)
    check_fields(EfficientSam3Config, fields)
    result = EfficientSam3Config(**copy.deepcopy(fields))
    if image_size is not None:
        result.image_size = image_size
    return result


def changed(default: Any, change: Any) -> Any:
    """A value with a change applied: dictionaries are merged, anything else is replaced.

    So is a dictionary by one of another `model_type`. A dictionary changes a configuration, too.

    >>> changed({"neck": "sam3", "backbone_config": {"a": 1}}, {"backbone_config": {"b": 2}})
    {'neck': 'sam3', 'backbone_config': {'a': 1, 'b': 2}}
    """
    if isinstance(default, PreTrainedConfig) and isinstance(change, Mapping):
        default = default.to_dict()
    if not isinstance(default, Mapping) or not isinstance(change, Mapping):
        return change
    if change.get("model_type", default.get("model_type")) != default.get("model_type"):
        return change
    return {
        **default,
        **{name: changed(default.get(name), value) for name, value in change.items()},
    }


def check_fields(config_class: type[PreTrainedConfig], values: Mapping[str, Any]) -> None:
    """Raise for what is no field of a configuration or of one inside it, and for parts left out.

    Args:
        config_class: Class of the configuration.
        values: Its fields, those inside as dictionaries or as configurations.
    """
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map, *NO_FIELDS}
    known |= {name for name in dir(config_class) if is_settable(getattr(config_class, name))}
    for name, value in values.items():
        if name not in known:
            likely = difflib.get_close_matches(name, known, n=1)
            question = f" Did you mean {likely[0]!r}?" if likely else ""
            raise TypeError(f"{config_class.__name__} has no field {name!r}.{question}")
        if name == "model_type" and value != config_class.model_type:
            raise ValueError(
                f"model_type is {config_class.model_type!r} in the zoo, it cannot be {value!r}."
            )
        part = config_class.sub_configs_defaults.get(name)
        if part is not None and value is None and not part.optional:
            raise ValueError(
                f"{name} cannot be None: every {config_class.__name__} has that part. Leave the "
                "field out for the variant's own."
            )
        if part is not None and isinstance(value, Mapping):
            model_type = value.get("model_type", part.model_type)
            if model_type not in CONFIG_MAPPING:
                raise ValueError(f"transformers knows no {name} of type {model_type!r}.")
            check_fields(CONFIG_MAPPING[model_type], value)


def is_settable(attribute: Any) -> bool:
    """Whether this is a property that can be set, such as `image_size`."""
    return isinstance(attribute, property) and attribute.fset is not None


def check_one_length(context_length: int, text_config: Any) -> None:
    """Raise if a text configuration, too, says how long phrases are."""
    lengths = {"context_length", "max_position_embeddings"}
    if isinstance(text_config, PreTrainedConfig) or lengths & set(text_config or ()):
        raise ValueError(
            f"A context length of {context_length}, of the name or an argument, and text_config "
            "both say how long phrases are. Leave one of them out."
        )


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
    lower = re.sub(r"(-ctx\d+)(-lateral)", r"\2\1", name.lower())
    if lower != name and is_name(lower):
        nearest = [lower]
    else:
        nearest = difflib.get_close_matches(lower, names(), n=3, cutoff=0.3)
    question = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    return ValueError(
        f"There is no variant {name!r}.{question} efficientsam3_hf.zoo.names() lists them all."
    )


def is_name(name: str) -> bool:
    """Whether this is the name of a variant, a context length and `-lateral` included."""
    base_name = re.sub(r"-ctx\d+$", "", name)
    return base_name in names() or _NAME.fullmatch(base_name) is not None
