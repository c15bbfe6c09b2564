"""One checkpoint for all tasks: how its weights are named, and how strictly they are read.

The names are those of transformers' SAM 3: `detector_model.*` for the concept model,
`tracker_neck.*` and `tracker_model.*` for the tracker. The trunk is stored once, with the detector.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DETECTOR_PREFIX = "detector_model."
TRACKER_PREFIX = "tracker_model."
TRACKER_NECK_PREFIX = "tracker_neck."
BACKBONE_PREFIX = "vision_encoder.backbone."
NECK_PREFIX = "vision_encoder.neck."

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


class StrictLoadingMixin:
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

        Whoever asks for `output_loading_info` gets the lists of them instead.
        """
        strict = not (output_loading_info or ignore_mismatched_sizes)
        model, info = super().from_pretrained(  # pyright: ignore  of PreTrainedModel
            *args,
            output_loading_info=True,
            ignore_mismatched_sizes=strict or ignore_mismatched_sizes,
            **kwargs,
        )
        if strict:
            check_loading(cls.__name__, info)
        return (model, info) if output_loading_info else model


def check_loading(class_name: str, info: Mapping[str, Any]) -> None:
    """Raise if any weight did not find its place.

    Args:
        class_name: The model, for the message.
        info: What transformers' `output_loading_info` gives.
    """
    shapes = [
        f"{name}: {tuple(stored)} stored, {tuple(wanted)} wanted"
        for name, stored, wanted in info["mismatched_keys"]
    ]
    problems = {
        "missing in the checkpoint": sorted(info["missing_keys"]),
        "not part of the model": sorted(info["unexpected_keys"]),
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
