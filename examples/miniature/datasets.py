"""The world on disk, in the forms of the datasets that the real SAM 3 learned from."""

import os
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from efficientsam3_hf.data.phrases import write_phrases
from efficientsam3_hf.data.synthetic_writer import write_synthetic
from efficientsam3_hf.models.prompts import VISUAL_PHRASE

from .world import EVENTS, MOST_MOVING, MOST_THINGS, SIDE, WORLD

FRAMES = 12  # of a clip

# Part -> images and clips. Students are chosen by "val", whose first half calibrates them, and
# "test" is for the numbers that are reported.
SIZES = {"train": (20_000, 1_500), "val": (400, 20), "test": (1_000, 60)}


def phrases() -> list[str]:
    """All that can be said in this world."""
    shapes, colours = WORLD.words["shape"], WORLD.words["colour"]
    both = [f"{colour} {shape}" for colour in colours for shape in shapes]
    return [*shapes, *(f"{colour} object" for colour in colours), *both]


def write_world(folder: str | os.PathLike, sizes: dict[str, tuple[int, int]] | None = None) -> Path:
    """Write what is not there yet; each part is written whole or not at all.

    Args:
        folder: Gets `train/`, `val/` and `test/`, and in each of them `images` (SA-Co), `clips`
            (DAVIS 2017) and, to evaluate boxes and clicks, `objects` (COCO); and `phrases.txt`.
        sizes: Images and clips of each part, in place of `SIZES`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # What goes with exemplars alone is read by the student's own text tower, too.
    write_phrases([VISUAL_PHRASE, *phrases()], folder / "phrases.txt")
    common: dict[str, Any] = {"side": SIDE, "world": WORLD}
    options: dict[str, dict[str, Any]] = {
        "images": {"most": MOST_THINGS},
        "objects": {"most": MOST_THINGS},
        "clips": {"most": MOST_MOVING, "events": EVENTS, "num_frames": FRAMES},
    }
    jobs = [
        (Path(split, kind), form, split, count)
        for split, (images, clips) in (sizes or SIZES).items()
        for kind, form, count in (
            ("images", "saco", images),
            ("objects", "coco", 0 if split == "train" else images // 2),
            ("clips", "davis2017", clips),
        )
        if count
    ]
    for place, form, split, count in tqdm(jobs, "writing the world"):
        if (folder / place).is_dir():
            continue
        unfinished = folder / f".{os.getpid()}"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_synthetic(unfinished, form, split, count, **options[place.name], **common)
        (folder / place).parent.mkdir(exist_ok=True)
        unfinished.rename(folder / place)
    return folder
