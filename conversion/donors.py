"""Completes a checkpoint with the parts that it lacks, from one that has them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .parts import DETECTOR, PARTS, POINT_BRANCH, TRACKER_PARTS, describe_parts, split_parts
from .renaming import Renamed, rename

MEMORY = "tracker_model.memory_attention."
HOW_TO_GIVE_A_DONOR = (
    "Add --donor SAM3, where SAM3 is Meta's sam3.pt, a folder or hf:// address of transformers' "
    "facebook/sam3, or any file that holds these keys."
)


@dataclass(frozen=True)
class Completed:
    """Weights of a whole model.

    Args:
        weights: Our names to tensors.
        donated: Names of the parts that are the donor's.
        notes: What a user should know about the parts that are there, and those that are not.
    """

    weights: dict[str, Tensor]
    donated: tuple[str, ...]
    notes: tuple[str, ...]


def name_weights(weights: Mapping[str, Tensor]) -> Renamed:
    """Bring weights under our names, whether they bear Meta's or transformers'.

    transformers' names for SAM 3 are ours; a concept model that it saved alone lacks their prefix.
    """
    if any(name.startswith(DETECTOR) for name in weights):
        return Renamed(dict(weights), {})
    if any(name.startswith("vision_encoder.") for name in weights):
        return Renamed({DETECTOR + name: tensor for name, tensor in weights.items()}, {})
    if weights and all(name.startswith("tracker_model.") for name in weights):
        raise ValueError(
            "These are the weights of a tracker that transformers saved alone. Give a folder of "
            "concept model and tracker together, as zoo.save writes it."
        )
    return rename(weights)


def complete(
    weights: Mapping[str, Tensor],
    source_name: str,
    donor: Mapping[str, Tensor] | None = None,
    donor_name: str | None = None,
) -> Completed:
    """Add every part that is wholly missing and that the donor has.

    A part is never mixed: what the source has of it stays alone.

    Args:
        weights: The source's weights under our names.
        source_name: What to call it in messages.
        donor: Weights of the donor under our names.
        donor_name: What to call that.
    """
    parts = split_parts(weights)
    given = split_parts(donor or {})
    donated = [name for name in given if name not in parts]
    if not all(name in parts or name in given for name in TRACKER_PARTS):
        donated = [name for name in donated if name not in TRACKER_PARTS]
    for name in donated:
        parts[name] = given[name]

    _refuse_incomplete(parts, source_name, donor_name)
    return Completed(
        weights={name: tensor for values in parts.values() for name, tensor in values.items()},
        donated=tuple(part.name for part in PARTS if part.name in donated),
        notes=tuple(_find_notes(parts, donor_name)),
    )


def _refuse_incomplete(
    parts: Mapping[str, object], source_name: str, donor_name: str | None
) -> None:
    missing = [part.name for part in PARTS if part.is_required and part.name not in parts]
    lacking = [name for name in TRACKER_PARTS if name not in parts]
    has_half_a_tracker = len(lacking) == 1
    if has_half_a_tracker:
        missing += lacking
    if not missing:
        return
    who = f"{source_name} lacks the"
    if donor_name:
        who = f"Neither {source_name} nor its donor {donor_name} holds the"
    also = ""
    if lacking and not has_half_a_tracker:
        also = f" Missing too, though concepts in images do without: {describe_parts(lacking)}."
    raise ValueError(
        f"{who} {describe_parts(missing)}. Nothing is filled in at random, so no model can be made "
        f"of it.{also} {HOW_TO_GIVE_A_DONOR}"
    )


def _find_notes(parts: Mapping[str, Mapping[str, Tensor]], donor_name: str | None) -> list[str]:
    notes = []
    if any(name not in parts for name in TRACKER_PARTS):
        who = "Neither the file nor its donor has a" if donor_name else "The file has no"
        notes.append(
            f"{who} tracker: the folder serves the concept model only. It takes no points, boxes "
            f"or masks of single objects, and no video."
        )
    elif not any(name.startswith(MEMORY) for name in parts["tracker"]):
        notes.append(
            "The tracker has no memory: it takes points, boxes and masks on images, but no video."
        )
    if POINT_BRANCH not in parts:
        notes.append(
            "The geometry encoder has no point branch, which transformers leaves out of SAM 3: the "
            "model takes phrases and exemplar boxes, and refuses exemplar points. Meta's sam3.pt, "
            "given as the donor, has it."
        )
    return notes
