"""Images, points and boxes to the inputs of the image tracker."""

from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.models.sam3_tracker.processing_sam3_tracker import Sam3TrackerProcessor

from .auto_map import SelfContainedProcessorMixin
from .prompts import (
    PADDING_LABEL,
    check_box,
    check_coordinates,
    check_labels,
    check_options,
    check_point,
    check_sizes,
    is_list,
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
            original_sizes: (height, width) of images whose embeddings are at hand; a single one is
                that of all.
            return_tensors: As in transformers.
            kwargs: Options of the image processor.
        """
        check_options(kwargs, self.image_processor, has_images=images is not None)
        points, labels, boxes = map(to_lists, (input_points, input_labels, input_boxes))
        check_prompts(points, labels, boxes)
        encoding = BatchFeature()
        if images is not None:
            encoding.update(
                self.image_processor(
                    images,
                    segmentation_maps=segmentation_maps,
                    return_tensors=return_tensors,
                    **kwargs,
                )
            )
            original_sizes = encoding["original_sizes"]
        elif segmentation_maps is not None:
            raise ValueError("segmentation_maps go with images, and there are none.")
        elif original_sizes is None:
            raise ValueError("Either images or original_sizes must be provided")
        sizes = check_sizes(original_sizes)
        if images is None and len(sizes) == 1:
            sizes = sizes * len(points or boxes or sizes)
        check_counts(len(sizes), input_points=points, input_labels=labels, input_boxes=boxes)
        check_places(points, labels, boxes, sizes)
        encoding.update(
            super().__call__(
                original_sizes=sizes,
                input_points=points,
                input_labels=labels,
                input_boxes=boxes,
                return_tensors=return_tensors,
            )
        )
        if boxes is not None:  # as corners, in pixels of the model's input
            encoding["input_boxes"] = encoding["input_boxes"].clamp(0, self.target_size)
        return encoding


def check_counts(num_images: int, **prompts: list | None) -> None:
    """Raise for prompts of another number of images."""
    for name, of_images in prompts.items():
        if of_images is not None and len(of_images) != num_images:
            raise ValueError(
                f"{name} for {len(of_images)} images do not fit {num_images} images: give a list "
                "for each."
            )


def check_places(
    points: list | None, labels: list | None, boxes: list | None, sizes: list[list[int]]
) -> None:
    """Raise for points and boxes that lie outside their image.

    Args:
        points: Nested as image, object, point.
        labels: As points; None where all are points on the object.
        boxes: Nested as image, object.
        sizes: (height, width) of each image.
    """
    for index, of_image in enumerate(boxes or []):
        for box in of_image:
            check_box(box, sizes[index])
    for index, of_image in enumerate(points or []):
        found = leaves(of_image, depth=2)
        flat_labels = [1] * len(found) if labels is None else items(labels[index], depth=2)
        for point, label in zip(found, flat_labels, strict=True):
            if label not in PLACELESS:
                check_point(point, sizes[index])


def check_prompts(points: list | None, labels: list | None, boxes: list | None) -> None:
    """Raise for coordinates and labels that make no sense in any image."""
    if points is None and labels is not None:
        raise ValueError("input_labels label nothing: there are no input_points.")
    check_nesting("input_points", points, ("image", "object", "point"))
    check_nesting("input_labels", labels, ("image", "object", "label"))
    check_nesting("input_boxes", boxes, ("image", "object"))
    for point in leaves(points, depth=3):
        check_coordinates("point", point)
    for box in leaves(boxes, depth=2):
        check_coordinates("box", box)
    if labels is not None:
        counts, labelled = [[len(one) for one in nested] for nested in (points, labels)]
        if counts != labelled:
            raise ValueError(
                f"input_labels for {labelled} objects an image do not fit input_points for "
                f"{counts}."
            )
        of_objects = zip(leaves(points, depth=2), leaves(labels, depth=2), strict=True)
        for of_object, object_labels in of_objects:
            check_labels("point", object_labels, len(of_object), POINT_LABELS)


def check_nesting(name: str, nested: Any, levels: tuple[str, ...]) -> None:
    """Raise unless these are lists of lists, as deep as there are levels and none of them empty."""
    if nested is None:
        return
    for depth in range(len(levels)):
        wrong = [item for item in items(nested, depth) if not (is_list(item) and item)]
        if wrong:
            whose = "all images" if depth == 0 else f"one {levels[depth - 1]}"
            raise ValueError(
                f"{name} are nested lists: one for each {', in it one for each '.join(levels)}. "
                f"There is {wrong[0]!r} in place of the list of {whose}."
            )


def leaves(nested: Any, depth: int) -> list[list]:
    """The lists at a depth of nested lists; nothing where there are none."""
    return [] if nested is None else items(nested, depth)


def items(nested: list, depth: int) -> list:
    """What lies at a depth of nested lists."""
    return [nested] if depth == 0 else [x for item in nested for x in items(item, depth - 1)]
