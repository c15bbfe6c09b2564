"""Train the tracker of the miniature teacher on its trunk, which stays as it is.

    python -m examples.miniature.train_tracker --teacher teacher_state.safetensors \\
        --folder outputs/tracker_images --frames 1 --minutes 30
    python -m examples.miniature.state outputs/tracker_images tracker_state.safetensors
    python -m examples.miniature.train_tracker --start tracker_state.safetensors \\
        --new-memory --folder outputs/tracker --frames 4 --batch 4 --minutes 60

First boxes and clicks on single images, then memory on clips, where the neck stays too: so what
students learn to see is settled before memory is. What is asked, and the losses of SAM 2, are those
of stage 2, without a teacher.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from efficientsam3_hf import zoo
from efficientsam3_hf.data.collators import ClipCollator
from efficientsam3_hf.data.synthetic import Clips
from efficientsam3_hf.distillation.checkpoints import last_checkpoint
from efficientsam3_hf.distillation.clip_prompts import (
    PromptRules,
    first_prompts,
    make_plan,
    true_masks,
)
from efficientsam3_hf.distillation.mask_losses import overlap
from efficientsam3_hf.distillation.memory_terms import (
    encode,
    follow,
    memory_parts,
    said_masks,
)
from efficientsam3_hf.distillation.stage2_memory import (
    MemoryDistillationArguments,
    MemoryDistillationTrainer,
)

from .datasets import FRAMES
from .state import import_state
from .teacher import fit_memory, new_teacher, with_tracker
from .timekeeper import PastMixin, Timekeeper, add_common_options, common_arguments
from .world import EVENTS, MOST_MOVING, MOST_THINGS, SIDE, WORLD

HELD_OUT_FRAMES = 8
TERMS = ("focal", "dice", "iou", "object")
HEADS = ("tracker.prompt_encoder.*", "tracker.mask_decoder.*", "tracker.mask_downsample.*")


class TrackerTrainer(PastMixin, MemoryDistillationTrainer):
    """Stage 2 without a teacher."""

    stage = "miniature teacher: tracker"


def clips(length: int, split: str, frames: int, most_step: int = 1) -> Clips:
    """Pieces of clips of the world.

    Args:
        length: Number of them.
        split: Of the world.
        frames: Of each; one alone is the first of its clip.
        most_step: From one to the next there are up to so many frames of a whole clip.
    """
    spans = (1.0, 1.0)
    if frames > 1:
        least = (frames - 1) / (FRAMES - 1)
        spans = (least, min(1.0, most_step * least))
    return Clips(
        *(length, split),
        side=SIDE,
        num_frames=frames,
        least=2,
        most=MOST_MOVING if frames > 1 else MOST_THINGS,
        world=WORLD,
        spans=spans,
        events=EVENTS,
    )


@torch.no_grad()
def score_prompts(trainer: TrackerTrainer, batches: Sequence[Mapping[str, Any]]) -> dict:
    """Mean IoU of what a box and a click give in the frame where they are."""
    family = trainer.family.eval()
    scores = {}
    for number, kind in enumerate(("point", "box")):
        shares = [float(place == number) for place in range(3)]
        found = []
        for batch in batches:
            labels = batch["labels"]
            plan = make_plan(labels, PromptRules(None, shares), trainer.args.seed, "score")
            frames = encode(family, batch["pixel_values"].to(trainer.args.device))
            said = follow(family, frames, first_prompts(plan, labels, jitter=0.0), plan)
            truth = true_masks(plan, labels)
            overlaps = overlap(said_masks(said, truth.to(trainer.args.device)).cpu(), truth)
            found += [overlaps[row, asked.start] for row, _, asked in plan.rows()]
        scores[f"{kind}_mIoU"] = float(torch.stack(found).mean())
    return scores


def score_memory(trainer: TrackerTrainer, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """J, F and J&F of objects that are given by their masks."""
    family = trainer.family.eval()
    records = []
    for batch in batches:
        with torch.no_grad():
            records += trainer.score(family, trainer._prepare_inputs(dict(batch)), None)
    return dict(trainer.summarize(records))


def build_trainer(options: argparse.Namespace) -> TrackerTrainer:
    """Everything that training takes."""
    torch.set_num_threads(options.threads)
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    family = with_tracker(new_teacher(options.seed), options.seed)
    collate = ClipCollator(
        zoo.processor(family.configuration).image_processor, mask_size=(SIDE, SIDE)
    )
    is_still = options.frames == 1
    arguments = MemoryDistillationArguments(
        **common_arguments(options),
        trained_parts=["tracker"] if is_still else [*memory_parts(family), *HEADS],
        max_objects=3,
        prompt_shares=[0.5, 0.5, 0.0] if is_still else [0.4, 0.4, 0.2],
        corrections=0 if is_still else 1,
        forcing_share=0.0,
    )
    trainer = TrackerTrainer(
        family,
        arguments,
        train_dataset=clips(10_000_000, "train", options.frames, most_step=2),
        data_collator=collate,
    )
    held_out = clips(options.held_out, "val", 1 if is_still else HELD_OUT_FRAMES)
    samples = [held_out[index] for index in range(len(held_out))]
    batches = [collate(samples[first : first + 10]) for first in range(0, len(samples), 10)]

    def score() -> dict[str, float]:
        scores = score_prompts(trainer, batches)
        return scores if is_still else {**scores, **score_memory(trainer, batches)}

    clock = (options.minutes, options.every)
    trainer.add_callback(Timekeeper(trainer, *clock, score, TERMS, options.last))
    return trainer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument("--teacher", help="file of `state.py` with the concept model")
    parser.add_argument("--frames", type=int, default=1, help="of each clip")
    parser.add_argument(
        "--new-memory", action="store_true", help="with --start: memory has not been trained yet"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    trainer = build_trainer(options)
    checkpoint = last_checkpoint(options.folder)
    if checkpoint is None and options.start:
        import_state(trainer, options.start)
        if options.new_memory:
            fit_memory(trainer.family)
            trainer.average.weights |= {
                name: weight.detach().clone()
                for name, weight in trainer.average.followed().items()
                if name.startswith("tracker.memory_")
            }
    elif checkpoint is None and options.teacher:
        import_state(trainer, options.teacher, is_trunk=True)
    trainer.train(resume_from_checkpoint=checkpoint)


if __name__ == "__main__":
    main()
