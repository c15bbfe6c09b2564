"""SA-Co VEval: videos with noun phrases and all masklets of each.

    annotation/saco_veval_sav_val.json    saco_sav/JPEGImages_24fps/{video}/00000.jpg

Which phrases are asked of which video is said by `video_np_pairs`; those without masklets are
negatives.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .clips import ClipReader, Cut, seen_masks
from .files import join, read_json, write_image, write_json
from .loading import Record
from .masks_rle import rle_area, rle_box
from .samples import ClipQuery, ClipSample, Masklet


class SacoVideos(ClipReader):
    """Videos of one file of SA-Co VEval.

    A query's `source_id` is the number of its pair, and `details["category_id"]` that of its
    phrase, by which predictions are scored.

    Args:
        annotations: The JSON file.
        frames: Folder that `file_names` start from.
        cut, pixels: As for `ClipReader`.
    """

    source = "saco_video"

    def __init__(self, annotations: str, frames: str, cut: Cut | None = None, pixels: bool = True):
        super().__init__(cut, pixels)
        self.annotations, self.frames = str(annotations), str(frames)

    def __str__(self) -> str:
        return self.annotations

    def records(self) -> Iterator[tuple[str, Record]]:
        content = read_json(self.annotations)
        masklets, pairs = defaultdict(list), defaultdict(list)
        for annotation in content["annotations"]:
            masklets[annotation["video_id"]].append(annotation)
        for pair in content["video_np_pairs"]:
            pairs[pair["video_id"]].append(pair)
        for video in content["videos"]:
            number = video["id"]
            record = {"video": video, "annotations": masklets[number], "pairs": pairs[number]}
            yield str(number), record

    def read(self, record: Record) -> ClipSample:
        video = record["video"]
        size = (int(video["height"]), int(video["width"]))
        length = len(video["file_names"])
        if length != video["length"]:
            raise ValueError(f"{length} file names do not fit a length of {video['length']}.")
        frames = list(range(length))
        chosen = self.choose_frames(str(video["id"]), length, frames)
        of_category = defaultdict(list)
        for annotation in record["annotations"]:
            masklet = read_masklet(annotation, size, frames if chosen is None else chosen)
            of_category[annotation["category_id"]].append(masklet)
        queries = []
        for pair in record["pairs"]:
            found = of_category.get(pair["category_id"], [])
            if pair["num_masklets"] != len(found):
                raise ValueError(
                    f"Pair {pair['id']} has {len(found)} masklets and should have "
                    f"{pair['num_masklets']}."
                )
            details = {"category_id": pair["category_id"]}
            queries.append(
                ClipQuery(pair["noun_phrase"], found, source_id=pair["id"], details=details)
            )
        sample = ClipSample(
            source=self.source,
            source_id=video["id"],
            size=size,
            num_frames=length,
            annotated_frames=frames,
            queries=queries,
            frame_indices=chosen,
            frame_names=[Path(name).stem for name in video["file_names"]],
        )
        return self.add_frames(sample, [join(self.frames, name) for name in video["file_names"]])


def read_masklet(annotation: dict[str, Any], size: tuple[int, int], frames: list[int]) -> Masklet:
    """A masklet in the frames that are wanted and where it is seen."""
    rles = seen_masks(((frame, annotation["segmentations"][frame]) for frame in frames), size)
    details = {"iscrowd": annotation["iscrowd"]} if annotation.get("iscrowd") else {}
    return Masklet(rles, annotation["id"], details)


def write_saco_videos(
    clips: Iterable[ClipSample], annotations: str | Path, frames: str | Path
) -> None:
    """Write clips, annotated in every frame, in the form of SA-Co VEval.

    Videos, pairs and masklets are numbered from 1 on.

    Args:
        clips: With video, and a phrase in each query.
        annotations: The JSON file.
        frames: Folder for the frames.
    """
    videos, written, pairs = [], [], []
    categories: dict[str, int] = {}
    for number, clip in enumerate(clips, start=1):
        height, width = clip.size
        name = str(clip.source_id)
        file_names = [f"{name}/{frame:05d}.jpg" for frame in range(clip.num_frames)]
        for frame in clip.video or ():
            write_image(Path(frames, file_names[frame.index]), frame.pixels)
        shared = {"height": height, "width": width}
        video = {"id": number, "video_name": name, "file_names": file_names}
        videos.append({**video, **shared, "length": clip.num_frames})
        for query in clip.queries:
            if query.phrase is None:
                raise ValueError(f"Clip {name} has a query without phrase, which SA-Co has not.")
            category = categories.setdefault(query.phrase, len(categories) + 1)
            named = {"video_id": number, "category_id": category, "noun_phrase": query.phrase}
            masklets = query.masklets or []
            pairs.append({"id": len(pairs) + 1, **named, "num_masklets": len(masklets)})
            for masklet in masklets:
                rles = [masklet.rles.get(frame) for frame in range(clip.num_frames)]
                annotation = {
                    "id": len(written) + 1,
                    "segmentations": rles,
                    "bboxes": [None if rle is None else box_of(rle) for rle in rles],
                    "areas": [None if rle is None else rle_area(rle) for rle in rles],
                    "iscrowd": masklet.details.get("iscrowd", 0),
                }
                written.append({**annotation, **named, **shared})
    content = {
        "info": {},
        "videos": videos,
        "annotations": written,
        "categories": [{"id": category, "name": name} for name, category in categories.items()],
        "video_np_pairs": pairs,
    }
    write_json(annotations, content)


def box_of(rle: Any) -> list[float]:
    """The box of a mask as (x, y, width, height)."""
    x1, y1, x2, y2 = rle_box(rle)
    return [x1, y1, x2 - x1, y2 - y1]
