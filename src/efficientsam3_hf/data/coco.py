"""COCO, LVIS, and folders in COCO's form as Roboflow, ODinW and RF100-VL have them.

    coco/annotations/instances_val2017.json    coco/{images/,}val2017/000000000139.jpg
    lvis/annotations/lvis_v1_val.json          the pictures of COCO, by the end of `coco_url`
    roboflow/train/_annotations.coco.json      pictures beside it

A sample asks for each category that an image has. Categories known to be absent are negatives: in
COCO every other one, in LVIS those in `neg_category_ids`.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .files import exists, join, read_image, read_json, write_image, write_json
from .loading import Reader, Record
from .masks_rle import rle_area, runs_of, to_rle
from .samples import ImageSample, Instance, Query


class CocoImages(Reader[ImageSample]):
    """Images of one annotation file in COCO's form.

    Args:
        folder: With `annotations/instances_{split}.json`, or the one named below.
        split: E.g. "val2017".
        annotations: Path of the file, from the folder on.
        images: Folder of the pictures, from the folder on; by default `images/{split}` or `split`.
        negatives: Absent categories to ask for in each image, chosen by its number; "all" for
            those of the whole file, as evaluation needs.
        pixels: Whether to read the picture.
        least_size: As for `read_image`.
    """

    source = "coco"

    def __init__(
        self,
        folder: str,
        split: str = "val2017",
        annotations: str | None = None,
        images: str | None = None,
        negatives: int | str = 0,
        pixels: bool = True,
        least_size: tuple[int, int] | None = None,
    ):
        if negatives != "all" and not (isinstance(negatives, int) and negatives >= 0):
            raise ValueError(f'negatives is a number or "all", not {negatives!r}.')
        self.folder, self.split = str(folder), split
        self.annotations = join(self.folder, annotations or self.annotations_of(split))
        self.images = join(self.folder, images) if images else self.find_images()
        self.negatives, self.pixels, self.least_size = negatives, pixels, least_size
        self.categories: dict[int, str] = {}
        self.details: dict[int, dict[str, Any]] = {}

    def __str__(self) -> str:
        return self.annotations

    def annotations_of(self, split: str) -> str:
        """Where the annotations of a split are."""
        return f"annotations/instances_{split}.json"

    def find_images(self) -> str:
        """Where the pictures of the split are."""
        inner = join(self.folder, "images", self.split)
        return inner if exists(inner) else join(self.folder, self.split)

    def records(self) -> Iterator[tuple[str, Record]]:
        content = read_json(self.annotations)
        self.categories = self.asked_categories(content)
        self.details = {
            each["id"]: {name: each[name] for name in ("supercategory",) if name in each}
            for each in content["categories"]
        }
        of_image = defaultdict(list)
        for annotation in content.get("annotations", []):
            of_image[annotation["image_id"]].append(annotation)
        for image in content["images"]:
            record = {"image": image, "annotations": of_image[image["id"]]}
            yield str(image["id"]), record

    def asked_categories(self, content: dict[str, Any]) -> dict[int, str]:
        """Phrase of each category, by number."""
        return {each["id"]: phrase_of(each["name"]) for each in content["categories"]}

    def read(self, record: Record) -> ImageSample:
        image = record["image"]
        size = (int(image["height"]), int(image["width"]))
        of_category: dict[int, list[Instance]] = defaultdict(list)
        for annotation in record["annotations"]:
            of_category[annotation["category_id"]].append(read_instance(annotation, size))
        incomplete = set(self.incomplete_categories(image))
        queries = [
            Query(
                self.categories[category],
                of_category.get(category, []),
                is_exhaustive=category not in incomplete,
                source_id=category,
                details=dict(self.details[category]),
            )
            for category in [*sorted(of_category), *self.absent_categories(image, of_category)]
        ]
        path = self.picture_of(image)
        return ImageSample(
            source=self.source,
            source_id=image["id"],
            file_name=image["file_name"] if "file_name" in image else Path(path).name,
            size=size,
            queries=queries,
            image=read_image(path, size, self.least_size) if self.pixels else None,
        )

    def picture_of(self, image: dict[str, Any]) -> str:
        """Path of the picture of an image."""
        return join(self.images, image["file_name"])

    def incomplete_categories(self, image: dict[str, Any]) -> list[int]:
        """Categories of which the image may have more than was annotated."""
        return []

    def absent_categories(self, image: dict[str, Any], present: Iterable[int]) -> list[int]:
        """Categories to ask for although the image has none of them."""
        absent = sorted(set(self.known_absent(image)) - set(present))
        if self.negatives == "all" or not absent:
            return absent
        digest = hashlib.blake2b(str(image["id"]).encode(), digest_size=8).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "big"))
        count = min(int(self.negatives), len(absent))
        return sorted(int(each) for each in generator.choice(absent, count, replace=False))

    def known_absent(self, image: dict[str, Any]) -> Iterable[int]:
        """Categories of which the image has none, unless it is annotated with them."""
        return self.categories


class LvisImages(CocoImages):
    """Images of LVIS: categories known to be absent are negatives, and none else.

    Args:
        folder: With `annotations/lvis_v1_{split}.json` and COCO's pictures.
        split: "train" or "val". The pictures of both are in `train2017` and `val2017`.
        options: As for `CocoImages`.
    """

    source = "lvis"

    def __init__(self, folder: str, split: str = "val", **options: Any):
        super().__init__(folder, split, **{"negatives": "all", **options})

    def annotations_of(self, split: str) -> str:
        return f"annotations/lvis_v1_{split}.json"

    def find_images(self) -> str:
        inner = join(self.folder, "images")
        return inner if exists(inner) else self.folder

    def picture_of(self, image: dict[str, Any]) -> str:
        if "coco_url" not in image:
            return join(self.images, image["file_name"])
        return join(self.images, *image["coco_url"].rsplit("/", 2)[-2:])

    def incomplete_categories(self, image: dict[str, Any]) -> list[int]:
        return image.get("not_exhaustive_category_ids", [])

    def known_absent(self, image: dict[str, Any]) -> Iterable[int]:
        return image.get("neg_category_ids", [])


class RoboflowImages(CocoImages):
    """Images of a folder with `{split}/_annotations.coco.json`, as Roboflow exports them.

    A category that is no more than the heading (`supercategory`) of others is not asked for.
    """

    source = "roboflow"

    def __init__(self, folder: str, split: str = "train", **options: Any):
        super().__init__(folder, split, **options)

    def annotations_of(self, split: str) -> str:
        return f"{split}/_annotations.coco.json"

    def find_images(self) -> str:
        return join(self.folder, self.split)

    def asked_categories(self, content: dict[str, Any]) -> dict[int, str]:
        asked = super().asked_categories(content)
        used = {annotation["category_id"] for annotation in content.get("annotations", [])}
        for heading in content["categories"]:
            others = [each for each in content["categories"] if each is not heading]
            is_above = any(each.get("supercategory") == heading["name"] for each in others)
            if is_above and heading["id"] not in used:
                asked.pop(heading["id"])
        return asked


def phrase_of(name: str) -> str:
    """A category's name as a phrase.

    >>> phrase_of("bow_(weapon)")
    'bow (weapon)'
    """
    return name.replace("_", " ").strip()


def read_instance(annotation: dict[str, Any], size: tuple[int, int]) -> Instance:
    """An annotation of COCO's form; an empty segmentation means that there is only a box."""
    x, y, width, height = (float(number) for number in annotation["bbox"])
    segmentation = annotation.get("segmentation")
    return Instance(
        box_xyxy=(x, y, x + width, y + height),
        rle=to_rle(segmentation, size) if segmentation else None,
        is_crowd=bool(annotation.get("iscrowd", 0)),
        source_id=annotation["id"],
    )


