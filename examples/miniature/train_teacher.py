"""Train the miniature teacher, for as long as there is time; started again, it goes on.

    python -m examples.miniature.train_teacher --folder outputs/teacher --minutes 120

In the folder are the last checkpoints of `Trainer`, with all that going on takes, and `log.jsonl`,
to which a line is added at each of them.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from efficientsam3_hf import zoo
from efficientsam3_hf.data.collators import ImageCollator
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.trainer import last_checkpoint

from .lessons import LessonArguments, LessonTrainer
from .scores import score_concepts
from .state import import_state
from .teacher import GRID, new_teacher
from .world import MOST_THINGS, SIDE, WORLD, DescribedCollator, DescribedScenes, scenes

LOG_FILE = "log.jsonl"
HELD_OUT = 200  # images


class Timekeeper(TrainerCallback):
    """Saves and scores every few minutes, and stops when time is up.

    Args:
        trainer: Whose model is scored, with its averaged weights.
        folder: Of the log.
        minutes: To train, those before a stop not counted in.
        every: Minutes from one checkpoint to the next.
        held_out: Batches to score with.
    """

    def __init__(
        self, trainer: LessonTrainer, folder: Path, minutes: float, every: float, held_out
    ):
        self.trainer, self.folder, self.held_out = trainer, folder, held_out
        self.minutes, self.every = minutes, every
        self.began = self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Look at the clock."""
        now = time.monotonic()
        is_over = now - self.began >= 60 * self.minutes
        if is_over or state.global_step >= state.max_steps or now - self.saved >= 60 * self.every:
            self.trainer.minutes += (now - self.saved) / 60
            control.should_save = True
            control.should_training_stop |= is_over

    def on_save(self, args, state, control, **kwargs) -> None:
        """Add a line to the log. What scoring takes is no training."""
        line: dict[str, Any] = {
            "step": self.trainer.steps,
            "minutes": round(self.trainer.minutes, 2),
        }
        if self.trainer.steps > self.trainer.args.warm_up + self.trainer.args.naming:
            with self.trainer.averaged():
                line |= score_concepts(self.trainer.family.detector, self.held_out)
            self.trainer.family.train()
        losses = [entry for entry in state.log_history if "loss" in entry]
        if losses:
            kept = ("loss", "class", "presence", "l1", "giou", "mask", "dice", "words", "places", "named")
            line |= {f"train_{name}": losses[-1].get(name) for name in kept}
            line["images_per_second"] = losses[-1].get("samples_per_second")
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(json.dumps({k: rounded(v) for k, v in line.items()}) + "\n")
        self.saved = time.monotonic()


def rounded(value: Any) -> Any:
    """A number with four digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def build_trainer(options: argparse.Namespace) -> LessonTrainer:
    """Everything that training takes."""
    torch.set_num_threads(options.threads)
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = Family(new_teacher(options.seed))
    processor = zoo.processor(family.configuration)
    collate = ImageCollator(processor, mask_size=(SIDE, SIDE))
    trainer = LessonTrainer(
        family,
        LessonArguments(
            os.fspath(folder),
            seed=options.seed,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=options.rate_warm_up,
            weight_decay=0.01,
            adam_beta2=0.98,
            max_grad_norm=options.clip,
            ema_decay=options.ema,
            warm_up=options.warm_up,
            naming=options.naming,
            where_weight=options.where_weight,
            save_strategy="no",  # by the clock
            save_total_limit=2,
            logging_steps=20,
            dataloader_num_workers=options.workers,
            dataloader_prefetch_factor=4 if options.workers else None,
            use_cpu=options.cpu,
            disable_tqdm=True,
        ),
        train_dataset=DescribedScenes(
            10_000_000,
            "train",
            side=SIDE,
            most=options.most,
            positives=2,
            negatives=2,
            world=WORLD,
        ),
        data_collator=DescribedCollator(collate, 4 * GRID),
    )
    held_out = scenes(options.held_out, "val", most=options.most)
    samples = [held_out[index] for index in range(len(held_out))]
    batches = [collate(samples[first : first + 20]) for first in range(0, len(samples), 20)]
    trainer.add_callback(Timekeeper(trainer, folder, options.minutes, options.every, batches))
    return trainer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="where checkpoints and the log go")
    parser.add_argument("--start", help="file of `state.py` to go on from, in a new folder")
    parser.add_argument("--minutes", type=float, default=120.0, help="to train, this time")
    parser.add_argument("--steps", type=int, default=1_000_000, help="to train, in all")
    parser.add_argument("--every", type=float, default=5.0, help="minutes between checkpoints")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rate-warm-up", type=int, default=100, help="steps")
    parser.add_argument("--clip", type=float, default=1.0, help="greatest norm of gradients")
    parser.add_argument("--ema", type=float, default=0.998, help="of the averaged weights")
    parser.add_argument("--warm-up", type=int, default=1500, help="steps of the vision encoder")
    parser.add_argument("--naming", type=int, default=1500, help="then, of both encoders")
    parser.add_argument("--where-weight", type=float, default=4.0)
    parser.add_argument("--most", type=int, default=MOST_THINGS, help="things in an image")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="images to score with")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
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
