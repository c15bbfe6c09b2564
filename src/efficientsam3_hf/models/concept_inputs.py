"""What the concept model is given, checked and brought to one number of prompts."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .prompts import PADDING_LABEL

# What `forward` hands on to the modules, beside its own arguments.
OUTPUT_OPTIONS = {"output_attentions", "output_hidden_states", "return_dict"}
# What may come along, and nothing reads: transformers' Trainer says how many items a batch has.
UNREAD_OPTIONS = {"labels", "num_items_in_batch"}


def check_options(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `forward` that its modules read; what nothing would read is an error.

    Args:
        model: Name of the class, for the message.
        options: Arguments beside those of the signature.
    """
    if options.get("labels") is not None:
        raise ValueError(
            f"{model} computes no loss and takes no labels: keep them out of its inputs, and "
            "compare its outputs with them yourself."
        )
    unknown = [name for name in options if name not in OUTPUT_OPTIONS | UNREAD_OPTIONS]
    if unknown:
        raise TypeError(
            f"{model}.forward has no argument {unknown[0]!r}. Beside those of its signature it "
            f"takes {', '.join(sorted(OUTPUT_OPTIONS))}."
        )
    return {name: value for name, value in options.items() if name in OUTPUT_OPTIONS}


def check_pixels(pixel_values: Tensor) -> None:
    """Raise for what is no batch of images."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(
            "pixel_values must be (images, 3, height, width), as the processor makes them, not "
            f"{tuple(pixel_values.shape)}."
        )


def check_vit_image_size(pixel_values: Tensor, image_size: int) -> None:
    """Raise if the ViT, whose positions are laid out for one size, gets another."""
    if tuple(pixel_values.shape[-2:]) != (image_size, image_size):
        height, width = pixel_values.shape[-2:]
        raise ValueError(
            f"The ViT of this configuration takes {image_size} x {image_size}, not {height} x "
            f"{width}. Load the model with image_size={height} (a multiple of 14), or resize."
        )


def check_levels(levels: Sequence[Tensor]) -> None:
    """Raise for what is no pyramid, finest map first."""
    if len(levels) < 3:
        raise ValueError(
            f"vision_embeds holds {len(levels)} maps, not the three (finest first) that the heads "
            "read. Keep fpn_hidden_states of get_vision_features whole."
        )
    shapes = [tuple(level.shape) for level in levels]
    is_pyramid = all(level.ndim == 4 for level in levels) and all(
        finer.shape[-1] > coarser.shape[-1] for finer, coarser in pairwise(levels)
    )
    if not is_pyramid:
        raise ValueError(
            "The maps of vision_embeds must be (images, channels, height, width), finest first, "
            f"not of shapes {shapes}."
        )


def check_precision(name: str, features: Tensor, dtype: torch.dtype) -> None:
    """Raise for features of another precision than the model's, outside of autocast."""
    if features.dtype != dtype and not torch.is_autocast_enabled(features.device.type):
        raise ValueError(
            f"{name} are {features.dtype}, but the model is {dtype}: convert them with "
            f".to({dtype})."
        )


def check_exemplars(
    kind: str, exemplars: Tensor | None, labels: Tensor | None, coordinates: int
) -> tuple[Tensor | None, Tensor | None]:
    """Boxes or points with labels that fit them, or None if there are none."""
    if exemplars is None and labels is not None:
        raise ValueError(f"There are labels of kind {kind!r}, but none of that kind to label.")
    if exemplars is None or exemplars.numel() == 0:
        return None, None
    if exemplars.ndim != 3 or exemplars.shape[-1] != coordinates:
        raise ValueError(
            f"Exemplars of kind {kind!r} must be (prompts, count, {coordinates}), not "
            f"{tuple(exemplars.shape)}."
        )
    if labels is None:
        labels = torch.ones(exemplars.shape[:2], dtype=torch.long, device=exemplars.device)
    if labels.shape != exemplars.shape[:2]:
        raise ValueError(
            f"{kind} labels {tuple(labels.shape)} do not fit {tuple(exemplars.shape[:2])} of them."
        )
    if can_be_read(exemplars) and not exemplars.isfinite().all():
        raise ValueError(f"Exemplars of kind {kind!r} hold numbers that are not finite.")
    if can_be_read(labels):
        wrong = set(labels.unique().tolist()) - {0, 1, PADDING_LABEL}
        if wrong:
            raise ValueError(
                f"Labels of kind {kind!r} are 1, 0, or {PADDING_LABEL} for padding, not "
                f"{sorted(wrong)}."
            )
    return exemplars, labels


def select_images(
    levels: Sequence[Tensor], position: Tensor, image_indices: Tensor | None, num_prompts: int
) -> tuple[list[Tensor], Tensor]:
    """Maps and position encoding of the image that each prompt is about."""
    num_images = len(levels[-1])
    if image_indices is None:
        if num_images == num_prompts or num_prompts == 1:
            return list(levels), position
        if num_images != 1:
            raise ValueError(
                f"{num_prompts} prompts do not fit {num_images} images. Pass image_indices to say "
                "which image each prompt is about."
            )
        # Views: the maps of a single image are shared by all prompts.
        return (
            [level.expand(num_prompts, -1, -1, -1) for level in levels],
            position.expand(num_prompts, -1, -1, -1),
        )
    if image_indices.ndim != 1 or image_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "image_indices must be whole numbers, one for each prompt, not "
            f"{image_indices.dtype} of shape {tuple(image_indices.shape)}."
        )
    if can_be_read(image_indices):
        wrong = [index for index in image_indices.tolist() if not 0 <= index < num_images]
        if wrong:
            raise ValueError(f"image_indices names image {wrong[0]} of {num_images}.")
    if len(image_indices) < num_prompts:
        raise ValueError(
            f"image_indices names {len(image_indices)} images for {num_prompts} prompts."
        )
    return [level[image_indices] for level in levels], position[image_indices]


def repeat_prompt(kind: str, count: int, *tensors: Tensor) -> list[Tensor]:
    """Tensors of `count` prompts, a single prompt being repeated for all."""
    given = len(tensors[0])
    if given not in (1, count):
        raise ValueError(f"{given} of kind {kind!r} do not fit {count} prompts: give 1 or {count}.")
    return [tensor.expand(count, *tensor.shape[1:]) for tensor in tensors]


def can_be_read(values: Tensor) -> bool:
    """Whether looking at values waits for no GPU, and breaks no graph that is being traced."""
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return values.device.type == "cpu" and not is_traced
