"""How well prompts are answered: as numbers, and as pictures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ..evaluation.mask_iou import centre_click, mask_iou
from ..visualize import colour_of, draw_instances
from .pictures import to_picture
from .prompted_heads import ObjectAnswers
from .prompts import (
    FIRST_CORNER,
    LAST_CORNER,
    ON_OBJECT,
    ObjectPrompts,
    Objects,
    object_prompts,
)

Answerer = Callable[[ObjectPrompts], ObjectAnswers]


def score_answers(
    answerers: Mapping[str, Answerer],
    labels: Sequence[Mapping[str, Any]],
    objects: Objects,
    device: torch.device,
) -> list[dict[str, float]]:
    """For each object that has a mask, IoUs under its box and under a click in its middle.

    `box_iou` is the student's with the annotation, `box_iou_of_teacher` the teacher's with it, and
    `box_agreement` that of the two; likewise for `click`.

    Args:
        answerers: "student" and "teacher".
        labels: Of the batch.
        objects: Of the batch.
        device: Where prompts are answered.
    """
    truths = [truth_of(objects, number, labels) for number in range(len(objects.image))]
    rows = np.array([row for row, truth in enumerate(truths) if truth.any()], dtype=int)
    truths = [truths[row] for row in rows]
    corners = objects.boxes_xyxy[rows].reshape(-1, 2, 2)
    middles = np.array([middle_of(truth) for truth in truths]).reshape(-1, 1, 2)
    forms = {
        "box": object_prompts(objects, rows, corners, [FIRST_CORNER, LAST_CORNER]),
        "click": object_prompts(objects, rows, middles, [ON_OBJECT]),
    }
    records: list[dict[str, float]] = [{} for _ in truths]
    for form, prompts in forms.items():
        student, teacher = (
            masks_of(answerers[name], prompts, device) for name in ("student", "teacher")
        )
        for row, truth in enumerate(truths):
            own, theirs = at_size(student[row], truth.shape), at_size(teacher[row], truth.shape)
            records[row] |= {
                f"{form}_iou": mask_iou(own, truth),
                f"{form}_iou_of_teacher": mask_iou(theirs, truth),
                f"{form}_agreement": mask_iou(own, theirs),
            }
    return records


def truth_of(objects: Objects, number: int, labels: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The annotated mask of an object; empty if there is none."""
    masks: Tensor = labels[objects.label[number]]["masks"]
    return masks[objects.instance[number]].cpu().numpy()


def middle_of(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) in [0, 1] of the middle of a mask."""
    click, (height, width) = centre_click(mask), mask.shape
    return (click.x + 0.5) / width, (click.y + 0.5) / height


def masks_of(answer: Answerer, prompts: ObjectPrompts, device: torch.device) -> Tensor:
    """Logits (prompts, height, width) of the best masks, on the CPU."""
    asked = prompts.at_least_one().to(device)
    return answer(asked).best()[: len(prompts)].cpu()


def at_size(logits: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """The mask (height, width) that logits of another size stand for."""
    resized = F.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)
    return resized[0, 0].numpy() > 0


def draw_answers(
    answerers: Mapping[str, Answerer],
    pixel_values: Tensor,
    objects: Objects,
    groups: Sequence[ObjectPrompts],
) -> dict[str, Image.Image]:
    """For each image of a batch, its prompts with the masks of each answerer, side by side."""
    device = pixel_values.device
    answers = [
        [masks_of(answer, prompts, device) for prompts in groups] for answer in answerers.values()
    ]
    groups = [prompts.to(torch.device("cpu")) for prompts in groups]
    pictures = {}
    for number in range(len(pixel_values)):
        # The processor's mean and standard deviation are both one half.
        image = to_picture(pixel_values[number].float().movedim(0, -1) * 0.5 + 0.5)
        panels = [draw_panel(image, number, groups, masks) for masks in answers]
        picture = Image.new("RGB", (len(panels) * image.width, image.height))
        for place, panel in enumerate(panels):
            picture.paste(panel, (place * image.width, 0))
        pictures[f"prompts_{number}"] = picture
    return pictures


def draw_panel(
    image: Image.Image, number: int, groups: Sequence[ObjectPrompts], answers: Sequence[Tensor]
) -> Image.Image:
    """An image of a batch with the masks that were given for it, and what was asked."""
    size = (image.height, image.width)
    masks, asked = [], []
    for prompts, logits in zip(groups, answers, strict=True):
        for row in torch.nonzero(prompts.image == number)[:, 0]:
            masks.append(at_size(logits[row], size))
            asked.append(prompts[row[None]])
    numbers = [int(prompt.object) for prompt in asked]
    picture = draw_instances(image, np.stack(masks), numbers=numbers) if masks else image.copy()
    pen, width = ImageDraw.Draw(picture), max(2, image.width // 250)
    for prompt in asked:
        colour = colour_of(int(prompt.object))
        points = (prompt.points[0] * torch.tensor(image.size)).tolist()
        if len(points) == 2:
            pen.rectangle((*points[0], *points[1]), outline=colour, width=width)
        else:
            (x, y), reach = points[0], 2 * width
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour, outline="white")
    return picture
