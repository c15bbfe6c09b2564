"""Images, phrases and exemplars to the inputs of the concept model, outputs to instances."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.sam3.processing_sam3 import Sam3Processor
from transformers.utils import logging

from .auto_map import SelfContainedProcessorMixin
from .prompts import (
    PADDING_LABEL,
    VISUAL_PHRASE,
    check_box,
    check_labels,
    check_options,
    check_point,
    check_sizes,
    clean_phrase,
    is_list,
    to_lists,
)

logger = logging.get_logger(__name__)

PAD_TOKEN_ID = 0  # CLIP's; it is also the token "!", so it cannot be the tokenizer's pad token


class EfficientSam3Processor(SelfContainedProcessorMixin, Sam3Processor):
    """Takes what `Sam3Processor` takes, and also points and several phrases for one image.

    A prompt is a phrase, exemplar boxes and exemplar points for one image, each alone or combined.
    Prompts are given one for each image, several for a single image, or as a list of lists: the
    prompts of the first image, of the second, ... A single phrase, list of boxes or list of points
    goes with all prompts.

    Coordinates are pixels of the original images. A box that leaves its image is clipped to it; one
    outside, or without area, is an error, and so is a point outside.

    Args:
        image_processor: An `EfficientSam3ImageProcessor`.
        tokenizer: CLIP's tokenizer; its `model_max_length` is the context length.
        target_size: Kept for `Sam3Processor`; the image processor's size is what counts.
        point_pad_value: Kept for `Sam3Processor`.
    """

    def __call__(
        self,
        images=None,
        text: str | Sequence[Any] | None = None,
        segmentation_maps=None,
        input_boxes: Sequence[Any] | Tensor | None = None,
        input_boxes_labels: Sequence[Any] | Tensor | None = None,
        input_points: Sequence[Any] | Tensor | None = None,
        input_points_labels: Sequence[Any] | Tensor | None = None,
        original_sizes: Sequence[Any] | Tensor | None = None,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Make the inputs of the model; `model(**inputs)` takes them all.

        Args:
            images: One image or several, of any sizes and kinds.
            text: A phrase for all images, a list of one phrase for each image (or of several for a
                single image), or a list of such lists. None beside exemplars means "visual".
            segmentation_maps: Ground truth for each image, resized to the size of the predicted
                masks and returned as `labels`, which the model itself does not take.
            input_boxes: Exemplar boxes (x1, y1, x2, y2): for each prompt a list of boxes or None. A
                single list is for all prompts, in pixels of the image of each.
            input_boxes_labels: 1 for "like this", 0 for "unlike this"; all 1 if left out. -10 marks
                a box that only fills up a list. A single list is for all prompts.
            input_points: Exemplar points (x, y): for each prompt a list of points or None, as for
                boxes.
            input_points_labels: As for boxes.
            original_sizes: (height, width) of images whose vision features are at hand.
            return_tensors: Only `"pt"`.
            kwargs: Options of the image processor.

        Returns:
            `pixel_values`, `input_ids`, `attention_mask`, `input_boxes` and `input_points` with
            their labels, as far as asked for; `image_indices` where prompts came as a list of
            lists; and `original_sizes`, the (height, width) behind each prompt.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors must be 'pt', not {return_tensors!r}.")
        check_options(kwargs, self.image_processor, has_images=images is not None)
        if images is not None and original_sizes is not None:
            raise ValueError("Give images or original_sizes, not both: images bring their sizes.")
        if images is None and segmentation_maps is not None:
            raise ValueError("segmentation_maps go with images, and there are none.")
        encoding = BatchFeature()
        sizes = None
        if images is not None:
            encoding.update(
                self.image_processor(
                    images, segmentation_maps=segmentation_maps, return_tensors="pt", **kwargs
                )
            )
            sizes = encoding["original_sizes"].tolist()
        elif original_sizes is not None:
            sizes = check_sizes(original_sizes)

        phrases = text if isinstance(text, str) else list_of("text", text)
        boxes, boxes_labels = exemplar_lists("boxes", input_boxes, input_boxes_labels)
        points, points_labels = exemplar_lists("points", input_points, input_points_labels)
        has_exemplars = boxes is not None or points is not None
        if images is None and phrases is None and not has_exemplars:
            raise ValueError("There is nothing to process: give images, text, boxes or points.")
        if has_exemplars and sizes is None:
            raise ValueError("Boxes and points need images, or original_sizes, to be measured by.")

        image_indices = None
        if isinstance(phrases, list) and any(is_list(item) for item in phrases):
            image_indices = nested_indices(phrases, 1 if sizes is None else len(sizes))
            counts = [len(of_image) for of_image in phrases]
            boxes = flatten("boxes", boxes, counts)
            boxes_labels = flatten("box labels", boxes_labels, counts)
            points = flatten("points", points, counts)
            points_labels = flatten("point labels", points_labels, counts)
            phrases = flatten("text", phrases, counts)

        if not any([*(boxes or ()), *(boxes_labels or ())]):
            boxes = None
        if not any([*(points or ()), *(points_labels or ())]):
            points = None
        count = count_prompts(1 if sizes is None else len(sizes), phrases, boxes, points)
        if sizes is not None:
            sizes = sizes_of_prompts(sizes, image_indices, count)
            encoding["original_sizes"] = torch.tensor(sizes)
        if phrases is not None or has_exemplars:
            encoding.update(self.encode_phrases(phrases, boxes, points, count))
        if boxes is not None:
            encoding["input_boxes"], encoding["input_boxes_labels"] = encode_exemplars(
                "box", boxes, boxes_labels, sizes, encode_box
            )
        if points is not None:
            encoding["input_points"], encoding["input_points_labels"] = encode_exemplars(
                "point", points, points_labels, sizes, encode_point
            )
        if image_indices is not None:
            encoding["image_indices"] = torch.tensor(image_indices)
        return encoding

    @property
    def model_input_names(self) -> list[str]:
        """What every call with images and text returns."""
        return [*super().model_input_names, "original_sizes"]

    def encode_phrases(
        self, phrases: str | list | None, boxes: list | None, points: list | None, count: int
    ) -> dict[str, Tensor]:
        """Token ids and mask of cleaned phrases, padded to the context length."""
        if phrases is None:
            phrases = [None] * count
        elif isinstance(phrases, str):
            phrases = [phrases]
        cleaned = []
        for index, phrase in enumerate(phrases):
            if phrase is None:
                if not (item_at(boxes, index) or item_at(points, index)):
                    raise ValueError(f"Prompt {index} has no phrase, no boxes and no points.")
                phrase = VISUAL_PHRASE
            cleaned.append(clean_phrase(phrase))
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            cleaned, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        self.warn_of_truncation(cleaned, tokens["attention_mask"], length)
        self.warn_of_unknown_words(cleaned, tokens["input_ids"])
        padding = tokens["attention_mask"] == 0
        return {
            "input_ids": tokens["input_ids"].masked_fill(padding, PAD_TOKEN_ID),
            "attention_mask": tokens["attention_mask"],
        }

    def warn_of_truncation(self, phrases: list[str], mask: Tensor, length: int) -> None:
        """Say once, and not once for each of them, that phrases are too long."""
        for phrase, row in zip(phrases, mask, strict=True):
            if row.all() and len(self.tokenizer.tokenize(phrase)) + 2 > length:
                logger.warning_once(
                    f"Phrases longer than the context of {length} tokens are cut. Models with a "
                    "longer context have names that end in -ctx32 or -ctx77."
                )
                return

    def warn_of_unknown_words(self, phrases: list[str], ids: Tensor) -> None:
        """Say which words mean nothing to a tokenizer of whole words; CLIP's takes any."""
        tokenizer, unknown = self.tokenizer, self.tokenizer.unk_token
        is_clip = unknown == tokenizer.eos_token  # which ends every phrase there
        if is_clip or not (ids == tokenizer.unk_token_id).any():
            return
        words = dict.fromkeys(word for phrase in phrases for word in phrase.split())
        strange = [repr(word) for word in words if unknown in tokenizer.tokenize(word)]
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        known = [word for word, _ in vocabulary if "<|" not in word and word != VISUAL_PHRASE]
        logger.warning_once(
            f"This model does not know {', '.join(strange)}. All the words it knows are "
            f"{', '.join(known)}."
        )

    def post_process_semantic_segmentation(self, outputs, target_sizes=None, **kwargs):
        """Binary map of all instances of each prompt, resized to (height, width)."""
        sizes = self.image_processor.check_target_sizes(target_sizes, len(outputs.semantic_seg))
        return self.image_processor.post_process_semantic_segmentation(
            outputs, target_sizes=None if target_sizes is None else sizes, **kwargs
        )


