"""One checkpoint for all tasks: how its weights are named, and how strictly they are read.

The names are those of transformers' SAM 3: `detector_model.*` for the concept model,
`tracker_neck.*` and `tracker_model.*` for the tracker. The trunk is stored once, with the detector.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import AutoConfig, AutoModel

from .pushing import PushedCardMixin

DETECTOR_PREFIX = "detector_model."
TRACKER_PREFIX = "tracker_model."
TRACKER_NECK_PREFIX = "tracker_neck."
BACKBONE_PREFIX = "vision_encoder.backbone."
NECK_PREFIX = "vision_encoder.neck."

# Models of which the vision encoder, its backbone or the text tower are parts.
WHOLE_MODELS = (
    "efficientsam3", "efficientsam3_tracker", "efficientsam3_tracker_video", "efficientsam3_vision",
)  # fmt: skip

# Arguments of `from_pretrained` that say where a checkpoint is.
HUB_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token",
)  # fmt: skip

# Arguments of `from_pretrained` for the model, though configurations take them for fields.
MODEL_OPTIONS = ("attn_implementation", "dtype", "torch_dtype")

# Names on disk -> names in the tracker, in the form that transformers' loading takes and inverts.
TRACKER_RENAMES = (
    (r"^detector_model\.vision_encoder\.backbone\.", BACKBONE_PREFIX),
    (r"^tracker_neck\.", NECK_PREFIX),
    (r"^tracker_model\.(.+)", r"\1"),
)


def detector_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The concept model's own names for its weights in a checkpoint, whole or its own."""
    if not any(name.startswith(DETECTOR_PREFIX) for name in weights):
        return dict(weights)
    return {
        name.removeprefix(DETECTOR_PREFIX): tensor
        for name, tensor in weights.items()
        if name.startswith(DETECTOR_PREFIX)
    }


def tracker_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tracker's own names for its weights in a checkpoint, whole or its own."""
    if not any(name.startswith(TRACKER_PREFIX) for name in weights):
        return dict(weights)
    renames = {
        TRACKER_PREFIX: "",
        TRACKER_NECK_PREFIX: NECK_PREFIX,
        DETECTOR_PREFIX + BACKBONE_PREFIX: BACKBONE_PREFIX,
    }
    return {
        new + name.removeprefix(old): tensor
        for name, tensor in weights.items()
        for old, new in renames.items()
        if name.startswith(old)
    }


