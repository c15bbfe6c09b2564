"""SA-1B: tars `sa_000000.tar`, ... of `sa_N.jpg` and `sa_N.json`, as they are or extracted.

Masks have no names: each image has one query without phrase. JSON of the enhanced form has captions
too; asked for them, a sample has a query for each.
"""

import io
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .files import is_remote, list_below, open_file, read_bytes, read_image, write_json
from .loading import Reader, Record
from .masks_rle import rle_area, to_rle
from .samples import ImageSample, Instance, Query

CAPTIONS = ("label_2", "label_5", "label_10")

# What a file says of a mask beside where it is.
DETAILS = ("predicted_iou", "stability_score", "crop_box", *CAPTIONS)

# Pictures of a tar that may wait for their annotations, and the other way round.
MOST_WAITING = 512


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
            yield from index_of_tar(shard)
        if shards:
            return
        pictures = {Path(path).stem: path for path in list_below(self.folder, "*.jpg")}
        texts = {Path(path).stem: path for path in list_below(self.folder, "*.json")}
        # Those without masks, or without a picture, are not left out in silence.
        for name in sorted(pictures.keys() | texts.keys(), key=number_in):
            yield name, {"name": name, "jpg": pictures.get(name), "json": texts.get(name)}

    def records_of_shard(self, shard: str) -> Iterator[tuple[str, Record]]:
        return contents_of_tar(shard) if is_remote(shard) else index_of_tar(shard)

    def read(self, record: Record) -> ImageSample:
        if "damage" in record:
            raise ValueError(record["damage"])
        picture = part_of(record, "jpg") if self.pixels or not self.annotations else None
        sample = ImageSample(self.source, record["name"], f"{record['name']}.jpg", (0, 0))
        if self.annotations:
            content = json.loads(part_of(record, "json"))
            sample.size = (int(content["image"]["height"]), int(content["image"]["width"]))
            sample.queries = self.queries(content["annotations"], sample.size)
        elif picture is not None:
            with Image.open(io.BytesIO(picture)) as opened:
                sample.size = (opened.height, opened.width)
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


def part_of(record: Record, kind: str) -> bytes:
    """Bytes of the picture or the annotations of a record."""
    part = record.get(kind)
    if part is None:
        raise FileNotFoundError(f"There is no {record['name']}.{kind}.")
    if isinstance(part, bytes):
        return part
    if isinstance(part, str):
        return read_bytes(part)
    offset, size = part
    return read_bytes(record["tar"], offset, size)


def index_of_tar(path: str) -> Iterator[tuple[str, Record]]:
    """Where in a tar the parts of each record are."""
    found: dict[str, Record] = {}
    damage = None
    with open_file(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    name, _, kind = Path(member.name).name.rpartition(".")
                    if member.isfile() and kind in ("jpg", "json"):
                        record = found.setdefault(name, {"name": name, "tar": path})
                        record[kind] = [member.offset_data, member.size]
        except tarfile.TarError as error:
            damage = f"The tar {path} is damaged: {error}"
    yield from found.items()
    if damage is not None:
        yield path, {"damage": damage}


def contents_of_tar(path: str) -> Iterator[tuple[str, Record]]:
    """The parts of each record of a tar, which is read once from beginning to end."""
    waiting: dict[str, Record] = {}
    with open_file(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    name, _, kind = Path(member.name).name.rpartition(".")
                    if not member.isfile() or kind not in ("jpg", "json"):
                        continue
                    record = waiting.setdefault(name, {"name": name, "jpg": None, "json": None})
                    opened = tar.extractfile(member)
                    record[kind] = b"" if opened is None else opened.read()
                    if record["jpg"] is not None and record["json"] is not None:
                        yield name, waiting.pop(name)
                    elif len(waiting) > MOST_WAITING:
                        raise tarfile.ReadError(
                            f"more than {MOST_WAITING} pictures and annotations are far apart; "
                            "fetch it, to read it from disk"
                        )
        except tarfile.TarError as error:
            yield path, {"damage": f"The tar {path} is damaged: {error}"}
    yield from waiting.items()  # of which a part is missing


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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tar = None
    for count, sample in enumerate(samples):
        name = sample.source_id if isinstance(sample.source_id, str) else f"sa_{sample.source_id}"
        content = annotations_of(sample, name)
        picture = io.BytesIO()
        if sample.image is not None:
            Image.fromarray(np.ascontiguousarray(sample.image)).save(picture, "JPEG", quality=95)
        if per_tar is None:
            (folder / f"{name}.jpg").write_bytes(picture.getvalue())
            write_json(folder / f"{name}.json", content)
            continue
        if count % per_tar == 0:
            if tar is not None:
                tar.close()
            tar = tarfile.open(folder / f"sa_{count // per_tar:06d}.tar", "w")  # noqa: SIM115
        text = json.dumps(content).encode()
        for kind, data in (("jpg", picture.getvalue()), ("json", text)):
            member = tarfile.TarInfo(f"./{name}.{kind}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if tar is not None:
        tar.close()


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
