"""Images, points and boxes to the inputs of the image tracker."""

from typing import Any

from transformers.models.sam3_tracker.processing_sam3_tracker import Sam3TrackerProcessor

from .auto_map import SelfContainedProcessorMixin
from .prompts import (
    PADDING_LABEL,
    check_box,
    check_coordinates,
    check_labels,
    check_point,
    to_lists,
)

# Foreground, background, the two corners of a box, no point, padding.
POINT_LABELS = (1, 0, 2, 3, -1, PADDING_LABEL)
# Labels of points that lie nowhere.
PLACELESS = (-1, PADDING_LABEL)


class EfficientSam3TrackerProcessor(SelfContainedProcessorMixin, Sam3TrackerProcessor):
    """`Sam3TrackerProcessor` that checks prompts before the model sees them.

    A box that leaves its image is clipped to it; one outside, or without area, is an error, and so
    is a point outside.
    """

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
        points, labels, boxes = map(to_lists, (input_points, input_labels, input_boxes))
        check_prompts(points, labels, boxes)
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
        check_places(points, labels, boxes, to_lists(encoding["original_sizes"]))
        if boxes is not None:  # as corners, in pixels of the model's input
            encoding["input_boxes"] = encoding["input_boxes"].clamp(0, self.target_size)
        return encoding


def check_places(
    points: list | None, labels: list | None, boxes: list | None, sizes: list[tuple[int, int]]
) -> None:
    """Raise for points and boxes that lie outside their image.

    Args:
        points: Nested as image, object, point.
        labels: As points; None where all are points on the object.
        boxes: Nested as image, object.
        sizes: (height, width) of each image, or of the only one.
    """
    for index, of_image in enumerate(boxes or []):
        for box in of_image:
            check_box(box, sizes[index if len(sizes) > 1 else 0])
    for index, of_image in enumerate(points or []):
        found = leaves(of_image, depth=2)
        flat_labels = [1] * len(found)
        if labels is not None:
            flat_labels = [label for of_object in leaves(labels[index], 1) for label in of_object]
        for point, label in zip(found, flat_labels, strict=False):
            if label not in PLACELESS:
                check_point(point, sizes[index if len(sizes) > 1 else 0])


def check_prompts(points: list | None, labels: list | None, boxes: list | None) -> None:
    """Raise for coordinates and labels that make no sense in any image.

    Nesting of another depth is left to `Sam3TrackerProcessor`, which describes the right one.
    """
    for point in leaves(points, depth=3):
        check_coordinates("point", point)
    for box in leaves(boxes, depth=2):
        check_coordinates("box", box)
    for of_object in leaves(labels, depth=2):
        check_labels("point", of_object, len(of_object), POINT_LABELS)


def leaves(nested: Any, depth: int) -> list[list]:
    """The lists at a depth of nested lists; nothing where there are none."""
    if not isinstance(nested, list | tuple):
        return []
    if depth == 0:
        return [list(nested)]
    return [leaf for item in nested for leaf in leaves(item, depth - 1)]