def join_weights(
    detector: Mapping[str, Tensor], tracker: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """One checkpoint out of a concept model's and a tracker's weights, which share their trunk."""
    joined = {DETECTOR_PREFIX + name: tensor for name, tensor in detector.items()}
    for name, tensor in tracker.items():
        if name.startswith(BACKBONE_PREFIX):
            if name not in detector or not torch.equal(tensor, detector[name]):
                raise ValueError(
                    f"Concept model and tracker have different trunks, e.g. in {name}. They can "
                    "share a checkpoint only if the tracker's trunk is the concept model's."
                )
        elif name.startswith(NECK_PREFIX):
            joined[TRACKER_NECK_PREFIX + name.removeprefix(NECK_PREFIX)] = tensor
        else:
            joined[TRACKER_PREFIX + name] = tensor
    return joined


class StrictLoadingMixin(PushedCardMixin):
    """Makes `from_pretrained` raise for what transformers only warns about."""

    @classmethod
    def from_pretrained(
        cls,
        *args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ) -> Any:
        """As in transformers; weights missing, left over or misshaped are errors that name them.

        Whoever asks for `output_loading_info` gets the lists of them instead. With
        `ignore_mismatched_sizes`, other shapes are no error, and such weights start fresh.
        """
        model, info = super().from_pretrained(  # pyright: ignore  of PreTrainedModel
            *args,
            output_loading_info=True,
            # Collected here in any case, so that one error can name all misfits.
            ignore_mismatched_sizes=ignore_mismatched_sizes or not output_loading_info,
            **kwargs,
        )
        if output_loading_info:
            return model, info
        misshaped = {name for name, *_ in info["mismatched_keys"]}
        check_loading(
            cls.__name__,
            missing=set(info["missing_keys"]) - misshaped,
            unexpected=set(info["unexpected_keys"]),
            mismatched=[] if ignore_mismatched_sizes else info["mismatched_keys"],
        )
        return model


class PartLoadingMixin(StrictLoadingMixin):
    """Makes `from_pretrained` find a part in the checkpoint of a whole model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs) -> Any:
        """As in transformers; from a whole model's checkpoint, its part.

        Weights missing, left over or misshaped are errors that name them.
        """
        part_class: Any = cls  # a PreTrainedModel, which this is mixed into
        options = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        stored = {}
        if pretrained_model_name_or_path is not None:  # with it, transformers takes a state_dict
            stored, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **options)
        model_type = stored.get("model_type")
        if model_type == part_class.config_class.model_type or model_type not in WHOLE_MODELS:
            return super().from_pretrained(
                pretrained_model_name_or_path, *args, config=config, **kwargs
            )
        whole = AutoConfig.from_pretrained(pretrained_model_name_or_path, **options)
        kwargs = set_part(whole, part_class, config, kwargs)
        loaded = AutoModel.from_pretrained(
            pretrained_model_name_or_path, *args, config=whole, **kwargs
        )
        model, info = loaded if kwargs.get("output_loading_info") else (loaded, None)
        part = next(module for module in model.modules() if isinstance(module, cls))
        return part if info is None else (part, info)


def set_part(
    whole: PreTrainedConfig, part_class: Any, config: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """Put the configuration of a part into that of the whole.

    Args:
        whole: Of the checkpoint.
        part_class: Model of the part.
        config: The part's configuration in place of the stored one; None for that.
        options: What `from_pretrained` got. Fields of the part are set.

    Returns:
        The options that are no fields.
    """
    field, config_class = part_class.config_class.base_config_key, part_class.config_class
    holder: Any = whole if hasattr(whole, field) else getattr(whole, "vision_config", None)
    stored = getattr(holder, field, None)
    if not isinstance(stored, config_class):
        found = f"its {field} is a {type(stored).__name__}" if stored else f"it has no {field}"
        raise ValueError(
            f"This checkpoint of type {whole.model_type!r} holds no {part_class.__name__}: "
            f"{found}. Load the whole model and take its parts from there."
        )
    if config is None:
        kept = {name: options.pop(name) for name in MODEL_OPTIONS if name in options}
        config, options = config_class.from_dict(
            stored.to_dict(), return_unused_kwargs=True, **options
        )
        options |= kept
    elif not isinstance(config, config_class):
        raise TypeError(
            f"The config of a {part_class.__name__} must be a {config_class.__name__}, not a "
            f"{type(config).__name__}."
        )
    setattr(holder, field, config)
    return options


def check_loading(
    class_name: str, missing: set[str], unexpected: set[str], mismatched: Iterable[tuple]
) -> None:
    """Raise if any weight did not find its place.

    Args:
        class_name: The model, for the message.
        missing: Names of the model that are not in the checkpoint.
        unexpected: Names in the checkpoint that are not in the model.
        mismatched: (name, shape in the checkpoint, shape in the model).
    """
    shapes = [
        f"{name}: {tuple(stored)} stored, {tuple(wanted)} wanted"
        for name, stored, wanted in mismatched
    ]
    problems = {
        "missing in the checkpoint": sorted(missing),
        "not part of the model": sorted(unexpected),
        "of another shape": sorted(shapes),
    }
    listing = "; ".join(
        f"{len(names)} {problem} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for problem, names in problems.items()
        if names
    )
    if listing:
        raise ValueError(
            f"The weights do not fit {class_name}: {listing}. Nothing is initialised at random in "
            "silence: pass output_loading_info=True to load all the same and get these lists back."
        )