def write_coco(
    samples: Iterable[ImageSample], folder: str | Path, split: str = "val2017", form: str = "coco"
) -> None:
    """Write samples, whose queries are categories, in a form that the readers above read.

    Masks are written as compressed run lengths, those of crowds uncompressed as COCO does.

    Args:
        samples: Queries have the number of their category as `source_id`. Instances are numbered
            anew where their numbers would repeat.
        folder: To write to.
        split: Its name.
        form: "coco", "lvis" or "roboflow".
    """
    readers = {"coco": CocoImages, "lvis": LvisImages, "roboflow": RoboflowImages}
    if form not in readers:
        raise ValueError(f"form is one of {list(readers)}, not {form!r}.")
    # Where files go is for the reader to say.
    reader = readers[form](str(folder), split, images=f"images/{split}" if form == "coco" else None)
    images, annotations, categories = [], [], {}
    used: set[int] = set()
    for sample in samples:
        image = {
            "id": sample.source_id,
            "file_name": sample.file_name,
            "height": sample.size[0],
            "width": sample.size[1],
        }
        if form == "lvis":
            image["coco_url"] = f"http://images.cocodataset.org/val2017/{sample.file_name}"
            image["neg_category_ids"] = [q.source_id for q in sample.queries if q.is_negative]
            image["not_exhaustive_category_ids"] = [
                query.source_id for query in sample.queries if not query.is_exhaustive
            ]
        images.append(image)
        for query in sample.queries:
            categories[query.source_id] = query.phrase
            for instance in query.instances or []:
                number = instance.source_id
                if not isinstance(number, int) or number in used:
                    number = max(used, default=0) + 1
                used.add(number)
                annotation = write_instance(instance)
                annotation |= {"id": number, "image_id": sample.source_id}
                annotations.append(annotation | {"category_id": query.source_id})
        if sample.image is not None:
            write_image(reader.picture_of(image), sample.image)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": key, "name": categories[key]} for key in sorted(categories)],
    }
    write_json(reader.annotations, content)


def write_instance(instance: Instance) -> dict[str, Any]:
    """An annotation of COCO's form, less the numbers of image and category."""
    x1, y1, x2, y2 = instance.box_xyxy
    annotation: dict[str, Any] = {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "iscrowd": int(instance.is_crowd),
        "area": (x2 - x1) * (y2 - y1),
        "segmentation": [],
    }
    if instance.rle is not None:
        annotation["area"] = rle_area(instance.rle)
        annotation["segmentation"] = dict(instance.rle)
        if instance.is_crowd:
            counts = runs_of(instance.rle["counts"]).tolist()
            annotation["segmentation"]["counts"] = counts
    return annotation
