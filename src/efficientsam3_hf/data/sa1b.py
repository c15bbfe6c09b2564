"""SA-1B: tars `sa_000000.tar`, ... of `sa_N.jpg` and `sa_N.json`, as they are or extracted.

Masks have no names: each image has one query without phrase. JSON of the enhanced form has captions
too; asked for them, a sample has a query for each.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .files import image_size, list_below, read_image, write_image, write_json
from .loading import Reader, Record
from .masks_rle import rle_area, to_rle
from .samples import ImageSample, Instance, Query
from .tar_shards import index_of_tar, pack_tars, read_part, read_tar

CAPTIONS = ("label_2", "label_5", "label_10")

# What a file says of a mask beside where it is.
DETAILS = ("predicted_iou", "stability_score", "crop_box", *CAPTIONS)


class Sa1b(Reader[ImageSample]):
    """Images of SA-1B.

    Args:
        folder: Of tars, or of extracted files in whatever folders, where `sa_N.jpg` and `sa_N.json`
            belong together. May be an address.
        tars: Which of the tars, as a pattern, e.g. "sa_00002?.tar" for a hundredth of them.
        annotations: False leaves the masks unread, for training on images alone.
        captions: "label_2", "label_5" or "label_10" of the enhanced form, to ask for each caption.
        pixels: Whether to read the picture.
        least_size: As for `read_image`.
    """

    source = "sa1b"

    def __init__(
        self,
        folder: str,
        tars: str = "*.tar",
        annotations: bool = True,
        captions: str | None = None,
        pixels: bool = True,
        least_size: tuple[int, int] | None = None,
    ):
        if captions not in (None, *CAPTIONS):
            raise ValueError(f"captions is None or one of {list(CAPTIONS)}, not {captions!r}.")
        self.folder, self.tars, self.annotations = str(folder), tars, annotations
        self.captions, self.pixels, self.least_size = captions, pixels, least_size

    def __str__(self) -> str:
        return self.folder

    def shards(self) -> list[str]:
        return list_below(self.folder, self.tars)

    def records(self) -> Iterator[tuple[str, Record]]:
        shards = self.shards()
        for shard in shards:
            yield from index_of_tar(shard, part_of)
        if shards:
            return
        pictures = {Path(path).stem: path for path in list_below(self.folder, "*.jpg")}
        texts = {Path(path).stem: path for path in list_below(self.folder, "*.json")}
        # Those without masks, or without a picture, are not left out in silence.
        for name in sorted(pictures.keys() | texts.keys(), key=number_in):
            yield name, {"name": name, "jpg": pictures.get(name), "json": texts.get(name)}

    def records_of_shard(self, shard: str) -> Iterator[tuple[str, Record]]:
        return read_tar(shard, part_of, ("jpg", "json"))

    def read(self, record: Record) -> ImageSample:
        picture = read_part(record, "jpg") if self.pixels or not self.annotations else None
        sample = ImageSample(self.source, record["name"], f"{record['name']}.jpg", (0, 0))
        if self.annotations:
            content = json.loads(read_part(record, "json"))
            sample.size = (int(content["image"]["height"]), int(content["image"]["width"]))
            sample.queries = self.queries(content["annotations"], sample.size)
        elif picture is not None:
            sample.size = image_size(picture)
        if self.pixels and picture is not None:
            sample.image = read_image(picture, sample.size, self.least_size)
        return sample

    def queries(self, annotations: list[dict[str, Any]], size: tuple[int, int]) -> list[Query]:
        """One for all masks, or one for each caption."""
        if self.captions is None:
            instances = [read_instance(annotation, size) for annotation in annotations]
            return [Query(None, instances, is_exhaustive=False)]
        of_caption = defaultdict(list)
        for annotation in annotations:
            if annotation.get(self.captions):
                of_caption[annotation[self.captions]].append(read_instance(annotation, size))
        return [Query(caption, each, is_exhaustive=False) for caption, each in of_caption.items()]


def read_instance(annotation: dict[str, Any], size: tuple[int, int]) -> Instance:
    """A mask of SA-1B."""
    x, y, width, height = (float(number) for number in annotation["bbox"])
    points = annotation.get("point_coords", []) + annotation.get("mask_sample_points_xy", [])
    return Instance(
        box_xyxy=(x, y, x + width, y + height),
        rle=to_rle(annotation["segmentation"], size),
        points=[(float(x), float(y)) for x, y in points],
        source_id=annotation["id"],
        details={name: annotation[name] for name in DETAILS if name in annotation},
    )


def part_of(file_name: str) -> tuple[str, str] | None:
    """Image and kind of a file."""
    name, _, kind = file_name.rpartition(".")
    return (name, kind) if kind in ("jpg", "json") else None


def number_in(name: str) -> tuple[int, str]:
    """A key that sorts `sa_9` before `sa_10`."""
    digits = re.findall(r"\d+", name)
    return (int(digits[-1]) if digits else -1, name)


def write_sa1b(samples: Iterable[ImageSample], folder: str | Path, per_tar: int | None = None):
    """Write samples as SA-1B has them; all instances of all queries become masks without names.

    Args:
        samples: Named by numbers, or by `sa_N`.
        folder: To write to.
        per_tar: Images in each of the tars; None writes single files.
    """
    folder, written = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        name = sample.source_id if isinstance(sample.source_id, str) else f"sa_{sample.source_id}"
        paths = [folder / f"{name}.json"]
        write_json(paths[0], annotations_of(sample, name))
        if sample.image is not None:
            paths.insert(0, folder / f"{name}.jpg")
            write_image(paths[0], sample.image)
        written.append(paths)
    if per_tar is not None:
        pack_tars(written, str(folder / "sa_{:06d}.tar"), per_tar)


def annotations_of(sample: ImageSample, name: str) -> dict[str, Any]:
    """What SA-1B's JSON says of an image."""
    height, width = sample.size
    annotations = []
    for query in sample.queries:
        for instance in query.instances or []:
            x1, y1, x2, y2 = instance.box_xyxy
            annotation = {
                "id": instance.source_id,
                "segmentation": instance.rle,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": 0 if instance.rle is None else rle_area(instance.rle),
                "predicted_iou": 1.0,
                "stability_score": 1.0,
                "crop_box": [0, 0, width, height],
                "point_coords": [list(point) for point in instance.points[:1]],
            }
            if len(instance.points) > 1:
                annotation["mask_sample_points_xy"] = [list(each) for each in instance.points[1:]]
            annotations.append(annotation | instance.details)
    number = number_in(name)[0]
    image = {"image_id": number, "width": width, "height": height, "file_name": f"{name}.jpg"}
    return {"image": image, "annotations": annotations}
