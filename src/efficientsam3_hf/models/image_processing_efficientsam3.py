"""Images to pixels and predictions to masks: the one transform of teacher and students."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.models.auto import AutoImageProcessor
from transformers.models.sam3.image_processing_sam3 import Sam3ImageProcessor
from transformers.utils import logging

from .auto_map import SelfContainedProcessorMixin
from .configuration_efficientsam3 import (
    EfficientSam3Config,
    EfficientSam3TrackerConfig,
    EfficientSam3VisionConfig,
)
from .configuration_efficientsam3_video import EfficientSam3TrackerVideoConfig
from .score_calibration import calibrate_scores

logger = logging.get_logger(__name__)

# Masks resized at a time: bounds memory where hundreds of instances meet a large photograph.
MASKS_AT_ONCE = 16


class EfficientSam3ImageProcessor(SelfContainedProcessorMixin, Sam3ImageProcessor):
    """SAM 3's transform: squash to a square, scale to [-1, 1].

    Grey images become RGB, transparent ones are laid over white, 16-bit ones (`uint16`, and PIL's
    modes "I" and "I;16") are scaled to 8 bits. Wider integers and floats count from 0 to 255, or
    floats from 0 to 1 with `do_rescale=False`. Values that are not finite, and integers out of
    range, are errors.

    Files are read likewise, upright. What is behind a URL loses its transparency, and so does the
    transparent level of grey of a 16-bit PNG.

    `score_temperature` and `score_bias` are those of the model's configuration.
    """

    score_temperature = 1.0
    score_bias = 0.0

    def preprocess(self, images, segmentation_maps=None, **kwargs):
        """As in transformers; a grey image may also be an array (height, width).

        Args:
            images: A path, URL, PIL image, array (height, width) or with channels first or last, or
                a tensor; a batch, or a list of them.
            segmentation_maps: One for each image, where there are any.
            kwargs: Options.
        """
        converts, rescales = (
            getattr(self, name) if kwargs.get(name) is None else kwargs[name]
            for name in ("do_convert_rgb", "do_rescale")
        )
        data_format = kwargs.pop("input_data_format", None)
        pictures = []
        for image in self.flatten(images):
            check_pixels(image)
            if rescales:
                warn_of_shares(image)
            image = to_eight_bits(image) if converts else image
            full_scale = 255 if rescales else 1
            pictures.append(
                to_rgb(image, data_format, full_scale)
                if converts
                else channels_first(image, data_format)
            )
        if not pictures:
            raise ValueError("images is empty. Leave it out, or give None, if there is nothing.")
        encoding = super().preprocess(
            pictures, segmentation_maps, input_data_format=ChannelDimension.FIRST, **kwargs
        )
        if "labels" in encoding and len(encoding["labels"]) != len(pictures):
            raise ValueError(
                f"{len(encoding['labels'])} segmentation maps do not fit {len(pictures)} images: "
                "give one for each."
            )
        return encoding

    def flatten(self, images) -> list[Any]:
        """Single images out of one, a batch, or nested lists of them."""
        if isinstance(images, list | tuple):
            return [image for item in images for image in self.flatten(item)]
        if isinstance(images, str | os.PathLike):
            if not os.path.isfile(images):
                return [self.fetch_images(os.fspath(images))]
            with Image.open(images) as opened:
                return [ImageOps.exif_transpose(opened)]
        if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
            return list(images)
        if isinstance(images, np.ndarray | Tensor) and images.ndim not in (2, 3):
            raise ValueError(
                f"An image is (height, width) or has channels besides, not {tuple(images.shape)}."
            )
        if not isinstance(images, Image.Image | np.ndarray | Tensor):
            raise TypeError(
                "An image is a path, a URL, a PIL image, an array or a tensor, not "
                f"{type(images).__name__}."
            )
        return [images]

    def post_process_instance_segmentation(
        self,
        outputs,
        threshold: float = 0.3,
        mask_threshold: float = 0.5,
        target_sizes: list[tuple[int, int]] | Tensor | None = None,
    ) -> list[dict[str, Tensor]]:
        """Instances of each prompt, with boolean masks.

        Logits are resized before the sigmoid, as Meta's code does; `Sam3ImageProcessor` resizes
        probabilities, which erodes thin parts.

        Args:
            outputs: What the concept model returned.
            threshold: Keep instances whose score, presence included, lies above.
            mask_threshold: Probability above which a pixel belongs to a mask.
            target_sizes: (height, width) for each prompt; None leaves masks as the model made them
                and boxes in [0, 1].
        """
        scores = outputs.pred_logits.sigmoid()
        if outputs.presence_logits is not None:
            scores = scores * outputs.presence_logits.sigmoid()
        scores = calibrate_scores(scores, self.score_temperature, self.score_bias)
        sizes = self.check_target_sizes(target_sizes, len(scores))
        results = []
        for index, size in enumerate(sizes):
            keep = scores[index] > threshold
            boxes = outputs.pred_boxes[index][keep]
            masks = outputs.pred_masks[index][keep]
            if size is not None:
                height, width = size
                boxes = boxes * boxes.new_tensor([width, height, width, height])
            results.append(
                {
                    "scores": scores[index][keep],
                    "boxes": boxes,
                    "masks": resize_masks(masks, size, mask_threshold),
                }
            )
        return results

    def post_process_for_mask_generation(
        self, all_masks, all_scores: Tensor, all_boxes: Tensor, crops_nms_thresh: float
    ):
        """As in transformers, where scores in half precision do not go with boxes in float32."""
        return super().post_process_for_mask_generation(
            all_masks, all_scores.float(), all_boxes, crops_nms_thresh
        )

    @staticmethod
    def check_target_sizes(
        target_sizes: list[tuple[int, int]] | Tensor | None, count: int
    ) -> Sequence[tuple[int, int] | None]:
        """One (height, width), or None, for each of `count` predictions."""
        if target_sizes is None:
            return [None] * count
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        if len(sizes) != count:
            raise ValueError(
                f"{len(sizes)} target sizes do not fit {count} predictions: give one (height, "
                "width) for each prompt. The processor returns them as original_sizes."
            )
        return sizes


def to_eight_bits(image):
    """Scale 16-bit values and booleans to what 8 bits hold; leave bytes and floats as they are.

    >>> to_eight_bits(np.array([[65535]], dtype=np.uint16))
    array([[255]], dtype=uint8)
    """
    if isinstance(image, Image.Image):
        if not image.mode.startswith(("I", "F")):
            return image
        has_sixteen_bits = image.mode.startswith("I")  # that is how PIL opens such a PNG
        image = np.array(image)  # PIL itself would clip to white
        if has_sixteen_bits:
            if image.min() < 0 or image.max() > 65535:
                raise ValueError(
                    f"An image of PIL's mode 'I' holds values from {image.min()} to {image.max()}; "
                    "they count from 0 to 65535."
                )
            image = image.astype(np.uint16)
    if not isinstance(image, np.ndarray | Tensor):
        return image
    pixels = torch.as_tensor(image)
    if pixels.dtype == torch.uint8 or pixels.is_floating_point():
        return image
    if pixels.dtype == torch.bool:
        pixels = pixels.byte() * 255
    elif pixels.dtype == torch.uint16:
        pixels = (pixels.int() // 257).byte()
    else:
        pixels = pixels.long()
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 255:
            raise ValueError(
                f"An image of {str(image.dtype).removeprefix('torch.')} holds values from {low} "
                f"to {high}. Integers count from 0 to 255, those of uint16 from 0 to 65535."
            )
        pixels = pixels.byte()
    return pixels.numpy() if isinstance(image, np.ndarray) else pixels


def to_rgb(image, input_data_format=None, full_scale: float = 255) -> Tensor:
    """An image of any kind as (3, height, width), transparent pixels laid over white.

    transformers 5.20 leaves grey and transparent arrays as they are, and drops PIL's transparency.

    Args:
        image: PIL image, array or tensor.
        input_data_format: Where channels are; None to see from the shape.
        full_scale: What stands for white in an image of floats; 255 in all others.
    """
    if isinstance(image, Image.Image):
        is_transparent = "A" in image.getbands() or "transparency" in image.info
        image = image.convert("RGBA" if is_transparent else "RGB")
    image = channels_first(image, input_data_format)
    if image.shape[0] == 4:
        is_float = image.is_floating_point()
        white = full_scale if is_float else 255
        alpha = image[3:] / white
        mixed = alpha * image[:3] + (1 - alpha) * white
        image = mixed if is_float else mixed.round().to(image.dtype)
    return image.expand(3, -1, -1)


def channels_first(image, input_data_format=None) -> Tensor:
    """An image of any kind as a tensor (channels, height, width)."""
    if isinstance(image, Image.Image):
        image, input_data_format = np.array(image), ChannelDimension.LAST
    image = torch.as_tensor(image)
    if image.ndim == 2:
        return image[None]
    if input_data_format is None:
        input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
    return image.movedim(-1, 0) if input_data_format == ChannelDimension.LAST else image


def check_pixels(image) -> None:
    """Raise if an image has no pixels, or some that are NaN or infinite."""
    if isinstance(image, Image.Image):
        shape, values = (image.height, image.width), np.array(image) if image.mode == "F" else None
    else:
        shape, values = tuple(image.shape), image
    if 0 in shape:
        raise ValueError(f"An image of shape {shape} is empty.")
    if isinstance(values, np.ndarray):
        finite = bool(np.isfinite(values).all())
    else:
        finite = values is None or bool(values.isfinite().all())
    if not finite:
        raise ValueError("An image holds NaN or infinite pixels; repair it or leave it out.")


def warn_of_shares(image) -> None:
    """Warn if a picture of floats looks as if they counted from 0 to 1."""
    is_float = (isinstance(image, np.ndarray) and image.dtype.kind == "f") or (
        isinstance(image, Tensor) and image.is_floating_point()
    )
    if is_float and 0 < image.max() <= 1:
        logger.warning_once(
            "The floats of an image lie between 0 and 1, but are read as 0 to 255: it is all but "
            "black. Multiply it by 255, or pass do_rescale=False."
        )


def resize_masks(logits: Tensor, size: tuple[int, int] | None, threshold: float) -> Tensor:
    """Mask logits (count, height, width) to booleans of the given (height, width)."""
    if size is None:
        return logits.sigmoid() > threshold
    masks = logits.new_zeros((len(logits), *size), dtype=torch.bool)
    for start in range(0, len(logits), MASKS_AT_ONCE):
        some = logits[None, start : start + MASKS_AT_ONCE].float()
        resized = F.interpolate(some, size, mode="bilinear", align_corners=False)[0]
        masks[start : start + MASKS_AT_ONCE] = resized.sigmoid() > threshold
    return masks


for _configuration in (
    EfficientSam3Config,
    EfficientSam3TrackerConfig,
    EfficientSam3TrackerVideoConfig,
    EfficientSam3VisionConfig,
):
    AutoImageProcessor.register(
        _configuration, fast_image_processor_class=EfficientSam3ImageProcessor, exist_ok=True
    )
