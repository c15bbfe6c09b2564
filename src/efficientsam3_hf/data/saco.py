"""SA-Co Gold and Silver: images with noun phrases, of which most name nothing there.

    gold_metaclip_merged_a_release_test.json    pictures below any folder, by `file_name`

The file has an entry in `images` for each pair of image and phrase; a sample has all phrases of one
image. Gold comes from three annotators: read the files of a, b and c; their pairs are the same.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .files import join, read_image, read_json, write_image, write_json
from .loading import Reader, Record
from .masks_rle import rle_area, to_rle
from .samples import ImageSample, Instance, Query

# What a file says of a pair beside image and phrase.
DETAILS = ("queried_category", "is_pixel_exhaustive")
# And of an instance beside where it is; a score has what a model has found.
INSTANCE_DETAILS = ("source", "score")


class SacoImages(Reader[ImageSample]):
    """Images of one file of SA-Co Gold or Silver.

    A query's `source_id` is the number of its pair, by which predictions are scored.

    Args:
        annotations: The JSON file.
        images: Folder that the file names start from.
        pixels: Whether to read the picture.
        least_size: As for `read_image`.
        upright: As for `read_image`; for annotations of photographs as the camera was held.
    """

    source = "saco"

    def __init__(
        self,
        annotations: str,
        images: str,
        pixels: bool = True,
        least_size: tuple[int, int] | None = None,
        upright: bool = False,
    ):
        self.annotations, self.images = str(annotations), str(images)
        self.pixels, self.least_size, self.upright = pixels, least_size, upright

    def __str__(self) -> str:
        return self.annotations

    def records(self) -> Iterator[tuple[str, Record]]:
        content = read_json(self.annotations)
        of_pair = defaultdict(list)
        for annotation in content["annotations"]:
            of_pair[annotation["image_id"]].append(annotation)
        of_picture = defaultdict(list)
        for pair in content["images"]:
            of_picture[pair["file_name"]].append({**pair, "annotations": of_pair[pair["id"]]})
        for file_name, pairs in of_picture.items():
            yield file_name, {"file_name": file_name, "pairs": pairs}

    def read(self, record: Record) -> ImageSample:
        pairs, file_name = record["pairs"], record["file_name"]
        sizes = {(int(pair["height"]), int(pair["width"])) for pair in pairs}
        if len(sizes) > 1:
            raise ValueError(f"{file_name} has different sizes in the file: {sorted(sizes)}.")
        size = sizes.pop()
        image = None
        if self.pixels:
            path = join(self.images, file_name)
            image = read_image(path, size, self.least_size, self.upright)
        return ImageSample(
            source=self.source,
            source_id=file_name,
            file_name=file_name,
            size=size,
            queries=[read_pair(pair, size) for pair in pairs],
            image=image,
        )


def read_pair(pair: dict[str, Any], size: tuple[int, int]) -> Query:
    """A phrase with its instances, whose boxes are shares of the image's sides."""
    height, width = size
    instances = []
    for annotation in pair["annotations"]:
        x, y, box_width, box_height = annotation["bbox"]
        box = (x * width, y * height, (x + box_width) * width, (y + box_height) * height)
        segmentation = annotation.get("segmentation")
        instances.append(
            Instance(
                box_xyxy=box,
                rle=to_rle(segmentation, size) if segmentation else None,
                is_crowd=bool(annotation.get("iscrowd", 0)),
                source_id=annotation["id"],
                details={name: annotation[name] for name in INSTANCE_DETAILS if name in annotation},
            )
        )
    return Query(
        pair["text_input"],
        instances,
        is_exhaustive=bool(pair.get("is_instance_exhaustive", 1)),
        source_id=pair["id"],
        details={name: pair[name] for name in DETAILS if name in pair},
    )


def write_saco(samples: Iterable[ImageSample], annotations: str | Path, images: str | Path) -> None:
    """Write samples in the form of SA-Co Gold.

    Args:
        samples: Their queries become pairs, numbered anew where numbers would repeat.
        annotations: The JSON file.
        images: Folder for the pictures.
    """
    pairs, written = [], []
    used: set[Any] = set()
    for sample in samples:
        height, width = sample.size
        for query in sample.queries:
            number = query.source_id
            if number is None or number in used:
                number = max([each for each in used if isinstance(each, int)], default=-1) + 1
            used.add(number)
            pairs.append(
                {
                    "id": number,
                    "file_name": sample.file_name,
                    "text_input": query.phrase,
                    "height": height,
                    "width": width,
                    "is_instance_exhaustive": int(query.is_exhaustive),
                    "is_pixel_exhaustive": int(query.is_exhaustive),
                    "queried_category": str(number),
                    **query.details,
                }
            )
            for instance in query.instances or []:
                x1, y1, x2, y2 = instance.box_xyxy
                box = [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height]
                pixels = 0 if instance.rle is None else rle_area(instance.rle)
                written.append(
                    {
                        "id": len(written) + 1,
                        "image_id": number,
                        "source": "manual",
                        "area": pixels / (height * width),
                        "bbox": box,
                        "segmentation": instance.rle,
                        "category_id": 1,
                        "iscrowd": int(instance.is_crowd),
                        **instance.details,
                    }
                )
        if sample.image is not None:
            write_image(Path(images, sample.file_name), sample.image)
    content = {
        "images": pairs,
        "annotations": written,
        "categories": [{"id": 1, "name": "object"}],
    }
    write_json(annotations, content)
