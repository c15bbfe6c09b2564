"""Images, points and boxes to the inputs of the image tracker."""

from typing import Any

from transformers.models.sam3_tracker.processing_sam3_tracker import Sam3TrackerProcessor

from .prompts import check_box, check_finite, check_labels

# Foreground, background, the two corners of a box, no point, padding.
POINT_LABELS = (1, 0, 2, 3, -1, -10)


class EfficientSam3TrackerProcessor(Sam3TrackerProcessor):
    """`Sam3TrackerProcessor` that checks prompts before the model sees them."""

    def __call__(
        self,
        images=None,
        segmentation_maps=None,
        input_points=None,
        input_labels=None,
        input_boxes=None,
        original_sizes=None,
        return_tensors: str | None = "pt",
        **kwargs,
    ):
        """As `Sam3TrackerProcessor`, in pixels of the original images.

        Args:
            images: One image or several, of any sizes and kinds.
            segmentation_maps: Ground truth, resized to the size of the predicted masks.
            input_points: Points (x, y), nested as image, object, point.
            input_labels: 1 on the object, 0 beside it; nested as image, object, point.
            input_boxes: Boxes (x1, y1, x2, y2), nested as image, object.
            original_sizes: (height, width) of images whose embeddings are at hand.
            return_tensors: As in transformers.
            kwargs: Options of the image processor.
        """
        encoding = super().__call__(
            images=images,
            segmentation_maps=segmentation_maps,
            input_points=input_points,
            input_labels=input_labels,
            input_boxes=input_boxes,
            original_sizes=original_sizes,
            return_tensors=return_tensors,
            **kwargs,
        )
        sizes = encoding["original_sizes"]
        sizes = sizes.tolist() if hasattr(sizes, "tolist") else list(sizes)
        check_object_points(to_lists(input_points), to_lists(input_labels))
        for index, boxes in enumerate(to_lists(input_boxes) or []):
            for box in boxes:
                check_box(box, sizes[index if len(sizes) > 1 else 0])
        return encoding


def check_object_points(points: list | None, labels: list | None) -> None:
    """Raise unless every point is finite and every label known."""
    for of_image in points or []:
        for of_object in of_image:
            for point in of_object:
                check_finite("point", point)
    for of_image in labels or []:
        for of_object in of_image:
            check_labels("point", of_object, len(of_object), POINT_LABELS)


def to_lists(data: Any) -> list | None:
    """Nested lists out of tensors, arrays and lists."""
    return data.tolist() if hasattr(data, "tolist") else data
