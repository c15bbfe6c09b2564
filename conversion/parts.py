"""The parts that a checkpoint is made of, as users know them."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

Value = TypeVar("Value")


class Part(NamedTuple):
    """Some weights that only make sense together.

    Args:
        name: What to call it in reports.
        prefixes: How its weights begin, under our names.
        is_required: Whether the concept model cannot do without.
        released: How its weights begin in released files.
    """

    name: str
    prefixes: tuple[str, ...]
    is_required: bool
    released: str


DETECTOR = "detector_model."
POINT_BRANCH = "point branch of the geometry encoder"
TRACKER_PARTS = ("tracker neck", "tracker")

# The first part that fits is a weight's own.
PARTS = (
    Part(
        "image trunk",
        (f"{DETECTOR}vision_encoder.backbone.",),
        True,
        "detector.backbone.vision_backbone.trunk.*",
    ),
    Part(
        "neck",
        (f"{DETECTOR}vision_encoder.neck.",),
        True,
        "detector.backbone.vision_backbone.convs.*",
    ),
    Part(
        "text tower",
        (f"{DETECTOR}text_encoder.", f"{DETECTOR}text_projection."),
        True,
        "detector.backbone.language_backbone.*",
    ),
    Part(
        POINT_BRANCH,
        (f"{DETECTOR}geometry_encoder.points_",),
        False,
        "detector.geometry_encoder.points_*",
    ),
    Part(
        "geometry encoder",
        (f"{DETECTOR}geometry_encoder.",),
        True,
        "detector.geometry_encoder.*",
    ),
    Part("DETR encoder", (f"{DETECTOR}detr_encoder.",), True, "detector.transformer.encoder.*"),
    Part("DETR decoder", (f"{DETECTOR}detr_decoder.",), True, "detector.transformer.decoder.*"),
    Part("mask decoder", (f"{DETECTOR}mask_decoder.",), True, "detector.segmentation_head.*"),
    Part("scoring", (f"{DETECTOR}dot_product_scoring.",), True, "detector.dot_prod_scoring.*"),
    Part(
        "tracker neck",
        ("tracker_neck.",),
        False,
        "detector.backbone.vision_backbone.sam2_convs.*",
    ),
    Part("tracker", ("tracker_model.",), False, "tracker.*"),
)


def part_of(name: str) -> Part:
    """The part that a weight under our names belongs to."""
    for part in PARTS:
        if name.startswith(part.prefixes):
            return part
    raise ValueError(f"{name} belongs to no part. Add one to PARTS in {__name__}.")


def split_parts(weights: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Part names, in the order of `PARTS`, to their weights; parts without any are left out."""
    parts: dict[str, dict[str, Value]] = {part.name: {} for part in PARTS}
    for name, value in weights.items():
        parts[part_of(name).name][name] = value
    return {name: values for name, values in parts.items() if values}


def describe_parts(names: Iterable[str]) -> str:
    """Parts with their released keys, for a message."""
    released = {part.name: part.released for part in PARTS}
    return ", ".join(f"{name} ({released[name]})" for name in names)
