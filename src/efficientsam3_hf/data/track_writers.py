"""Tracks written while they come: COCO RLE as JSON, DAVIS folders of PNG, or a video to look at.

    with RleWriter("tracks.json") as writer:
        for result in model.stream(frames, text=["a red car"]):
            writer.write(result)

A result has `frame_index`, and `object_ids`, `labels`, `scores`, `boxes` and `masks` with one entry
for each object in the frame.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..visualize import draw_instances, to_array
from .masks_rle import import_mask_api, to_rle
from .video import import_av

DAVIS_IDS = 255  # objects that fit into a PNG of 8 bits


class FrameOfTracks(Protocol):
    """What a writer needs to know of a frame."""

    frame_index: int
    object_ids: list[int]
    labels: list[str]
    scores: Any  # (objects,)
    boxes: Any  # (objects, 4) as (x1, y1, x2, y2)
    masks: Any  # (objects, height, width)


class TrackWriter:
    """What writers have in common: they are closed by leaving their `with` block."""

    def write(self, result: FrameOfTracks, image: Any = None) -> None:
        """Add one frame.

        Args:
            result: Its objects.
            image: Its picture, for the writers that draw.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Finish the file."""

    def __enter__(self) -> "TrackWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class RleWriter(TrackWriter):
    """One JSON record for each object of each frame, its mask as compressed COCO RLE.

    A path that ends in `.jsonl` gets a record a line, of which a process that dies loses none; any
    other gets one list.

    Args:
        path: File to write.
        video: Name of the video, put into every record; None leaves it out.
    """

    def __init__(self, path: str | Path, video: str | None = None):
        import_mask_api()  # an error now is better than one after the first frame
        self.video = video
        self.is_list = Path(path).suffix != ".jsonl"
        self.is_first = True
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115  closed by `close`
        if self.is_list:
            self.file.write("[")

    def write(self, result: FrameOfTracks, image: Any = None) -> None:
        masks, boxes, scores = (
            to_array(result.masks),
            to_array(result.boxes),
            to_array(result.scores),
        )
        for row, object_id in enumerate(result.object_ids):
            x1, y1, x2, y2 = (float(side) for side in boxes[row])
            record = {
                "frame_index": result.frame_index,
                "object_id": int(object_id),
                "label": result.labels[row],
                "score": round(float(scores[row]), 6),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "segmentation": to_rle(masks[row], masks[row].shape),
            }
            if self.video is not None:
                record = {"video": self.video, **record}
            if self.is_list and not self.is_first:
                self.file.write(",")
            self.file.write("\n" if self.is_list else "")
            self.file.write(json.dumps(record, ensure_ascii=False))
            self.file.write("" if self.is_list else "\n")
            self.is_first = False
        self.file.flush()

    def close(self) -> None:
        if not self.file.closed:
            self.file.write("\n]\n" if self.is_list else "")
            self.file.close()


class DavisWriter(TrackWriter):
    """A PNG for each frame, whose pixels are the numbers of objects, 0 for none.

    Objects are numbered from 1 in the order in which they come, as `numbers` tells. Where two
    overlap, the pixel goes to the one with the higher score.

    Args:
        folder: Where to write `00000.png`, `00001.png`, ...
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.numbers: dict[int, int] = {}

    def write(self, result: FrameOfTracks, image: Any = None) -> None:
        masks, scores = to_array(result.masks).astype(bool), to_array(result.scores)
        height, width = masks.shape[1:]
        labels = np.zeros((height, width), dtype=np.uint8)
        for object_id in result.object_ids:
            self.numbers.setdefault(int(object_id), len(self.numbers) + 1)
        if len(self.numbers) > DAVIS_IDS:
            raise ValueError(
                f"A PNG in DAVIS layout holds {DAVIS_IDS} objects, and this video has more: write "
                "COCO RLE instead."
            )
        for row in np.argsort(scores, kind="stable"):
            labels[masks[row]] = self.numbers[int(result.object_ids[row])]
        picture = Image.frombytes("P", (width, height), labels.tobytes())
        picture.putpalette(davis_palette())
        picture.save(self.folder / f"{result.frame_index:05d}.png")


class OverlayWriter(TrackWriter):
    """A video (`.mp4`, `.mkv`, ...) or `.gif` with the objects drawn on their frames.

    A GIF is kept in memory until it is closed; a video is not.

    Args:
        path: File to write.
        fps: Frames a second.
    """

    def __init__(self, path: str | Path, fps: float = 24.0):
        self.path, self.fps = Path(path), fps
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.pictures: list[Image.Image] = []  # of a GIF, which is written at the end
        self.container = self.stream = None
        self.is_gif = self.path.suffix.lower() == ".gif"
        if not self.is_gif:
            self.av = import_av()

    def write(self, result: FrameOfTracks, image: Any = None) -> None:
        if image is None:
            raise ValueError("An overlay needs the picture: writer.write(result, image).")
        captions = [
            f"{object_id} {label}".strip()
            for object_id, label in zip(result.object_ids, result.labels, strict=True)
        ]
        drawn = draw_instances(
            image, result.masks, result.boxes, captions, numbers=list(result.object_ids)
        )
        if self.is_gif:
            self.pictures.append(drawn.quantize(128))
            return
        if self.container is None:
            self.open(drawn.size)
        frame = self.av.VideoFrame.from_image(drawn)
        self.container.mux(self.stream.encode(frame))

    def open(self, size: tuple[int, int]) -> None:
        """Begin the file, when the size of the frames is known."""
        self.container = self.av.open(str(self.path), "w")
        codec = "libx264" if "libx264" in self.av.codecs_available else "mpeg4"
        self.stream = self.container.add_stream(codec, rate=round(self.fps))
        self.stream.width, self.stream.height = (side + side % 2 for side in size)
        self.stream.pix_fmt = "yuv420p"

    def close(self) -> None:
        if self.pictures:
            first, *others = self.pictures
            duration = round(1000 / self.fps)
            first.save(self.path, save_all=True, append_images=others, duration=duration, loop=0)
            self.pictures = []
        if self.container is not None:
            self.container.mux(self.stream.encode())
            self.container.close()
            self.container = None


def open_writers(
    stack: ExitStack,
    name: str,
    fps: float,
    overlay: Path | None = None,
    rle: Path | None = None,
    davis: Path | None = None,
) -> list[TrackWriter]:
    """A writer for each path that is given.

    Args:
        stack: Closes them.
        name: Of the video, for the records.
        fps: Of the overlay.
        overlay: Video or GIF to look at.
        rle: `.json` or `.jsonl`.
        davis: Folder of PNGs.
    """
    writers: list[TrackWriter] = []
    if overlay:
        writers.append(OverlayWriter(overlay, fps))
    if rle:
        writers.append(RleWriter(rle, name))
    if davis:
        writers.append(DavisWriter(davis))
    return [stack.enter_context(writer) for writer in writers]


def davis_palette() -> list[int]:
    """The palette of DAVIS and PASCAL VOC: the bits of a number, dealt out to red, green, blue."""
    palette = []
    for number in range(256):
        channels = [0, 0, 0]
        for position in range(8):
            for channel in range(3):
                channels[channel] |= (number >> (3 * position + channel) & 1) << (7 - position)
        palette += channels
    return palette
