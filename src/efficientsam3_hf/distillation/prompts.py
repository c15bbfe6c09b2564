"""What is asked of an image: objects by box or click, phrases with exemplars, clicks on errors.

All choices depend on a seed, a step and the image's own name alone. So neither the batch an image
is in nor the process that has it changes what is asked of it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.prompts import PADDING_LABEL

ON_OBJECT, BESIDE_OBJECT, FIRST_CORNER, LAST_CORNER = 1, 0, 2, 3
MOST_NOISE = 20 / 1008  # of the image, by which a corner of a box is moved


@dataclass
class Objects:
    """The objects in the images of a batch that can be asked for, as arrays.

    Args:
        names: Of the images.
        image: (objects,): the image each is in.
        label: (objects,): which of the batch's labels it belongs to.
        instance: (objects,): which of that label's instances it is.
        boxes_xyxy: (objects, 4) in [0, 1].
        points: (objects, 2): a point on each, (x, y) in [0, 1].
    """

    names: list[str]
    image: np.ndarray
    label: np.ndarray
    instance: np.ndarray
    boxes_xyxy: np.ndarray
    points: np.ndarray

    def members(self) -> list[np.ndarray]:
        """Numbers of the objects of each image."""
        return [np.flatnonzero(self.image == number) for number in range(len(self.names))]


@dataclass
class ObjectPrompts:
    """Prompts of one form, each for one object and by itself.

    Args:
        image: (prompts,): the image each is about.
        points: (prompts, points, 2) as (x, y) in [0, 1].
        labels: (prompts, points): 1 on the object, 0 beside it, 2 and 3 for the corners of a box.
        draws: (prompts, corrections) in [0, 1), by which pixels of corrections are chosen.
        object: (prompts,): number of the object.
    """

    image: Tensor
    points: Tensor
    labels: Tensor
    draws: Tensor
    object: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: torch.device) -> "ObjectPrompts":
        """On another device."""
        return ObjectPrompts(**{name: value.to(device) for name, value in vars(self).items()})

    def __getitem__(self, rows: Tensor) -> "ObjectPrompts":
        return ObjectPrompts(**{name: value[rows] for name, value in vars(self).items()})

    def at_least_one(self) -> "ObjectPrompts":
        """Themselves; if there are none, one of their form, for those that must be asked."""
        if len(self):
            return self
        blank = {name: value.new_zeros(1, *value.shape[1:]) for name, value in vars(self).items()}
        return ObjectPrompts(**blank)


@dataclass
class ConceptPrompts:
    """Prompts of the concept model.

    Args:
        image: (prompts,): the image each is about.
        label: (prompts,): which of the batch's labels has its phrase.
        instance: (prompts,): which of that label's instances is the exemplar; -1 for none.
        has_words: (prompts,), false where an exemplar is asked with alone.
        boxes_cxcywh: Exemplars (prompts, 1, 4) in [0, 1].
        boxes_labels: (prompts, 1): 1, or -10 where there is no exemplar.
    """

    image: Tensor
    label: Tensor
    instance: Tensor
    has_words: Tensor
    boxes_cxcywh: Tensor
    boxes_labels: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: torch.device) -> "ConceptPrompts":
        """On another device."""
        return ConceptPrompts(**{name: value.to(device) for name, value in vars(self).items()})

    def __getitem__(self, rows: Tensor) -> "ConceptPrompts":
        return ConceptPrompts(**{name: value[rows] for name, value in vars(self).items()})

    def at_least_one(self) -> "ConceptPrompts":
        """Themselves; if there are none, one without exemplar, for those that must be asked."""
        if len(self):
            return self
        blank = {name: value.new_zeros(1, *value.shape[1:]) for name, value in vars(self).items()}
        blank["boxes_cxcywh"] += 0.5
        blank["boxes_labels"] += PADDING_LABEL
        blank["instance"] -= 1
        return ConceptPrompts(**blank)


def read_objects(labels: Sequence[Mapping[str, Any]], num_images: int) -> Objects:
    """The objects of a batch that are no crowds and have an extent.

    Args:
        labels: As `ImageCollator` makes them.
        num_images: In the batch.
    """
    names = [""] * num_images
    for label in labels:
        names[label["image"]] = str(label["image_id"])
    counts = [len(label["boxes"]) for label in labels]
    if not sum(counts):
        empty = np.zeros(0, np.int64)
        return Objects(names, empty, empty, empty, np.zeros((0, 4)), np.zeros((0, 2)))
    columns = [
        torch.cat([label["boxes"], label["points"], label["is_crowd"][:, None].float()], dim=1)
        for label in labels
    ]
    table = torch.cat(columns).cpu().double().numpy()  # in one copy
    centres, sizes, points, is_crowd = np.split(table, [2, 4, 6], axis=1)
    usable = np.flatnonzero((sizes > 0).all(axis=1) & (is_crowd[:, 0] == 0))
    label_of = np.repeat(np.arange(len(labels)), counts)[usable]
    instance_of = np.concatenate([np.arange(count) for count in counts])[usable]
    boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1)[usable]
    image_of = np.array([label["image"] for label in labels])[label_of]
    return Objects(names, image_of, label_of, instance_of, boxes.clip(0, 1), points[usable])


def count_concepts(
    labels: Sequence[Mapping[str, Any]], objects: Objects, most: int, has_phrases: bool
) -> int:
    """How many prompts `choose_concepts` chooses."""
    choices = np.array([label["image"] for label in labels], int) if has_phrases else objects.image
    counts = np.bincount(choices, minlength=len(objects.names))
    return int(np.minimum(counts, most).sum())


def count_objects(objects: Objects, most: int) -> int:
    """How many prompts `choose_objects` chooses."""
    return int(np.minimum(np.bincount(objects.image, minlength=1), most).sum())


def choose_objects(
    objects: Objects,
    most: int,
    seed: int,
    step: int,
    box_share: float = 0.5,
    box_noise: float = 0.0,
    corrections: int = 0,
) -> list[ObjectPrompts]:
    """Prompts by box, and prompts by click, each for another object of its image.

    Args:
        objects: Of a batch.
        most: In an image.
        seed: Another one makes other choices.
        step: Of training, likewise.
        box_share: How many of them are boxes.
        box_noise: By which corners of boxes are moved: standard deviation as a share of the side.
        corrections: How many clicks on errors may follow.
    """
    chosen, is_box, boxes, draws = [], [], [], []
    for name, members in zip(objects.names, objects.members(), strict=True):
        generator = generator_of(seed, step, name, "objects")
        members = generator.permutation(members)[:most]
        count = len(members)
        chosen.append(members)
        is_box.append(generator.random(count) < box_share)
        clean = objects.boxes_xyxy[members]
        sides = np.tile(clean[:, 2:] - clean[:, :2], 2)
        noise = (generator.normal(size=(count, 4)) * box_noise * sides).clip(
            -MOST_NOISE, MOST_NOISE
        )
        boxes.append((clean + noise).clip(0, 1))
        draws.append(generator.random((count, corrections)))
    rows, boxes, draws = np.concatenate(chosen), np.concatenate(boxes), np.concatenate(draws)
    by_box = np.concatenate(is_box)
    corners = boxes.reshape(-1, 2, 2)[by_box]
    return [
        object_prompts(objects, rows[by_box], corners, [FIRST_CORNER, LAST_CORNER], draws[by_box]),
        object_prompts(
            objects,
            rows[~by_box],
            objects.points[rows[~by_box]][:, None],
            [ON_OBJECT],
            draws[~by_box],
        ),
    ]


def object_prompts(
    objects: Objects,
    rows: np.ndarray,
    points: np.ndarray,
    labels: list[int],
    draws: np.ndarray | None = None,
) -> ObjectPrompts:
    """Prompts for some objects.

    Args:
        objects: Of a batch.
        rows: (prompts,): numbers of the objects asked for.
        points: (prompts, points, 2) in [0, 1].
        labels: Of the points, the same in all prompts.
        draws: (prompts, corrections); None for none.
    """
    draws = np.zeros((len(rows), 0)) if draws is None else draws
    return ObjectPrompts(
        image=torch.from_numpy(objects.image[rows]),
        points=torch.from_numpy(points).float(),
        labels=torch.tensor(labels).expand(len(rows), -1),
        draws=torch.from_numpy(draws).float(),
        object=torch.from_numpy(rows),
    )


def choose_concepts(
    labels: Sequence[Mapping[str, Any]],
    objects: Objects,
    most: int,
    seed: int,
    step: int,
    has_phrases: bool,
    exemplar_share: float = 0.5,
    exemplar_alone: float = 0.0,
) -> ConceptPrompts:
    """Phrases of each image, some with one of their instances as exemplar; or exemplars alone.

    Args:
        labels: Of the batch.
        objects: Of the batch.
        most: In an image.
        seed: Another one makes other choices.
        step: Of training, likewise.
        has_phrases: False where labels have none: then every prompt is an exemplar.
        exemplar_share: How many of the phrases that name something get an exemplar.
        exemplar_alone: How many of these lose their words.
    """
    image_of_label = np.array([label["image"] for label in labels], dtype=int)
    images, chosen, exemplars, has_words = [], [], [], []
    for image, (name, members) in enumerate(zip(objects.names, objects.members(), strict=True)):
        generator = generator_of(seed, step, name, "concepts")
        if has_phrases:
            of_image = generator.permutation(np.flatnonzero(image_of_label == image))[:most]
            for label in of_image:
                instances = members[objects.label[members] == label]
                wants_exemplar, which, wants_words = generator.random(3)
                has_exemplar = bool(len(instances)) and wants_exemplar < exemplar_share
                has_words.append(not has_exemplar or wants_words >= exemplar_alone)
                exemplars.append(instances[int(which * len(instances))] if has_exemplar else -1)
        else:
            shown = generator.permutation(members)[:most]
            of_image = objects.label[shown]
            exemplars += list(shown)
            has_words += [False] * len(shown)
        chosen += list(of_image)
        images += [image] * len(of_image)
    rows = np.array(exemplars, dtype=int)
    # -1, for none, is the box added at the end.
    boxes = np.concatenate([objects.boxes_xyxy, [[0.25, 0.25, 0.75, 0.75]]])[rows]
    first, last = boxes[:, :2], boxes[:, 2:]
    cxcywh = np.concatenate([(first + last) / 2, last - first], axis=1)
    return ConceptPrompts(
        image=torch.tensor(images, dtype=torch.long),
        label=torch.tensor(np.array(chosen, dtype=int)),
        instance=torch.from_numpy(np.append(objects.instance, -1)[rows]),
        has_words=torch.tensor(has_words, dtype=torch.bool),
        boxes_cxcywh=torch.from_numpy(cxcywh).float()[:, None],
        boxes_labels=torch.from_numpy(np.where(rows < 0, PADDING_LABEL, ON_OBJECT))[:, None],
    )


def correct(
    prompts: ObjectPrompts,
    own: Tensor,
    wanted: Tensor,
    correction: int,
    least: int,
    valid: Tensor | None = None,
) -> tuple[ObjectPrompts, Tensor]:
    """Prompts with one more click, on a pixel where a mask differs from the one that is wanted.

    Every such pixel is as likely as the others. A click on what is missing says "on the object",
    one on what is too much "beside it".

    Args:
        prompts: Those that led to the masks.
        own: Logits (prompts, height, width) of the student's masks.
        wanted: Logits of the teacher's.
        correction: Number of this correction, from 0 on.
        least: Pixels that must differ; prompts with fewer are left out.
        valid: (prompts, height, width), true where there is a picture.

    Returns:
        Prompts, and the rows they had among those given.
    """
    is_wrong = (own > 0) != (wanted > 0)
    if valid is not None:
        is_wrong &= valid
    ranks = is_wrong.flatten(1).cumsum(dim=1)  # of the wrong pixels, from 1 on
    counts = ranks[:, -1]
    kept = torch.nonzero(counts >= max(least, 1))[:, 0]
    prompts, ranks, counts = prompts[kept], ranks[kept], counts[kept]
    place = (prompts.draws[:, correction] * counts).long().minimum(counts - 1)
    pixel = torch.searchsorted(ranks, place[:, None] + 1)[:, 0]
    height, width = own.shape[-2:]
    row, column = pixel // width, pixel % width
    size = prompts.points.new_tensor([width, height])
    point = (torch.stack([column, row], dim=-1) + 0.5) / size
    is_missing = wanted[kept, row, column] > 0
    label = torch.where(is_missing, ON_OBJECT, BESIDE_OBJECT).to(prompts.labels.dtype)
    prompts.points = torch.cat([prompts.points, point[:, None]], dim=1)
    prompts.labels = torch.cat([prompts.labels, label[:, None]], dim=1)
    return prompts, kept


def generator_of(*key: Any) -> np.random.Generator:
    """Random numbers that depend on a key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
