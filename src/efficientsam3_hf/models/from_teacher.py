"""Starting a student from SAM 3: every weight that the student keeps is the teacher's."""

import os

from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from .checkpoint_layout import detector_weights
from .variants import config as zoo_config

logger = logging.get_logger(__name__)

TRUNK = "vision_encoder.backbone.trunk."
NECK = "vision_encoder.neck."
# As long as the context, so it may differ where the text tower is the same.
POSITION_TABLE = "text_encoder.embeddings.position_embedding.position_embedding"
# What transformers' SAM 3 lacks, and a student may have all the same.
POINT_BRANCH = "geometry_encoder.points_"


class FromTeacherMixin:
    """Gives a model the class method `from_teacher`."""

    # Parts that no teacher weight fits, e.g. "vision_encoder.backbone"; set by `from_teacher`.
    fresh_parts: tuple[str, ...] = ()

    @classmethod
    def from_teacher(
        cls, teacher: PreTrainedModel | str | os.PathLike, student, pretrained_trunk: bool = False
    ):
        """A student that has every weight of SAM 3 it keeps; the rest starts fresh.

        Args:
            teacher: A SAM 3 of transformers or of this package, or a folder or Hub name of one.
            student: Name in the zoo, or a configuration.
            pretrained_trunk: Start the trunk from timm's ImageNet weights (fetched from the Hub)
                instead of at random. Not for a teacher that hands its trunk on.
        """
        if isinstance(teacher, str | os.PathLike):
            is_family = AutoConfig.from_pretrained(teacher).model_type == "efficientsam3"
            teacher = (cls if is_family else AutoModel).from_pretrained(teacher)
        if isinstance(student, str):
            student = zoo_config(student)
        model = cls(student)
        source = cls.teacher_weights(teacher)
        target = model.state_dict()
        replaced = replaced_parts(model.config, source, target)

        copied = {
            name: source[name]
            for name in target
            if name in source and not name.startswith(replaced)
        }
        check_every_part(type(teacher).__name__, source, target, replaced)
        if pretrained_trunk:
            check_trunk_is_fresh(target, copied)
        misshaped = [name for name in copied if copied[name].shape != target[name].shape]
        if misshaped:
            name = misshaped[0]
            raise ValueError(
                f"{len(misshaped)} weights that the student keeps have another shape in the "
                f"teacher, e.g. {name}: {tuple(source[name].shape)} there, "
                f"{tuple(target[name].shape)} here. Choose a variant of the teacher's sizes."
            )
        model.load_state_dict(copied, strict=False)
        if pretrained_trunk:
            model.vision_encoder.backbone.load_pretrained_trunk()

        fresh = [
            name
            for name in target
            if name not in copied and not (pretrained_trunk and name.startswith(TRUNK))
        ]
        model.fresh_parts = parts_of(fresh, target)
        logger.warning(
            "Copied %d of %d tensors from the teacher. Starting fresh: %s.",
            len(copied), len(target), ", ".join(model.fresh_parts) or "nothing",
        )  # fmt: skip
        return model

    @classmethod
    def teacher_weights(cls, teacher: PreTrainedModel) -> dict[str, Tensor]:
        """Weights of the teacher under the names of this class."""
        return detector_weights(teacher.state_dict())


def replaced_parts(config, source: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[str, ...]:
    """Prefixes of the parts that stand in for the teacher's: their weights mean something else.

    A teacher that has the very same part, name by name and shape by shape, hands it on; but a
    lateral neck only with its trunk, and a text tower of another context without its position
    table.
    """
    own_parts = []
    if config.vision_config.model_type == "efficientsam3_vision":
        lateral = (NECK,) if config.vision_config.neck == "lateral" else ()
        own_parts.append(("vision_encoder.backbone.", *lateral))
    text_config = getattr(config, "text_config", None)
    if text_config is not None and text_config.model_type == "efficientsam3_text":
        own_parts.append(("text_encoder.", "text_projection."))
    if getattr(config, "memory", None) == "perceiver":
        own_parts.append(("spatial_perceiver.",))
    replaced = []
    for prefixes in own_parts:
        shapes, teachers = (
            {
                name: tensor.shape
                for name, tensor in weights.items()
                if name.startswith(prefixes) and name != POSITION_TABLE
            }
            for weights in (target, source)
        )
        if shapes != teachers:
            replaced += prefixes
    has_text = POSITION_TABLE in target and POSITION_TABLE in source
    if has_text and target[POSITION_TABLE].shape != source[POSITION_TABLE].shape:
        replaced.append(POSITION_TABLE)
    return tuple(replaced)


def check_every_part(
    teacher: str, source: dict[str, Tensor], target: dict[str, Tensor], replaced: tuple[str, ...]
) -> None:
    """Raise if the teacher has not a single weight of a part that the student keeps."""
    optional = (*replaced, POINT_BRANCH)
    kept = {part_of(name) for name in target if not name.startswith(optional)}
    found = {part_of(name) for name in source if name in target}
    words = {name.split(".")[0] for name in source}
    missing = {part if part.split(".")[0] in words else part.split(".")[0] for part in kept - found}
    if missing:
        raise ValueError(
            f"The teacher, a {teacher}, has no weights for {', '.join(sorted(missing))}, "
            "which the student would keep. Concept models start from a SAM 3 with its detector, "
            "trackers from one with its tracker (a folder of SAM 3 has both), and students with "
            "the sam3 neck from one with that."
        )


def check_trunk_is_fresh(target: dict[str, Tensor], copied: dict[str, Tensor]) -> None:
    """Raise if there is no trunk that could start from timm's weights."""
    if not any(name.startswith(TRUNK) for name in target):
        raise ValueError(
            "pretrained_trunk=True is for students with a trunk of timm's. This one has none."
        )
    if any(name.startswith(TRUNK) for name in copied):
        raise ValueError(
            "The teacher hands on its trunk, which pretrained_trunk=True would replace. Leave that "
            "out."
        )


def parts_of(fresh: list[str], target: dict[str, Tensor]) -> tuple[str, ...]:
    """The parts that some weights make up, in the words of a report; in more of them if not whole.

    Args:
        fresh: Names of the weights.
        target: All weights of the model.
    """
    in_part = {part_of(name) for name in target.keys() - set(fresh)}
    return tuple(
        dict.fromkeys(part_of(name, 3 if part_of(name) in in_part else None) for name in fresh)
    )


def part_of(name: str, depth: int | None = None) -> str:
    """The part a weight belongs to, in the words of a report.

    Args:
        name: Of the weight.
        depth: How many words; None for one of a text tower, and two of all else.

    >>> part_of("vision_encoder.backbone.trunk.stem.conv1.c.weight")
    'vision_encoder.backbone'
    >>> part_of("text_projection.weight")
    'text_projection'
    >>> part_of("geometry_encoder.points_pool_project.bias")
    'geometry_encoder.points_pool_project'
    """
    modules = name.split(".")[:-1] or [name]
    return ".".join(modules[: depth or (1 if modules[0] == "text_encoder" else 2)])
