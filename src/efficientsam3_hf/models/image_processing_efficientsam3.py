"""Images to pixels and predictions to masks: the one transform of teacher and students."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
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

logger = logging.get_logger(__name__)

# Masks resized at a time: bounds memory where hundreds of instances meet a large photograph.
MASKS_AT_ONCE = 16


class EfficientSam3ImageProcessor(SelfContainedProcessorMixin, Sam3ImageProcessor):
    """SAM 3's transform: squash to a square, scale to [-1, 1].

    Grey images become RGB, transparent ones are laid over white, 16-bit ones (`uint16`, and PIL's
    modes "I" and "I;16") are scaled to 8 bits. Wider integers and floats count from 0 to 255.
    Values that are not finite, and integers out of range, are errors.
    """

    def preprocess(self, images, segmentation_maps=None, **kwargs):
        """As in transformers; a grey image may also be an array (height, width)."""
        many = isinstance(images, list | tuple)
        images = [add_channel(image) for image in (images if many else [images])]
        do_rescale = kwargs.get("do_rescale")
        for image in images:
            check_finite(image)
            if self.do_rescale if do_rescale is None else do_rescale:
                warn_of_shares(image)
        return super().preprocess(images if many else images[0], segmentation_maps, **kwargs)

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
    """Scale 16-bit values and booleans to what 8 bits hold; leave bytes and floats as they are.

    >>> to_eight_bits(np.array([[65535]], dtype=np.uint16))
    array([[255]], dtype=uint8)
    """
    if isinstance(image, Image.Image):
        if not image.mode.startswith(("I", "F")):
            return image
        has_sixteen_bits = image.mode.startswith("I")  # that is how PIL opens such a PNG
        image = np.array(image)  # PIL itself would clip to white
        image = image.clip(0, 65535).astype(np.uint16) if has_sixteen_bits else image
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
    """Raise if an image holds NaN or infinity."""
    if isinstance(image, Image.Image) and image.mode == "F":
        image = np.array(image)
    if isinstance(image, np.ndarray):
        finite = bool(np.isfinite(image).all())
    else:
        finite = not isinstance(image, Tensor) or bool(image.isfinite().all())
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
