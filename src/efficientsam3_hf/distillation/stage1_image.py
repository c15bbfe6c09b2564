"""Stage 1, images: the student's encoder learns to see what the teacher's sees."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from .arguments import DistillationArguments
from .family import Family
from .feature_losses import angle_error, whitened_error
from .trainer import DistillationTrainer

TARGETS = ("trunk", "neck", "tracker_neck")


@dataclass
class ImageDistillationArguments(DistillationArguments):
    """Arguments of stage 1 for images.

    Args:
        targets: Where the student is compared: `"trunk"` is the map handed to the neck, `"neck"`
            the three levels of the detector's pyramid, `"tracker_neck"` those of the tracker's.
    """

    targets: list[str] = field(
        default_factory=lambda: ["trunk"],
        metadata={"help": f"Where student and teacher are compared: some of {', '.join(TARGETS)}."},
    )

    def __post_init__(self):
        super().__post_init__()
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets:
            raise ValueError(f"targets={self.targets} must be some of {', '.join(TARGETS)}.")


class ImageDistillationTrainer(DistillationTrainer):
    """Trains trunk and neck on the distance of their maps to the teacher's."""

    stage = "stage 1: images"
    trained_parts = ("backbone",)
    units = {f"{target}_{kind}": "samples" for target in TARGETS for kind in ("error", "angle")}
    weights = dict.fromkeys(units, 1.0)

    args: ImageDistillationArguments

    def count(self, inputs: Mapping[str, Any]) -> dict[str, int | Tensor]:
        """Images."""
        return {"samples": len(inputs["pixel_values"])}

    def teacher_step(self, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """The teacher's maps."""
        seen = self.teacher.see(inputs["pixel_values"])
        return target_maps(self.teacher, seen, self.args.targets)

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: Any
    ) -> dict[str, Tensor]:
        """Distances of the student's maps."""
        maps = target_maps(student, student.see(inputs["pixel_values"]), self.args.targets)
        return map_terms(maps, targets, inputs.get("valid"))


def map_terms(
    maps: Mapping[str, list[Tensor]], wanted: Mapping[str, list[Tensor]], valid: Tensor | None
) -> dict[str, Tensor]:
    """Distances of maps, the mean over the levels of each target.

    Args:
        maps: The student's by target.
        wanted: The teacher's.
        valid: (images, height, width), true where there is a picture; None for everywhere.
    """
    terms = {}
    for target, own in maps.items():
        pairs = list(zip(own, wanted[target], strict=True))
        errors = [whitened_error(mine, theirs, valid) for mine, theirs in pairs]
        angles = [angle_error(mine, theirs, valid) for mine, theirs in pairs]
        terms[f"{target}_error"] = sum(errors) / len(pairs)
        terms[f"{target}_angle"] = sum(angles) / len(pairs)
    return terms


def target_maps(
    family: Family, seen: Sam3VisionEncoderOutput, targets: list[str]
) -> dict[str, list[Tensor]]:
    """The maps of a student or a teacher by target, finest first, from what it saw."""
    maps: dict[str, list[Tensor]] = {}
    if "trunk" in targets:
        height, width = seen.fpn_hidden_states[2].shape[-2:]
        maps["trunk"] = [seen.last_hidden_state.transpose(1, 2).unflatten(2, (height, width))]
    if "neck" in targets:
        maps["neck"] = list(seen.fpn_hidden_states[:3])
    if "tracker_neck" in targets:
        maps["tracker_neck"] = list(family.tracker_levels(seen)[:3])
    return maps
