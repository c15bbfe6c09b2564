"""A tiny teacher, student and data for tests of distillation."""

from typing import Any

import torch
from tiny import (
    TINY_VIT,
    see_objects,
    stir,
    tiny_config,
    tiny_tracker_video,
    tiny_video_config,
    tiny_vision,
)
from transformers import default_data_collator

from efficientsam3_hf import EfficientSam3Model, EfficientSam3TrackerVideoModel
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.stage1_image import (
    ImageDistillationArguments,
    ImageDistillationTrainer,
)
from efficientsam3_hf.distillation.stage3_concepts import ConceptTrainer, ConceptTrainingArguments

CONFIDENCE = 0.05  # of which a teacher with random weights is
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def tiny_teacher() -> Family:
    """A ViT with detector and dense-memory tracker, frozen."""
    torch.manual_seed(0)
    detector = stir(EfficientSam3Model(tiny_config(TINY_VIT)))
    tracker = tiny_tracker_video("dense", TINY_VIT)
    return Family(detector, tracker).eval().requires_grad_(False)


def tiny_student(memory: str = "dense", neck: str = "sam3", **text: Any) -> Family:
    """A student of the same sizes, but for its trunk and perhaps its memory."""
    torch.manual_seed(1)
    vision = tiny_vision(neck)
    detector = stir(EfficientSam3Model(tiny_config(vision)))
    tracker = stir(EfficientSam3TrackerVideoModel(tiny_video_config(memory, vision)))
    return Family(detector, see_objects(tracker))


class Pictures(torch.utils.data.Dataset):
    """Noise with a gradient of light: something to tell apart, the same in every run."""

    name = "pictures"

    def __init__(self, length: int = 16, size: int = 112):
        self.length, self.size = length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        coarse = torch.randn(1, 3, 7, 7, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (self.size, self.size), mode="bilinear")
        return {"pixel_values": smooth[0]}


def image_trainer(
    folder: Any, student: Family | None = None, **fields: Any
) -> ImageDistillationTrainer:
    """Of stage 1 for images."""
    return ImageDistillationTrainer(
        student or tiny_student(),
        ImageDistillationArguments(output_dir=str(folder), **{**SETTINGS, **fields}),
        teacher=tiny_teacher(),
        train_dataset=Pictures(16),
        eval_dataset=Pictures(6),
        data_collator=default_data_collator,
    )


def concept_trainer(
    folder: Any, student: Family | None = None, teacher: Any = None, length: int = 4, **fields: Any
) -> ConceptTrainer:
    """Of stage 3, on scenes; masks are compared everywhere."""
    student = student or tiny_student()
    student.configuration.objective = {"mask_points": None}
    dataset, collator = scenes(student, length)
    settings = {**SETTINGS, "confidence": CONFIDENCE, **fields}
    return ConceptTrainer(
        student,
        ConceptTrainingArguments(output_dir=str(folder), **settings),
        teacher=tiny_teacher() if teacher is None else teacher,
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=collator,
    )


def scenes(student: Family, length: int) -> tuple[Any, Any]:
    """Scenes with phrases, and a collator for the student."""
    from efficientsam3_hf import zoo
    from efficientsam3_hf.data.collators import ImageCollator
    from efficientsam3_hf.data.synthetic import Scenes

    collator = ImageCollator(zoo.processor(student.configuration), mask_size=(32, 32))
    return Scenes(length, side=112, most=3), collator
