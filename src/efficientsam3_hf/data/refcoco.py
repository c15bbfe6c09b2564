"""RefCOCO, RefCOCO+ and RefCOCOg in parquet shards: one object, and expressions that name it.

    data/val-00000-of-00004.parquet

A row has the picture itself (`image`), expressions (`answer`), one flat polygon (`segmentation`)
and a box (`bbox` as x, y, width, height). An expression names one object and no other, so each is a
query with one instance; it says nothing of what else is there.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .files import image_size, read_image
from .loading import Reader, Record
from .masks_rle import to_rle
from .parquet_shards import count_rows, find_shards, iterate_rows, read_group, write_shards
from .samples import ImageSample, Instance, Query

COLUMNS = ("question_id", "image", "answer", "segmentation", "bbox", "iscrowd", "file_name")


class RefCoco(Reader[ImageSample]):
    """Objects of RefCOCO with the expressions that name them.

    Args:
        folder: Of the shards, or one of them. May be an address.
        split: "val", "test", "testA" or "testB"; what the names of the shards begin with.
        pixels: Whether to decode the picture.
        least_size: As for `read_image`.
    """

    source = "refcoco"

    def __init__(
        self,
        folder: str,
        split: str = "val",
        pixels: bool = True,
        least_size: tuple[int, int] | None = None,
    ):
        self.folder, self.split = str(folder), split
        self.pixels, self.least_size = pixels, least_size

    def __str__(self) -> str:
        return f"{self.folder} ({self.split})"

    def shards(self) -> list[str]:
        return find_shards(self.folder, f"{self.split}-*.parquet")

    def records(self) -> Iterator[tuple[str, Record]]:
        for shard in self.shards():
            for group, count in enumerate(count_rows(shard)):
                names = read_group(shard, group, ("question_id",)).column(0).to_pylist()
                for row in range(count):
                    yield str(names[row]), {"shard": shard, "group": group, "row": row}

    def records_of_shard(self, shard: str) -> Iterator[tuple[str, Record]]:
        for row in iterate_rows(shard, COLUMNS):
            yield str(row["question_id"]), row

    def read(self, record: Record) -> ImageSample:
        row = record
        if "group" in record:
            table = read_group(record["shard"], record["group"], COLUMNS)
            row = table.slice(record["row"], 1).to_pylist()[0]
        picture = row["image"]["bytes"]
        size = image_size(picture)
        x, y, width, height = row["bbox"]
        instance = Instance(
            box_xyxy=(x, y, x + width, y + height),
            rle=to_rle([list(row["segmentation"])], size) if row["segmentation"] else None,
            is_crowd=bool(row["iscrowd"]),
        )
        queries = [
            Query(expression, [instance], is_exhaustive=False, source_id=str(row["question_id"]))
            for expression in row["answer"]
        ]
        return ImageSample(
            source=self.source,
            source_id=str(row["question_id"]),
            file_name=row["file_name"],
            size=size,
            queries=queries,
            image=read_image(picture, size, self.least_size) if self.pixels else None,
        )


def write_refcoco(
    rows: Iterable[dict[str, Any]], folder: str | Path, split: str = "val", per_shard: int = 1000
) -> None:
    """Write rows in RefCOCO's form; polygons cannot be had from a sample, so these are rows.

    Args:
        rows: With the columns named above; `image` is `{"bytes": ..., "path": ...}`.
        folder: To write to.
        split: Its name.
        per_shard: Rows in each file.
    """
    write_shards(rows, folder, split, per_shard)
