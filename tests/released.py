"""Tiny models in the form of released files, and what else conversion starts from."""

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_config, tiny_model, tiny_tracker
from torch import Tensor

from conversion.convert import convert
from conversion.restoring import restore
from conversion.sources import Source
from efficientsam3_hf import EfficientSam3Config

VISION = "detector.backbone.vision_backbone."
GEOMETRY = "detector.geometry_encoder."
TRACKER = ("tracker.", f"{VISION}sam2_convs.")


def our_weights(*args: Any, **fields: Any) -> dict[str, Tensor]:
    """Concept model and tracker of tiny size, under our names."""
    detector, tracker = tiny_model(*args, **fields), tiny_tracker(*args, **fields)
    weights = {f"detector_model.{name}": value for name, value in detector.state_dict().items()}
    for name, value in tracker.state_dict().items():
        if name.startswith("vision_encoder.neck."):
            weights["tracker_neck." + name.removeprefix("vision_encoder.neck.")] = value
        elif not name.startswith("vision_encoder."):
            weights[f"tracker_model.{name}"] = value
    twin = "tracker_model.prompt_encoder.shared_embedding.positional_embedding"
    weights["tracker_model.shared_image_embedding.positional_embedding"] = weights[twin].clone()
    return weights


def released(*args: Any, **fields: Any) -> dict[str, Tensor]:
    """The same as a complete release spells it: `detector.*` and `tracker.*`."""
    return restore(our_weights(*args, **fields), {})


def without(weights: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """Weights less those that begin so."""
    return {key: value for key, value in weights.items() if not key.startswith(prefixes)}


def only(weights: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """Those weights alone that begin so."""
    return {key: value for key, value in weights.items() if key.startswith(prefixes)}


def save(content: Any, path: Path) -> Source:
    """A file that torch wrote, as a source of conversion."""
    torch.save(content, path)
    return Source(path.stem, path, path.name)


def convert_tiny(
    source: Source,
    output: Path,
    donor: Source | None = None,
    config: EfficientSam3Config | None = None,
) -> dict[str, Any]:
    """Convert a model whose sizes are not those of the zoo."""
    return convert(source, output, donor=donor, config=config or tiny_config())
