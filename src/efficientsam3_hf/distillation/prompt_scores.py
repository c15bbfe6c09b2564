"""How well prompts are answered: as numbers, and as pictures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ..evaluation.mask_iou import centre_click, mask_iou
from ..visualize import colour_of, draw_instances
from .family import Family
from .prompted_heads import ask_objects
from .prompts import (
    FIRST_CORNER,
    LAST_CORNER,
    ON_OBJECT,
    ObjectPrompts,
    Objects,
    choose_objects,
    object_prompts,
    read_objects,
)


def score_answers(
    families: Mapping[str, Family], inputs: Mapping[str, Any], most: int, seed: int, step: int
) -> dict[str, float]:
    """Sums over `objects` of IoUs under boxes and under clicks in the middle of objects.

    `box_iou` is the student's with the annotation, `box_iou_of_teacher` the teacher's with it, and
    `box_agreement` that of the two; likewise for `click`.

    Args:
        families: "student" and "teacher".
        inputs: A batch, with labels.
        most: Objects of an image that are asked for.
        seed: Chooses them, if there are more.
        step: Likewise.
    """
    labels, pixel_values = inputs["labels"], inputs["pixel_values"]
    objects = read_objects(labels, len(pixel_values))
    (prompts, _) = choose_objects(objects, most, seed, step, box_share=1.0)
    truths = [truth_of(objects, row, labels) for row in prompts.object.tolist()]
    seen_rows = [row for row, truth in enumerate(truths) if truth.any()]
    prompts, truths = (
        prompts[torch.tensor(seen_rows, dtype=torch.long)],
        [truths[row] for row in seen_rows],
    )
    forms = {"box": prompts, "click": clicks_on(objects, prompts, truths)}
    sums = {"objects": float(len(truths))}
    for form, asked in forms.items():
        names = (f"{form}_iou", f"{form}_iou_of_teacher", f"{form}_agreement")
        sums |= dict.fromkeys(names, 0.0)
        answers = {name: masks_of(family, pixel_values, asked) for name, family in families.items()}
        for row, truth in enumerate(truths):
            own, theirs = (
                at_size(answers[name][row], truth.shape) for name in ("student", "teacher")
            )
            pairs = ((own, truth), (theirs, truth), (own, theirs))
            for name, pair in zip(names, pairs, strict=True):
                sums[name] += mask_iou(*pair)
    return sums


def truth_of(objects: Objects, row: int, labels: Any) -> np.ndarray:
    """The annotated mask of an object; empty if there is none."""
    return labels[objects.label[row]]["masks"][objects.instance[row]].cpu().numpy()


def clicks_on(objects: Objects, prompts: ObjectPrompts, truths: list[np.ndarray]) -> ObjectPrompts:
    """A click in the middle of each mask."""
    points = np.zeros((len(truths), 1, 2))
    for row, truth in enumerate(truths):
        click, (height, width) = centre_click(truth), truth.shape
        points[row, 0] = (click.x + 0.5) / width, (click.y + 0.5) / height
    return object_prompts(objects, prompts.object.numpy(), points, [ON_OBJECT])


def masks_of(family: Family, pixel_values: Tensor, prompts: ObjectPrompts) -> Tensor:
    """Logits (prompts, height, width) of the best masks, on the CPU, as they are in use."""
    if not len(prompts):
        return torch.zeros(0, 1, 1)
    features = family.tracker_features(family.see(pixel_values))
    tracker: Any = family.tracker
    answers = ask_objects(tracker, features, prompts.to(pixel_values.device), in_use=True)
    return answers.best().float().cpu()


def at_size(logits: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """The mask (height, width) that logits of another size stand for."""
    resized = F.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)
    return resized[0, 0].numpy() > 0


def draw_answers(
    families: Mapping[str, Family], inputs: Mapping[str, Any], most: int, seed: int
) -> dict[str, Image.Image]:
    """For each image of a batch, its prompts with the masks of each family, side by side."""
    pixel_values = inputs["pixel_values"]
    objects = read_objects(inputs["labels"], len(pixel_values))
    groups = choose_objects(objects, most, seed, step=0)
    answers = {
        name: [masks_of(family, pixel_values, prompts) for prompts in groups]
        for name, family in families.items()
    }
    pictures = {}
    for number, image_name in enumerate(objects.names):
        # The processor's mean and standard deviation are both one half.
        pixels = (pixel_values[number].float().cpu() * 0.5 + 0.5).clamp(0, 1)
        image = (pixels * 255).byte().permute(1, 2, 0).numpy()
        panels = [draw_panel(image, number, groups, answers[name]) for name in families]
        picture = Image.new("RGB", (sum(each.width for each in panels), panels[0].height))
        for place, panel in enumerate(panels):
            picture.paste(panel, (place * panel.width, 0))
        pictures[image_name or f"image {number}"] = picture
    return pictures


def draw_panel(
    image: np.ndarray, number: int, groups: list[ObjectPrompts], answers: list[Tensor]
) -> Image.Image:
    """An image of a batch with the masks that were given for it, and what was asked."""
    picture = Image.fromarray(image)
    asked: list[tuple[tuple[int, int, int], ObjectPrompts]] = []
    masks, numbers = [], []
    for prompts, logits in zip(groups, answers, strict=True):
        for row in torch.nonzero(prompts.image == number)[:, 0]:
            masks.append(at_size(logits[row], image.shape[:2]))
            numbers.append(int(prompts.object[row]))
            asked.append((colour_of(numbers[-1]), prompts[row[None]]))
    if masks:
        picture = draw_instances(picture, np.stack(masks), numbers=numbers)
    pen, width = ImageDraw.Draw(picture), max(2, picture.width // 250)
    for colour, prompt in asked:
        points = (prompt.points[0] * torch.tensor(picture.size)).tolist()
        if prompt.labels[0].tolist() == [FIRST_CORNER, LAST_CORNER]:
            pen.rectangle([*points[0], *points[1]], outline=colour, width=width)
        else:
            (x, y), reach = points[0], 2 * width
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour, outline="white")
    return picture
