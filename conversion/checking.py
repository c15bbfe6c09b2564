"""Compares weights with the models that are to read them, before anything is written."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from efficientsam3_hf.models.checkpoint_layout import (
    DETECTOR_PREFIX,
    TRACKER_NECK_PREFIX,
    TRACKER_PREFIX,
    tracker_weights,
)
from efficientsam3_hf.models.configuration_efficientsam3 import EfficientSam3Config
from efficientsam3_hf.models.modeling_efficientsam3 import EfficientSam3Model
from efficientsam3_hf.models.modeling_efficientsam3_tracker import EfficientSam3TrackerModel

Shapes = dict[str, tuple[int, ...]]


def refuse_misfits(configuration: EfficientSam3Config, weights: Mapping[str, Tensor]) -> None:
    """Raise unless the models of a configuration have these weights, all of them and no others."""
    with torch.device("meta"):
        found = {"concept model": _compare(EfficientSam3Model(configuration), _detector(weights))}
        if configuration.tracker_config is not None:
            tracker = EfficientSam3TrackerModel(configuration)
            found["tracker"] = _compare(tracker, _tracker(weights))
    problems = [f"{model}: {problem}" for model, them in found.items() for problem in them]
    if problems:
        listing = "; ".join(problems)
        raise ValueError(
            f"The weights do not fit the models that are to read them. {listing}. A part of them "
            f"is incomplete or of another size: compare the file with the original's, or convert "
            f"one in which each part is whole or left out."
        )


def _detector(weights: Mapping[str, Tensor]) -> Shapes:
    return {
        name.removeprefix(DETECTOR_PREFIX): tuple(tensor.shape)
        for name, tensor in weights.items()
        if name.startswith(DETECTOR_PREFIX)
    }


def _tracker(weights: Mapping[str, Tensor]) -> Shapes:
    """Of the tracker on images; the memory that serves video beside it is for another model."""
    prefixes = (TRACKER_PREFIX, TRACKER_NECK_PREFIX, f"{DETECTOR_PREFIX}vision_encoder.backbone.")
    own = {name: tensor for name, tensor in weights.items() if name.startswith(prefixes)}
    memory = EfficientSam3TrackerModel._keys_to_ignore_on_load_unexpected or []
    return {
        name: tuple(tensor.shape)
        for name, tensor in tracker_weights(own).items()
        if not any(re.search(pattern, name) for pattern in memory)
    }


def _compare(model: torch.nn.Module, given: Shapes) -> list[str]:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in wanted if name not in given]
    left_over = [name for name in given if name not in wanted]
    misshaped = [
        f"{name} {given[name]} for {wanted[name]}"
        for name in wanted
        if name in given and given[name] != wanted[name]
    ]
    kinds = {"missing": missing, "left over": left_over, "misshaped": misshaped}
    return [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    ]
