"""What stage 1+ needs to run on tiny models."""

from pathlib import Path
from typing import Any

import torch
from distillation.worlds import tiny_teacher
from tiny import tiny_config, tiny_video_config, tiny_vision

from efficientsam3_hf import zoo
from efficientsam3_hf.data.collators import ImageCollator
from efficientsam3_hf.data.synthetic import Scenes
from efficientsam3_hf.distillation.family import Family, new_student
from efficientsam3_hf.distillation.stage1_prompts import (
    PromptDistillationArguments,
    PromptDistillationTrainer,
)

# The teacher's weights are random: its scores are low, and few pixels are disputed.
SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "prompts_per_image": 3,
    "confidence": 0.1,
    "least_disagreement": 3,
}


def prompt_student(teacher: Family, neck: str = "sam3") -> Family:
    """A student with the teacher's heads."""
    torch.manual_seed(1)
    vision = tiny_vision(neck)
    memory = tiny_video_config("dense", vision).to_dict()
    return new_student(teacher, tiny_config(vision, tracker_video_config=memory))


def scenes(length: int = 8, ask: str = "phrases") -> Scenes:
    """Images with phrases, or with objects that have no names."""
    return Scenes(length, side=112, most=4, ask=ask)


def make_trainer(
    folder: Path,
    student: Family | None = None,
    teacher: Family | None = None,
    ask: str = "phrases",
    **fields: Any,
) -> PromptDistillationTrainer:
    teacher = teacher or tiny_teacher()
    student = student or prompt_student(teacher)
    arguments = PromptDistillationArguments(output_dir=str(folder), **{**SETTINGS, **fields})
    processor = zoo.processor(student.configuration)
    other = zoo.processor(teacher.detector.config).image_processor
    return PromptDistillationTrainer(
        student,
        arguments,
        teacher=teacher,
        train_dataset=scenes(ask=ask),
        eval_dataset=scenes(3, ask=ask),
        data_collator=ImageCollator(processor, (32, 32), teacher_processor=other),
    )
