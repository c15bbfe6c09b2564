"""Trains a tiny student, in a process of its own that may be killed or have siblings.

python train_tiny.py OUTPUT_DIR --max_steps 8 ...

Flags are those of the stage's arguments.
"""

import sys

from distillation.worlds import Pictures, tiny_student, tiny_teacher
from transformers import HfArgumentParser, default_data_collator

from efficientsam3_hf.distillation.stage1_image import (
    ImageDistillationArguments,
    ImageDistillationTrainer,
)


def main() -> None:
    folder, *flags = sys.argv[1:]
    words = ["--output_dir", folder, "--use_cpu", "true", "--disable_tqdm", "true", *flags]
    (arguments,) = HfArgumentParser(ImageDistillationArguments).parse_args_into_dataclasses(words)
    trainer = ImageDistillationTrainer(
        tiny_student(),
        arguments,
        teacher=tiny_teacher(),
        train_dataset=Pictures(16),
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


if __name__ == "__main__":
    main()
