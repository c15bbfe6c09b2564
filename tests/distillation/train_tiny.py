"""Trains a tiny student, in a process of its own that may be killed or have siblings.

python train_tiny.py STAGE OUTPUT_DIR --max_steps 8 ...

Flags are those of the stage's arguments.
"""

import sys
from typing import Any

from distillation import joint_worlds
from distillation.worlds import Pictures, scenes, tiny_student, tiny_teacher
from transformers import HfArgumentParser, default_data_collator

from efficientsam3_hf.distillation.stage1_image import (
    ImageDistillationArguments,
    ImageDistillationTrainer,
)
from efficientsam3_hf.distillation.stage3_concepts import ConceptTrainer, ConceptTrainingArguments
from efficientsam3_hf.distillation.stage3_joint import JointTrainingArguments


def main() -> None:
    stage, folder, *flags = sys.argv[1:]
    words = ["--output_dir", folder, "--use_cpu", "true", "--disable_tqdm", "true", *flags]
    kind: Any
    if stage == "joint":
        own = [f"--{name}={value}" for name, value in joint_worlds.SETTINGS.items()]
        parser = HfArgumentParser(JointTrainingArguments)  # pyright: ignore
        (arguments,) = parser.parse_args_into_dataclasses([*own, *words])
        trainer = joint_worlds.make_trainer(folder, arguments=arguments)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model()
        return
    student = tiny_student()
    if stage == "image":
        kind, trainer_class = ImageDistillationArguments, ImageDistillationTrainer
        dataset, collator = Pictures(16), default_data_collator
    else:
        kind, trainer_class = ConceptTrainingArguments, ConceptTrainer
        student.configuration.objective = {"mask_points": None}
        dataset, collator = scenes(student, 16)
    (arguments,) = HfArgumentParser(kind).parse_args_into_dataclasses(words)
    trainer = trainer_class(
        student, arguments, teacher=tiny_teacher(), train_dataset=dataset, data_collator=collator
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


if __name__ == "__main__":
    main()
