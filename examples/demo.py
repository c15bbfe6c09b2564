"""Segment a picture by phrase, box and click, and follow a phrase through a clip.

    make demo
    python examples/demo.py --output my-folder

With the miniature that comes with the package. It knows coloured shapes only, and so picture and
clip show such. The same calls, given the folder of a real model, take photographs.
"""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from transformers import pipeline
from transformers.utils import logging

from efficientsam3_hf import (
    EfficientSam3TrackerModel,
    EfficientSam3TrackerProcessor,
    EfficientSam3VideoModel,
    zoo,
)
from efficientsam3_hf.data.track_writers import OverlayWriter
from efficientsam3_hf.data.video import open_video
from efficientsam3_hf.visualize import draw_instances

MEDIA = Path(__file__).parent / "media"
PHRASE = "red star"
EXEMPLAR = (353, 203, 480, 365)  # one of the red stars
BOX = (0, 216, 148, 373)  # the red square
CLICK = (254, 371)  # on the yellow star
CLIP_PHRASE = "yellow square"

PANEL, TITLE = 320, 30  # pixels of the overview


@dataclass
class Found:
    """What one prompt gave.

    Args:
        prompt: In words.
        masks: Booleans (instances, height, width).
        scores: Of each instance.
        box, click: What was pointed at.
    """

    prompt: str
    masks: np.ndarray
    scores: list[float]
    box: tuple[int, ...] | None = None
    click: tuple[int, int] | None = None

    def draw(self, image: Image.Image) -> Image.Image:
        """The picture with masks and scores, and what was pointed at in white."""
        captions = [f"{each:.2f}" for each in self.scores]
        # Colour 0 is red, as some of the things that are looked for.
        numbers = range(1, len(captions) + 1)
        drawn = draw_instances(image, self.masks, captions=captions, numbers=list(numbers))
        pen = ImageDraw.Draw(drawn)
        if self.box is not None:
            pen.rectangle(self.box, outline="white", width=4)
        if self.click is not None:
            pen.circle(self.click, 9, fill="white", outline="black", width=3)
        return drawn


def find_concepts(folder: Path, image: Image.Image) -> list[Found]:
    """Every instance of a phrase, and of what looks like an example."""
    pipe = pipeline("promptable-concept-segmentation", model=str(folder))
    by_phrase = pipe(image, text=PHRASE)
    by_example = pipe(image, input_boxes=[EXEMPLAR])
    return [
        Found(f'phrase "{PHRASE}"', *masks_and_scores(by_phrase, image)),
        Found("all like this one", *masks_and_scores(by_example, image), box=EXEMPLAR),
    ]


def masks_and_scores(instances: list[dict], image: Image.Image) -> tuple[np.ndarray, list[float]]:
    """Instances of the pipeline as arrays."""
    masks = [np.asarray(instance["mask"]) > 0 for instance in instances]
    shape = (len(masks), image.height, image.width)
    return np.reshape(masks, shape).astype(bool), [instance["score"] for instance in instances]


@torch.inference_mode()
def find_objects(folder: Path, image: Image.Image) -> list[Found]:
    """The single object in a box, and that under a click."""
    tracker = EfficientSam3TrackerModel.from_pretrained(folder).eval()
    processor = EfficientSam3TrackerProcessor.from_pretrained(folder)
    found = []
    for prompt, pointed, inputs in (
        ("box", {"box": BOX}, {"input_boxes": [[BOX]]}),
        ("click", {"click": CLICK}, {"input_points": [[[CLICK]]], "input_labels": [[[1]]]}),
    ):
        inputs = processor(image, **inputs)
        outputs = tracker(**inputs)  # three candidates
        best = outputs.iou_scores[0, 0].argmax()
        masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])
        score = float(outputs.iou_scores[0, 0, best])
        found.append(Found(prompt, masks[0][:, best].numpy(), [score], **pointed))
    return found


def follow_phrase(folder: Path, clip: Path, path: Path) -> tuple[int, list[Image.Image]]:
    """Write the clip with every instance of a phrase; their number, and the pictures."""
    model = EfficientSam3VideoModel.from_pretrained(folder).eval()
    frames = open_video(clip)
    with OverlayWriter(path, fps=frames.fps or 12) as writer:
        objects = set()
        for result in model.stream(frames, text=CLIP_PHRASE):
            writer.write(result, result.pixels)
            objects.update(result.object_ids)
        pictures = [picture.convert("RGB") for picture in writer.pictures]
    return len(objects), pictures


def overview(found: list[Found], image: Image.Image, pictures: list[Image.Image]) -> Image.Image:
    """What was found in the picture, above four frames of the clip."""
    panels = [(f"{each.prompt}: {shown(each.scores)}", each.draw(image)) for each in found]
    numbers = np.linspace(0, len(pictures) - 1, len(panels)).round().astype(int)
    panels += [(f'"{CLIP_PHRASE}", frame {number}', pictures[number]) for number in numbers]
    height = PANEL + TITLE
    sheet = Image.new("RGB", (len(found) * PANEL, 2 * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (title, picture) in enumerate(panels):
        x, y = index % len(found) * PANEL, index // len(found) * height
        pen.text((x + 8, y + 6), title, fill="black", font_size=16)
        sheet.paste(picture.resize((PANEL, PANEL), Image.Resampling.LANCZOS), (x, y + TITLE))
    return sheet


def shown(scores: list[float]) -> str:
    """Scores as a reader wants them."""
    return ", ".join(f"{score:.2f}" for score in scores) or "nothing"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder to write")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    began = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    folder = zoo.embedded()

    with Image.open(MEDIA / "scene.jpg") as file:
        image = file.convert("RGB")
    found = [*find_concepts(folder, image), *find_objects(folder, image)]
    clip = options.output / "clip.gif"
    count, pictures = follow_phrase(folder, MEDIA / "clip.mp4", clip)
    overview(found, image, pictures).save(options.output / "overview.jpg", quality=80)

    table = Table("prompt", "found", "scores", "file", title=folder.name)
    for number, each in enumerate(found, start=1):
        path = options.output / f"scene_{number}.png"
        each.draw(image).save(path)
        table.add_row(each.prompt, str(len(each.scores)), shown(each.scores), path.name)
    table.add_row(f'phrase "{CLIP_PHRASE}" in a clip', str(count), "", clip.name)
    Console().print(table)
    picture = os.path.relpath(MEDIA / "scene.jpg")
    print(f"It took {time.monotonic() - began:.0f} seconds. The files are in {options.output}/,")
    print(f"all in one is {options.output / 'overview.jpg'}. Next, from the command line:\n")
    print(f'  .venv/bin/efficientsam3 segment {picture} --text "yellow star"')


if __name__ == "__main__":
    main()
