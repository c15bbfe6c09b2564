"""How good a model of the miniature is, by the tasks of `efficientsam3 evaluate`, and how large."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from efficientsam3_hf import zoo
from efficientsam3_hf.benchmarks.image_tasks import BoxTask, ClickTask, ConceptTask
from efficientsam3_hf.benchmarks.running import Run, run_task
from efficientsam3_hf.benchmarks.subsets import find_subsets
from efficientsam3_hf.benchmarks.tasks import Task
from efficientsam3_hf.benchmarks.video_tasks import VosTask
from efficientsam3_hf.distillation.family import Family

# Part of the data -> task, and number of its summary -> what it is called here.
TASKS: dict[str, tuple[Task, str, dict[str, str]]] = {
    "concept": (
        ConceptTask(batch_size=16),
        "images",
        {"cgF1": "cgF1", "IL_MCC": "IL_MCC", "pmF1": "pmF1", "IL_FPR": "false positives"},
    ),
    "box": (BoxTask(batch_size=16), "objects", {"mIoU": "box mIoU"}),
    "click": (ClickTask(batch_size=16, clicks=3), "objects", {"mIoU@1": "click mIoU"}),
    "video": (VosTask(), "clips", {"J&F": "J&F"}),
}
METRICS = tuple(name for _, _, names in TASKS.values() for name in names.values())


def measure(
    model: str | os.PathLike,
    data: Path,
    split: str,
    output: Path,
    limit: int | None = None,
    draws: int = 1000,
    device: str = "cpu",
) -> dict[str, Any]:
    """Numbers of a folder, in percent, each with the ends of its interval of 95 %.

    Args:
        model: The folder.
        data: As `write_world` makes it.
        split: Part of it.
        output: For predictions; a run that was stopped goes on from there.
        limit: Images and clips at most, the first ones.
        draws: Of the bootstrap.
        device: Where to run.
    """
    run = Run(os.fspath(model), output, device=device, draws=draws)
    numbers = {}
    for name, (task, kind, wanted) in TASKS.items():
        form = "saco" if kind == "images" else None
        subsets = find_subsets(data / split / kind, task.formats, form, split=in_form(kind, split))
        bar = tqdm(desc=f"{name} ({split})")
        with bar:

            def show(total: int, bar: tqdm = bar) -> Any:
                bar.reset(total)
                return bar.update

            result = run_task(task, [subset.open(limit) for subset in subsets], run, show)
        assert result is not None  # there is one process
        for each in result.measurements:
            if each.metric in wanted:
                numbers[wanted[each.metric]] = [each.value, each.low, each.high]
    return numbers


def in_form(kind: str, split: str) -> str | None:
    """Name of a part in the files of a form."""
    return {"images": None, "objects": f"{split}2017", "clips": split}[kind]


@torch.no_grad()
def cost(model: str | os.PathLike) -> dict[str, float]:
    """Parameters, and multiplications and additions for an image.

    `image` is what is computed of each image, whatever is asked: trunk, and the necks of detector
    and tracker. `phrase` is all that a phrase then takes.
    """
    family = Family.load(model).eval().requires_grad_(False)
    config = family.configuration
    side = config.image_size
    processor = zoo.processor(config)
    pixels = torch.zeros(1, 3, side, side)
    words = processor(text="red circle")
    with FlopCounterMode(display=False) as image:
        seen = family.see(pixels)
        family.tracker_levels(seen)
    with FlopCounterMode(display=False) as phrase:
        family.detector(
            vision_embeds=seen,
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
        )
    return {
        "parameters": sum(weight.numel() for weight in family.parameters()),
        "image": image.get_total_flops(),
        "phrase": phrase.get_total_flops(),
    }
