"""Clips, and a student that differs from its teacher in memory alone."""

from typing import Any

import torch
from distillation.worlds import tiny_teacher
from tiny import TINY_VIT, stir, tiny_config, tiny_video_config

from efficientsam3_hf import (
    EfficientSam3ImageProcessor,
    EfficientSam3Model,
    EfficientSam3TrackerVideoModel,
)
from efficientsam3_hf.data.collators import ClipCollator
from efficientsam3_hf.data.synthetic import Clips
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.stage2_memory import (
    MemoryDistillationArguments,
    MemoryDistillationTrainer,
)

FRAMES = 4


def processor(size: int) -> EfficientSam3ImageProcessor:
    """Of a model of this size."""
    return EfficientSam3ImageProcessor(size={"height": size, "width": size})


def clips(length: int = 4, split: str = "train") -> Clips:
    """Clips of which every second frame is annotated."""
    return Clips(length, split, side=112, num_frames=FRAMES, most=3, annotate_every=2)


def collator(size: int = 112) -> ClipCollator:
    """To batches for a student of this size."""
    return ClipCollator(processor(size), mask_size=(32, 32), teacher_processor=processor(112))


def heir(teacher: Family) -> Family:
    """A student that has all of its teacher but the memory."""
    detector = stir(EfficientSam3Model(tiny_config(TINY_VIT)))
    detector.load_state_dict(teacher.detector.state_dict())
    config = tiny_video_config("perceiver", TINY_VIT)
    torch.manual_seed(2)
    source: Any = teacher.tracker
    return Family(detector, EfficientSam3TrackerVideoModel.from_teacher(source, config))


def make_trainer(
    folder: Any, student: Family | None = None, cache: Any = None, **fields: Any
) -> MemoryDistillationTrainer:
    """A trainer on four clips; of the heir of its teacher, if no student is given."""
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 5,
    }
    args = MemoryDistillationArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, **{**settings, **fields}
    )
    teacher = tiny_teacher()
    student = heir(teacher) if student is None else student
    return MemoryDistillationTrainer(
        student,
        args,
        teacher=teacher,
        cache=cache,
        train_dataset=clips(),
        eval_dataset=clips(2, "val"),
        data_collator=collator(student.detector.config.image_size),
    )


def trained_weights(made: MemoryDistillationTrainer) -> dict[str, torch.Tensor]:
    """Of a trainer's student."""
    return {
        name: weight.detach().clone()
        for name, weight in made.family.named_parameters()
        if weight.requires_grad
    }
