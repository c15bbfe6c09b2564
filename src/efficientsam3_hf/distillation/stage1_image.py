"""Stage 1, images: the student's encoder learns to see what the teacher's sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from ..evaluation.features import score_maps, summarize
from ..evaluation.units import stack
from .arguments import DistillationArguments
from .family import Family
from .feature_losses import angle_error, same_size, valid_places, whitened_error
from .pictures import draw_maps
from .teacher import to_map
from .teacher_cache import TeacherCache
from .trainer import DistillationTrainer

TARGETS = ("trunk", "neck", "tracker_neck")

# Where the student is compared -> kind of a cache, and its parts, finest first.
LEVELS = ("level_0", "level_1", "level_2")
CACHES = {
    "trunk": ("trunk", ("trunk",)),
    "neck": ("levels", LEVELS),
    "tracker_neck": ("tracker_levels", LEVELS),
}

Maps = dict[str, list[Tensor]]


@dataclass
class ImageDistillationArguments(DistillationArguments):
    """Arguments of stage 1 for images.

    Args:
        targets: Where the student is compared: `"trunk"` is the map handed to the neck, `"neck"`
            the three levels of the detector's pyramid, `"tracker_neck"` those of the tracker's.
            Empty for the trunk with the `sam3` neck, and for the necks there are with the lateral
            one, which has no map of the teacher's kind before them.
    """

    targets: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Where student and teacher are compared: some of {', '.join(TARGETS)}. "
            "Empty for the trunk with the sam3 neck, and for all necks with the lateral one."
        },
    )

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    max_grad_norm: float = 5.0

    def __post_init__(self):
        super().__post_init__()
        check_targets(self.targets)


class ImageDistillationTrainer(DistillationTrainer):
    """Trains the encoder on the distance of its maps to the teacher's.

    The `sam3` neck stays as the teacher's, which the trunk learns to serve. A lateral neck is the
    student's own, and is trained with the trunk where its levels are compared.
    """

    stage = "stage 1: images"
    units = {f"{target}_{kind}": "samples" for target in TARGETS for kind in ("error", "angle")}
    weights = dict.fromkeys(units, 1.0)

    args: ImageDistillationArguments

    def __init__(self, model: Family, args: ImageDistillationArguments, **kwargs: Any):
        self.targets = choose_targets(model, args.targets)
        own_necks = [each for each in self.targets if each != "trunk"] if is_lateral(model) else []
        self.trained_parts = ("backbone", *own_necks)
        super().__init__(model, args, **kwargs)
        if self.cache is not None:
            check_cache(self.cache, self.targets)

    def count(self, inputs: Mapping[str, Any]) -> dict[str, int | Tensor]:
        """Images."""
        return {"samples": len(inputs["pixel_values"])}

    def teacher_step(self, inputs: Mapping[str, Any]) -> Maps:
        """The teacher's maps, from the cache if the batch brought them along."""
        tokens = self.cached(inputs)
        if tokens is not None:
            return {
                target: [to_map(tokens[part]) for part in CACHES[target][1]]
                for target in self.targets
            }
        pixels = inputs.get("teacher_pixel_values", inputs["pixel_values"])
        return self.teacher(target_maps, pixels, self.targets)

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: Maps
    ) -> dict[str, Tensor]:
        """Distances of the student's maps."""
        maps = target_maps(student, inputs["pixel_values"], self.targets)
        return map_terms(maps, targets, inputs.get("valid"))

    def score(
        self, student: Family, inputs: Mapping[str, Any], targets: Maps
    ) -> list[dict[str, float]]:
        """Agreement of each image, level by level."""
        own = by_level(target_maps(student, inputs["pixel_values"], self.targets))
        theirs = by_level(targets)
        valid = inputs.get("valid")
        return [
            score_maps(
                {level: maps[index] for level, maps in own.items()},
                {level: maps[index] for level, maps in theirs.items()},
                None if valid is None else valid[index],
            )
            for index in range(len(inputs["pixel_values"]))
        ]

    def summarize(self, records: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Cosine and relative error of each level."""
        summary = summarize(stack(records))
        return {name.replace("/", "_"): value for name, value in summary.items()}

    def draw(self, student: Family, batch: Mapping[str, Any]) -> dict[str, Image.Image]:
        """The maps of teacher and student in the colours of the teacher's main components."""
        own = by_level(target_maps(student, batch["pixel_values"], self.targets))
        theirs = by_level(self.teacher_step(batch))
        return {level: draw_maps(batch["pixel_values"], theirs[level], own[level]) for level in own}


def check_targets(targets: Sequence[str]) -> None:
    """Raise for places where nothing can be compared."""
    if not set(targets) <= set(TARGETS):
        raise ValueError(f"targets={targets} must be some of {', '.join(TARGETS)}.")


def is_lateral(family: Family) -> bool:
    """Whether the neck reads the trunk's own maps."""
    return getattr(family.configuration.vision_config, "neck", None) == "lateral"


def choose_targets(student: Family, wanted: Sequence[str]) -> list[str]:
    """Where a student is compared, or why it cannot be there."""
    if is_lateral(student):
        if "trunk" in wanted:
            raise ValueError(
                "A student with the lateral neck has no map of the teacher's kind before its neck: "
                'distil it at the levels of its necks, with targets "neck" and "tracker_neck".'
            )
        necks = ["neck"] if student.tracker is None else ["neck", "tracker_neck"]
        return list(wanted) or necks
    return list(wanted) or ["trunk"]


def check_cache(cache: TeacherCache, targets: Sequence[str]) -> None:
    """Raise if a cache does not have what the student is compared with."""
    for target in targets:
        kind = CACHES[target][0]
        if cache.manifest.kind != kind:
            raise ValueError(
                f"The cache in {cache.folder} has features of kind {cache.manifest.kind!r}, but "
                f"the target {target!r} needs {kind!r}. Write such a cache, or choose the target "
                "that this one serves."
            )


def target_maps(family: Family, pixel_values: Tensor, targets: Sequence[str]) -> Maps:
    """The maps of a student or a teacher by target, finest first."""
    return seen_maps(family, family.see(pixel_values), targets)


def seen_maps(family: Family, seen: Sam3VisionEncoderOutput, targets: Sequence[str]) -> Maps:
    """The same out of what was seen."""
    maps: Maps = {}
    if "trunk" in targets:
        height, width = seen.fpn_hidden_states[2].shape[-2:]
        maps["trunk"] = [seen.last_hidden_state.transpose(1, 2).unflatten(2, (height, width))]
    if "neck" in targets:
        maps["neck"] = list(seen.fpn_hidden_states[:3])
    if "tracker_neck" in targets:
        maps["tracker_neck"] = list(family.tracker_levels(seen)[:3])
    return maps


def map_terms(maps: Maps, wanted: Maps, valid: Tensor | None) -> dict[str, Tensor]:
    """Distances of maps, the mean over the levels of each target.

    Args:
        maps: The student's.
        wanted: The teacher's.
        valid: (images, height, width), true where there is a picture; None for everywhere.
    """
    terms = {}
    for target, levels in maps.items():
        errors, angles = [], []
        for own, theirs in zip(levels, wanted[target], strict=True):
            check_channels(target, own, theirs)
            own = same_size(own, theirs)
            places = valid_places(valid, theirs.shape[-2:])
            errors.append(whitened_error(own, theirs, places))
            angles.append(angle_error(own, theirs, places))
        terms[f"{target}_error"] = sum(errors) / len(levels)
        terms[f"{target}_angle"] = sum(angles) / len(levels)
    return terms


def by_level(maps: Maps) -> dict[str, Tensor]:
    """Maps under a name each: the target's and, where it has several, the level's number."""
    return {
        target if len(levels) == 1 else f"{target}_{number}": level
        for target, levels in maps.items()
        for number, level in enumerate(levels)
    }


def check_channels(target: str, student: Tensor, teacher: Tensor) -> None:
    """Raise for maps that cannot be compared."""
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"The student's maps of {target!r} have {student.shape[1]} channels, the teacher's "
            f"{teacher.shape[1]}. Choose a variant of the teacher's sizes."
        )
