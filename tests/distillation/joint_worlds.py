"""Images with clips beside them, and a trainer on both."""

from typing import Any

from distillation.worlds import CONFIDENCE, SETTINGS, scenes, tiny_student, tiny_teacher

from efficientsam3_hf import EfficientSam3ImageProcessor
from efficientsam3_hf.data.collators import ClipCollator
from efficientsam3_hf.data.images_with_clips import ImagesWithClips, ImagesWithClipsCollator
from efficientsam3_hf.data.synthetic import Clips
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.stage3_joint import JointTrainer, JointTrainingArguments

FRAMES = 3
OWN = {
    **SETTINGS,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "images_per_clip": 1,
    "confidence": CONFIDENCE,
    "seed": 3,
}


def clips(length: int, split: str = "train") -> Clips:
    """Clips of which every second frame is annotated."""
    return Clips(length, split, side=112, num_frames=FRAMES, most=2, annotate_every=2)


def joint_student() -> Family:
    """A student with a Perceiver, whose masks are compared everywhere."""
    student = tiny_student("perceiver")
    student.configuration.objective = {"mask_points": None}
    return student


def make_trainer(
    folder: Any,
    student: Family | None = None,
    images: int = 4,
    **fields: Any,
) -> JointTrainer:
    """A trainer on images and half as many clips."""
    student = student or joint_student()
    pictures, of_images = scenes(student, images)
    arguments = JointTrainingArguments(output_dir=str(folder), **{**OWN, **fields})
    size = EfficientSam3ImageProcessor(size={"height": 112, "width": 112})
    return JointTrainer(
        student,
        arguments,
        teacher=tiny_teacher(),
        train_dataset=ImagesWithClips(
            pictures, clips(images // 2), arguments.images_per_clip, arguments.seed
        ),
        eval_dataset={"images": pictures, "clips": clips(1, "val")},
        data_collator=ImagesWithClipsCollator(of_images, ClipCollator(size, mask_size=(32, 32))),
    )


def batch_of(trainer: JointTrainer, count: int = 2) -> dict[str, Any]:
    """The first samples."""
    dataset: Any = trainer.train_dataset
    return trainer.data_collator([dataset[index] for index in range(count)])
