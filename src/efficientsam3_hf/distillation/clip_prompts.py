"""What is asked of clips in training: which objects, by which prompts, on which frames.

All of it depends on seed, step and the name of the clip, and not on what else is in its batch.
Places are relative to the picture, from 0 to 1, until `to_pixels`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.augmentations import generator_named
from ..models.clip_forward import ClipPrompts, FramePrompt
from .mask_losses import overlap

KINDS = ("point", "box", "mask")
MOST_CORRECTIONS = 4
DRAWS = 8 + MOST_CORRECTIONS  # random numbers of an object


@dataclass(frozen=True)
class PromptRules:
    """How prompts are chosen.

    Args:
        most_objects: Objects of a clip at most; None for all.
        shares: Of each of `KINDS`.
        corrections: Clicks that an object gets at most after its first prompt, each in a frame of
            its own; how many is drawn from 0 to this.
    """

    most_objects: int | None = None
    shares: Sequence[float] = (0.0, 0.0, 1.0)
    corrections: int = 0


@dataclass
class Asked:
    """What is asked of one object of a clip.

    Args:
        number: Of the object among those of the clip.
        start: Frame of its first prompt: the first annotated one that shows it.
        kind: Of that prompt.
        corrections: Frames in which it may be corrected.
        draws: Random numbers from 0 to 1, for places.
    """

    number: int
    start: int
    kind: str
    corrections: int
    draws: list[float]


@dataclass
class Plan:
    """What is asked of the clips of a batch.

    Rows are objects of clips as in `ClipPrompts`. Clips of fewer objects have rows that are not
    asked for.
    """

    clips: list[list[Asked]]

    @property
    def num_objects(self) -> int:
        """Rows of each clip."""
        return max([1, *(len(asked) for asked in self.clips)])

    def rows(self) -> Iterator[tuple[int, int, Asked]]:
        """Row, clip and what is asked, of each object."""
        for clip, of_clip in enumerate(self.clips):
            for place, asked in enumerate(of_clip):
                yield clip * self.num_objects + place, clip, asked


def make_plan(
    labels: Sequence[Mapping[str, Any]], rules: PromptRules, seed: int, moment: int | str
) -> Plan:
    """What to ask of clips at a moment of the training.

    Args:
        labels: As `ClipCollator` makes them.
        rules: How to choose.
        seed: Of the training.
        moment: The step, or a name for what is to be the same each time.
    """
    return Plan([ask(label, rules, generator_of(label, seed, moment)) for label in labels])


def generator_of(label: Mapping[str, Any], *moment: int | str) -> np.random.Generator:
    """Random numbers of a clip at a moment."""
    name = "/".join(map(str, (*moment, label["source_id"], label["frame_indices"][0])))
    return generator_named(name)


def ask(
    label: Mapping[str, Any], rules: PromptRules, generator: np.random.Generator
) -> list[Asked]:
    """What to ask of one clip."""
    shown = shown_frames(label).cpu().numpy()
    draws = generator.random((len(shown), DRAWS))
    candidates = [number for number in np.argsort(draws[:, 0]) if shown[number].any()]
    limits = np.cumsum(rules.shares) / np.sum(rules.shares)
    return [
        Asked(
            number=int(number),
            start=int(shown[number].argmax()),
            kind=KINDS[int(np.searchsorted(limits, draws[number, 1], side="right"))],
            corrections=int(draws[number, 2] * (rules.corrections + 1)),
            draws=draws[number, 3:].tolist(),
        )
        for number in sorted(candidates[: rules.most_objects])
    ]


def shown_frames(label: Mapping[str, Any]) -> Tensor:
    """Frames (objects, frames) that are annotated and show a pixel of an object."""
    return label["masks"].flatten(2).any(dim=-1) & label["is_annotated"]


def first_prompts(
    plan: Plan, labels: Sequence[Mapping[str, Any]], jitter: float
) -> list[FramePrompt]:
    """The prompt with which each object begins.

    Where nothing at all is asked for, one object is pretended that counts nowhere: so every batch
    takes the same way through the model.

    Args:
        plan: Of the batch.
        labels: Of its clips.
        jitter: How far the corners of a box are moved at most, as a share of its sides.
    """
    prompts = []
    for row, clip, asked in plan.rows():
        label, place = labels[clip], (asked.number, asked.start)
        mask = label["masks"][place]
        if asked.kind == "mask":
            prompts.append(FramePrompt(asked.start, [row], masks=mask[None, None].float()))
            continue
        if asked.kind == "point":
            points, point_labels = torch.tensor([pick(mask, asked.draws[0])]), [1]
        else:
            x, y, width, height = label["boxes"][place].tolist()
            corners = torch.tensor(
                [[x - width / 2, y - height / 2], [x + width / 2, y + height / 2]]
            )
            moves = 2 * torch.tensor(asked.draws[1:5]).view(2, 2) - 1
            points = corners + jitter * moves * torch.tensor([width, height])
            points, point_labels = points.clamp(0, 1), [2, 3]
        prompts.append(
            FramePrompt(asked.start, [row], points[None].float(), torch.tensor([point_labels]))
        )
    nothing = FramePrompt(0, [0], torch.full((1, 1, 2), 0.5), torch.ones(1, 1, dtype=torch.long))
    return joined(prompts) or [nothing]


def correcting_clicks(
    plan: Plan, labels: Sequence[Mapping[str, Any]], truth: Tensor, logits: Tensor
) -> list[FramePrompt]:
    """Clicks in the frames in which predictions agree least with the truth, where they are wrong.

    Args:
        plan: Of the batch.
        labels: Of its clips.
        truth: Masks (rows, frames, height, width), 0 or 1.
        logits: What was predicted, of the same shape.
    """
    agreement = overlap(logits, truth).cpu()
    prompts = []
    for row, clip, asked in plan.rows():
        annotated = labels[clip]["is_annotated"].tolist()
        later = [time for time, known in enumerate(annotated) if known and time > asked.start]
        worst = sorted(later, key=lambda time, row=row: float(agreement[row, time]))
        for number, time in enumerate(worst[: asked.corrections]):
            inside = truth[row, time] > 0.5
            wrong = (logits[row, time] > 0) != inside
            if not wrong.any():
                continue
            x, y = pick(wrong, asked.draws[5 + number])
            height, width = inside.shape
            label = int(inside[int(y * height), int(x * width)])
            prompts.append(
                FramePrompt(time, [row], torch.tensor([[[x, y]]]), torch.tensor([[label]]))
            )
    return joined(prompts)


def pick(mask: Tensor, draw: float) -> tuple[float, float]:
    """The middle (x, y) of a pixel of a boolean mask (height, width), by a number from 0 to 1."""
    height, width = mask.shape
    places = mask.flatten().nonzero()[:, 0]
    row, column = divmod(int(places[int(draw * len(places))]), width)
    return (column + 0.5) / width, (row + 0.5) / height


def joined(prompts: Sequence[FramePrompt]) -> list[FramePrompt]:
    """The same prompts, those of one kind and frame as one."""
    groups: dict[tuple[int, int], list[FramePrompt]] = {}
    for prompt in prompts:
        count = 0 if prompt.points is None else prompt.points.shape[1]
        groups.setdefault((prompt.frame, count), []).append(prompt)

    def stacked(group: list[FramePrompt], name: str) -> Tensor | None:
        each = [getattr(prompt, name) for prompt in group]
        return None if each[0] is None else torch.cat(each)

    return [
        FramePrompt(
            frame,
            [row for prompt in group for row in prompt.rows],
            *(stacked(group, name) for name in ("points", "labels", "masks")),
        )
        for (frame, _), group in groups.items()
    ]


def to_pixels(
    prompts: Sequence[FramePrompt], num_objects: int, size: int, device: torch.device
) -> ClipPrompts:
    """Prompts as a tracker of this size takes them."""
    placed = []
    for prompt in prompts:
        points = labels = None
        if prompt.points is not None and prompt.labels is not None:
            # A click is a pixel by its number, the corner of a box lies between pixels.
            points = prompt.points * size - 0.5 * (prompt.labels < 2)[..., None]
            points, labels = points.to(device), prompt.labels.to(device)
        placed.append(FramePrompt(prompt.frame, prompt.rows, points, labels, prompt.masks))
    return ClipPrompts(num_objects, placed)


def true_masks(plan: Plan, labels: Sequence[Mapping[str, Any]]) -> Tensor:
    """Masks (rows, frames, height, width), 0 or 1; empty for rows that are not asked for."""
    masks = labels[0]["masks"]
    truth = masks.new_zeros(len(plan.clips) * plan.num_objects, *masks.shape[1:])
    for row, clip, asked in plan.rows():
        truth[row] = labels[clip]["masks"][asked.number]
    return truth.float()


def counted_frames(
    plan: Plan, labels: Sequence[Mapping[str, Any]], constant: int = 0
) -> dict[str, Tensor]:
    """Which rows count for what in which frames: booleans (rows, frames).

    * `tracked`: the object has begun.
    * `remembered`: it began in an earlier frame, and so is looked for by memory.
    * `predicted`: its mask was not given, but found.
    * `judged`: moreover the frame is annotated.
    * `visible`: moreover the annotation shows the object.

    Args:
        plan: Of the batch.
        labels: Of its clips.
        constant: Frames at the beginning that count for nothing.
    """
    frames = len(labels[0]["is_annotated"])
    times = torch.arange(frames)
    counted = {
        name: torch.zeros(len(plan.clips) * plan.num_objects, frames, dtype=torch.bool)
        for name in ("tracked", "remembered", "predicted", "judged", "visible")
    }
    for row, clip, asked in plan.rows():
        has_gradient = times >= constant
        tracked, remembered = times >= asked.start, times > asked.start
        predicted = remembered if asked.kind == "mask" else tracked
        judged = predicted & labels[clip]["is_annotated"].cpu()
        visible = judged & shown_frames(labels[clip])[asked.number].cpu()
        for name, flags in zip(
            counted, (tracked, remembered, predicted, judged, visible), strict=True
        ):
            counted[name][row] = flags & has_gradient
    return counted
