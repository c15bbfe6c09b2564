"""Train the miniature teacher, for as long as there is time; started again, it goes on.

    python -m examples.miniature.train_teacher --folder outputs/teacher --minutes 120

In the folder are the last checkpoints of `Trainer`, with all that going on takes, and `log.jsonl`,
to which a line is added at each of them.
"""

import argparse
from pathlib import Path

import torch

from efficientsam3_hf import zoo
from efficientsam3_hf.data.collators import ImageCollator
from efficientsam3_hf.distillation.checkpoints import last_checkpoint
from efficientsam3_hf.distillation.family import Family

from .lessons import LessonArguments, LessonTrainer
from .scores import score_concepts
from .state import import_state
from .teacher import GRID, new_teacher
from .timekeeper import Timekeeper, add_common_options, common_arguments
from .world import MOST_THINGS, SIDE, WORLD, DescribedCollator, DescribedScenes, scenes

TERMS = ("class", "presence", "l1", "giou", "mask", "dice", "words", "kinds", "places", "named")


def build_trainer(options: argparse.Namespace) -> LessonTrainer:
    """Everything that training takes."""
    torch.set_num_threads(options.threads)
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    family = Family(new_teacher(options.seed))
    collate = ImageCollator(zoo.processor(family.configuration), mask_size=(SIDE, SIDE))
    arguments = LessonArguments(
        **common_arguments(options),
        warm_up=options.warm_up,
        enough=options.enough,
        naming=options.naming,
        where_weight=options.where_weight,
        exemplars_every=options.exemplars_every,
    )
    trainer = LessonTrainer(
        family,
        arguments,
        train_dataset=DescribedScenes(
            10_000_000, "train", side=SIDE, most=options.most, world=WORLD
        ),
        data_collator=DescribedCollator(collate, 4 * GRID),
    )
    held_out = scenes(options.held_out, "val", most=options.most)
    samples = [held_out[index] for index in range(len(held_out))]
    batches = [collate(samples[first : first + 20]) for first in range(0, len(samples), 20)]

    def score() -> dict[str, float]:
        if trainer.lesson < 2:
            return {"lesson": trainer.lesson}
        return {"lesson": trainer.lesson, **score_concepts(family.detector, batches)}

    clock = (options.minutes, options.every)
    trainer.add_callback(Timekeeper(trainer, *clock, score, TERMS, options.last))
    return trainer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument("--warm-up", type=int, default=20_000, help="most steps of vision alone")
    parser.add_argument("--enough", type=float, default=0.5, help="error at which it is over")
    parser.add_argument("--naming", type=int, default=1500, help="then, steps of both encoders")
    parser.add_argument("--where-weight", type=float, default=4.0)
    parser.add_argument(
        "--exemplars-every", type=int, default=4, help="steps from one of exemplar boxes on"
    )
    parser.add_argument("--most", type=int, default=MOST_THINGS, help="things in an image")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    trainer = build_trainer(options)
    checkpoint = last_checkpoint(options.folder)
    if checkpoint is None and options.start:
        import_state(trainer, options.start)
    trainer.train(resume_from_checkpoint=checkpoint)


if __name__ == "__main__":
    main()
