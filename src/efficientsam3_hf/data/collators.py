"""Samples to batches. The transform of pixels is the processor's own, whichever it is.

collate = ImageCollator(processor)
loader = DataLoader(samples, batch_size=4, collate_fn=collate)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .augmentations import generator_named
from .loading import shared_number
from .masks_rle import Rle, decode_window, point_inside, resize_window, rle_area, rle_box
from .phrases import TextSample
from .samples import ClipSample, ImageSample, Instance, Query


class ImageCollator:
    """Inputs of the concept model and what it should find.

    Adds to what the processor gives `labels`, as `EfficientSam3Model` takes them to compute its
    loss, with one entry for each prompt, in their order:
    `masks` (instances, height, width), `boxes` as (cx, cy, w, h) and `points` as (x, y) in [0, 1],
    `is_crowd`, `is_exhaustive`, `phrase`, `image` (its number in the batch), `image_id` (its name
    in the dataset) and `source_id`.

    Args:
        processor: Takes `images` and `text` as `EfficientSam3Processor` does.
        mask_size: (height, width) of the masks in `labels`; None keeps each image's own.
        augment: Called with each sample, one after another, before all else, such as
            `[ChooseQueries(), Augmentations()]`.
        most_instances: Those beyond are left out, the smallest first, and `is_exhaustive` is then
            false.
        teacher_processor: Image processor of another model. Where its size is another, the same
            pictures are given as `teacher_pixel_values`, too.
        gives_valid: Whether to give `valid`, too, which the model itself does not take: boolean
            (images, height, width), false where a picture that was made smaller does not cover its
            canvas.
    """

    def __init__(
        self,
        processor: Any,
        mask_size: tuple[int, int] | None = (288, 288),
        augment: Sequence[Callable[[ImageSample], ImageSample]] = (),
        most_instances: int | None = None,
        teacher_processor: Any = None,
        gives_valid: bool = False,
    ):
        self.gives_valid = gives_valid
        self.processor, self.mask_size = processor, mask_size
        self.augment, self.most_instances = augment, most_instances
        self.teacher_processor = teacher_processor

    def __call__(self, samples: Sequence[ImageSample | None]) -> dict[str, Any]:
        usable = usable_samples(samples)
        for change in self.augment:
            usable = [change(sample) for sample in usable]
        images = [pixels_of(sample) for sample in usable]
        phrases = [[query.phrase for query in sample.queries] for sample in usable]
        labels = [
            self.label(sample, number, query)
            for number, sample in enumerate(usable)
            for query in sample.queries
        ]
        nameless = {phrase is None for of_image in phrases for phrase in of_image}
        if nameless == {True, False}:
            raise ValueError("A batch has queries with a phrase and without: load them apart.")
        if nameless == {False}:
            batch = dict(self.processor(images=images, text=phrases, return_tensors="pt"))
        else:
            batch = dict(self.processor(images=images, return_tensors="pt"))
        other = self.teacher_processor
        if other is not None and other.size != self.processor.image_processor.size:
            batch["teacher_pixel_values"] = other(images, return_tensors="pt")["pixel_values"]
        if self.gives_valid:
            size = tuple(batch["pixel_values"].shape[-2:])
            batch["valid"] = torch.stack([covered_places(each, size) for each in usable])
        batch["labels"] = labels
        return batch

    def label(self, sample: ImageSample, image: int, query: Query) -> dict[str, Any]:
        """What a model should find for one query."""
        instances = query.instances or []
        is_exhaustive = query.is_exhaustive and query.instances is not None
        if self.most_instances is not None and len(instances) > self.most_instances:
            instances = sorted(instances, key=box_area, reverse=True)[: self.most_instances]
            is_exhaustive = False
        height, width = sample.size
        return {
            "masks": stack_masks([each.rle for each in instances], sample.size, self.mask_size),
            "boxes": relative_boxes([each.box_xyxy for each in instances], sample.size),
            "points": torch.tensor(
                [point_of(each) for each in instances], dtype=torch.float32
            ).view(-1, 2)
            / torch.tensor([width, height]),
            "is_crowd": torch.tensor([each.is_crowd for each in instances], dtype=torch.bool),
            "is_exhaustive": torch.tensor(is_exhaustive),
            "phrase": query.phrase,
            "image": image,
            "image_id": sample.source_id,
            "source_id": query.source_id,
        }


class PictureCollator:
    """Pixels alone, for learning from the features of another model.

    Gives `pixel_values`, and `names` of the samples. With changes, also `valid` (images, height,
    width): false where a picture that was made smaller does not cover its canvas.

    Args:
        image_processor: Takes a list of images.
        augment: Called with each sample, one after another, such as `[Augmentations()]`.
        teacher_processor: The other model's. Where its size is another, the same pictures are
            given as `teacher_pixel_values`, too.
    """

    def __init__(
        self,
        image_processor: Any,
        augment: Sequence[Callable[[ImageSample], ImageSample]] = (),
        teacher_processor: Any = None,
    ):
        self.image_processor, self.augment = image_processor, augment
        is_other = teacher_processor is not None and teacher_processor.size != image_processor.size
        self.teacher_processor = teacher_processor if is_other else None

    def __call__(self, samples: Sequence[ImageSample | None]) -> dict[str, Any]:
        # Nothing is asked of them, and what is not there need not be moved along.
        changed = [replace(sample, queries=[]) for sample in usable_samples(samples)]
        for change in self.augment:
            changed = [change(sample) for sample in changed]
        images = [pixels_of(sample) for sample in changed]
        pixels: Tensor = self.image_processor(images, return_tensors="pt")["pixel_values"]
        batch: dict[str, Any] = {
            "pixel_values": pixels,
            "names": [f"{sample.source}/{sample.source_id}" for sample in changed],
        }
        if self.teacher_processor is not None:
            other = self.teacher_processor(images, return_tensors="pt")
            batch["teacher_pixel_values"] = other["pixel_values"]
        if self.augment:
            height, width = pixels.shape[-2:]
            places = [covered_places(each, (height, width)) for each in changed]
            batch["valid"] = torch.stack(places)
        return batch


def covered_places(sample: ImageSample, size: tuple[int, int]) -> Tensor:
    """Where a picture lies on its canvas: boolean (height, width)."""
    if sample.covered is None:
        return torch.ones(size, dtype=torch.bool)
    (x1, y1, x2, y2), (height, width) = sample.covered, sample.size
    y, x = (torch.arange(side) + 0.5 for side in size)
    rows = (y > y1 / height * size[0]) & (y < y2 / height * size[0])
    columns = (x > x1 / width * size[1]) & (x < x2 / width * size[1])
    return rows[:, None] & columns


class PhraseCollator:
    """Token ids of phrases, and of the same phrases with their words in another order.

    Gives `input_ids` and `attention_mask` (phrases, length), `keys`, which are equal for equal ids,
    and, if asked to shuffle, `shuffled_ids`. Words are shuffled as tokens, after a long phrase has
    been cut: both orders have the same tokens, and so the same mask.

    Args:
        processor: Its `encode_phrases` and `tokenizer` are those of `EfficientSam3Processor`.
        shuffle: Whether to shuffle; anew in each epoch.
        seed: Another one makes other orders.
    """

    def __init__(self, processor: Any, shuffle: bool = True, seed: int = 0):
        self.processor, self.shuffle, self.seed = processor, shuffle, seed
        self.epoch = shared_number()
        tokenizer = processor.tokenizer
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.ends_word = np.array([token.endswith("</w>") for token in tokens])

    def set_epoch(self, epoch: int) -> None:
        """Choose the orders of this epoch."""
        self.epoch.fill_(epoch)

    def __call__(self, samples: Sequence[TextSample | None]) -> dict[str, Any]:
        batch = self.encode([sample.text for sample in usable_samples(samples)])
        if self.shuffle:
            batch["shuffled_ids"] = torch.stack(
                [
                    self.shuffle_words(ids, int(mask.sum()))
                    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
                ]
            )
        return batch

    def encode(self, phrases: list[str]) -> dict[str, Any]:
        """Ids, mask and keys of phrases in their own order."""
        batch = dict(self.processor.encode_phrases(phrases, None, None, len(phrases)))
        batch["keys"] = [ids.numpy().tobytes() for ids in batch["input_ids"]]
        return batch

    def shuffle_words(self, ids: Tensor, length: int) -> Tensor:
        """Ids (padded,) of a phrase whose words are in another order, between start and end."""
        words = ids[1 : length - 1].numpy()
        parts = np.split(words, np.flatnonzero(self.ends_word[words]) + 1)
        parts = [part for part in parts if len(part)]  # the last is empty, unless a word was cut
        name = f"{self.seed}/{int(self.epoch)}/{words.tolist()}"
        order = generator_named(name).permutation(len(parts))
        shuffled = ids.clone()
        if len(parts) > 1:
            shuffled[1 : length - 1] = torch.from_numpy(
                np.concatenate([parts[int(index)] for index in order])
            )
        return shuffled


class ClipCollator:
    """Frames of clips of one length, and the masks of each object in each of them.

    Gives `pixel_values` (clips, frames, 3, height, width) and `labels`, with one entry for each
    clip: `masks` (objects, frames, height, width), `boxes` (objects, frames, 4) as (cx, cy, w, h)
    in [0, 1], `is_visible` (objects, frames), `is_annotated` (frames,), `phrases` and `object_ids`
    of the objects, `frame_indices` and `source_id`.

    Args:
        image_processor: Takes a list of frames.
        mask_size: (height, width) of the masks in `labels`; None keeps each clip's own.
        augment: Called with each sample, one after another, before all else, such as
            `[Augmentations()]`.
        teacher_processor: Of a model that is learned from. Where its size is another, the same
            frames are given as `teacher_pixel_values`, too.
    """

    def __init__(
        self,
        image_processor: Any,
        mask_size: tuple[int, int] | None = (288, 288),
        augment: Sequence[Callable[[ClipSample], ClipSample]] = (),
        teacher_processor: Any = None,
    ):
        self.image_processor, self.mask_size, self.augment = image_processor, mask_size, augment
        is_other = teacher_processor is not None and teacher_processor.size != image_processor.size
        self.teacher_processor = teacher_processor if is_other else None

    def __call__(self, samples: Sequence[ClipSample | None]) -> dict[str, Any]:
        usable = usable_samples(samples)
        for change in self.augment:
            usable = [change(sample) for sample in usable]
        frames = []
        for sample in usable:
            if sample.frames is None:
                raise ValueError(f"Clip {sample.source_id} has no frames: take a cut of it first.")
            frames.append(sample.frames)
        lengths = {len(of_clip) for of_clip in frames}
        if len(lengths) > 1:
            raise ValueError(f"Clips of {sorted(lengths)} frames do not fit one batch.")
        flat = [frame for of_clip in frames for frame in of_clip]
        shape = (len(usable), lengths.pop())
        pixels: Tensor = self.image_processor(flat, return_tensors="pt")["pixel_values"]
        batch: dict[str, Any] = {
            "pixel_values": pixels.unflatten(0, shape),
            "labels": [self.label(sample) for sample in usable],
        }
        if self.teacher_processor is not None:
            pixels = self.teacher_processor(flat, return_tensors="pt")["pixel_values"]
            batch["teacher_pixel_values"] = pixels.unflatten(0, shape)
        return batch

    def label(self, sample: ClipSample) -> dict[str, Any]:
        """What a model should find in one clip."""
        indices = sample.frame_indices or list(range(sample.num_frames))
        annotated = set(sample.annotated_frames)
        objects, phrases, rles = [], [], []
        for query in sample.queries:
            for masklet in query.masklets or []:
                objects.append(masklet.source_id)
                phrases.append(query.phrase)
                rles += [masklet.rles.get(index) for index in indices]
        shape = (len(objects), len(indices))
        boxes = [(0.0,) * 4 if rle is None else rle_box(rle) for rle in rles]
        visible = torch.tensor([rle is not None for rle in rles], dtype=torch.bool)
        stacked = stack_masks(rles, sample.size, self.mask_size)
        return {
            "masks": stacked.view(*shape, *stacked.shape[-2:]),
            "boxes": relative_boxes(boxes, sample.size).view(*shape, 4),
            "is_visible": visible.view(shape),
            "is_annotated": torch.tensor([index in annotated for index in indices]),
            "phrases": phrases,
            "object_ids": objects,
            "frame_indices": indices,
            "source_id": sample.source_id,
        }


def usable_samples(samples: Sequence[Any]) -> list[Any]:
    """Those that could be read."""
    usable = [sample for sample in samples if sample is not None]
    if not usable:
        raise ValueError(f"None of the {len(samples)} samples of a batch could be read.")
    return usable


def pixels_of(sample: ImageSample) -> np.ndarray:
    """The image of a sample, or an error."""
    if sample.image is None:
        raise ValueError(f"Image {sample.source_id} was read without pixels.")
    return sample.image


def stack_masks(
    rles: Sequence[Rle | None], size: tuple[int, int], mask_size: tuple[int, int] | None
) -> Tensor:
    """Boolean masks (count, height, width): of `mask_size` where half of a pixel or more is inside.

    A missing one is empty.
    """
    height, width = mask_size or size
    stacked = torch.zeros(len(rles), height, width, dtype=torch.bool)
    for mask, rle in zip(stacked.numpy(), rles, strict=True):
        if rle is None or not rle_area(rle):
            continue
        part, corner = decode_window(rle)
        if (height, width) != tuple(size):
            part, corner = resize_window(part, corner, size, (height, width), Image.Resampling.BOX)
        top, left = corner
        mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return stacked


def relative_boxes(boxes_xyxy: Sequence[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """Boxes (count, 4) as (cx, cy, w, h) in [0, 1]."""
    height, width = size
    boxes = torch.tensor(boxes_xyxy, dtype=torch.float64).view(-1, 4)
    first, last = boxes[:, :2], boxes[:, 2:]
    scale = torch.tensor([width, height], dtype=torch.float64)
    return torch.cat([(first + last) / 2 / scale, (last - first) / scale], dim=-1).float()


def point_of(instance: Instance) -> tuple[float, float]:
    """A point on an instance: the file's, else the middle of its mask, else of its box."""
    if instance.points:
        return instance.points[0]
    if instance.rle is not None and rle_area(instance.rle):
        part, (top, left) = decode_window(instance.rle)
        x, y = point_inside(part)
        return left + x, top + y
    x1, y1, x2, y2 = instance.box_xyxy
    return (x1 + x2) / 2, (y1 + y2) / 2


def box_area(instance: Instance) -> float:
    """Pixels of the box."""
    x1, y1, x2, y2 = instance.box_xyxy
    return (x2 - x1) * (y2 - y1)