def list_of(name: str, value: Any) -> list | None:
    """An argument as nested lists; one that is none, or holds nothing, is an error."""
    lists = to_lists(value)
    if lists is not None and not isinstance(lists, list):
        kind = "a phrase or a list of them" if name == "text" else "nested lists or a tensor"
        raise TypeError(f"{name} must be {kind}, not {type(value).__name__}: {value!r}.")
    if lists == []:
        raise ValueError(f"{name} is empty. Leave it out, or give None, if there is nothing.")
    return lists


def exemplar_lists(kind: str, exemplars: Any, labels: Any) -> tuple[list | None, list | None]:
    """Boxes or points and their labels as nested lists."""
    if exemplars is None and labels is not None:
        raise ValueError(f"input_{kind}_labels label nothing: there are no input_{kind}.")
    return list_of(f"input_{kind}", exemplars), list_of(f"input_{kind}_labels", labels)


def count_prompts(num_images: int, phrases: Any, boxes: list | None, points: list | None) -> int:
    """How many prompts phrases, boxes and points make, each of which may be one for all."""
    given = {"text": phrases, "input_boxes": boxes, "input_points": points}
    counts = {name: len(part) for name, part in given.items() if isinstance(part, list)}
    count = max(counts.values(), default=num_images)
    for name, number in counts.items():
        if number not in (1, count):
            raise ValueError(
                f"{name} for {number} prompts do not fit {count} prompts: give an entry (or None) "
                "for each, or a single one for all."
            )
    return count


