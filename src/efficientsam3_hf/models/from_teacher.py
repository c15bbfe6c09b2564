"""Starting a student from SAM 3: every weight that the student keeps is the teacher's."""

import os

from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from .checkpoint_layout import detector_weights
from .variants import config as zoo_config

logger = logging.get_logger(__name__)


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
                instead of at random.
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
        check_every_part(type(teacher).__name__, target, copied, replaced)
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

        fresh = [name for name in target if name not in copied]
        model.fresh_parts = tuple(dict.fromkeys(part_of(name) for name in fresh))
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

    A teacher that has the very same part, name by name and shape by shape, hands it on.
    """
    own_parts = []
    if config.vision_config.model_type == "efficientsam3_vision":
        own_parts.append(("vision_encoder.backbone.",))
        if config.vision_config.neck == "lateral":
            own_parts.append(("vision_encoder.neck.",))
    text_config = getattr(config, "text_config", None)
    if text_config is not None and text_config.model_type == "efficientsam3_text":
        own_parts.append(("text_encoder.", "text_projection."))
    if getattr(config, "memory", None) == "perceiver":
        own_parts.append(("spatial_perceiver.",))
    replaced = []
    for prefixes in own_parts:
        shapes, teachers = (
            {name: tensor.shape for name, tensor in weights.items() if name.startswith(prefixes)}
            for weights in (target, source)
        )
        if shapes != teachers:
            replaced += prefixes
    return tuple(replaced)


def check_every_part(
    teacher: str, target: dict[str, Tensor], copied: dict[str, Tensor], replaced: tuple[str, ...]
) -> None:
    """Raise if the teacher has not a single weight of a part that the student keeps."""
    kept = {part_of(name).split(".")[0] for name in target if not name.startswith(replaced)}
    found = {part_of(name).split(".")[0] for name in copied}
    if kept - found:
        raise ValueError(
            f"The teacher, a {teacher}, has no weights for {', '.join(sorted(kept - found))}, "
            "which the student would keep. Concept models start from a SAM 3 with its detector, "
            "trackers from one with its tracker (a folder of SAM 3 has both)."
        )


def part_of(name: str) -> str:
    """The part a weight belongs to, in the words of a report.

    >>> part_of("vision_encoder.backbone.trunk.stem.conv1.c.weight")
    'vision_encoder.backbone'
    >>> part_of("text_projection.weight")
    'text_projection'
    >>> part_of("geometry_encoder.points_pool_project.bias")
    'geometry_encoder.points_pool_project'
    """
    modules = name.split(".")[:-1] or [name]
    return ".".join(modules[:2]) if modules[0] != "text_encoder" else modules[0]
