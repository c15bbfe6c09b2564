"""Images to pixels and predictions to masks: the one transform of teacher and students."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.models.auto import AutoImageProcessor
from transformers.models.sam3.image_processing_sam3 import Sam3ImageProcessor

from .configuration_efficientsam3 import (
    EfficientSam3Config,
    EfficientSam3TrackerConfig,
    EfficientSam3VisionConfig,
)

# Masks resized at a time: bounds memory where hundreds of instances meet a large photograph.
MASKS_AT_ONCE = 16


class EfficientSam3ImageProcessor(Sam3ImageProcessor):
    """SAM 3's transform: squash to a square, scale to [-1, 1].

    Grey images become RGB, transparent ones are laid over white, 16-bit ones are scaled to 8 bits,
    and values that are not finite are an error. Floats count from 0 to 255.
    """

    def preprocess(self, images, segmentation_maps=None, **kwargs):
        """As in transformers; a grey image may also be an array (height, width)."""
        if isinstance(images, list | tuple):
            images = [add_channel(image) for image in images]
        else:
            images = add_channel(images)
        return super().preprocess(images, segmentation_maps, **kwargs)

    def process_image(
        self,
        image,
        do_convert_rgb: bool | None = None,
        input_data_format=None,
        device=None,
        **kwargs,
    ) -> Tensor:
        """One image of any kind to channels first."""
        if do_convert_rgb:  # not for segmentation maps, whose values are labels
            check_finite(image)
            image = to_rgb(to_eight_bits(image), input_data_format)
            input_data_format = ChannelDimension.FIRST
        image = super().process_image(image, False, input_data_format, device, **kwargs)
        if min(image.shape[-2:]) == 0:
            raise ValueError(f"An image of {image.shape[-2]} x {image.shape[-1]} pixels is empty.")
        return image

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


def add_channel(image):
    """An array (height, width) as (1, height, width); anything else as it is."""
    is_grey = isinstance(image, np.ndarray | Tensor) and image.ndim == 2
    return image[None] if is_grey else image


def to_eight_bits(image):
    """Scale 16-bit values and booleans to what 8 bits hold; leave anything else as it is.

    >>> to_eight_bits(np.array([[65535]], dtype=np.uint16))
    array([[255]], dtype=uint8)
    """
    if isinstance(image, Image.Image) and image.mode.startswith(("I", "F")):
        image = np.array(image)  # 16 or 32 bits a pixel: PIL would clip them to white
    if isinstance(image, Tensor):
        kind = "f" if image.is_floating_point() else "b" if image.dtype == torch.bool else "i"
        to_bytes = torch.Tensor.byte
    elif isinstance(image, np.ndarray):
        kind = image.dtype.kind
        to_bytes = partial(np.asarray, dtype=np.uint8)
    else:
        return image
    if kind == "b":
        return to_bytes(image) * 255
    if kind in "iu" and image.itemsize > 1:
        return to_bytes(image // 257 if image.max() > 255 else image)
    return image


def to_rgb(image, input_data_format=None) -> Tensor:
    """An image of any kind as (3, height, width), transparent pixels laid over white.

    transformers 5.20 leaves grey and transparent arrays as they are, and drops PIL's transparency.
    """
    if isinstance(image, Image.Image):
        is_transparent = "A" in image.getbands() or "transparency" in image.info
        image = np.array(image.convert("RGBA" if is_transparent else "RGB"))
        input_data_format = ChannelDimension.LAST
    image = torch.as_tensor(image)
    if image.ndim == 2:
        image, input_data_format = image[None], ChannelDimension.FIRST
    if input_data_format is None:
        input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
    if input_data_format == ChannelDimension.LAST:
        image = image.movedim(-1, 0)
    if image.shape[0] == 4:
        alpha = image[3:] / 255
        image = (alpha * image[:3] + (1 - alpha) * 255).round().to(image.dtype)
    return image.expand(3, -1, -1)


def check_finite(image) -> None:
    """Raise if an array or tensor holds NaN or infinity."""
    if isinstance(image, np.ndarray):
        finite = bool(np.isfinite(image).all())
    else:
        finite = not isinstance(image, Tensor) or bool(image.isfinite().all())
    if not finite:
        raise ValueError("An image holds NaN or infinite pixels; repair it or leave it out.")


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


for _configuration in (EfficientSam3Config, EfficientSam3TrackerConfig, EfficientSam3VisionConfig):
    AutoImageProcessor.register(
        _configuration, fast_image_processor_class=EfficientSam3ImageProcessor, exist_ok=True
    )