def flatten(kind: str, nested: list | None, counts: list[int]) -> list | None:
    """A list of the entries of all prompts out of a list for each image.

    Args:
        kind: What the entries are, for the message.
        nested: For each image a list with an entry for each of its phrases, or None for the image.
        counts: Phrases of each image.
    """
    if nested is None:
        return None
    given = [len(of_image) if is_list(of_image) else None for of_image in nested]
    if len(given) != len(counts) or any(
        number not in (None, count) for number, count in zip(given, counts, strict=True)
    ):
        raise ValueError(
            f"{kind} for {given} prompts an image do not fit text for {counts}: give a list for "
            "each image, with an entry (or None) for each of its phrases."
        )
    flat = []
    for of_image, count in zip(nested, counts, strict=True):
        flat += [None] * count if of_image is None else list(of_image)
    return flat


def nested_indices(phrases: list, num_images: int) -> list[int]:
    """Which image each prompt of a list of lists is about."""
    if not all(is_list(of_image) for of_image in phrases):
        raise ValueError("Give a list of phrases for every image, or for none.")
    if len(phrases) != num_images:
        raise ValueError(f"{len(phrases)} lists of phrases do not fit {num_images} images.")
    if not any(phrases):
        raise ValueError("text holds no phrase for any image.")
    return [index for index, of_image in enumerate(phrases) for _ in of_image]


def sizes_of_prompts(sizes: list, image_indices: list[int] | None, count: int) -> list:
    """(height, width) of the image behind each prompt."""
    if image_indices is not None:
        return [sizes[index] for index in image_indices]
    if len(sizes) == 1:
        return sizes * count
    if count not in (1, len(sizes)):
        raise ValueError(
            f"{count} prompts do not fit {len(sizes)} images. Give one for each image, or a list "
            "of prompts for each image."
        )
    return sizes


def encode_exemplars(
    kind: str,
    exemplars: list,
    labels: list | None,
    sizes: list,
    encode: Callable[[Sequence[float], Sequence[int]], list[float]],
) -> tuple[Tensor, Tensor]:
    """Boxes or points of each prompt, in [0, 1] and padded to one length, with their labels."""
    if labels is not None and len(labels) not in (1, len(exemplars)):
        raise ValueError(
            f"{kind} labels for {len(labels)} prompts do not fit {len(exemplars)} prompts."
        )
    if len(exemplars) == 1 and len(set(map(tuple, sizes))) > 1:
        exemplars = exemplars * len(sizes)  # the same pixels are other shares of other images
    filler = [0.5] * (4 if kind == "box" else 2)  # any valid place: its label says to ignore it
    rows, row_labels = [], []
    for index, of_prompt in enumerate(exemplars):
        given = [] if of_prompt is None else of_prompt
        if not is_list(given):
            raise ValueError(
                f"Prompt {index} has {given!r} in place of a list of exemplars of kind {kind!r}."
            )
        if any(is_list(number) for exemplar in given if is_list(exemplar) for number in exemplar):
            raise ValueError(
                f"Prompt {index} has lists of lists of kind {kind!r}: {given!r}. Where images have "
                "lists of prompts each, so has text: [[None], [None]] if there are no phrases."
            )
        of_labels = item_at(labels, index)
        of_labels = [1] * len(given) if of_labels is None else of_labels
        row_labels.append(check_labels(kind, of_labels, len(given), (0, 1, PADDING_LABEL)))
        rows.append(
            [
                filler if label == PADDING_LABEL else encode(exemplar, sizes[index])
                for exemplar, label in zip(given, of_labels, strict=True)
            ]
        )
    longest = max(map(len, rows), default=0)
    padded = [row + [filler] * (longest - len(row)) for row in rows]
    padded_labels = [row + [PADDING_LABEL] * (longest - len(row)) for row in row_labels]
    shape = (len(rows), longest, len(filler))
    return (
        torch.tensor(padded, dtype=torch.float32).view(shape),
        torch.tensor(padded_labels, dtype=torch.long).view(shape[:2]),
    )


def encode_box(box: Sequence[float], size: Sequence[int]) -> list[float]:
    """A pixel box (x1, y1, x2, y2) as (cx, cy, w, h) in [0, 1]."""
    height, width = size
    x1, y1, x2, y2 = check_box(box, (height, width))
    return [
        (x1 + x2) / 2 / width,
        (y1 + y2) / 2 / height,
        (x2 - x1) / width,
        (y2 - y1) / height,
    ]


def encode_point(point: Sequence[float], size: Sequence[int]) -> list[float]:
    """A pixel point (x, y) in [0, 1]."""
    height, width = size
    x, y = check_point(point, (height, width))
    return [x / width, y / height]


def item_at(items: list | None, index: int) -> Any:
    """The entry of one prompt; a single entry is for all prompts."""
    if items is None:
        return None
    return items[0] if len(items) == 1 else items[index]
